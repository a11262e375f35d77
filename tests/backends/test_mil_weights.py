"""Compressed weights of a package: the evaluator expands them as coremltools itself does."""
import importlib

import numpy as np
import pytest
import torch

from caphuman_edge.export.mil import load_program
from caphuman_edge.export.mil_weights import TYPES, BlobFile, Constant, TensorType

ct = pytest.importorskip("coremltools")
pytestmark = pytest.mark.usefixtures("quick_collections")
cto = importlib.import_module("coremltools.optimize.coreml")
storage = importlib.import_module("coremltools.libmilstoragepython")
mb, types = ct.converters.mil.Builder, ct.converters.mil.mil.types

RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(16, 8, 3, 3)).astype(np.float32)
MATRIX = RNG.normal(size=(24, 64)).astype(np.float32)
X = RNG.normal(size=(1, 8, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def models():
    """`models("iOS18", "FLOAT16")`: a convolution and a linear layer, not compressed."""
    made = {}

    def model(target, precision):
        if (target, precision) not in made:
            opset = getattr(ct.target, target)

            @mb.program(input_specs=[mb.TensorSpec(shape=X.shape)], opset_version=opset)
            def program(x):
                features = mb.conv(x=x, weight=KERNEL, pad_type="same", name="features")
                return mb.linear(x=mb.reshape(x=features, shape=[16, 64]), weight=MATRIX, name="product")

            made[target, precision] = ct.convert(
                program, convert_to="mlprogram", minimum_deployment_target=opset, skip_model_load=True,
                compute_precision=getattr(ct.precision, precision))
        return made[target, precision]

    return model


def outputs(model, folder):
    """What the evaluator computes from the model's saved package, and the ops that it used."""
    model.save(str(folder / "model.mlpackage"))
    program = load_program(folder / "model.mlpackage")
    return program({"x": X})[program.outputs[0].name], {step.op for step in program.function.steps}


def linear(**options):
    """A way to quantise."""
    config = cto.OptimizationConfig(global_config=cto.OpLinearQuantizerConfig(weight_threshold=0, **options))
    return lambda model, joint=False: cto.linear_quantize_weights(model, config, joint)


def palette(**options):
    """A way to palettise."""
    config = cto.OptimizationConfig(global_config=cto.OpPalettizerConfig(weight_threshold=0, **options))
    return lambda model, joint=False: cto.palettize_weights(model, config, joint)


def pruned(model):
    """Half of the weights set to zero."""
    return cto.prune_weights(model, cto.OptimizationConfig(
        global_config=cto.OpMagnitudePrunerConfig(target_sparsity=0.5, weight_threshold=0)))


WAYS = {
    "int8 per channel, iOS 17": ("iOS17", "constexpr_affine_dequantize", linear(mode="linear_symmetric")),
    "uint8 per channel, iOS 17": ("iOS17", "constexpr_affine_dequantize", linear(mode="linear", dtype="uint8")),
    "int8 per tensor, iOS 17": ("iOS17", "constexpr_affine_dequantize",
                                linear(mode="linear", dtype="int8", granularity="per_tensor")),
    "int8 per channel": ("iOS18", "constexpr_blockwise_shift_scale", linear(mode="linear_symmetric")),
    "int4 per channel": ("iOS18", "constexpr_blockwise_shift_scale", linear(mode="linear_symmetric", dtype="int4")),
    "uint4 per block": ("iOS18", "constexpr_blockwise_shift_scale",
                        linear(mode="linear", dtype="uint4", granularity="per_block", block_size=4)),
    **{f"{bits} bit palette, iOS 17": ("iOS17", "constexpr_lut_to_dense", palette(mode="uniform", nbits=bits))
       for bits in (1, 2, 4, 6, 8)},
    **{f"{bits} bit palette": ("iOS18", "constexpr_lut_to_dense", palette(mode="uniform", nbits=bits))
       for bits in (1, 2, 3, 4, 6, 8)},
    "palette per group": ("iOS18", "constexpr_lut_to_dense",
                          palette(mode="uniform", nbits=4, granularity="per_grouped_channel", group_size=4)),
    "pruned, iOS 17": ("iOS17", "constexpr_sparse_to_dense", pruned),
    "pruned": ("iOS18", "constexpr_sparse_to_dense", pruned),
    "pruned int8": ("iOS18", "constexpr_sparse_blockwise_shift_scale",
                    lambda model: linear(mode="linear_symmetric")(pruned(model), joint=True)),
    "pruned palette": ("iOS18", "constexpr_lut_to_sparse",
                       lambda model: palette(mode="uniform", nbits=4)(pruned(model), joint=True)),
    "int8 palette": ("iOS18", "constexpr_lut_to_dense",
                     lambda model: linear(mode="linear_symmetric", granularity="per_tensor")(
                         palette(mode="uniform", nbits=4)(model), joint=True)),
}


# Indices do not depend on the precision of what they point at.
@pytest.mark.parametrize("way, precision", [(way, precision) for way in WAYS for precision in ("FLOAT16", "FLOAT32")
                                            if precision == "FLOAT16" or "palette" not in way])
def test_compressed_weights_compute_what_decompressed_ones_do(models, tmp_path, way, precision):
    target, op, compress = WAYS[way]
    model = models(target, precision)
    compressed = compress(model)
    got, ops = outputs(compressed, tmp_path)
    assert op in ops
    (tmp_path / "plain").mkdir()
    wanted, plain_ops = outputs(cto.decompress_weights(compressed), tmp_path / "plain")
    assert not any(op.startswith("constexpr_") for op in plain_ops)
    np.testing.assert_array_equal(got, wanted)
    (tmp_path / "exact").mkdir()
    assert not np.array_equal(got, outputs(model, tmp_path / "exact")[0])  # the compression did lose something


def constexpr(build, folder, target="iOS18"):
    """What a compressed constant that the builder makes is expanded to."""
    opset = getattr(ct.target, target)
    program = mb.program(input_specs=[mb.TensorSpec(shape=(1,))], opset_version=opset)(
        lambda x: mb.add(x=build(), y=x))
    model = ct.convert(program, convert_to="mlprogram", minimum_deployment_target=opset, skip_model_load=True,
                       compute_precision=ct.precision.FLOAT32, pass_pipeline=ct.PassPipeline.EMPTY)
    model.save(str(folder / "constant.mlpackage"))
    loaded = load_program(folder / "constant.mlpackage")
    return loaded({"x": np.zeros(1, np.float32)})[loaded.outputs[0].name]


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_vectors_of_a_palette_lie_along_their_axis(tmp_path, axis):
    indices = RNG.integers(0, 4, (2, 3)).astype(np.uint8)
    lut = RNG.normal(size=(1, 1, 4, 2)).astype(np.float32)
    got = constexpr(lambda: mb.constexpr_lut_to_dense(
        indices=indices.astype(types.np_uint2_dtype), lut=lut, vector_axis=axis), tmp_path)
    wanted = np.empty((4, 3) if axis == 0 else (2, 6), np.float32)
    for (row, column), index in np.ndenumerate(indices):
        if axis == 0:
            wanted[2 * row:2 * row + 2, column] = lut[0, 0, index]
        else:
            wanted[row, 2 * column:2 * column + 2] = lut[0, 0, index]
    np.testing.assert_array_equal(got, wanted)


def test_constants_of_the_documentation(tmp_path):
    """Examples of coremltools' documentation: a palette a group, and a scale a column of sparse data."""
    got = constexpr(lambda: mb.constexpr_lut_to_dense(
        indices=np.array([2, 3, 3, 0, 1, 0, 3, 0, 2, 1, 0, 3]).reshape(6, 2).astype(types.np_uint2_dtype),
        lut=np.array([1, 5, 9, 13, 2, 10, 18, 26], np.float32).reshape(2, 1, 4, 1)), tmp_path)
    np.testing.assert_array_equal(got, [[9, 13], [13, 1], [5, 1], [26, 2], [18, 10], [2, 26]])

    def sparse():
        mask = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0]]).astype(types.np_uint1_dtype)
        mask, data = mb.constexpr_sparse_blockwise_shift_scale(
            data_mask=mask, nonzero_data=np.array([10, 11, 3, 4, 5, 6, 7, 8, 9], np.int8),
            scale=np.array([[0.1, 0.2, 0.3, 0.4]], np.float32), offset=np.array([[1, 2, 3, 4]], np.int8))
        return mb.constexpr_sparse_to_dense(nonzero_data=data, mask=mask)

    np.testing.assert_allclose(constexpr(sparse, tmp_path), [
        [0.9, 1.8, 0, 0], [0.2, 0.4, 0.6, 0], [0, 0, 0.9, 1.2], [0.7, 1.4, 0, 0]], rtol=1e-6)


