"""More training pictures: styles that are moved as asked, names as the labels expect, stopped runs that go on."""
import numpy as np
import pytest
from PIL import Image

from caphuman_edge.export import faces
from caphuman_edge.runtime.errors import BadInput

AXIS = np.eye(512, dtype=np.float32)
DIRECTIONS = {"mean_style": np.zeros((1, 512)), "sample_mean_style": np.full((1, 512), 0.1), "yaw": 2 * AXIS[0],
              "yaw_regressor": AXIS[0] / 2, "pitch": AXIS[1], "mouth_open": AXIS[2], "mouth_width": AXIS[3],
              "yaw_std_degrees": np.float64(12.0), "yaw_mean_degrees": np.float64(-0.5)}


def measured_yaw(style: np.ndarray) -> float:
    standard = (style - DIRECTIONS["sample_mean_style"]) @ DIRECTIONS["yaw_regressor"]
    return float(standard[0] * 12.0 - 0.5)


@pytest.fixture
def generator():
    """A mapping that changes nothing, and a synthesis that paints the style's first number."""
    return faces.Generator(lambda inputs: [inputs[0]],
                           lambda inputs: [np.full((1, 3, 1024, 1024), inputs[0][0, 0] / 50, np.float32)], DIRECTIONS)


def test_a_pose_turns_to_the_yaw_that_was_asked_and_moves_nothing_else(generator):
    style = generator.style(400)
    turned = generator.posed(style, 30.0, {"pitch": -1.0, "mouth_open": 0.5})
    assert measured_yaw(turned) == pytest.approx(30, abs=1e-3)
    assert (turned - style)[0, 1:4].tolist() == pytest.approx([-1.0, 0.5, 0.0])
    assert not (turned - style)[0, 4:].any()


def test_styles_are_truncated_towards_the_mean_and_the_same_for_a_seed(generator):
    drawn = np.random.default_rng(400).standard_normal((1, 512))
    shares = generator.style(400) / drawn
    assert np.ptp(shares) < 1e-4 and 0.6 <= shares[0, 0] <= 0.85
    assert np.array_equal(generator.style(400), generator.style(400))


def test_a_stopped_run_draws_only_what_is_missing(generator, tmp_path):
    faces.make(generator, 300, 2, 40.0, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00300.jpg", "00300_a.jpg", "00300_b.jpg"]
    assert Image.open(tmp_path / "00300_a.jpg").size == (256, 256)
    kept, lost = (tmp_path / "00300.jpg"), (tmp_path / "00300_a.jpg")
    expected = lost.read_bytes()
    kept.write_bytes(b"mine")
    lost.unlink()
    faces.make(generator, 300, 2, 40.0, tmp_path)
    assert (kept.read_bytes(), lost.read_bytes()) == (b"mine", expected)


@pytest.mark.parametrize(("flags", "reason"), [
    (["--seeds", "299", "301"], "expected 300 <= FIRST"), (["--seeds", "500", "500"], "FIRST < END"),
    (["--seeds", "300", "301", "--poses", "27"], "expected 0 to 26")])
def test_held_out_seeds_and_nonsense_are_refused(flags, reason, tmp_path):
    with pytest.raises(BadInput, match=reason):
        faces.main(["--directions", "none.npz", "--out", str(tmp_path), *flags])


def test_missing_files_are_named_with_their_remedy(tmp_path):
    pytest.importorskip("openvino")
    call = ["--seeds", "300", "301", "--out", str(tmp_path), "--downloads", str(tmp_path), "--directions"]
    with pytest.raises(BadInput, match=r"none\.npz does not exist"):
        faces.main([*call, str(tmp_path / "none.npz")])
    np.savez(tmp_path / "directions.npz", **DIRECTIONS)
    with pytest.raises(BadInput, match=r"MappingNetwork\.xml is missing: add --fetch"):
        faces.main([*call, str(tmp_path / "directions.npz")])
