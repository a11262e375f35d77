"""How well the head's fit meets photos, and finds heads again whose pose is known.

    python -m benchmarks.head_fit --pictures /work/faces [--count N] [--heads N]

Three kinds: held-out photos, of which only the landmarks are known; renders of the open head that are measured as
photos are; and the fit alone, on points that are computed from the head, with noise.
"""
import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.score import PICTURES
from caphuman_edge.export.landmark_bias import Span, picture, random_head
from caphuman_edge.quant.heldout import Pictures
from caphuman_edge.runtime.bundle import Bundle
from caphuman_edge.runtime.errors import CapHumanError, FaceError
from caphuman_edge.runtime.head import HeadCode, HeadFitter, HeadModel, project
from caphuman_edge.runtime.perception import (
    BLENDSHAPES,
    FaceLandmarks,
    Perception,
    head_rotation,
    rotation_from,
    select_face,
    yaw_pitch_roll,
)
from caphuman_edge.runtime.perception.bias import landmark_bias
from caphuman_edge.runtime.pipeline import Pipeline
from caphuman_edge.runtime.render import Renderer

IRISES, EYE_CORNERS = [468, 473], [33, 263]
TOWARDS_VIEWER = np.array([1, -1, -1])  # pixels' x right, y down, z away to x right, y up, z nearer and back
SPAN = Span(yaw=45.0, pitch=20.0, roll=20.0)
SIZE = 512  # px of the renders
SEED = 20250611  # another than the landmarks' known error was measured with
POINT_NOISE, START_NOISE = 0.01, 4.0  # of the irises' distance; degrees
NEAR = 2.0  # degrees
Row = tuple[str, np.ndarray, str]


@dataclass(frozen=True)
class Rig:
    """What measures pictures and draws them."""

    see: Perception
    fitter: HeadFitter
    renderer: Renderer


@dataclass(frozen=True)
class Fitted:
    """One photo's head against its landmarks."""

    plain: np.ndarray  # (478,) distance of the head's landmarks, of the irises'
    corrected: np.ndarray  # the same with the landmark network's known error added to the head's
    eyes: float  # irises' distance over that of the outer eye corners
    turned: np.ndarray  # yaw, pitch, roll that the head has more than the landmarks say, degrees
    apart: float  # the angle between both rotations, degrees


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.head_fit", description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Path, default=PICTURES, metavar="DIR")
    parser.add_argument("--count", type=int, metavar="N", help="photos to fit (default: all held-out ones)")
    parser.add_argument("--heads", type=int, default=300, metavar="N", help="heads to draw (default: %(default)d)")
    options = parser.parse_args()
    try:
        with Pipeline(Bundle.open(None), threads=1) as pipe:
            names = sorted(Pictures(options.pictures).names)[:options.count]
            rig = Rig(pipe.see, HeadFitter(pipe.head_model), pipe.renderer)
            photos = list(fit_photos(rig, options.pictures, names))
            drawn = known_poses(rig, options.heads, on_render)
            exact = known_poses(rig, options.heads, on_points)
    except CapHumanError as error:
        print(f"head_fit: {error}", file=sys.stderr)
        return 2
    print(f"{len(photos)} of {len(names)} held-out photos; {len(drawn)} of {options.heads} renders\n")
    print(table(photo_rows(photos)), pose_table({"render": drawn, "points": exact}), sep="\n\n")
    return 0


def fit_photos(rig: Rig, folder: Path, names: list[str]) -> Iterator[Fitted]:
    """Each photo that can be measured."""
    pictures = Pictures(folder)
    for name in names:
        image = pictures.read(name)
        try:
            face = rig.see.landmarks(image, select_face(rig.see.detect(image), 1))
        except FaceError:
            continue
        yield fit_photo(rig, image, face)


def fit_photo(rig: Rig, image: np.ndarray, face: FaceLandmarks) -> Fitted:
    """The fitted head's landmarks and rotation against the measured ones."""
    seen = head_rotation(face)
    code = rig.fitter.fit(face.points, face.blendshapes, seen, image)
    plain = _places(rig.fitter.model, code, *image.shape[:2])
    corrected = plain + _error(code, *image.shape[:2])
    irises, corners = (np.linalg.norm(face.points[a, :2] - face.points[b, :2]) for a, b in (IRISES, EYE_CORNERS))
    away, near = (np.linalg.norm((places - face.points)[:, :2], axis=1) / irises for places in (plain, corrected))
    between = np.degrees(np.arccos(np.clip((np.trace(code.rotation.T @ seen) - 1) / 2, -1, 1)))
    return Fitted(away, near, irises / corners, np.subtract(code.angles, yaw_pitch_roll(seen)), between)


