"""What the Core ML writer leaves on disk: packages with the contract's tensors that compute what the reference does."""
import copy
import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from caphuman_edge.export.coreml_graphs import LENGTHS, PooledHintEncoder, balanced_cut, coreml_graphs, fixed
from caphuman_edge.export.coreml_metadata import GRAPHS, describe
from caphuman_edge.export.coreml_writer import MAC, PHONE, CoremlOptions, chunk_paths, packages, write_coreml
from caphuman_edge.export.graphs import SplitUNet, example_inputs
from caphuman_edge.export.palette import palettise
from caphuman_edge.ref.caphuman import CapHuman, face_gates
from caphuman_edge.ref.clip import TextEncoder
from caphuman_edge.ref.unet import UNet
from caphuman_edge.runtime.contract import FULL, NANO, GraphSpec, TensorSpec, TextConfig, graphs
from caphuman_edge.runtime.errors import BadInput, BundleError, ShapeMismatch
from caphuman_edge.runtime.selftest import psnr_db

ct = pytest.importorskip("coremltools")
check = pytest.importorskip("caphuman_edge.export.coreml_check")

MULTI_ARRAY = {"float32": 65568, "int64": 131104}  # in Core ML ids are int32


@pytest.fixture(scope="module")
def written(micro, tmp_path_factory):
    """`written("unet", PHONE)`: the place of a graph of the micro model, written once for this module."""
    places = {}

    def write(name, options):
        if (name, options) not in places:
            path = tmp_path_factory.mktemp("coreml") / f"{name}.mlpackage"
            places[name, options] = path, write_coreml(micro.modules[name], micro.specs[name], path, options)
        return places[name, options]

    return write


@pytest.fixture(scope="module")
def wide_text():
    """A text encoder whose layers are wide enough to be palettised, and its spec."""
    config = dataclasses.replace(NANO, text=TextConfig(width=64, layers=1, heads=2))
    torch.manual_seed(1)
    return TextEncoder(config.text).eval().requires_grad_(False), graphs(config)["text_encoder"]


def description(package):
    return ct.models.utils.load_spec(str(package)).description


def operations(package):
    (main,) = ct.models.utils.load_spec(str(package)).mlProgram.functions.values()
    (block,) = main.block_specializations.values()
    return block.operations


def tensors(features):
    return [(feature.name, tuple(feature.type.multiArrayType.shape), feature.type.multiArrayType.dataType)
            for feature in features]


def as_coreml(specs):
    return [(spec.name, tuple(LENGTHS.get(n, n) for n in spec.shape), MULTI_ARRAY[spec.dtype]) for spec in specs]


@pytest.mark.parametrize("name", ["text_encoder", "hint_encoder", "preview_decoder"])
def test_tensors_are_those_of_the_contract(micro, written, name):
    path, _ = written(name, MAC)
    found = description(path)
    assert tensors(found.input) == as_coreml(micro.specs[name].inputs)
    assert tensors(found.output) == as_coreml(micro.specs[name].outputs)


@pytest.mark.parametrize("name, options, precision, most", [
    ("preview_decoder", CoremlOptions(precision="f32"), "f32", 200.1),
    ("preview_decoder", MAC, "f16", 100),
    ("text_encoder", MAC, "f16", 100),
    ("image_encoder", dataclasses.replace(PHONE, palettise_bits=None), "f16", 100),
    ("hint_encoder", MAC, "f32", 200.1),
    ("control_encoder", MAC, "f16", 100),
    pytest.param("controlnet", MAC, "f16", 100, marks=pytest.mark.slow),
])
def test_package_computes_what_the_reference_does(micro, written, name, options, precision, most):
    """`most`: so near can no package come that stores or computes as coarsely as it says."""
    path, stored = written(name, options)
    assert stored == precision
    figures = check.check_coreml(path, micro.specs[name], micro.modules[name], check.FLOORS_DB[stored])
    assert figures.keys() == {tensor.name for tensor in micro.specs[name].outputs}
    assert min(figures.values()) < most


def test_means_and_log_variances_of_the_vae_encoder_are_checked_apart(micro, written):
    path, stored = written("vae_encoder", MAC)
    figures = check.check_coreml(path, micro.specs["vae_encoder"], micro.modules["vae_encoder"], 50)
    assert stored == "f16" and figures.keys() == {"latent_mean", "latent_log_variance"}
    assert max(figures.values()) < 100


