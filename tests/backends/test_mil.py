"""The MIL evaluator: whole graphs against the reference, and its arithmetic in halves and whole numbers."""
import dataclasses
import functools
import math

import numpy as np
import pytest
import torch

from caphuman_edge.export.graphs import example_inputs, modules
from caphuman_edge.export.mil import load_program
from caphuman_edge.ref.caphuman import CapHuman
from caphuman_edge.runtime.contract import (
    TensorSpec,
    graphs,
)
from caphuman_edge.runtime.errors import ShapeMismatch
from caphuman_edge.runtime.selftest import psnr_db

ct = pytest.importorskip("coremltools")
pytestmark = pytest.mark.usefixtures("quick_collections")
mb, types = ct.converters.mil.Builder, ct.converters.mil.mil.types

X = np.array([[0.5, -1.25, 3, 300]], np.float32)


@pytest.fixture(scope="module")
def exported(micro):
    """`exported(graph, prediction)`: its module, its contract and torch's export of it, at batch 1."""

    @functools.cache
    def export(name, prediction):
        config = dataclasses.replace(micro.config, unet=dataclasses.replace(micro.config.unet, prediction=prediction))
        model = CapHuman(config, pose_net=True).eval().requires_grad_(False)
        model.load_state_dict(micro.model.state_dict())
        module, spec = modules(model, micro.preview, micro.tiny)[name], graphs(config)[name]
        inputs = example_inputs(spec.inputs, seed=0, batch=1)
        return module, spec, torch.export.export(module, tuple(inputs.values())).run_decompositions({})

    return export


def converted(program, spec, precision, pipeline):
    """The graph as Core ML's converter makes it."""
    inputs = example_inputs(spec.inputs, seed=0, batch=1)
    return ct.convert(
        program, convert_to="mlprogram", minimum_deployment_target=ct.target.iOS17, skip_model_load=True,
        compute_precision=getattr(ct.precision, precision), pass_pipeline=pipeline,
        inputs=[ct.TensorType(tensor.name, inputs[tensor.name].shape,
                              np.int32 if tensor.dtype == "int64" else np.float32) for tensor in spec.inputs],
        outputs=[ct.TensorType(tensor.name, dtype=np.float32) for tensor in spec.outputs])


def few_passes(precision):
    """What is needed for unique names and for float16: all passes take half a minute for a thousand ops."""
    pipeline = ct.PassPipeline.EMPTY
    halves = ["common::add_fp16_cast", "common::cast_optimization", "common::dead_code_elimination"]
    for name in ["common::dedup_op_and_var_names", *(halves if precision == "FLOAT16" else [])]:
        pipeline.append_pass(name)
    return pipeline


SMALL = ("text_encoder", "image_encoder", "hint_encoder", "tiny_decoder", "preview_decoder")  # these take all passes
GRAPHS = [*((name, precision, "v") for name in SMALL for precision in ("FLOAT32", "FLOAT16")),
          *(pytest.param(*graph, marks=pytest.mark.slow) for graph in (
              ("vae_decoder", "FLOAT32", "v"), ("capface", "FLOAT32", "v"), ("unet", "FLOAT16", "v"),
              ("unet", "FLOAT32", "eps")))]


@pytest.mark.parametrize("name, precision, prediction", GRAPHS)
def test_graph_computes_what_the_reference_does(exported, tmp_path, name, precision, prediction):
    module, spec, program = exported(name, prediction)
    pipeline = ct.PassPipeline.DEFAULT if name in SMALL else few_passes(precision)
    converted(program, spec, precision, pipeline).save(str(tmp_path / "graph.mlpackage"))
    program = load_program(tmp_path / "graph.mlpackage")
    inputs = example_inputs(spec.inputs, seed=5, batch=1)
    wanted = module(*inputs.values())
    got = program({key: value.numpy() for key, value in inputs.items()})
    assert [tensor.name for tensor in program.inputs] == [tensor.name for tensor in spec.inputs]
    assert list(got) == [tensor.name for tensor in program.outputs] == [tensor.name for tensor in spec.outputs]
    decibels = {key: psnr_db(got[key], tensor.numpy()) for key, tensor in
                zip(got, wanted if isinstance(wanted, tuple) else (wanted,), strict=True)}
    assert min(decibels.values()) > (60 if precision == "FLOAT32" else 35), decibels
    if precision == "FLOAT16":
        assert min(decibels.values()) < 100  # it did compute in halves


