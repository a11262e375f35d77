"""What the self-test calls equal, and what it does not."""
import numpy as np
import pytest

from caphuman_edge.runtime.manifest import Form
from caphuman_edge.runtime.selftest import Verdict, _verdicts, floor_db, psnr_db

SINGLE, HALF = ({"x": np.zeros(1, dtype)} for dtype in (np.float32, np.float16))


@pytest.mark.parametrize(("precision", "parity", "in_halves", "expected", "floor"), [
    ("f32", 140, False, SINGLE, 60), ("f16", 140, False, SINGLE, 60), ("f16", 140, False, HALF, 45),
    ("mixed", None, False, HALF, 45), ("f16", 52, False, HALF, 35), ("f32", 140, True, HALF, 35),
    ("int8", 41, False, HALF, 35), ("palettised-8", 41, False, HALF, 35), ("palettised-6", 33, True, HALF, 25),
    ("palettised-4", 19, True, HALF, 12), ("int8", 29, False, HALF, 24), ("palettised-mixed", 33, True, HALF, 28),
])
def test_the_floor_follows_weights_arithmetic_and_expectations(precision, parity, in_halves, expected, floor):
    form = Form("model.onnx", {}, precision, {} if parity is None else {"psnr_db": float(parity)})
    assert floor_db(form, in_halves, expected) == floor


def test_an_error_of_a_hundredth_of_the_peak_is_40_db():
    expected = np.array([2.0, -1.0, 0.5], np.float32)
    assert psnr_db(expected + np.float32(0.02), expected) == pytest.approx(40, abs=1e-3)


def test_no_error_and_no_number_are_the_ends_of_the_scale():
    expected = np.array([1.0, 0.0], np.float32)
    assert psnr_db(expected, expected) == 200
    assert psnr_db(np.array([np.nan, 0], np.float32), expected) == -200
    assert psnr_db(np.array([0.1, 0.1], np.float32), np.zeros(2, np.float32)) < 0


def test_a_graph_on_its_floor_passes_and_below_it_fails():
    assert Verdict("vae_decoder", 45.0, 45.0, "ort").passed
    assert not Verdict("vae_decoder", 44.9, 45.0, "ort").passed


@pytest.mark.parametrize(("flips", "passes"), [(1, True), (2, False)])
def test_one_gate_in_a_thousand_may_flip(flips, passes):
    gates = {f"gate_{k}": np.zeros((1, 1, 32 >> k, 32 >> k), np.float32) for k in range(4)}  # 1,360 cells
    gates["gate_0"][0, 0, 0, 0] = 1
    flipped = {name: gate.copy() for name, gate in gates.items()}
    flipped["gate_3"].flat[:flips] = 1
    hint = {"hint": np.ones((1, 8), np.float32)}
    smooth, hard = _verdicts("hint_encoder", "ort", 60.0, hint | flipped, hint | gates)
    assert smooth.passed and hard.graph == "hint_encoder gates"
    assert hard.passed is passes