def test_halves_are_widened(tmp_path):
    halves = RNG.normal(size=(3, 5)).astype(np.float16)
    got = constexpr(lambda: mb.constexpr_cast(source_val=halves, output_dtype="fp32"), tmp_path, "iOS17")
    np.testing.assert_array_equal(got, halves.astype(np.float32))


@pytest.mark.parametrize("axis, shape", [(None, ()), (1, (8,))])
def test_quantise_and_dequantise(tmp_path, axis, shape):
    scale = (RNG.uniform(0.01, 0.03, shape)).astype(np.float32)
    zero = RNG.integers(-3, 3, shape).astype(np.int8)
    opset = ct.target.iOS17
    place = {} if axis is None else {"axis": axis}

    @mb.program(input_specs=[mb.TensorSpec(shape=X.shape)], opset_version=opset)
    def program(x):
        steps = mb.quantize(input=x, scale=scale, zero_point=zero, output_dtype="int8", **place)
        return mb.dequantize(input=steps, scale=scale, zero_point=zero, **place)

    model = ct.convert(program, convert_to="mlprogram", minimum_deployment_target=opset, skip_model_load=True,
                       compute_precision=ct.precision.FLOAT32, pass_pipeline=ct.PassPipeline.EMPTY)
    got, ops = outputs(model, tmp_path)
    assert ops == {"quantize", "dequantize"}
    s, z = (np.broadcast_to(part, 8)[:, None, None] for part in (scale, zero))
    wanted = torch.fake_quantize_per_channel_affine(torch.tensor(X), torch.tensor(s[:, 0, 0]),
                                                    torch.tensor(z[:, 0, 0].astype(np.int32)), 1, -128, 127)
    np.testing.assert_allclose(got, wanted.numpy(), atol=1e-6)
    assert np.abs(X / s + z).max() > 127.5  # some values were clipped


