"""A photo's landmarks to a HeadCode: pose, camera, identity and expression, then light and texture.

One Gauss-Newton problem: the projected landmarks should meet the measured ones, which are first corrected for what the
landmark network is known to misplace. Identity coefficients are drawn to 0, expression units to the measured blendshape
scores. A FLAME head has no such units and opens its mouth with the jaw joint: its expression is drawn to 0, its jaw to
the measured opening. The camera is orthographic, as in the official tool.
"""
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Float32, Float64, UInt8

from caphuman_edge.runtime.errors import FaceError
from caphuman_edge.runtime.head.appearance import Appearance
from caphuman_edge.runtime.head.code import HeadCode
from caphuman_edge.runtime.head.marks import Marks, turning
from caphuman_edge.runtime.head.model import HeadModel
from caphuman_edge.runtime.head.skinning import axis_angle, rotation_matrices
from caphuman_edge.runtime.perception.bias import landmark_bias
from caphuman_edge.runtime.perception.landmarks import BLENDSHAPES, FACE_OVAL

Points = Float64[np.ndarray, "n 3"]
Vector = Float64[np.ndarray, "p"]
ITERATIONS = 6
LANDMARKS = 478
RIGID = 7  # parameters before the shape: log scale, shift, turn
JAW_TURN = 3  # parameters after identity and expression: the jaw's axis-angle
SMALLEST_FACE = 0.01  # of half the frame
OUTER_EYE_CORNERS = [33, 263]
# Standard deviations. Neighbouring landmarks err together, so each counts for less than its own error would say.
POINT_SIGMA = 0.02  # of the distance between the outer eye corners, across the picture
FEATURE_SIGMA = 0.012  # lips, lids and irises are what one sees first
DEPTH_SIGMA = 1.0  # of the same; depth is the network's guess, and it leans towards the upright face
OVAL_SIGMA = 0.05  # the outline slides along the cheek as the head turns
IDENTITY_SIGMA = 1.0
EXPRESSION_SIGMA = 0.2
UNSEEN_SIGMA = 0.05  # units without a measured score stay near 0
COEFFICIENT_SIGMA = 1.0  # of a head whose expression is no face unit, as FLAME's
WIDE_OPEN = 0.45  # radians that the jaw turns down at full score
LEAST_JAW, LARGEST_JAW = np.array([0, -0.2, -0.2]), np.array([0.7, 0.2, 0.2])  # radians
JAW_SIGMA = np.array([0.15, 0.03, 0.03])  # radians: down, aside, askew
STILL = 1e-4  # the jaw's of a head that has a unit for it
FEATURES = [
    61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291, 409, 270, 269, 267, 0, 37, 39, 40, 185, 78, 191, 80, 81, 82, 13,
    312, 311, 310, 415, 308, 95, 88, 178, 87, 14, 317, 402, 318, 324, 33, 7, 163, 144, 145, 153, 154, 155, 133, 173,
    157, 158, 159, 160, 161, 246, 263, 249, 390, 373, 374, 380, 381, 382, 362, 398, 384, 385, 386, 387, 388, 466,
    *range(468, 478)]


@dataclass(frozen=True, eq=False)
class Frame:
    """A picture's coordinates: x right, y up, z to the viewer, 1 = half of the longer edge."""

    height: int  # px
    width: int

    @property
    def half(self) -> float:
        """Half of the longer edge, px."""
        return max(self.height, self.width) / 2

    @property
    def crop(self) -> Float32[np.ndarray, "3 3"]:
        """What a HeadCode needs so that its frame is the whole picture; without it, the picture padded to a square."""
        return np.diag([2 * self.half / self.width, 2 * self.half / self.height, 1]).astype(np.float32)

    def from_pixels(self, points: Float[np.ndarray, "n 3"]) -> Float64[np.ndarray, "n 3"]:
        """Image pixels (x right, y down, z into the picture) to this frame."""
        middle = np.array([self.width / 2, self.height / 2, 0])
        return np.asarray((points - middle) / self.half * [1, -1, -1])


@dataclass(frozen=True, eq=False)
class Prior:
    """What is known of the shape before the landmarks are seen: identity, expression, jaw."""

    mean: Vector
    sigma: Vector


@dataclass(frozen=True, eq=False)
class Estimate:
    """A rigid placement and a shape: point = scale * rotation @ shape + shift."""

    scale: float
    rotation: Float64[np.ndarray, "3 3"]
    shift: Float64[np.ndarray, "3"]
    shape: Vector  # identity, expression, jaw


