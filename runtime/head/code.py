"""A head as numbers: who it is, what it does, where it stands in the frame, and how it is lit.

Axes of the head: x right, y up, z to the viewer, metres. Axes of the frame: x right, y down, both -1..1 over width
and height. +yaw turns the nose to image right, +pitch up, +roll clockwise as seen; R = Rz Rx Ry.
"""
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from caphuman_edge.runtime.errors import BadInput
from caphuman_edge.runtime.head.light import directional_light, turned_light
from caphuman_edge.runtime.head.skinning import axis_angle, rotation_matrices
from caphuman_edge.runtime.perception.rotation import rotation_from, yaw_pitch_roll

Vector = Float[np.ndarray, "_"]  # any float on the way in, float32 inside
EVERYDAY_NAMES = {"smile": "mouthSmile", "frown": "mouthFrown", "blink": "eyeBlink", "open": "jawOpen",
                  "pout": "mouthPucker", "surprise": "browInnerUp"}
MOVED_ASIDE = ("jaw", "mouth")  # jawLeft and jawRight are directions, not sides: together they undo each other
NEUTRAL_SCALE = 5.0  # the mean head then fills about two thirds of the frame
LARGEST_NUMBER, SMALLEST_CROP = 1e4, 1e-6  # beyond these, numbers from a file describe no head in a frame
LARGEST_STRENGTHS = dict.fromkeys(["identity", "expression", "texture"], 20.0)  # more is spikes, gigabytes to draw


@dataclass(frozen=True)
class HeadLayout:
    """What the numbers of a HeadCode mean in one head model."""

    identity_count: int
    expression_names: tuple[str, ...]
    texture_count: int
    root: tuple[float, float, float]  # the joint that the global rotation turns about, metres
    centre: tuple[float, float, float]  # the middle of the mean head, metres

    @property
    def lever(self) -> Float32[np.ndarray, "3"]:
        """From the root joint to the middle of the head, metres."""
        return np.asarray(np.subtract(self.centre, self.root), np.float32)