@pytest.mark.parametrize("name", ["int4", "uint1", "uint2", "uint3", "uint4", "uint6"])
def test_elements_narrower_than_a_byte_are_unpacked(tmp_path, name):
    """13 elements, so that no width ends with a byte."""
    writer = storage._BlobStorageWriter(str(tmp_path / "weight.bin"))
    bits, signed = int(name[-1]), name[0] == "i"
    values = np.arange(13) % 2**bits - (2 ** (bits - 1) if signed else 0)
    offset = getattr(writer, f"write_{name}_data")(values.astype(np.int8 if signed else np.uint8))
    del writer
    element = next(element for element in TYPES.values() if element.name == name)
    tensor = TensorType(element, (13,))
    file = BlobFile(tmp_path / "weight.bin")
    constant = Constant(tensor, file=file, offset=file.locate(offset, tensor, "a constant"))
    np.testing.assert_array_equal(constant.read().numpy(), values)


@pytest.mark.parametrize("name, kind", [("float", np.float32), ("uint8", np.uint8), ("int8", np.int8),
                                        ("uint16", np.uint16), ("int16", np.int16), ("int32", np.int32),
                                        ("uint32", np.uint32)])
def test_whole_elements_are_read_in_place(tmp_path, name, kind):
    writer = storage._BlobStorageWriter(str(tmp_path / "weight.bin"))
    values = np.array([0, 1, 100, 3], kind) if kind is np.float32 else np.array([0, 1, np.iinfo(kind).max, 3], kind)
    writer.write_int8_data(np.zeros(5, np.int8))  # something before it
    offset = getattr(writer, f"write_{name}_data")(values)
    del writer
    element = next(element for element in TYPES.values()
                   if element.name == np.dtype(kind).name)
    tensor = TensorType(element, (2, 2))
    file = BlobFile(tmp_path / "weight.bin")
    constant = Constant(tensor, file=file, offset=file.locate(offset, tensor, "a constant"))
    np.testing.assert_array_equal(constant.read().numpy(), values.reshape(2, 2))