class HeadFitter:
    """Fits one head model to photos; what depends on the model alone is worked out once."""

    def __init__(self, model: HeadModel):
        self.model = model
        self.marks = Marks.of(model)
        self.appearance = Appearance(model)
        self.has_units = not set(BLENDSHAPES).isdisjoint(model.expression_names)

    def fit(self, points: Float[np.ndarray, "478 3"], blendshapes: Float[np.ndarray, "52"],
            rotation: Float[np.ndarray, "3 3"], image: UInt8[np.ndarray, "h w 3"]) -> HeadCode:
        """The head in a photo.

        points: image pixels, x right, y down, z into the picture; blendshapes: 0..1 in the order of BLENDSHAPES;
        rotation: where to start from, as `perception.head_rotation` measures it.
        Raises FaceError for points that form no face.
        """
        frame = Frame(*image.shape[:2])
        measured = frame.from_pixels(points)
        if not np.isfinite(measured).all() or np.ptp(measured[:, :2], axis=0).min() < SMALLEST_FACE:
            raise FaceError("the landmarks do not form a face; use a photo that shows the whole face")
        prior = self._prior(blendshapes)
        estimate = self._start(self.marks.among(measured), rotation, prior)
        for _ in range(ITERATIONS):
            estimate = self._improve(estimate, measured, prior)
        return self.appearance.fit(replace(self._code(estimate), crop=frame.crop), image)

    def _prior(self, blendshapes: Float[np.ndarray, "52"]) -> Prior:
        scores = dict(zip(BLENDSHAPES, np.asarray(blendshapes, np.float64), strict=True))
        names = self.model.expression_names
        identity = np.zeros(self.model.layout.identity_count)
        if self.has_units:
            sigma = [EXPRESSION_SIGMA if name in scores else UNSEEN_SIGMA for name in names]
            jaw, jaw_sigma = 0.0, np.full(JAW_TURN, STILL)
        else:
            sigma = [COEFFICIENT_SIGMA] * len(names)
            jaw, jaw_sigma = WIDE_OPEN * scores["jawOpen"], JAW_SIGMA
        mean = np.concatenate([identity, [scores.get(name, 0.0) for name in names], [jaw, 0, 0]])
        return Prior(mean, np.concatenate([identity + IDENTITY_SIGMA, sigma, jaw_sigma]))

    def _start(self, measured: Points, rotation: Float[np.ndarray, "3 3"], prior: Prior) -> Estimate:
        """Scale and shift of the expected shape at the measured rotation, by least squares."""
        turned = self.marks.places(prior.mean)[0] @ np.asarray(rotation, np.float64).T
        centre, target = turned.mean(axis=0), measured.mean(axis=0)
        flat, flat_target = (turned - centre)[:, :2], (measured - target)[:, :2]
        scale = float((flat * flat_target).sum() / (flat**2).sum())
        return Estimate(scale, np.asarray(rotation, np.float64), target - scale * centre, prior.mean)

    def _improve(self, now: Estimate, measured: Float64[np.ndarray, "478 3"], prior: Prior) -> Estimate:
        """One Gauss-Newton step on log scale, shift, a small turn and the shape."""
        places, moves = self.marks.places(now.shape)
        turned = now.scale * places @ now.rotation.T
        slopes = np.concatenate([turned[:, :, None], np.broadcast_to(np.eye(3), (len(turned), 3, 3)),
                                 turning(turned), now.scale * (now.rotation @ moves)], axis=2)
        trust = self.marks.among(_trust(measured))
        target = self.marks.among(measured - now.scale * self._misplaced(now.rotation))
        flat = (trust[..., None] * slopes).reshape(trust.size, -1)
        precision = np.concatenate([np.zeros(RIGID), prior.sigma**-2])
        pull = np.concatenate([np.zeros(RIGID), (prior.mean - now.shape) / prior.sigma**2])
        misses = trust * (target - turned - now.shift)
        step = np.linalg.solve(flat.T @ flat + np.diag(precision), flat.T @ misses.ravel() + pull)
        turn = rotation_matrices(step[None, 4:7])[0].astype(np.float64)
        return Estimate(now.scale * float(np.exp(step[0])), turn @ now.rotation, now.shift + step[1:4],
                        self._possible(now.shape + step[RIGID:]))

    def _misplaced(self, rotation: Float64[np.ndarray, "3 3"]) -> Float64[np.ndarray, "478 3"]:
        """The landmark network's known error, metres; what of it is the open head's own does not concern others."""
        return landmark_bias(rotation, turned_only=len(self.model.landmark_corners) != LANDMARKS)

    def _possible(self, shape: Vector) -> Vector:
        """Muscles neither pull backwards nor further than they can; nor does the jaw."""
        jaw = np.clip(shape[-JAW_TURN:], LEAST_JAW, LARGEST_JAW)
        identity, expression = np.split(shape[:-JAW_TURN], [self.model.layout.identity_count])
        return np.concatenate([identity, np.clip(expression, 0, 1) if self.has_units else expression, jaw])

    def _code(self, estimate: Estimate) -> HeadCode:
        """The same placement in terms of FLAME's root joint, which the shape moves a little."""
        neutral, count = HeadCode.neutral(self.model.layout), self.model.layout.identity_count
        code = replace(neutral, identity=estimate.shape[:count], expression=estimate.shape[count:-JAW_TURN])
        root = (self.model.joint_regressor @ self.model.shaped(code))[0]
        shift = estimate.shift / estimate.scale + estimate.rotation @ root - root
        jaw = np.zeros(JAW_TURN) if self.has_units else estimate.shape[-JAW_TURN:]
        pose = np.concatenate([axis_angle(estimate.rotation), jaw])
        return replace(code, pose=pose, camera=np.array([estimate.scale, *shift[:2]]))


def _trust(measured: Float64[np.ndarray, "478 3"]) -> Float64[np.ndarray, "478 3"]:
    """One over the standard deviation of each coordinate."""
    eyes = float(np.linalg.norm(measured[OUTER_EYE_CORNERS[0]] - measured[OUTER_EYE_CORNERS[1]]))
    sigma = np.full((LANDMARKS, 3), POINT_SIGMA)
    sigma[FEATURES] = FEATURE_SIGMA
    sigma[FACE_OVAL] = OVAL_SIGMA
    sigma[:, 2] = DEPTH_SIGMA
    return np.asarray(1 / (sigma * eyes))
