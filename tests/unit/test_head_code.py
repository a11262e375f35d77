"""What the sliders and the control modes do to a head."""
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from caphuman_edge.runtime.condition import condition_maps
from caphuman_edge.runtime.errors import BadInput
from caphuman_edge.runtime.head import HeadCode, HeadLayout, directional_light, load_head, mix, project
from caphuman_edge.runtime.head.light import shading_basis, turned_light
from caphuman_edge.runtime.perception import rotation_from
from caphuman_edge.runtime.render import NumpyRenderer

NOSE_TIP, FOREHEAD, CHIN, LEFT_MOUTH_CORNER, RIGHT_MOUTH_CORNER = 4, 10, 152, 61, 291
LAYOUT = HeadLayout(2, ("jawOpen", "mouthSmileLeft", "mouthSmileRight"), 1, (0.0, -0.1, 0.0), (0.0, 0.03, 0.04))
GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parents[1] / "golden"))


@pytest.fixture(scope="module")
def head():
    return load_head()


def on_screen(head, code):
    return head.landmarks(project(head.vertices(code), code))


def test_positive_yaw_turns_the_nose_to_image_right(head):
    neutral = HeadCode.neutral(head.layout)
    assert on_screen(head, neutral.posed(yaw=30.0))[NOSE_TIP, 0] > on_screen(head, neutral)[NOSE_TIP, 0] + 0.1


@pytest.mark.parametrize("scale", [3.0, 15.0, 30.0])
def test_however_large_a_head_is_one_sees_its_face_and_not_its_inside(head, scale):
    maps = condition_maps(NumpyRenderer(), head, HeadCode.neutral(head.layout).moved(scale=scale), 32, 32)
    assert maps[2, 12:20, 12:20].min() > 0  # normals towards the viewer


def test_positive_pitch_turns_the_nose_up(head):
    neutral = HeadCode.neutral(head.layout)
    assert on_screen(head, neutral.posed(pitch=20.0))[NOSE_TIP, 1] < on_screen(head, neutral)[NOSE_TIP, 1] - 0.05


def test_positive_roll_is_clockwise_as_seen(head):
    rolled = on_screen(head, HeadCode.neutral(head.layout).posed(roll=20.0))
    assert rolled[FOREHEAD, 0] > rolled[CHIN, 0] + 0.1


def test_angles_read_back_and_are_absolute():
    code = HeadCode.neutral(LAYOUT).posed(yaw=30.0, pitch=-10.0, roll=5.0)
    np.testing.assert_allclose(code.angles, (30, -10, 5), atol=1e-3)
    np.testing.assert_allclose(code.posed(yaw=-20.0).angles, (-20, -10, 5), atol=1e-3)


def test_posing_keeps_the_middle_of_the_head_in_place():
    code = HeadCode.neutral(LAYOUT).moved(x=0.2, y=-0.1)
    np.testing.assert_allclose(code.posed(yaw=40.0, pitch=15.0, roll=-30.0).centre, code.centre, atol=1e-6)


@pytest.mark.parametrize("crop", [np.eye(3), np.array([[0.5, 0, 0], [0, 2, 0], [0.1, -0.2, 1]])])
def test_moving_shifts_by_half_frames_right_and_up(crop):
    code = replace(HeadCode.neutral(LAYOUT), crop=crop)
    shift = code.moved(x=0.3, y=0.2).centre - code.centre
    np.testing.assert_allclose(shift, (0.3, -0.2), atol=1e-6)


def test_scaling_keeps_the_middle_of_the_head_in_place(head):
    code = HeadCode.neutral(head.layout).moved(x=0.3)
    larger = code.moved(scale=2.0)
    np.testing.assert_allclose(larger.centre, code.centre, atol=1e-6)
    before, after = (np.ptp(on_screen(head, one), axis=0) for one in (code, larger))
    np.testing.assert_allclose(after, 2 * before, rtol=1e-4)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_no_size_is_refused(scale):
    with pytest.raises(BadInput):
        HeadCode.neutral(LAYOUT).moved(scale=scale)