def known_poses(rig: Rig, count: int, refit: Callable[..., HeadCode]) -> np.ndarray:
    """(n, 3) yaw, pitch, roll that was found less that which was drawn, degrees."""
    misses = []
    for number in range(count):
        rng = np.random.default_rng([SEED, number])
        code = random_head(rig.fitter.model, rng, SPAN)
        try:
            misses.append(np.subtract(refit(rig, code, rng).angles, code.angles))
        except FaceError:
            continue
    return np.array(misses)


def on_render(rig: Rig, code: HeadCode, _: np.random.Generator) -> HeadCode:
    """Detect, measure and fit the head's picture."""
    image = picture(rig.renderer, rig.fitter.model, code, SIZE)
    face = rig.see.landmarks(image, select_face(rig.see.detect(image), 1))
    return rig.fitter.fit(face.points, face.blendshapes, head_rotation(face), image)


def on_points(rig: Rig, code: HeadCode, rng: np.random.Generator) -> HeadCode:
    """Fit points computed from the head, with the landmark network's known error and noise."""
    points = _places(rig.fitter.model, code, SIZE, SIZE) + _error(code, SIZE, SIZE)
    eyes = np.linalg.norm(points[IRISES[0]] - points[IRISES[1]])
    strengths = dict(zip(rig.fitter.model.expression_names, code.expression, strict=True))
    start = rotation_from(*(angle + rng.normal(0, START_NOISE) for angle in code.angles))
    return rig.fitter.fit(points + rng.normal(0, POINT_NOISE * eyes, points.shape),
                           np.array([strengths.get(name, 0.0) for name in BLENDSHAPES]), start,
                           np.full((SIZE, SIZE, 3), 128, np.uint8))


def photo_rows(photos: list[Fitted]) -> list[Row]:
    """What is shown of photos: values and their unit."""
    plain, corrected = (np.stack([getattr(photo, kind) for photo in photos]) * 100 for kind in ("plain", "corrected"))
    eyes, turned = np.array([photo.eyes for photo in photos])[:, None], np.stack([photo.turned for photo in photos])
    return [("landmarks, of the irises' distance", plain.ravel(), " %"),
            ("landmarks, of the outer eye corners' distance", (plain * eyes).ravel(), " %"),
            ("a photo's mean landmark, of the irises' distance", plain.mean(axis=1), " %"),
            ("landmarks, the network's known error added", corrected.ravel(), " %"),
            *((f"{axis} against the landmarks' own", np.abs(turned[:, i]), "°")
              for i, axis in enumerate(("yaw", "pitch", "roll"))),
            ("angle between both rotations", np.array([photo.apart for photo in photos]), "°")]


def table(rows: list[Row]) -> str:
    """Markdown: median, 90th percentile and mean of each row."""
    lines = [f"| {name} | {np.median(values):.2f}{unit} | {np.percentile(values, 90):.2f}{unit} | "
             f"{values.mean():.2f}{unit} |" for name, values, unit in rows]
    return "\n".join(["| held-out photos | median | 90th percentile | mean |", "| --- | --- | --- | --- |", *lines])


def pose_table(kinds: dict[str, np.ndarray]) -> str:
    """Markdown: each kind's errors by axis."""
    lines = ["| known pose, degrees | median | mean | 90th percentile | within 2 | bias |",
             "| --- | --- | --- | --- | --- | --- |"]
    for kind, misses in kinds.items():
        for axis, miss in zip(("yaw", "pitch", "roll"), misses.T, strict=True):
            size = np.abs(miss)
            lines.append(f"| {kind}: {axis} | {np.median(size):.2f} | {size.mean():.2f} | "
                         f"{np.percentile(size, 90):.2f} | {100 * (size <= NEAR).mean():.0f} % | {miss.mean():+.2f} |")
    return "\n".join(lines)


def _places(model: HeadModel, code: HeadCode, height: int, width: int) -> np.ndarray:
    """(478, 3) the head's landmarks in image pixels."""
    half = max(height, width) / 2
    screen = model.landmarks(project(model.vertices(code), code))
    return (screen + [1, 1, 0]) * [width / 2, height / 2, half]


def _error(code: HeadCode, height: int, width: int) -> np.ndarray:
    """(478, 3) pixels by which the landmark network is known to err on such a head."""
    return landmark_bias(code.rotation) * TOWARDS_VIEWER * code.camera[0] * max(height, width) / 2


if __name__ == "__main__":
    sys.exit(main())
