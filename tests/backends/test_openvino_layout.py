"""OpenVINO's graphs rearranged: the same numbers with fewer copies, and nothing touched that only looks alike."""
from collections import Counter

import numpy as np
import pytest

from caphuman_edge.runtime import Bundle
from caphuman_edge.runtime.selftest import psnr_db

openvino = pytest.importorskip("openvino")
op = pytest.importorskip("openvino.opset13")
arrange = pytest.importorskip("caphuman_edge.export.openvino_layout").arrange
EXACTLY = {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY", "INFERENCE_NUM_THREADS": 1}
CHANNELS, EDGE, HEADS = 4, 3, 2
IMAGE, ROWS = (1, CHANNELS, EDGE, EDGE), (1, EDGE * EDGE, CHANNELS)


def number(value):
    return op.constant(np.float32(value))


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rounded(value):
    """As quantised graphs read an activation."""
    coarse = op.fake_quantize(value, number(-4), number(3.96875), number(-128), number(127), 256)
    return op.multiply(op.convert(op.convert(coarse, "i8"), "f32"), number(1 / 32))


def weight(*shape):
    """As quantised graphs hold one: int8, a scale an output, which is the first axis."""
    numbers = op.constant(np.random.default_rng(1).integers(-127, 128, shape).astype(np.int8))
    scales = op.reshape(op.constant(np.linspace(0.01, 0.03, shape[0]).astype(np.float32)),
                        op.constant(np.array([shape[0], *[1] * (len(shape) - 1)])), False)
    return op.multiply(op.convert(numbers, "f32"), scales)


def convolved(value, kernel=1, stride=1, biased=True):
    pads = [kernel // 2] * 2
    found = op.convolution(value, weight(CHANNELS, CHANNELS, kernel, kernel), [stride] * 2, pads, pads, [1, 1])
    bias = op.reshape(op.constant(random(CHANNELS)), op.constant(np.array([1, CHANNELS, 1, 1])), False)
    return op.add(found, bias) if biased else found


def as_rows(image):
    return op.transpose(op.reshape(image, op.constant(np.array([0, CHANNELS, -1])), True),
                        op.constant(np.array([0, 2, 1])))


def as_image(rows, edge=EDGE):
    turned = op.transpose(rows, op.constant(np.array([0, 2, 1])))
    return op.reshape(turned, op.constant(np.array([0, CHANNELS, edge, edge])), True)


def heads(rows, order=(0, 2, 1, 3)):
    apart = op.reshape(rows, op.constant(np.array([0, -1, HEADS, CHANNELS // HEADS])), True)
    return op.transpose(apart, op.constant(np.array(order)))


def keys(rows, order=(0, 2, 1, 3)):
    """As the tracer writes them: to the front, three axes, the last two exchanged, back to four."""
    three = op.reshape(heads(rows, order), op.constant(np.array([HEADS, -1, CHANNELS // HEADS])), False)
    turned = op.transpose(three, op.constant(np.array([0, 2, 1])))
    return op.reshape(turned, op.constant(np.array([1, HEADS, CHANNELS // HEADS, EDGE * EDGE])), False)


def gated(rows, parts=2, biased=True):
    outputs = 6 * CHANNELS
    product = op.matmul(rounded(rows), weight(outputs, CHANNELS), False, True)
    total = op.add(product, op.constant(random(1, 1, outputs))) if biased else product
    split = op.split(total, op.constant(np.int64(2)), parts)
    return op.multiply(split.output(0), op.sigmoid(split.output(1)))


def counts(model):
    return Counter(node.get_type_name() for node in model.get_ordered_ops())


def outcome(model, *inputs):
    compiled = openvino.Core().compile_model(model, "CPU", EXACTLY)
    return [array.copy() for array in compiled(list(inputs)).values()]


@pytest.mark.parametrize(("shape", "make", "gone"), [
    (ROWS, gated, "Split"), (ROWS, lambda rows: gated(rows, biased=False), "Split"),
    (IMAGE, lambda image: as_rows(convolved(image)), "Convolution"),
    (IMAGE, lambda image: as_rows(convolved(rounded(image), biased=False)), "Convolution"),
    (ROWS, lambda rows: convolved(rounded(as_image(rows))), "Convolution"),
    (ROWS, lambda rows: convolved(as_image(rows), biased=False), "Convolution")])
def test_what_is_found_is_rearranged_and_gives_the_same(shape, make, gone):
    x = op.parameter(list(shape), np.float32)
    model, given = openvino.Model([make(x)], [x]), random(*shape, seed=3)
    (before,), had = outcome(model, given), counts(model)
    arrange(model)
    (after,) = outcome(model, given)
    assert had[gone] and gone not in counts(model)
    np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())
    assert np.ptp(before) > 0.1


def test_keys_are_transposed_once():
    x = op.parameter(list(ROWS), np.float32)
    model, given = openvino.Model([op.matmul(heads(x), keys(x), False, False)], [x]), random(*ROWS, seed=3)
    (before,), had = outcome(model, given), counts(model)
    arrange(model)
    assert had["Transpose"] - counts(model)["Transpose"] == 1 and had["Reshape"] - counts(model)["Reshape"] == 2
    np.testing.assert_array_equal(outcome(model, given)[0], before)


@pytest.mark.parametrize(("shape", "make"), [
    (ROWS, lambda rows: gated(rows, parts=3)),
    (ROWS, lambda rows: op.split(op.tanh(rows), op.constant(np.int64(2)), 2).output(1)),
    (ROWS, lambda rows: op.split(op.matmul(rows, op.constant(random(4, 4)), False, False),
                                 op.constant(np.int64(1)), 3).output(0)),
    (ROWS, lambda rows: op.split(op.matmul(rows, op.tanh(rows), True, False), op.constant(np.int64(2)), 2).output(0)),
    (ROWS, lambda rows: convolved(op.fake_quantize(as_image(rows), *(op.constant(bound * np.ones((1, CHANNELS, 1, 1),
                                  np.float32)) for bound in (-4, 4, -4, 4)), 256))),
    (IMAGE, lambda image: as_rows(convolved(image, kernel=3))),
    (IMAGE, lambda image: as_rows(convolved(image, stride=2))),
    (IMAGE, lambda image: convolved(op.tanh(image))),
    (ROWS, lambda rows: convolved(as_image(rows), kernel=3)),
    (ROWS, lambda rows: keys(rows, order=(0, 2, 3, 1)))],
    ids=["thirds", "of no product", "of another axis", "of no weights", "rounded by channel", "3x3", "strided",
         "of no rows", "3x3 of rows", "other order"])
def test_what_only_looks_alike_stays(shape, make):
    x = op.parameter(list(shape), np.float32)
    model = openvino.Model([make(x)], [x])
    had = counts(model)
    arrange(model)
    assert counts(model) == had


def test_an_image_that_others_read_as_well_stays_for_them():
    x = op.parameter(list(ROWS), np.float32)
    image = as_image(x)
    model = openvino.Model([convolved(image), op.tanh(image)], [x])
    had = counts(model)
    arrange(model)
    assert counts(model) == had


@pytest.mark.parametrize(("graph", "texts"), [("denoiser", 1), ("denoiser", 2), ("vae_decoder", 1),
                                              ("image_encoder", 1), ("text_encoder", 2)])
def test_graphs_of_the_miniature_give_what_they_gave(graph, texts):
    bundle = Bundle.open()
    model = openvino.Core().read_model(bundle.file(graph, "onnx"))
    with np.load(bundle.file("selftest")) as stored:
        given = {port.get_any_name(): stored[f"{graph}/in/{port.get_any_name()}"] for port in model.inputs}
    given = {name: array.astype(np.int64 if name == "input_ids" else np.float32) for name, array in given.items()}
    batched = ("text_tokens", "input_ids")
    given = {name: np.concatenate([array[:1]] * texts) if name in batched else array for name, array in given.items()}
    inputs = [given[port.get_any_name()] for port in model.inputs]
    (before,), had = outcome(model, *inputs), counts(model)
    arrange(model)
    (after,), has = outcome(model, *inputs), counts(model)
    # in int8 a sum in another order rounds some numbers the other way
    assert psnr_db(after, before) > (40 if graph == "denoiser" else 90)
    assert sum(has.values()) < sum(had.values())
    if graph == "denoiser":
        assert had["Split"] and not has["Split"]
        assert had["Convolution"] - has["Convolution"] == 16  # of the others the outputs are rounded
