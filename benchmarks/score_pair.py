"""One pair of the score: what is asked for, the portrait and its dummies, and what is measured of each of them."""
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from benchmarks.heldout import PAIRING_SEED, Pair, Pictures
from benchmarks.scorer import ArcFace, Scorer
from caphuman_edge.export.attributes import (
    COLOURS,
    HAIR_COLOURS,
    PHRASES,
    head_attributes,
    part_attributes,
    parts_of,
)
from caphuman_edge.runtime.errors import FaceError
from caphuman_edge.runtime.head import HeadCode, mix, project
from caphuman_edge.runtime.image import resize
from caphuman_edge.runtime.perceive import Subject
from caphuman_edge.runtime.perception import BLENDSHAPES, FaceLandmarks
from caphuman_edge.runtime.perception.graph import Graph
from caphuman_edge.runtime.pipeline import Pipeline
from caphuman_edge.runtime.request import Settings
from caphuman_edge.runtime.sheet import map_pictures

LEAST_YAW = 10  # degrees: a target head nearer the viewer tests little
ANGLES = ("yaw", "pitch", "roll")
UNITS: Mapping[str, tuple[str, ...]] = {  # expression units, as the mean of these blendshape scores
    "jawOpen": ("jawOpen",), "mouthSmile": ("mouthSmileLeft", "mouthSmileRight"),
    "eyeBlink": ("eyeBlinkLeft", "eyeBlinkRight")}
DEALT: Mapping[str, tuple[str, ...]] = {  # what prompts name at random, whatever the photos show
    "hair": HAIR_COLOURS, "background": COLOURS, "clothes": COLOURS, "length": ("long", "short"),
    "glasses": ("yes", "no")}
OF_THE_HEAD = ("light", "smile")  # what they name of the target, whose head shows it, too
OUTER_EYE_CORNERS = (33, 263)
BACKDROP = 128  # grey around the pasted map
Picture = np.ndarray  # (h, w, 3) uint8


@dataclass(frozen=True)
class Task:
    """What one portrait should show."""

    reference: Subject
    target: Subject
    target_name: str
    head: HeadCode  # the target's but for identity and texture
    attributes: dict[str, str]
    prompt: str


