"""What a portrait should show: a person, the head of another picture, and a prompt that names attributes.

Prompts name colours of hair, background and clothes at random, whatever the photos show, and light and smile as the
head has them: what a model draws without reading then scores no better than chance.
"""
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from caphuman_edge.export.attributes import COLOURS, HAIR_COLOURS, PHRASES
from caphuman_edge.quant.heldout import PAIRING_SEED, Pair
from caphuman_edge.runtime.errors import FaceError
from caphuman_edge.runtime.head import HeadCode, mix
from caphuman_edge.runtime.perceive import Subject

DEALT: Mapping[str, tuple[str, ...]] = {  # what prompts name at random, whatever the photos show
    "hair": HAIR_COLOURS, "background": COLOURS, "clothes": COLOURS, "length": ("long", "short"),
    "glasses": ("yes", "no")}
OF_THE_HEAD = ("light", "smile")  # what they name of the target, whose head shows it, too


@dataclass(frozen=True, eq=False)
class Task:
    """What one portrait should show."""

    reference: Subject
    target: Subject
    target_name: str
    head: HeadCode  # the target's but for identity and texture
    attributes: dict[str, str]
    prompt: str


class Tasks:
    """Tasks of pairs; every picture is measured once."""

    def __init__(self, measured: Callable[[str], Subject | None], told: Callable[[Subject], Mapping[str, str]],
                 least_yaw: float):
        """`measured` gives a picture's subject by name; `told` is what its head says; `least_yaw` in degrees."""
        self.measured, self.told, self.least_yaw = cache(measured), told, least_yaw

    def task(self, pair: Pair, attributes: Callable[[Subject], Mapping[str, str]] | None = None) -> Task | None:
        """What the pair asks for; None where the reference shows no measurable face.

        `attributes` tells what the prompt names of the reference, None deals it at random. Raises FaceError where no
        target is turned far enough.
        """
        reference, (name, target) = self.measured(pair.reference), self._turned(pair.targets)
        if reference is None:
            return None
        of_head = self.told(target)
        wanted = dict(attributes(reference)) if attributes else dealt_attributes(pair.number)
        wanted |= {key: of_head[key] for key in OF_THE_HEAD if key in of_head}
        return Task(reference, target, name, mix(reference.head, target.head, "all"), wanted, prompt_of(wanted))

    def _turned(self, names: tuple[str, ...]) -> tuple[str, Subject]:
        """The first picture that is turned far enough."""
        for name in names:
            subject = self.measured(name)
            if subject is not None and abs(subject.head.angles[0]) >= self.least_yaw:
                return name, subject
        raise FaceError(f"no other picture at hand shows a face that is turned by {self.least_yaw:g} degrees or more; "
                        "add pictures, or use the whole set")


def dealt_attributes(pair: int) -> dict[str, str]:
    """One value of each of DEALT, the same for every bundle."""
    rng = np.random.default_rng([PAIRING_SEED, pair, 1])
    return {name: str(rng.choice(values)) for name, values in DEALT.items()}


def prompt_of(attributes: Mapping[str, str]) -> str:
    """A prompt that names these attributes as the training's captions do."""
    return ", ".join(["a portrait", *(PHRASES[name][value][0] for name, value in attributes.items())])