def package(build, folder, shape=(1, 4), dtype="fp32", **options):
    """A package of one function, written by coremltools without any optimisation."""
    program = mb.program(input_specs=[mb.TensorSpec(shape=shape, dtype=getattr(types, dtype))],
                         opset_version=ct.target.iOS17)(build)
    model = ct.convert(program, convert_to="mlprogram", minimum_deployment_target=ct.target.iOS17,
                       compute_precision=ct.precision.FLOAT32, pass_pipeline=ct.PassPipeline.EMPTY,
                       skip_model_load=True, **options)
    model.save(str(folder / "model.mlpackage"))
    return folder / "model.mlpackage"


def test_halves_are_rounded_after_every_op(tmp_path):
    """2048.5 is no half, so adding and subtracting 2048 loses a half's fraction; 90000 is beyond the largest."""
    program = load_program(package(
        lambda x: mb.sub(x=mb.add(x=x, y=np.float16(2048)), y=np.float16(2048)), tmp_path, dtype="fp16"))
    np.testing.assert_array_equal(program({"x": X})[program.outputs[0].name], np.array([[0, -1, 4, 300]], np.float16))
    program = load_program(package(lambda x: mb.square(x=x), tmp_path, dtype="fp16"))
    assert program({"x": X})[program.outputs[0].name][0, 3] == math.inf


def test_halves_are_summed_in_single_precision(tmp_path):
    """A sum of halves kept in a half would stand still at 2048."""
    program = load_program(package(lambda x: mb.reduce_sum(x=x, axes=[1]), tmp_path, (1, 3000), "fp16"))
    assert program({"x": np.ones((1, 3000), np.float32)})[program.outputs[0].name] == 3000


def test_intermediate_values_are_freed_after_their_last_use(tmp_path, monkeypatch):
    def chain(x):
        for _ in range(6):
            x = mb.relu(x=x)
        return x

    program = load_program(package(chain, tmp_path))
    held = []
    run = program._run
    monkeypatch.setattr(program, "_run", lambda step, values: held.append(len(values)) or run(step, values))
    program({"x": X})
    assert held == [1] * 6


def test_what_is_evaluated_is_what_lies_on_disk(tmp_path):
    weight = np.arange(40, dtype=np.float32).reshape(10, 4)
    path = package(lambda x: mb.linear(x=x, weight=weight), tmp_path)
    program = load_program(path)
    np.testing.assert_allclose(program({"x": X})[program.outputs[0].name], X @ weight.T)
    file = path / "Data/com.apple.CoreML/weights/weight.bin"
    content = bytearray(file.read_bytes())
    at = content.index(weight.tobytes())
    content[at:at + weight.nbytes] = (2 * weight).tobytes()
    file.write_bytes(content)
    changed = load_program(path)
    np.testing.assert_allclose(changed({"x": X})[changed.outputs[0].name], 2 * X @ weight.T)


def test_lengths_that_a_package_leaves_open_take_any_value(tmp_path):
    path = package(lambda x: mb.reduce_sum(x=x, axes=[1]), tmp_path, (1, ct.converters.mil.mil.get_new_symbol()),
                   inputs=[ct.TensorType("x", (1, ct.RangeDim(1, 9)))])
    program = load_program(path)
    assert program.inputs == (TensorSpec("x", (1, "x_1")),)
    for length in (2, 7):
        assert program({"x": np.ones((1, length), np.float32)})[program.outputs[0].name] == length


def test_wide_integers_that_fit_are_taken(tmp_path):
    program = load_program(package(lambda x: mb.add(x=x, y=np.int32(1)), tmp_path, dtype="int32"))
    assert program.inputs == (TensorSpec("x", (1, 4), "int32"),)
    got = program({"x": np.array([[1, 2, 3, -4]], np.int64)})[program.outputs[0].name]
    np.testing.assert_array_equal(got, np.array([[2, 3, 4, -3]], np.int32))
    with pytest.raises(ShapeMismatch, match="x has values that int32 does not hold"):
        program({"x": np.array([[1, 2, 3, 2**40]], np.int64)})
    with pytest.raises(ShapeMismatch, match=r"x is float32 \[1, 4\], expected int32 \[1, 4\]"):
        program({"x": X})