class Bench:
    """Everything that makes and measures portraits, loaded once."""

    def __init__(self, pipe: Pipeline, pictures: Pictures, scorer: Scorer | ArcFace, parser: Graph,
                 settings: Settings, dealt: bool):
        """`settings` but for prompt and seed; `dealt`: prompts name attributes at random, else the reference's own."""
        self.pipe, self.pictures, self.scorer, self.parser = pipe, pictures, scorer, parser
        self.settings, self.dealt = settings, dealt
        self.measured = cache(self._measured)
        self.identity = cache(self._identity)

    def task(self, pair: Pair) -> Task | None:
        """What the pair asks for; None where the reference shows no measurable face."""
        reference, (target_name, target) = self.measured(pair.reference), self._turned(pair.targets)
        if reference is None:
            return None
        of_head = _head_attributes(target)
        wanted = dealt_attributes(pair.number) if self.dealt else self._part_attributes(reference)
        wanted |= {name: of_head[name] for name in OF_THE_HEAD if name in of_head}
        head = mix(reference.head, target.head, "all")
        return Task(reference, target, target_name, head, wanted, prompt_of(wanted))

    def portrait(self, task: Task, pair: Pair, head: HeadCode) -> Picture:
        """The bundle's answer."""
        *_, last = self.pipe.generate(task.reference, head, self.settings, prompt=task.prompt, seed=pair.seed)
        return last.image.pixels

    def dummies(self, task: Task, pair: Pair) -> dict[str, Picture]:
        """What scores without doing the task; the last one shows how well the head can be measured at all."""
        config = self.pipe.bundle.config
        photo, target = (resize(who.photo, config.height, config.width) for who in (task.reference, task.target))
        return {"frontal": self.portrait(task, pair, task.head.posed(yaw=0, pitch=0, roll=0)),
                "reference": photo, "pasted": self.pasted_map(task.head), "target": target}

    def pasted_map(self, head: HeadCode) -> Picture:
        """The rendered head on grey."""
        maps = self.pipe.maps(head)
        return np.where((maps == 0).all(axis=0)[..., None], np.uint8(BACKDROP), map_pictures(maps)["rendered"])

    def measure(self, picture: Picture, task: Task, pair: Pair) -> dict[str, object]:
        """All that is measured of one answer, ready for JSON; only `found: false` where it shows no face."""
        try:
            seen = self.pipe.perceive(picture, face=1, fit="squash")
        except FaceError:
            return {"found": False}
        identity = self.scorer(picture, seen.face)
        others = [self.identity(name) for name in pair.others if self.measured(name)]
        return {
            "found": True,
            "angles": dict(zip(ANGLES, seen.head.angles, strict=True)),
            "units": expression_units(seen.face),
            "landmarks": self._landmark_distance(seen.face, task.head, picture),
            "own": float(identity @ self.identity(pair.reference)),
            "others": [float(identity @ other) for other in others],
            "attributes": self._part_attributes(seen) | _head_attributes(seen),
        }

    def _part_attributes(self, subject: Subject) -> dict[str, str]:
        found = part_attributes(subject.photo, parts_of(subject.photo, self.parser))
        return {name: value for name, value in found.items() if name in DEALT}

    def _turned(self, names: tuple[str, ...]) -> tuple[str, Subject]:
        """The first picture that is turned far enough."""
        for name in names:
            subject = self.measured(name)
            if subject is not None and abs(subject.head.angles[0]) >= LEAST_YAW:
                return name, subject
        raise FaceError(f"no held-out picture is turned by {LEAST_YAW} degrees or more; use the whole set of pictures")

    def _landmark_distance(self, face: FaceLandmarks, head: HeadCode, picture: Picture) -> float:
        """Mean distance of the measured landmarks from the head's, in percent of that between the outer eye corners.

        The eye distance is taken in space, so that turning away does not shrink it.
        """
        model, (height, width) = self.pipe.head_model, picture.shape[:2]
        wanted = model.landmarks(project(model.vertices(head), head)) * (width / 2, height / 2, width / 2)
        left, right = wanted[list(OUTER_EYE_CORNERS)]
        apart = face.points[:, :2] - wanted[:, :2] - (width / 2, height / 2)
        return float(100 * np.linalg.norm(apart, axis=1).mean() / np.linalg.norm(left - right))

    def _measured(self, name: str) -> Subject | None:
        """A held-out picture as it is: all are framed as the training's were."""
        try:
            return self.pipe.perceive(self.pictures.read(name), face=1, fit="squash")
        except FaceError:
            return None

    def _identity(self, name: str) -> np.ndarray:
        subject = self.measured(name)
        return self.scorer(subject.photo, subject.face)


def dealt_attributes(pair: int) -> dict[str, str]:
    """One value of each of DEALT, the same for every bundle."""
    rng = np.random.default_rng([PAIRING_SEED, pair, 1])
    return {name: str(rng.choice(values)) for name, values in DEALT.items()}


def wanted_of(task: Task) -> dict[str, object]:
    """What is asked for, in the form of `Bench.measure`."""
    return {"angles": dict(zip(ANGLES, task.head.angles, strict=True)), "units": expression_units(task.target.face),
            "attributes": task.attributes}


def expression_units(face: FaceLandmarks) -> dict[str, float]:
    """The strength of each of UNITS, 0..1."""
    return {name: float(np.mean([face.blendshapes[BLENDSHAPES.index(part)] for part in parts]))
            for name, parts in UNITS.items()}


def prompt_of(attributes: Mapping[str, str]) -> str:
    """A prompt that names these attributes as the training's captions do."""
    return ", ".join(["a portrait", *(PHRASES[name][value][0] for name, value in attributes.items())])


def _head_attributes(subject: Subject) -> dict[str, str]:
    return head_attributes(subject.photo, subject.face, subject.head.light)