def test_features_whose_squares_no_half_holds_are_decoded(micro, tmp_path):
    """Those of trained autoencoders; a norm's square of 256 is infinite in halves."""
    loud, spec = copy.deepcopy(micro.modules["vae_decoder"]), micro.specs["vae_decoder"]
    for parameter in loud.autoencoder.decoder.conv_in.parameters():
        parameter.mul_(1000)
    write_coreml(loud, spec, tmp_path / "loud.mlpackage", MAC)
    assert check.check_coreml(tmp_path / "loud.mlpackage", spec, loud, 50)["sample"] < 100


@pytest.mark.parametrize("name", sorted(GRAPHS.keys() - {"unet_chunk1", "unet_chunk2"}))
def test_every_tensor_of_the_contract_is_described(name):
    spec, description = fixed(graphs(FULL)[name]), ct.proto.Model_pb2.ModelDescription()
    for features, specs in ((description.input, spec.inputs), (description.output, spec.outputs)):
        for tensor in specs:
            features.add().name = tensor.name
    describe(description, spec, "none", "f16", (1, 1))
    assert description.metadata.shortDescription == GRAPHS[name]
    assert all(feature.shortDescription for feature in (*description.input, *description.output))


@pytest.mark.parametrize("bits, least, most", [(8, 45, 65), (4, 20, 40)])
def test_palettised_package_is_as_coarse_as_its_bits(wide_text, tmp_path, bits, least, most):
    module, spec = wide_text
    options = dataclasses.replace(PHONE, palettise_bits=bits)
    stored = write_coreml(module, spec, tmp_path / "text.mlpackage", options)
    figures = check.check_coreml(tmp_path / "text.mlpackage", spec, module, check.FLOORS_DB[stored])
    assert stored == f"palettised-{bits}" and least < figures["last_hidden_state"] < most


@pytest.mark.slow
def test_chunked_phone_unet_computes_what_the_reference_does(micro, written):
    path, stored = written("unet", PHONE)
    assert not path.exists() and packages(path) == chunk_paths(path)
    figures = check.check_coreml(path, micro.specs["unet"], micro.modules["unet"], 60)  # few of its weights are many
    assert stored == "palettised-6" and figures["eps"] < 100


@pytest.mark.slow
def test_chunks_say_their_order_and_pass_their_state_by_name(micro, written):
    first, second = (description(package) for package in chunk_paths(written("unet", PHONE)[0]))
    assert [dict(one.metadata.userDefined)["caphuman.chunk"] for one in (first, second)] == ["1/2", "2/2"]
    assert {dict(one.metadata.userDefined)["caphuman.graph"] for one in (first, second)} == {"unet"}
    assert tensors(first.input) == as_coreml(micro.specs["unet"].inputs)
    assert tensors(second.output) == as_coreml(micro.specs["unet"].outputs)
    known = tensors(first.input) + tensors(first.output)
    assert set(tensors(second.input)) <= set(known)
    assert {feature.name for feature in first.output} <= {feature.name for feature in second.input}


@pytest.mark.slow
def test_angles_of_the_time_features_stay_in_single_precision(written):
    """A half has a step of 0.5 radians at 999."""
    single = 11  # FLOAT32 in MIL.proto
    angles = [op for op in operations(chunk_paths(written("unet", PHONE)[0])[0]) if op.type in ("sin", "cos")]
    assert len(angles) == 2
    assert {op.outputs[0].type.tensorType.dataType for op in angles} == {single}


@pytest.mark.slow
def test_split_einsum_reaches_the_package(written):
    first, second = (Counter(op.type for op in operations(package)) for package in
                     chunk_paths(written("unet", PHONE)[0]))
    assert first["einsum"] and second["einsum"]
    assert not first["matmul"] and not second["matmul"]


@pytest.mark.parametrize("prediction", ["v", "eps"])
@pytest.mark.parametrize("attention", ["original", "split_einsum"])
def test_halves_of_the_unet_in_sequence_equal_the_whole(micro, prediction, attention):
    config = dataclasses.replace(micro.config, unet=dataclasses.replace(micro.config.unet, prediction=prediction))
    model = CapHuman(config, pose_net=True).eval().requires_grad_(False)
    model.load_state_dict(micro.model.state_dict())
    module, spec = SplitUNet(model), graphs(config)["unet"]
    known = example_inputs(spec.inputs, seed=3, batch=1)
    wanted = module(*known.values())
    for half, half_spec in coreml_graphs(module, spec, attention, chunks=2):
        given = [known[tensor.name] for tensor in half_spec.inputs]
        assert [tuple(tensor.shape) for tensor in given] == [tensor.shape for tensor in half_spec.inputs]
        answer = half(*given)
        listed = answer if isinstance(answer, tuple) else (answer,)
        known |= {tensor.name: value for tensor, value in zip(half_spec.outputs, listed, strict=True)}
    assert psnr_db(known["eps"].numpy(), wanted.numpy()) > 100


