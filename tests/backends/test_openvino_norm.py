"""Group norms by our own kernel in OpenVINO's graphs: where their results are rounded to int8, and nowhere else."""
import numpy as np
import pytest

from caphuman_edge.runtime.backends import open_backend
from caphuman_edge.runtime.errors import BadInput
from caphuman_edge.runtime.kernels import attention_kernels
from caphuman_edge.runtime.selftest import psnr_db

openvino = pytest.importorskip("openvino")
op = pytest.importorskip("openvino.opset13")
ours = pytest.importorskip("caphuman_edge.runtime.backends.openvino_norm")
pytestmark = pytest.mark.skipif(not attention_kernels(), reason="no kernel was compiled for this machine")

CHANNELS, GROUPS, EDGE, STEP = 32, 4, 12, 0.03
IN_FLOAT = {"INFERENCE_PRECISION_HINT": "f32"}


@pytest.fixture(autouse=True)
def small_maps_too(tmp_path, monkeypatch):
    monkeypatch.setenv("CAPHUMAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ours, "FEWEST_NUMBERS", 1)


def constant(array):
    return op.constant(np.asarray(array, np.float32))


def rounded(value, low=-128.0):
    """To int8 and back, as OpenVINO reads QuantizeLinear and DequantizeLinear."""
    ends = map(constant, (low * STEP, (low + 255) * STEP, -128, 127))
    whole = op.convert(op.convert(op.fake_quantize(value, *ends, 256), "i8"), "f32")
    return op.multiply(op.subtract(whole, op.convert(op.constant(np.int8(0)), "f32")), constant(STEP))


def silu(value):
    return op.multiply(value, op.sigmoid(value))


def same(value):
    return value


def as_maps(value, weight):
    """On to a convolution."""
    return op.convolution(value, constant(weight[:, :, None, None]), [1, 1], [0, 0], [0, 0], [1, 1])


def as_rows(value, weight):
    """On to a linear layer, as tokens."""
    cells = op.reshape(value, op.constant(np.array([0, CHANNELS, -1])), True)
    return op.matmul(op.transpose(cells, op.constant(np.array([0, 2, 1]))), constant(weight), False, True)


def network(activation=silu, rounds=rounded, goes_on=as_maps, batch=2):
    """A group norm as the exporter writes it: as an instance norm of groups, then factors of channels."""
    rng = np.random.default_rng(0)
    x = op.parameter([batch, CHANNELS, EDGE, EDGE], np.float32, name="x")
    x.output(0).get_tensor().set_names({"x"})
    groups = op.reshape(x, op.constant(np.array([0, GROUPS, -1])), True)
    norm = op.mvn(groups, op.constant(np.array([2])), True, 1e-5, "inside_sqrt")
    norm = op.add(op.multiply(norm, constant(np.full((1, GROUPS, 1), 1.5))), constant(np.full((1, GROUPS, 1), 0.25)))
    maps = op.reshape(norm, op.shape_of(x), False)
    maps = op.multiply(maps, constant(rng.uniform(0.5, 1.5, (CHANNELS, 1, 1))))
    maps = op.add(maps, constant(rng.standard_normal((CHANNELS, 1, 1))))
    y = goes_on(rounds(activation(maps)), rng.standard_normal((CHANNELS, CHANNELS)) / CHANNELS)
    y.output(0).get_tensor().set_names({"y"})
    return openvino.Model([op.result(y)], [x], "norm")


def norms(model):
    ours.use_group_norm(model, False, 2)
    return [node for node in model.get_ordered_ops() if node.get_type_name() == "GroupNorm"]


@pytest.fixture
def maps():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, CHANNELS, EDGE, EDGE)) * 2 + 5 * rng.standard_normal((1, CHANNELS, 1, 1))
    return {"x": x.astype(np.float32)}


@pytest.mark.parametrize("goes_on", [as_maps, as_rows])
@pytest.mark.parametrize("activation", [silu, same])
@pytest.mark.parametrize("precision", ["fast", "bf16"])
def test_the_graph_computes_the_same(tmp_path, maps, activation, goes_on, precision):
    """As near to the graph in float as OpenVINO's own, which rounds alike; from the cache, too."""
    model = network(activation, goes_on=goes_on)
    openvino.save_model(model, tmp_path / "norm.xml", compress_to_fp16=False)
    assert len(norms(model)) == 1 and "MVN" not in {node.get_type_name() for node in model.get_ops()}
    backend = open_backend("openvino")
    try:
        found, again = (backend.load(tmp_path / "norm.xml", precision=precision)(maps)["y"] for _ in range(2))
    except BadInput as error:
        if "has no precision" in str(error):
            pytest.skip("this CPU has no bfloat16")
        raise
    exact, theirs = (openvino.Core().compile_model(network(activation, rounds, goes_on), "CPU", IN_FLOAT)(maps)[0]
                     for rounds in (same, rounded))
    np.testing.assert_array_equal(found, again)
    assert psnr_db(found, exact) > min(psnr_db(theirs, exact), 45) - 2  # 45: what is left of float is in bfloat16


@pytest.mark.parametrize("other", [
    {"rounds": same}, {"rounds": lambda value: rounded(value, low=-100.0)}, {"activation": op.relu},
    {"activation": lambda value: op.multiply(value, op.sigmoid(op.negative(value)))}, {"batch": -1}])
def test_what_is_otherwise_stays(other):
    assert not norms(network(**other))


def test_small_maps_stay(monkeypatch):
    monkeypatch.setattr(ours, "FEWEST_NUMBERS", CHANNELS * EDGE * EDGE + 1)
    assert not norms(network())


def test_who_asks_for_float_gets_openvinos_own(tmp_path, maps, monkeypatch):
    openvino.save_model(network(), tmp_path / "norm.xml", compress_to_fp16=False)
    monkeypatch.setattr(ours.GroupNorm, "evaluate", lambda *_: pytest.fail("our kernel ran"))
    open_backend("openvino").load(tmp_path / "norm.xml", precision="f32")(maps)