def test_a_pair_of_units_is_set_by_its_common_name():
    code = HeadCode.neutral(LAYOUT).expressed({"mouthSmile": 0.7, "jawOpen": 0.1})
    np.testing.assert_allclose(code.expression, (0.1, 0.7, 0.7))


def test_two_directions_are_no_pair_of_sides(head):
    """jawLeft and jawRight together would undo each other."""
    for name in ("jaw", "mouth"):
        with pytest.raises(BadInput, match=f'"{name}" is not known'):
            HeadCode.neutral(head.layout).expressed({name: 1.0})


def test_left_is_the_persons_left(head):
    neutral = HeadCode.neutral(head.layout)
    moved = np.abs(on_screen(head, neutral.expressed({"mouthSmileLeft": 1.0})) - on_screen(head, neutral)).sum(axis=1)
    assert moved[RIGHT_MOUTH_CORNER] > 5 * moved[LEFT_MOUTH_CORNER]


def test_an_unknown_expression_is_named_with_the_known_ones():
    with pytest.raises(BadInput, match=r'"smirk" is not known, expected one of smile, open, jawOpen'):
        HeadCode.neutral(LAYOUT).expressed({"smirk": 1.0})


@pytest.mark.parametrize(("field", "value"), [
    ("identity", np.zeros(3)), ("pose", np.zeros(3)), ("camera", np.full(3, np.nan)),
    ("light", np.full((9, 3), np.inf))])
def test_numbers_of_another_shape_or_not_finite_are_refused(field, value):
    with pytest.raises(BadInput, match=field):
        replace(HeadCode.neutral(LAYOUT), **{field: value})


def test_a_lamp_shades_the_side_it_is_on():
    right, left, up = np.eye(3)[0], -np.eye(3)[0], np.eye(3)[1]
    shade = shading_basis(np.stack([right, left, up])) @ directional_light(90.0, 0.0, strength=1.0, ambient=0.0)
    np.testing.assert_allclose(shade[0], 1, atol=0.1)
    np.testing.assert_allclose(shade[1], 0, atol=0.1)
    assert shade[1, 0] < shade[2, 0] < shade[0, 0]


def some_light() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)


