"""How far the landmark network errs on a turned head: runtime/data/landmark_bias.npy, measured on the open head.

    python -m caphuman_edge.export.landmark_bias [--count N] [--out FILE]

Heads of random shape, expression, colour, light and rotation are drawn and measured as photos are; the points' distance
from where they should be is a cubic in yaw and pitch, by robust least squares. It is made symmetrical: every
picture counts as its mirror image too.
"""
import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float64, UInt8

from caphuman_edge.export.open_head_landmarks import BACKGROUND, MIRROR, mirror_twins
from caphuman_edge.runtime.bundle import Bundle
from caphuman_edge.runtime.condition import condition_maps
from caphuman_edge.runtime.errors import FaceError
from caphuman_edge.runtime.head import HeadCode, HeadModel, directional_light, load_head, project
from caphuman_edge.runtime.perception import rotation_from, select_face
from caphuman_edge.runtime.perception.bias import LARGEST_PITCH, LARGEST_YAW, TERMS, bias_terms
from caphuman_edge.runtime.pipeline import Pipeline
from caphuman_edge.runtime.render import Renderer

SIZE = 384  # px
IDENTITY_SIGMA, TEXTURE_SIGMA = 0.7, 0.4
EXPRESSIONS = ("mouthSmile", "jawOpen", "eyeBlink", "browInnerUp", "mouthPucker", "browDown", "eyeSquint", "mouthFrown")
EXPRESSIONLESS = 0.3  # share of heads
LARGEST_ROLL = 15.0  # degrees
OUTLIER = 0.004  # metres; a point that is off by this counts half
ROUNDS = 4

Offsets = Float64[np.ndarray, "n 478 3"]


@dataclass(frozen=True)
class Span:
    """How much heads differ from each other; degrees, either way."""

    yaw: float = LARGEST_YAW
    pitch: float = LARGEST_PITCH
    roll: float = LARGEST_ROLL


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="pictures to draw (default: %(default)d)")
    parser.add_argument("--seed", type=int, default=77)
    parser.add_argument("--out", type=Path, default=Path("runtime/data/landmark_bias.npy"))
    options = parser.parse_args()
    with Pipeline(Bundle.open(None), threads=1) as pipe:
        angles, offsets = _measured(pipe, options.count, options.seed)
    np.save(options.out, fit_bias(angles, offsets).astype(np.float16))
    print(f"{len(offsets)} of {options.count} pictures measured", file=sys.stderr)
    return 0


def random_head(model: HeadModel, rng: np.random.Generator, span: Span) -> HeadCode:
    """A head of random shape, expression, colour, place, light and rotation."""
    neutral = HeadCode.neutral(model.layout)
    person = replace(neutral, identity=rng.normal(0, IDENTITY_SIGMA, len(neutral.identity)),
                     texture=rng.normal(0, TEXTURE_SIGMA, len(neutral.texture)))
    if rng.random() > EXPRESSIONLESS:
        person = person.expressed({str(name): rng.uniform(0, 0.6) for name in rng.choice(EXPRESSIONS, 2, False)})
    angles = (rng.uniform(-limit, limit) for limit in (span.yaw, span.pitch, span.roll))
    placed = person.posed(*angles).moved(x=rng.uniform(-0.1, 0.1), y=-0.12, scale=rng.uniform(1.2, 1.5))
    return placed.lit(directional_light(rng.uniform(-60, 60), rng.uniform(0, 50)))


def picture(renderer: Renderer, model: HeadModel, code: HeadCode, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The lit head on grey."""
    maps = condition_maps(renderer, model, code, size, size)
    shown = np.where(maps[:3].any(axis=0), maps[6:], BACKGROUND)
    return np.asarray(np.clip(shown * 255, 0, 255).transpose(1, 2, 0), np.uint8)


def fit_bias(angles: Float64[np.ndarray, "n 3"], offsets: Offsets) -> Float64[np.ndarray, "478 3 10"]:
    """Coefficients of `bias_terms` for each landmark and axis; Cauchy weights a landmark and picture."""
    twins = mirror_twins(load_head())
    both = np.concatenate([offsets, (offsets * MIRROR)[:, twins]])
    terms = np.array([bias_terms(yaw, pitch) for yaw, pitch, _ in angles] +
                     [bias_terms(-yaw, pitch) for yaw, pitch, _ in angles])
    weights = np.ones(both.shape[:2])
    for _ in range(ROUNDS):
        found = np.stack([_weighted(terms, both[:, i], weights[:, i]) for i in range(both.shape[1])])
        misses = both - np.einsum("nk,lck->nlc", terms, found)
        weights = 1 / (1 + (misses[..., :2] ** 2).sum(axis=-1) / OUTLIER**2)
    return found


def _measured(pipe: Pipeline, count: int, seed: int) -> tuple[Float64[np.ndarray, "n 3"], Offsets]:
    pairs = [pair for number in range(count) for pair in _one(pipe, np.random.default_rng([seed, number]))]
    angles, offsets = zip(*pairs, strict=True)
    return np.array(angles), np.array(offsets)


def _one(pipe: Pipeline, rng: np.random.Generator) -> Iterator[tuple[tuple[float, float, float], np.ndarray]]:
    """The rotation of one random head and its points' offsets in a level picture; nothing where no face was found."""
    model = pipe.head_model
    code = random_head(model, rng, Span())
    image = picture(pipe.renderer, model, code, SIZE)
    try:
        points = pipe.see.landmarks(image, select_face(pipe.see.detect(image), 1)).points
    except FaceError:
        return
    true = model.landmarks(project(model.vertices(code), code)) * SIZE / 2 + [SIZE / 2, SIZE / 2, 0]
    offsets = (points - true) * [1, -1, -1] / (code.camera[0] * SIZE / 2)
    offsets[:, 2] -= offsets[:, 2].mean()  # the network's depth has no origin
    yield code.angles, offsets @ rotation_from(0.0, 0.0, -code.angles[2]).T


def _weighted(terms: Float64[np.ndarray, "n 10"], offsets: Float64[np.ndarray, "n 3"],
              weights: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "3 10"]:
    root = np.sqrt(weights)[:, None]
    return np.asarray(np.linalg.lstsq(terms * root, offsets * root, rcond=None)[0].T.reshape(3, TERMS))


if __name__ == "__main__":
    sys.exit(main())
