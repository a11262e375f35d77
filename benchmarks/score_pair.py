"""One pair of the score: what is asked for, the portrait and its dummies, and what is measured of each of them."""
from functools import cache

import numpy as np

from caphuman_edge.quant.heldout import Pair, Pictures
from caphuman_edge.quant.judges import Judge
from caphuman_edge.quant.measures import ANGLES, Measurer, expression_units, told_by_head
from caphuman_edge.quant.tasks import Task, Tasks
from caphuman_edge.runtime.head import HeadCode
from caphuman_edge.runtime.image import resize
from caphuman_edge.runtime.perception.graph import Graph
from caphuman_edge.runtime.pipeline import Pipeline
from caphuman_edge.runtime.request import Settings
from caphuman_edge.runtime.sheet import map_pictures

BACKDROP = 128  # grey around the pasted map
Picture = np.ndarray  # (h, w, 3) uint8


class Bench:
    """Everything that makes and measures portraits, loaded once."""

    def __init__(self, pipe: Pipeline, pictures: Pictures, judge: Judge, parser: Graph, settings: Settings,
                 dealt: bool):
        """`settings` but for prompt and seed; `dealt`: prompts name attributes at random, else the reference's own."""
        self.pipe, self.judge, self.settings, self.dealt = pipe, judge, settings, dealt
        self.measurer = Measurer(pipe, parser)
        self.tasks = Tasks(lambda name: self.measurer.see(pictures.read(name), pictures.fit), told_by_head,
                           pictures.least_yaw)
        self.identity = cache(self._identity)

    def task(self, pair: Pair) -> Task | None:
        """What the pair asks for; None where the reference shows no measurable face."""
        return self.tasks.task(pair, None if self.dealt else self.measurer.part_attributes)

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
        seen = self.measurer.see(picture)
        if seen is None:
            return {"found": False}
        identity = self.judge(picture, seen.face)
        others = [self.identity(name) for name in pair.others if self.tasks.measured(name)]
        return {"found": True, **self.measurer.head_figures(seen, task.head),
                "own": float(identity @ self.identity(pair.reference)),
                "others": [float(identity @ other) for other in others], "attributes": self.measurer.attributes(seen)}

    def _identity(self, name: str) -> np.ndarray:
        subject = self.tasks.measured(name)
        return self.judge(subject.photo, subject.face)


def wanted_of(task: Task) -> dict[str, object]:
    """What is asked for, in the form of `Bench.measure`."""
    return {"angles": dict(zip(ANGLES, task.head.angles, strict=True)), "units": expression_units(task.target.face),
            "attributes": task.attributes}