def test_halves_share_no_weights_and_are_about_as_large(micro):
    halves = [half for half, _ in coreml_graphs(micro.modules["unet"], micro.specs["unet"], "original", 2)]
    first, second = ({p.data_ptr(): p.numel() for p in half.parameters()} for half in halves)
    assert not first.keys() & second.keys()
    whole = sum(p.numel() for p in micro.model.unet.parameters())
    assert sum(first.values()) + sum(second.values()) == whole
    assert 0.4 < sum(first.values()) / whole < 0.6


def test_full_size_halves_are_about_as_large():
    """447 and 412 million weights."""
    with torch.device("meta"):
        unet = UNet(FULL.unet)
    cut = balanced_cut(unet)
    second = sum(p.numel() for block in unet.output_blocks[cut:] for p in block.parameters())
    assert 0.45 < second / sum(p.numel() for p in unet.parameters()) < 0.5


def test_pooled_gates_are_those_of_the_bilinear_resize(micro):
    mask = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    pooled = PooledHintEncoder(micro.modules["hint_encoder"])
    assert all(torch.equal(one, other) for one, other in zip(pooled.gates(mask), face_gates(mask, 4), strict=True))
    with pytest.raises(AssertionError, match="multiple"):
        pooled.gates(mask[..., :60])


def test_colours_are_the_best_for_a_normal_distribution():
    """Signal to noise of Lloyd's and Max's quantiser: 20.22 dB at 16 levels, 31.89 at 64 (Max 1960; Jain 1989)."""
    weight = np.random.default_rng(0).standard_normal((1000, 1000)).astype(np.float32)
    for bits, decibels in ((4, 20.22), (6, 31.89)):
        colours, indices = palettise(weight, bits)
        assert len(colours) == 1 << bits and (np.diff(colours) > 0).all()
        noise = colours[indices].reshape(weight.shape) - weight
        assert -10 * np.log10(np.mean(noise**2)) == pytest.approx(decibels, abs=0.05)


def test_small_tensors_are_palettised_as_well_as_large_ones():
    weight = np.random.default_rng(1).laplace(size=4096).astype(np.float16)
    colours, indices = palettise(weight, 8)
    assert np.var(weight.astype(float)) / np.mean((colours[indices].astype(float) - weight) ** 2) > 10**4


def test_few_values_are_palettised_without_loss():
    weight = np.array([[0, -np.inf, 0], [1, 0.5, -np.inf]], np.float16)  # an attention mask has infinities
    colours, indices = palettise(weight, 4)
    assert len(colours) == 16 and np.array_equal(colours[indices].reshape(weight.shape), weight)


def test_palettised_package_is_as_small_as_its_bits(wide_text, tmp_path):
    module, spec = wide_text
    write_coreml(module, spec, tmp_path / "text.mlpackage", PHONE)
    (weights,) = tmp_path.rglob("weight.bin")
    bits = 8 * weights.stat().st_size / sum(p.numel() for p in module.parameters())
    assert 6 < bits < 6.1  # the small tensors as they are


def test_package_says_what_it_is(written):
    licensed = description(written("preview_decoder", dataclasses.replace(MAC, licence="CC-BY-NC-4.0, tests"))[0])
    assert licensed.metadata.license == "CC-BY-NC-4.0, tests"
    found = description(written("hint_encoder", MAC)[0])
    assert found.metadata.author and found.metadata.versionString and found.metadata.shortDescription
    assert dict(found.metadata.userDefined)["caphuman.precision"] == "f32"
    assert all(feature.shortDescription for feature in (*found.input, *found.output))
    assert "-1 to 1" in next(feature for feature in found.input if feature.name == "maps").shortDescription


def test_writing_replaces_chunks_and_leaves_no_scratch(micro, tmp_path):
    path = tmp_path / "preview_decoder.mlpackage"
    for stale in chunk_paths(path):
        stale.mkdir()
    for _ in range(2):
        write_coreml(micro.modules["preview_decoder"], micro.specs["preview_decoder"], path, MAC)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_failed_writing_leaves_the_former_package(micro, tmp_path):
    path = tmp_path / "preview_decoder.mlpackage"
    (path / "mark").mkdir(parents=True)
    three_channels = GraphSpec("preview_decoder", (TensorSpec("latent_sample", (1, 3, 8, 8)),), ())
    with pytest.raises(RuntimeError, match="channels"):
        write_coreml(micro.modules["preview_decoder"], three_channels, path, MAC)
    assert [file.name for file in tmp_path.iterdir()] == [path.name] and (path / "mark").exists()


