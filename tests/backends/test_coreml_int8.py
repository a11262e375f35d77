"""Core ML packages become int8 or get palettes without their checkpoint, as the MIL evaluator tells."""
import sys
from collections import Counter

import numpy as np
import pytest
from torch import nn

from caphuman_edge.export.coreml_writer import MAC, write_coreml
from caphuman_edge.quant.recipe import palette_bits
from caphuman_edge.quant.rewrite import Grid, LayerGrids
from caphuman_edge.runtime.errors import BundleError
from caphuman_edge.runtime.selftest import psnr_db

ct = pytest.importorskip("coremltools")
coreml_int8 = pytest.importorskip("caphuman_edge.quant.coreml_int8")
check = pytest.importorskip("caphuman_edge.export.coreml_check")
GRAPH, FLOAT = "capface", "control.time_embed.0.weight"
KINDS = ("weights", "int8", "palette-8", "palette-4")


@pytest.fixture(scope="module")
def package(micro, tmp_path_factory):
    path = tmp_path_factory.mktemp("coreml") / f"{GRAPH}.mlpackage"
    write_coreml(micro.modules[GRAPH], micro.specs[GRAPH], path, MAC)
    return path


@pytest.fixture(scope="module")
def names(micro):
    """The parameters of convolutions and linear layers, more than the graph has."""
    return [f"{name}.weight" for name, module in micro.modules[GRAPH].named_modules()
            if isinstance(module, (nn.Conv2d, nn.Linear))]


@pytest.fixture(scope="module")
def rewritten(package, names, tmp_path_factory):
    """`rewritten("int8")`: where the package lies of which every layer but FLOAT is treated so, and the counts."""
    made = {}

    def make(kind):
        if kind not in made:
            target = tmp_path_factory.mktemp("int8") / package.name
            grids = {name: LayerGrids(Grid(0.04, 0)) for name in names}
            made[kind] = target, coreml_int8.rewrite_package(
                package, target, names, lambda name: "float" if name == FLOAT else kind, grids, kind)
        return made[kind]

    return make


@pytest.fixture(scope="module")
def answers(package, rewritten):
    """What the float package and the others make of one call."""
    rng, graph = np.random.default_rng(0), check.evaluated(package)
    inputs = {spec.name: np.full(spec.shape, 500, spec.dtype) if spec.name == "timestep" else
              rng.normal(size=spec.shape).astype(spec.dtype) for spec in graph.inputs}
    return {kind: check.evaluated(rewritten(kind)[0] if kind else package)(inputs) for kind in (None, *KINDS)}


def operations(package):
    (main,) = ct.models.utils.load_spec(str(package)).mlProgram.functions.values()
    (block,) = main.block_specializations.values()
    return Counter(op.type for op in block.operations)


def size(package):
    return sum(file.stat().st_size for file in package.rglob("*.bin"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_is_treated_as_told(package, rewritten, kind):
    made, counts = rewritten(kind)
    before, found = operations(package), operations(made)
    layers = before["conv"] + before["linear"]
    assert counts == {kind: layers - 1, "float": 1}
    constant = "constexpr_lut_to_dense" if palette_bits(kind) else "constexpr_affine_dequantize"
    assert found[constant] == layers - 1
    assert (found["quantize"] > 10 and found["quantize"] == found["dequantize"]) == (kind == "int8")
    metadata = ct.models.utils.load_spec(str(made)).description.metadata.userDefined
    assert metadata["caphuman.precision"] == kind and metadata["caphuman.graph"] == GRAPH


@pytest.mark.parametrize("kind, least", [("weights", 35.0), ("int8", 20.0), ("palette-8", 35.0), ("palette-4", 12.0)])
def test_it_still_computes_the_graph(answers, kind, least):
    found = [psnr_db(answers[kind][name], wanted) for name, wanted in answers[None].items()]
    assert least < min(found) < 90


def test_activations_cost_more_than_weights_alone_and_fewer_bits_more(answers):
    def worst(kind):
        return min(psnr_db(answers[kind][name], wanted) for name, wanted in answers[None].items())

    assert worst("int8") < worst("weights") and worst("palette-4") < worst("palette-8")


def test_sizes_are_those_of_the_bits(package, rewritten):
    shares = [size(rewritten(kind)[0]) / size(package) for kind in ("weights", "palette-4")]
    assert shares[1] < shares[0] < 0.8  # the micro model's biases, norms and tables weigh much


def test_a_coarse_grid_is_a_coarse_answer(package, names, rewritten, answers, tmp_path):
    """The grids are what activations are rounded to."""
    grids = {name: LayerGrids(Grid(1.0, 0)) for name in names}
    coreml_int8.rewrite_package(package, tmp_path / "coarse.mlpackage", names, lambda name: "int8", grids)
    graph = check.evaluated(tmp_path / "coarse.mlpackage")
    rng = np.random.default_rng(0)
    inputs = {spec.name: np.full(spec.shape, 500, spec.dtype) if spec.name == "timestep" else
              rng.normal(size=spec.shape).astype(spec.dtype) for spec in graph.inputs}
    coarse = graph(inputs)
    assert all(psnr_db(coarse[name], answers[None][name]) < psnr_db(answers["int8"][name], answers[None][name])
               for name in coarse)


def test_a_package_without_any_of_the_layers_is_refused(package, tmp_path):
    with pytest.raises(BundleError, match="none of the layers"):
        coreml_int8.rewrite_package(package, tmp_path / "other.mlpackage", ["unet.out.2.weight"], lambda _: "int8", {})


@pytest.mark.skipif(sys.platform == "darwin", reason="there Core ML would take part")
def test_chunks_are_found_in_their_order(tmp_path):
    for number in (2, 1):
        (tmp_path / f"model_chunk{number}.mlpackage").mkdir()
    assert [path.name for path in coreml_int8.packages_at(tmp_path)] == ["model_chunk1.mlpackage",
                                                                        "model_chunk2.mlpackage"]
    one = tmp_path / "model_chunk1.mlpackage"
    assert coreml_int8.packages_at(one) == [one]