def test_a_turned_light_shades_a_turned_surface_as_the_light_did_before():
    turn = rotation_from(35.0, -20.0, 50.0)
    normals = np.random.default_rng(1).normal(size=(50, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    before = shading_basis(normals) @ some_light()
    after = shading_basis(normals @ turn.T) @ turned_light(some_light(), turn)
    np.testing.assert_allclose(after, before, atol=1e-5)


def test_relighting_turns_a_lamp_to_image_right_and_multiplies_it():
    code = HeadCode.neutral(LAYOUT).lit(directional_light(-10.0, 20.0))
    np.testing.assert_allclose(code.relit(turn=50.0).light, directional_light(40.0, 20.0), atol=1e-6)
    np.testing.assert_allclose(code.relit(gain=1.5).light, 1.5 * code.light, atol=1e-6)


def test_an_opened_jaw_lowers_the_chin_and_nothing_else(head):
    neutral = HeadCode.neutral(head.layout)
    opened = on_screen(head, neutral.opened(jaw=20.0)) - on_screen(head, neutral)
    assert opened[CHIN, 1] > 0.05
    np.testing.assert_allclose(opened[[NOSE_TIP, FOREHEAD]], 0, atol=1e-3)
    assert not neutral.opened(jaw=20.0).opened(jaw=0.0).pose.any()


def test_numbers_become_the_same_code_again():
    code = replace(HeadCode.neutral(LAYOUT).posed(yaw=12.0), light=some_light(), identity=np.array([1.5, -2.0]))
    again = HeadCode.from_numbers(LAYOUT, json.loads(json.dumps(code.numbers())))
    assert again.numbers() == code.numbers()
    np.testing.assert_allclose(again.camera, code.camera, atol=1e-6)


@pytest.mark.parametrize(("field", "value"), [
    ("identity", [0.0]), ("identity", "who"), ("expression", [[0.0], [1.0, 2.0]]), ("pose", [float("nan")] * 6),
    ("pose", None), ("camera", [1e30, 0, 0]), ("camera", [-5, 0, 0]), ("light", {"sun": 1}), ("crop", np.zeros((3, 3))),
    ("camera", [10**400, 0, 0]), ("expression", [0, 0, 25]), ("identity", [-1e3, 0])])
def test_strange_numbers_make_no_head(field, value):
    numbers = HeadCode.neutral(LAYOUT).numbers() | {field: value}
    with pytest.raises(BadInput, match=field):
        HeadCode.from_numbers(LAYOUT, numbers)


@pytest.mark.parametrize("numbers", [None, [], {}, {"pose": [0] * 6}, HeadCode.neutral(LAYOUT).numbers() | {"hat": 1}])
def test_numbers_of_something_else_make_no_head(numbers):
    with pytest.raises(BadInput, match="not the numbers of a head, expected identity"):
        HeadCode.from_numbers(LAYOUT, numbers)


REFERENCE = replace(HeadCode.neutral(LAYOUT).posed(yaw=10.0), pose=np.full(6, 0.1))
TARGET = replace(
    HeadCode.neutral(LAYOUT), identity=np.ones(2), expression=np.ones(3), texture=np.ones(1), pose=np.full(6, 0.2),
    camera=np.array([7, 0.1, 0.2]), light=np.ones((9, 3)), crop=2 * np.eye(3))
FIELDS = {"shape": lambda code: code.identity, "tex": lambda code: code.texture, "exp": lambda code: code.expression,
          "pose_global": lambda code: code.pose[:3], "pose_jaw": lambda code: code.pose[3:],
          "cam": lambda code: code.camera, "light": lambda code: code.light, "tform": lambda code: code.crop}


def sources(mixed):
    """Which code each of the official fields came from."""
    return {name: "pose_image" if np.array_equal(field(mixed), field(TARGET)) else "reference"
            for name, field in FIELDS.items()}


def test_every_recorded_mode_string_takes_what_the_official_tool_takes():
    path = GOLDEN / "modes.json"
    if not path.exists():
        pytest.skip(f"modes.json is not in {GOLDEN}")
    for modes, wanted in json.loads(path.read_text()).items():
        assert sources(mix(REFERENCE, TARGET, modes)) == {name: wanted[name] for name in FIELDS}, modes


@pytest.mark.parametrize(("modes", "taken"), [
    ("", set()), ("position", {"cam", "tform"}), ("pose", {"pose_global"}), ("lighting", {"light"}),
    ("expression", {"exp", "pose_jaw"}), ("position, pose", {"cam", "tform", "pose_global"}),
    ("all", {"cam", "tform", "pose_global", "light", "exp", "pose_jaw"}), ("position,all", {"cam", "tform"}),
    ("all,", set())])
def test_modes_take_their_fields_and_nothing_else(modes, taken):
    assert {name for name, source in sources(mix(REFERENCE, TARGET, modes)).items() if source == "pose_image"} == taken


def test_the_default_takes_position_and_pose():
    assert sources(mix(REFERENCE, TARGET)) == sources(mix(REFERENCE, TARGET, "position,pose"))


def test_an_unknown_mode_is_named():
    with pytest.raises(BadInput, match='"gaze" is not known'):
        mix(REFERENCE, TARGET, "pose,gaze")


def test_everyday_names_set_their_units():
    neutral = HeadCode.neutral(LAYOUT)
    assert (neutral.expressed({"smile": 0.7}).expression == neutral.expressed({"mouthSmile": 0.7}).expression).all()
    assert neutral.expressed({"smile": 0.7}).expression.any()
