"""People who exist nowhere, drawn by the embedded miniature: photos for a gate where the user has none at hand."""
from pathlib import Path

import numpy as np

from caphuman_edge.quant.tasks import prompt_of
from caphuman_edge.runtime.bundle import Bundle
from caphuman_edge.runtime.errors import FaceError
from caphuman_edge.runtime.head import HeadCode
from caphuman_edge.runtime.image import save_png
from caphuman_edge.runtime.perceive import Subject
from caphuman_edge.runtime.perception import FaceLandmarks
from caphuman_edge.runtime.pipeline import Pipeline
from caphuman_edge.runtime.portrait import AI_GENERATED

POSES = ((20.0, 5.0), (-25.0, 0.0), (30.0, -8.0), (-15.0, 8.0), (12.0, -5.0), (-35.0, 4.0), (25.0, 0.0), (-20.0, -6.0))
HAIR = ("brown", "black", "blond", "grey", "red")
RAISED, ENLARGED = -0.1, 1.45  # the mean head, framed as the miniature's training pictures
TRIES = 4  # seeds for each, since some portraits show no face that can be measured
SEED = 20261


def draw_strangers(folder: Path, count: int, threads: int | None = None) -> None:
    """Have `count` portraits in a folder, each of another person with another turn of the head; those there stay.

    Raises FaceError where the miniature draws no face, which a whole one does not do.
    """
    missing = [k for k in range(count) if not _file(folder, k).exists()]
    if missing:
        with Pipeline(Bundle.open(), threads=threads) as pipe:
            for k in missing:
                save_png(_file(folder, k), _portrait(pipe, k), AI_GENERATED)


def _portrait(pipe: Pipeline, number: int) -> np.ndarray:
    """(h, w, 3) uint8, with a face that can be found again."""
    yaw, pitch = POSES[number % len(POSES)]
    for seed in range(number * TRIES, (number + 1) * TRIES):
        subject = nobody(pipe, np.random.default_rng([SEED, seed]))
        head = subject.head.moved(y=RAISED, scale=ENLARGED).posed(yaw=yaw, pitch=pitch)
        prompt = prompt_of({"hair": HAIR[seed % len(HAIR)], "background": "grey", "glasses": "no", "light": "front"})
        *_, last = pipe.generate(subject, head, prompt=prompt, seed=seed)
        picture = last.image.pixels
        try:
            pipe.perceive(picture, face=1)
        except FaceError:
            continue
        return picture
    raise FaceError(f"the embedded bundle drew no face in {TRIES} portraits; name a folder of photos instead")


def nobody(pipe: Pipeline, rng: np.random.Generator) -> Subject:
    """The mean head with features drawn at random."""
    config = pipe.bundle.config
    size, identity = config.vision.image_size, rng.normal(size=config.identity_width).astype(np.float32)
    face = FaceLandmarks(np.zeros((478, 3), np.float32), 1.0, np.zeros(52, np.float32))
    return Subject(np.zeros((64, 64, 3), np.uint8), face, HeadCode.neutral(pipe.head_model.layout),
                   identity / np.linalg.norm(identity), np.zeros((3, size, size), np.float32))


def _file(folder: Path, number: int) -> Path:
    return folder / f"stranger-{number}.png"
