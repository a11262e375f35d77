"""Blocks of transformers by our own kernels in OpenVINO's graphs: where their layers are int8, and nowhere else."""
import math

import numpy as np
import pytest

from caphuman_edge.runtime.backends import open_backend
from caphuman_edge.runtime.kernels import AMX, attention_kernels
from caphuman_edge.runtime.selftest import psnr_db

openvino = pytest.importorskip("openvino")
op = pytest.importorskip("openvino.opset13")
ours = pytest.importorskip("caphuman_edge.runtime.backends.openvino_blocks")
feed_forward = pytest.importorskip("caphuman_edge.runtime.backends.openvino_feed_forward")
attention_block = pytest.importorskip("caphuman_edge.runtime.backends.openvino_attention_block")
pytestmark = pytest.mark.skipif(AMX not in attention_kernels(), reason="this CPU has no AMX, or no kernel was compiled")

WIDTH, HIDDEN, TOKENS, HEADS, KNOWN = 64, 128, 80, 2, 21
IN_FLOAT = {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CAPHUMAN_CACHE", str(tmp_path / "cache"))


def constant(array):
    return op.constant(np.asarray(array, np.float32))


def rounded(value, step=0.03):
    """To int8 and back, as OpenVINO reads QuantizeLinear and DequantizeLinear."""
    ends = map(constant, (-128 * step, 127 * step, -128, 127))
    whole = op.convert(op.convert(op.fake_quantize(value, *ends, 256), "i8"), "f32")
    return op.multiply(whole, constant(step))


def in_float(value, step=0.0):
    return value


class Layers:
    """Linear layers of int8 with other weights each, inputs x outputs or turned."""

    def __init__(self, turned=False):
        self.rng, self.turned = np.random.default_rng(0), turned

    def __call__(self, rows, inputs, outputs, bias=True):
        weights = self.rng.integers(-127, 128, (inputs, outputs)).astype(np.int8)
        scale = self.rng.uniform(0.5, 1.5, (1, outputs)) / 127 / math.sqrt(inputs)
        if self.turned:
            weights, scale = weights.T.copy(), scale.T
        weights = op.multiply(op.convert(op.constant(weights), "f32"), constant(scale))
        product = op.matmul(rows, weights, False, self.turned)
        return op.add(product, op.convert(op.constant(self.rng.normal(size=outputs).astype(np.float16) / 8), "f32")
                      ) if bias else product


def normed(x, axis=-1):
    rng = np.random.default_rng(5)
    norm = op.mvn(x, op.constant(np.array([axis])), True, 1e-5, "inside_sqrt")
    gamma, beta = rng.uniform(0.5, 1.5, WIDTH).astype(np.float16), rng.normal(size=WIDTH).astype(np.float16)
    return op.add(op.multiply(norm, op.convert(op.constant(gamma), "f32")), op.convert(op.constant(beta), "f32"))


def gelu(x, square=2.0):
    more = op.add(op.erf(op.divide(x, constant(math.sqrt(square)))), constant(1))
    return op.multiply(x, op.multiply(constant(0.5), more))


def model_of(make, **others):
    """Of rows x, and others that a block reads."""
    inputs = {"x": [1, TOKENS, WIDTH], **others}
    nodes = {name: op.parameter(shape, np.float32, name=name) for name, shape in inputs.items()}
    for name, node in nodes.items():
        node.output(0).get_tensor().set_names({name})
    y = make(*nodes.values())
    y.output(0).get_tensor().set_names({"y"})
    return openvino.Model([op.result(y)], list(nodes.values()), "block")


def feed_forward_model(rounds=rounded, activation=gelu, hidden=HIDDEN, turned=False, of=lambda x: x):
    def make(x):
        layer, rows = Layers(turned), rounds(normed(of(x)))
        product = op.multiply(layer(rows, WIDTH, hidden), activation(layer(rows, WIDTH, hidden)))
        return op.add(x, layer(rounds(product, 0.05), hidden, WIDTH))

    return model_of(make)


def heads_of(rows, tokens, order):
    apart = op.reshape(rows, op.constant(np.array([-1, tokens, HEADS, WIDTH // HEADS])), False)
    return op.multiply(op.transpose(apart, op.constant(np.array(order))), constant((WIDTH // HEADS) ** -0.25))


def attention_model(rounds=rounded, known=False, turned=False, of=lambda x: x):
    """Of x to itself, or to keys and values that other layers make of what is known."""
    def make(x, *others):
        layer, rows = Layers(turned), rounds(normed(of(x)))
        tokens, source = (KNOWN, rounds(others[0])) if others else (TOKENS, rows)
        round_heads = in_float if others else rounds
        q = round_heads(heads_of(layer(rows, WIDTH, WIDTH, bias=False), TOKENS, [0, 2, 1, 3]))
        k = round_heads(heads_of(layer(source, WIDTH, WIDTH, bias=False), tokens, [0, 2, 3, 1]))
        v = op.reshape(layer(source, WIDTH, WIDTH, bias=False), op.constant(
            np.array([-1, tokens, HEADS, WIDTH // HEADS])), False)
        weights = op.softmax(op.matmul(q, k, False, False), -1)
        sums = op.matmul(weights, op.transpose(v, op.constant(np.array([0, 2, 1, 3]))), False, False)
        attended = op.reshape(op.transpose(sums, op.constant(np.array([0, 2, 1, 3]))),
                              op.constant(np.array([-1, TOKENS, WIDTH])), False)
        return op.add(layer(rounds(attended, 0.02), WIDTH, WIDTH), x)

    return model_of(make, **({"known": [1, KNOWN, WIDTH]} if known else {}))


def to_known(**settings):
    return attention_model(known=True, **settings)


def blocks(model):
    ours.use_blocks(model, (feed_forward.feed_forward_of, attention_block.attention_block_of), 2)
    return [node.get_type_name() for node in model.get_ordered_ops()
            if node.get_type_name() in ("FeedForward", "AttentionBlock")]


@pytest.fixture
def arrays():
    rng = np.random.default_rng(1)
    shapes = {"x": (1, TOKENS, WIDTH), "known": (1, KNOWN, WIDTH)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("make", "kind"), [
    (feed_forward_model, "FeedForward"), (attention_model, "AttentionBlock"), (to_known, "AttentionBlock")])
def test_the_graph_computes_the_same(tmp_path, arrays, make, kind, turned):
    """As near to the graph in float as OpenVINO's own in float32, which rounds alike, but for the sum in bfloat16."""
    model = make(turned=turned)
    openvino.save_model(model, tmp_path / "block.xml", compress_to_fp16=False)
    assert blocks(model) == [kind]
    assert not {"MVN", "Softmax", "Erf"} & {node.get_type_name() for node in model.get_ops()}
    taken = {port.get_any_name(): arrays[port.get_any_name()] for port in model.inputs}
    backend = open_backend("openvino")
    found, again = (backend.load(tmp_path / "block.xml", precision="fast", threads=2)(taken)["y"] for _ in range(2))
    exact, theirs = (openvino.Core().compile_model(make(rounds=rounds, turned=turned), "CPU", IN_FLOAT)(taken)[0]
                     for rounds in (in_float, rounded))
    np.testing.assert_array_equal(found, again)
    assert psnr_db(found, exact) > psnr_db(theirs, exact) - 2


def tanh(x):
    return op.multiply(x, op.multiply(constant(0.5), op.add(op.tanh(x), constant(1))))


def of_another(x):
    return op.multiply(x, constant(2))


def unevenly(value, step=0.03):
    ends = map(constant, (-1, 3, -128, 127))
    return op.fake_quantize(value, *ends, 256)


@pytest.mark.parametrize("model", [
    lambda: feed_forward_model(in_float), lambda: feed_forward_model(unevenly), lambda: feed_forward_model(hidden=96),
    lambda: feed_forward_model(of=of_another), lambda: feed_forward_model(activation=tanh),
    lambda: feed_forward_model(activation=lambda x: gelu(x, 3.0)), lambda: attention_model(in_float),
    lambda: attention_model(of=of_another),
    lambda: to_known(rounds=in_float), lambda: to_known(of=of_another)])
def test_what_is_otherwise_stays(model):
    assert not blocks(model())


@pytest.mark.parametrize("make", [feed_forward_model, attention_model])
def test_who_asks_for_float_gets_openvinos_own(tmp_path, arrays, make, monkeypatch):
    openvino.save_model(make(), tmp_path / "block.xml", compress_to_fp16=False)
    for kind in (feed_forward.FeedForward, attention_block.AttentionBlock):
        monkeypatch.setattr(kind, "evaluate", lambda *_: pytest.fail("our kernel ran"))
    open_backend("openvino").load(tmp_path / "block.xml", precision="f32")({"x": arrays["x"]})


def test_without_the_matrix_unit_blocks_stay(tmp_path, arrays, monkeypatch):
    openvino.save_model(feed_forward_model(), tmp_path / "block.xml", compress_to_fp16=False)
    backend = open_backend("openvino")
    others = [kernel for kernel in attention_kernels() if kernel != AMX]
    monkeypatch.setattr(backend, "kernel_here", lambda threads: backend.Kernel(others[0], threads))
    monkeypatch.setattr(feed_forward.FeedForward, "evaluate", lambda *_: pytest.fail("our kernel ran"))
    backend.load(tmp_path / "block.xml", precision="fast")({"x": arrays["x"]})
