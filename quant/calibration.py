"""Calibration data: what denoiser and decoder read on the way from noise to portrait, in the shipped schedule."""
import dataclasses
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from caphuman_edge.export.attributes import PHRASES, captions
from caphuman_edge.quant.recipe import DENOISER
from caphuman_edge.quant.strangers import nobody
from caphuman_edge.runtime.backends import Arrays, Graph
from caphuman_edge.runtime.bundle import Bundle
from caphuman_edge.runtime.contract import HELD_OUT_SEEDS
from caphuman_edge.runtime.errors import BadInput, FaceError
from caphuman_edge.runtime.image import load_photo
from caphuman_edge.runtime.pipeline import Pipeline

Photo = UInt8[np.ndarray, "h w 3"]
POSES = ((-35.0, 0.0, 0.0), (30.0, 8.0, 0.0), (-15.0, -10.0, 5.0), (0.0, 0.0, 0.0), (18.0, -6.0, -8.0),
         (-25.0, 10.0, 0.0), (8.0, 14.0, 3.0), (38.0, 0.0, 6.0))  # yaw, pitch, roll in degrees; taken in turns
SEED = 20260  # of prompts and noise
DECODER = "vae_decoder"
NOTED = (*DENOISER, DECODER)  # graphs whose calls are recorded
STEPS = 10  # recorded of a portrait, at most; others of the next one
DRAWN_TRIES = 4  # seeds for each portrait that is drawn, since some show no face
PHOTOS = (".jpg", ".jpeg", ".png", ".webp")
ARCHIVE = "faces_256.tar"  # of the pictures that the miniature was trained on
TRAINING_PICTURE = re.compile(r"(\d{5})(_[ab])?\.jpg")


def record(bundle: Bundle, photos: Iterator[Photo], portraits: int, folder: Path, threads: int | None = None,
           report: Callable[[str], None] = lambda line: None) -> int:
    """Draw portraits of people in the photos and write what denoiser and decoder read to `folder`, a file a call.

    Heads and prompts vary from portrait to portrait. Returns how many portraits were drawn, which are fewer where the
    photos end. Raises BadInput where no photo shows a face.
    """
    drawn, pipe = 0, _Recorder(bundle, folder, threads)
    with pipe:
        rng = np.random.default_rng(SEED)
        for photo in photos:
            if drawn == portraits:
                break
            try:
                subject = pipe.perceive(photo)
            except FaceError:
                continue
            yaw, pitch, roll = POSES[drawn % len(POSES)]
            steps = pipe.generate(subject, subject.head.posed(yaw, pitch, roll), prompt=_prompt(rng), seed=SEED + drawn)
            stride = max(1, pipe.settings().steps // STEPS)  # type: ignore[operator]
            pipe.keeps = drawn % stride == 0  # a step's graphs run before the step is given
            for step in steps:
                pipe.keeps = (step.index + 1 + drawn) % stride == 0
            pipe.keeps = True
            pipe.decode(step.latent, DECODER)
            drawn += 1
            report(f"calibration portrait {drawn} of {portraits}")
    if not drawn:
        raise BadInput("none of the photos to calibrate with shows a face; name others with --photos")
    return drawn


def recorded(folder: Path, graph: str) -> Iterator[Arrays]:
    """The inputs of one graph, one call at a time, in the order of the calls."""
    for path in sorted(folder.glob(f"{graph}-*.npz")):
        with np.load(path, allow_pickle=False) as stored:
            yield {name: stored[name] for name in stored.files}


def photos_in(places: Sequence[Path]) -> Iterator[Photo]:
    """Photos from files, from folders of them, and from folders with the archive of training pictures.

    Of training pictures the held-out ones are left out. Raises BadInput for a place that holds no photo.
    """
    for place in places:
        files = sorted(path for path in place.iterdir() if _is_photo(path.name)) if place.is_dir() else [place]
        if place.is_dir() and (place / ARCHIVE).is_file():
            yield from _archived(place / ARCHIVE)
        elif files:
            yield from map(load_photo, files)
        else:
            raise BadInput(f"{place} holds no photo ({', '.join(PHOTOS)}); name files or another folder with --photos")


def drawn_photos(count: int) -> Iterator[Photo]:
    """Portraits of nobody, drawn by the embedded miniature: so that nobody's picture need be shipped."""
    with Pipeline(Bundle.open()) as pipe:
        rng = np.random.default_rng(SEED)
        for number in range(DRAWN_TRIES * count):
            *_, last = pipe.generate(nobody(pipe, rng), prompt=_prompt(rng), seed=number)
            yield last.image.pixels


class _Recorder(Pipeline):
    """A pipeline that notes what the NOTED graphs are given, while `keeps` is set."""

    def __init__(self, bundle: Bundle, folder: Path, threads: int | None):
        super().__init__(bundle, threads=threads)
        self.folder, self.keeps, self.count = folder, False, 0

    def graph(self, name: str) -> Graph:
        graph = super().graph(name)
        return dataclasses.replace(graph, run=self._noting(name, graph)) if name in NOTED else graph

    def _noting(self, name: str, graph: Graph) -> Callable[[Arrays], Arrays]:
        def run(arrays: Arrays) -> Arrays:
            if self.keeps:
                np.savez(self.folder / f"{name}-{self.count:05}.npz", **arrays)  # type: ignore[arg-type]
                self.count += 1
            return graph.run(arrays)
        return run


def _prompt(rng: np.random.Generator) -> str:
    """Words that the miniature knows, and every larger model does."""
    attributes = {name: str(rng.choice(list(phrases))) for name, phrases in PHRASES.items()}
    return captions(attributes, 1, rng)[0]


def _archived(archive: Path) -> Iterator[Photo]:
    with tarfile.open(archive) as pictures:
        for member in pictures:
            if _is_photo(member.name) and (file := pictures.extractfile(member)):
                yield np.asarray(Image.open(BytesIO(file.read())).convert("RGB"))


def _is_photo(name: str) -> bool:
    """Whether a file is one to calibrate with."""
    training = TRAINING_PICTURE.fullmatch(name)
    return name.lower().endswith(PHOTOS) and not (training and int(training[1]) < HELD_OUT_SEEDS)
