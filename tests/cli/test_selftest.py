"""What the self-test calls equal, and what it does not."""
import numpy as np
import pytest

from caphuman_edge.runtime.selftest import Verdict, _verdicts, floor_db, psnr_db

SINGLE, HALF = ({"x": np.zeros(1, dtype)} for dtype in (np.float32, np.float16))


@pytest.mark.parametrize(("precision", "expected", "floor"), [
    ("f32", SINGLE, 60), ("f16", SINGLE, 60), ("f16", HALF, 45), ("mixed", HALF, 45), ("int8", HALF, 35),
])
def test_the_floor_follows_weights_and_expectations(precision, expected, floor):
    assert floor_db(precision, expected) == floor


def test_an_error_of_a_hundredth_of_the_peak_is_40_db():
    expected = np.array([2.0, -1.0, 0.5], np.float32)
    assert psnr_db(expected + np.float32(0.02), expected) == pytest.approx(40, abs=1e-3)


def test_no_error_and_no_number_are_the_ends_of_the_scale():
    expected = np.array([1.0, 0.0], np.float32)
    assert psnr_db(expected, expected) == 200
    assert psnr_db(np.array([np.nan, 0], np.float32), expected) == -200
    assert psnr_db(np.array([0.1, 0.1], np.float32), np.zeros(2, np.float32)) < 0


def test_a_graph_on_its_floor_passes_and_below_it_fails():
    assert Verdict("vae_decoder", 45.0, 45.0).passed
    assert not Verdict("vae_decoder", 44.9, 45.0).passed


@pytest.mark.parametrize(("flips", "passes"), [(1, True), (2, False)])
def test_one_gate_in_a_thousand_may_flip(flips, passes):
    gates = {f"gate_{k}": np.zeros((1, 1, 32 >> k, 32 >> k), np.float32) for k in range(4)}  # 1,360 cells
    gates["gate_0"][0, 0, 0, 0] = 1
    flipped = {name: gate.copy() for name, gate in gates.items()}
    flipped["gate_3"].flat[:flips] = 1
    hint = {"hint": np.ones((1, 8), np.float32)}
    smooth, hard = _verdicts("hint_encoder", "f32", hint | flipped, hint | gates)
    assert smooth.passed and hard.graph == "hint_encoder gates"
    assert hard.passed is passes