@dataclass(frozen=True, eq=False)
class HeadCode:
    """One head in one frame. Immutable: every method returns another code."""

    layout: HeadLayout
    identity: Vector  # standard deviations
    expression: Vector  # strengths in the order of layout.expression_names, 0 = neutral
    texture: Vector
    pose: Vector  # (6,) axis-angles in radians: global, jaw
    camera: Vector  # (3,) scale in frame half-widths a metre; shift right and up in metres, applied before scaling
    light: Float[np.ndarray, "9 3"]  # spherical harmonics, RGB
    crop: Float[np.ndarray, "3 3"] = field(default_factory=lambda: np.eye(3, dtype=np.float32))
    # `crop` is a row-vector affine on the projected x, y: no change unless the frame is another frame's crop or not
    # square; it generalises the official crop transform.

    def __post_init__(self) -> None:
        shapes = {"identity": (self.layout.identity_count,), "expression": (len(self.layout.expression_names),),
                  "texture": (self.layout.texture_count,), "pose": (6,), "camera": (3,), "light": (9, 3),
                  "crop": (3, 3)}
        for name, shape in shapes.items():
            object.__setattr__(self, name, _checked(name, getattr(self, name), shape))

    @classmethod
    def neutral(cls, layout: HeadLayout) -> "HeadCode":
        """The mean head in the middle of the frame, facing the viewer, lit from the front and above."""
        camera = np.array([NEUTRAL_SCALE, -layout.centre[0], -layout.centre[1]])
        return cls(layout, np.zeros(layout.identity_count), np.zeros(len(layout.expression_names)),
                   np.zeros(layout.texture_count), np.zeros(6), camera, directional_light(0.0, 30.0))

    def numbers(self) -> dict[str, list[Any]]:
        """Every array as nested lists for JSON; all of the code but its layout.

        The shortest decimals that give the same float32 again.
        """
        arrays = {part.name: getattr(self, part.name) for part in fields(self) if part.name != "layout"}
        return {name: array.astype(str).astype(np.float64).tolist() for name, array in arrays.items()}

    @classmethod
    def from_numbers(cls, layout: HeadLayout, numbers: object) -> "HeadCode":
        """The code whose `numbers` these are; they may come from a stranger's file.

        Raises BadInput for anything but the numbers of a head with this layout.
        """
        names = [part.name for part in fields(cls) if part.name != "layout"]
        if not isinstance(numbers, dict) or set(numbers) != set(names):
            raise BadInput(f"these are not the numbers of a head, expected {', '.join(names)} and nothing else")
        neutral = cls.neutral(layout)
        code = cls(layout, **{name: _array(name, numbers[name], getattr(neutral, name).shape) for name in names})
        if code.camera[0] <= 0 or np.linalg.det(code.crop[:2, :2]) < SMALLEST_CROP:
            raise BadInput("the head's camera or crop leaves nothing of it to see, expected positive scales")
        return code

    @property
    def rotation(self) -> Float32[np.ndarray, "3 3"]:
        """The head's global rotation."""
        return rotation_matrices(self.pose[None, :3])[0]

    @property
    def angles(self) -> tuple[float, float, float]:
        """Yaw, pitch and roll in degrees."""
        return yaw_pitch_roll(self.rotation)

    @property
    def centre(self) -> Float32[np.ndarray, "2"]:
        """Where the middle of the head appears, in frame coordinates."""
        middle = self.rotation @ self.layout.lever + np.asarray(self.layout.root, np.float32)
        return np.asarray(project(middle[None], self)[0, :2])

    def posed(self, yaw: float | None = None, pitch: float | None = None, roll: float | None = None) -> "HeadCode":
        """Turn the head to these angles (degrees, absolute) about its middle; None keeps an angle."""
        angles = [old if new is None else new for old, new in zip(self.angles, (yaw, pitch, roll), strict=True)]
        return self.turned(rotation_from(*angles))

    def turned(self, rotation: Float[np.ndarray, "3 3"]) -> "HeadCode":
        """Give the head this global rotation; its middle stays where it appears."""
        moved = (self.rotation - rotation) @ self.layout.lever
        pose = np.concatenate([axis_angle(rotation), self.pose[3:]])
        return replace(self, pose=pose, camera=self.camera + np.array([0, *moved[:2]]))

    def moved(self, x: float = 0, y: float = 0, scale: float = 1) -> "HeadCode":
        """Shift the head right and up by fractions of half the frame, and scale it about its middle."""
        if scale <= 0:
            raise BadInput(f"head scale is {scale}, expected more than 0")
        middle = self.rotation @ self.layout.lever + np.asarray(self.layout.root, np.float32)
        old_scale, *old_shift = self.camera
        new_scale = old_scale * scale
        step = np.linalg.solve(self.crop[:2, :2].T, [x, -y]) * [1, -1] / new_scale
        shift = (middle[:2] + old_shift) / scale - middle[:2] + step
        return replace(self, camera=np.array([new_scale, *shift]))

    def expressed(self, strengths: Mapping[str, float]) -> "HeadCode":
        """Set expression units by name (layout.expression_names): 0 is neutral, 1 full strength.

        A name without its side (mouthSmile) sets both; so do EVERYDAY_NAMES (smile). A FLAME head's units are
        expression0 and so on, in standard deviations. Raises BadInput for a name that this head does not have.
        """
        expression = self.expression.copy()
        for name, strength in strengths.items():
            expression[self._units(name)] = strength
        return replace(self, expression=expression)

    def opened(self, jaw: float) -> "HeadCode":
        """Turn the jaw down to this angle: degrees, 0 is where the expression leaves it, 25 wide open."""
        return replace(self, pose=np.array([*self.pose[:3], np.radians(jaw), *self.pose[4:]]))

    def lit(self, light: Float[np.ndarray, "9 3"]) -> "HeadCode":
        """Put the head under another light: `directional_light(...)`, another code's, or any 27 coefficients."""
        return replace(self, light=light)

    def relit(self, turn: float = 0.0, gain: float = 1.0) -> "HeadCode":
        """Edit the light: turn it about the vertical axis (degrees, + to image right), multiply it by `gain`."""
        return self.lit(gain * turned_light(self.light, rotation_from(turn, 0.0, 0.0)))

    def _units(self, name: str) -> list[int]:
        """A unit, or both sides of it: `mouthSmile` is mouthSmileLeft and mouthSmileRight."""
        names = self.layout.expression_names
        meant = EVERYDAY_NAMES.get(name, name)
        sides = () if meant in MOVED_ASIDE else (f"{meant}Left", f"{meant}Right")
        units = [i for i, unit in enumerate(names) if unit in (meant, *sides)]
        if not units:
            known = [alias for alias, unit in EVERYDAY_NAMES.items() if any(n.startswith(unit) for n in names)]
            raise BadInput(f'expression "{name}" is not known, expected one of {", ".join([*known, *names])}')
        return units


def project(vertices: Float32[np.ndarray, "v 3"], code: HeadCode) -> Float32[np.ndarray, "v 3"]:
    """Posed vertices (metres) to the frame: x right, y down, -1..1; z smaller is nearer.

    The official orthographic camera: shift, scale, turn y and z around, then the crop on x and y.
    """
    scale, *shift = code.camera
    xy = scale * (vertices[:, :2] + np.asarray(shift, np.float32)) * np.array([1, -1], np.float32)
    cropped = xy @ code.crop[:2, :2] + code.crop[2, :2]
    return np.asarray(np.column_stack([cropped, -scale * vertices[:, 2]]), np.float32)


def _array(name: str, value: object, shape: tuple[int, ...]) -> Float32[np.ndarray, "..."]:
    """Nested lists from JSON as an array of this shape."""
    try:
        numbers = np.asarray(value, np.float64)
    except (TypeError, ValueError, OverflowError):
        numbers = np.full(shape, np.nan)
    largest = LARGEST_STRENGTHS.get(name, LARGEST_NUMBER)
    if numbers.shape != shape or not (np.abs(numbers) <= largest).all():
        raise BadInput(f"the head's {name} is not {shape} numbers up to {largest:g}; use a head that was made "
                       "with this head model")
    return np.asarray(numbers, np.float32)


def _checked(name: str, value: Float[np.ndarray, "..."], shape: tuple[int, ...]) -> Float32[np.ndarray, "..."]:
    numbers = np.asarray(value, np.float32)
    if numbers.shape != shape or not np.isfinite(numbers).all():
        raise BadInput(f"the head's {name} has shape {numbers.shape}, expected {shape} finite numbers; make it "
                       "with this head model")
    return numbers