def test_hint_encoder_is_single_precision_whatever_is_asked(micro, tmp_path):
    path = tmp_path / "hint_encoder.mlpackage"
    assert write_coreml(micro.modules["hint_encoder"], micro.specs["hint_encoder"], path, PHONE) == "f32"
    halves = 10  # FLOAT16 in MIL.proto
    assert not any(output.type.tensorType.dataType == halves for op in operations(path) for output in op.outputs)


def test_a_graph_that_cannot_be_converted_is_named(tmp_path):
    class Factorised(torch.nn.Module):
        def forward(self, latent_sample):
            return torch.linalg.qr(latent_sample)[0]

    spec = GraphSpec("preview_decoder", (TensorSpec("latent_sample", (1, 4, 8, 8)),),
                     (TensorSpec("sample", (1, 4, 8, 8)),))
    with pytest.raises(BundleError, match=r"preview_decoder cannot be converted to Core ML \(.*qr.*\); report"):
        write_coreml(Factorised(), spec, tmp_path / "model.mlpackage", MAC)
    assert not list(tmp_path.iterdir())


def test_a_package_that_computes_something_else_is_named(micro, written):
    other = torch.nn.Module()
    other.forward = lambda latent_sample: 1.1 * micro.modules["preview_decoder"](latent_sample)
    with pytest.raises(BundleError, match=r"preview_decoder\.mlpackage: sample differs .*PSNR \d+\.\d dB"):
        check.check_coreml(written("preview_decoder", MAC)[0], micro.specs["preview_decoder"], other, 35)


@pytest.mark.slow
def test_a_missing_chunk_is_named(micro, written, tmp_path):
    present, absent = (tmp_path / package.name for package in chunk_paths(written("unet", PHONE)[0]))
    present.symlink_to(chunk_paths(written("unet", PHONE)[0])[0])
    with pytest.raises(BundleError, match="lacks a chunk, found .'unet_chunk1.mlpackage'."):
        check.check_coreml(tmp_path / "unet.mlpackage", micro.specs["unet"], micro.modules["unet"], 60)
    assert not absent.exists()


def test_a_package_of_another_graph_is_refused(micro, written):
    path, _ = written("preview_decoder", MAC)
    with pytest.raises(ShapeMismatch, match=r"sample is \(1, 3, 8, 8\), expected \(1, 3, 64, 64\)"):
        check.check_coreml(path, micro.specs["vae_decoder"], micro.modules["vae_decoder"], 35)


def test_the_page_for_app_developers_states_the_contract():
    page = (Path(__file__).parents[2] / "docs" / "apple.md").read_text()
    specs = graphs(FULL)
    for name in ("text_encoder", "image_encoder", "hint_encoder", "capface", "unet", "control_encoder", "controlnet",
                 "vae_encoder", "vae_decoder", "tiny_decoder", "preview_decoder"):
        for tensor in (*fixed(specs[name]).inputs, *fixed(specs[name]).outputs):
            family = tensor.name.split("_")[0]
            if family not in ("residual", "gate"):
                shape = ", ".join(map(str, tensor.shape))
                assert f"`{tensor.name}`" in page and f"({shape})" in page, f"{name}: {tensor}"


@pytest.mark.parametrize("change, message", [
    ({"precision": "bf16"}, "precision is 'bf16', expected one of f16, f32"),
    ({"attention": "flash"}, "attention is 'flash'"), ({"palettise_bits": 5}, "palettise_bits is 5, .* 4, 6, 8"),
    ({"chunks": 3}, "chunks is 3, expected one of 1, 2")])
def test_options_that_there_are_not(change, message):
    with pytest.raises(BadInput, match=message):
        CoremlOptions(**change)


def test_graphs_of_any_size_and_foreign_suffixes_are_refused(micro, tmp_path):
    with pytest.raises(BadInput, match="parser takes any height, .* keep this graph in ONNX"):
        fixed(graphs(NANO)["parser"])
    with pytest.raises(BadInput, match=r"model\.onnx ends in \.onnx, expected \.mlpackage"):
        write_coreml(micro.modules["preview_decoder"], micro.specs["preview_decoder"], tmp_path / "model.onnx", MAC)
