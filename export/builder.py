"""Build a bundle from a reference model: every graph in every format asked for, each checked before it is published.

What did not change since another build is taken from that build's bundle (`part_store`), graph by graph.
"""
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from caphuman_edge.export.assemble import copy_data, copy_perception, publish, write_selftest
from caphuman_edge.export.check import Case
from caphuman_edge.export.graphs import PreviewDecoder, modules
from caphuman_edge.export.part_keys import CHECK, SELFTEST, made_of, part_keys
from caphuman_edge.export.part_store import RECORD, PartStore, write_record
from caphuman_edge.export.parts import Facts, Parts
from caphuman_edge.export.stages import TRACED, Job, Options, Stages, jobs
from caphuman_edge.ref.caphuman import CapHuman
from caphuman_edge.ref.tiny_decoder import TinyDecoder
from caphuman_edge.runtime.bundle import check_target, new_bundle, write_manifest
from caphuman_edge.runtime.contract import graphs
from caphuman_edge.runtime.head.storage import OPEN_HEAD
from caphuman_edge.runtime.manifest import Manifest
from caphuman_edge.runtime.schedule import Schedule


@dataclass(frozen=True)
class Sources:
    """Where a bundle's parts come from, besides the reference model."""

    perception: Mapping[str, Path]  # the folder of each graph that measures photos
    name: str
    schedule: Schedule
    provenance: Mapping[str, Any]
    licences: Mapping[str, str]
    licence_text: str
    head: Path = OPEN_HEAD


def build(model: CapHuman, preview: PreviewDecoder, sources: Sources, out: Path, options: Options | None = None,
          report: Callable[[str], None] = lambda line: None, consume: bool = False,
          store: PartStore | None = None, tiny: TinyDecoder | None = None) -> None:
    """Write the bundle at `out`, replacing an older one whole; `report` gets a line a part.

    `consume`: the model is emptied once nothing needs it any more, since what follows needs as much memory again.
    `store`: finished bundles, whose parts are taken where this build would make equal ones.
    `tiny`: the fast decoder that `options.tiny` asks for.
    A build that was stopped goes on where it was: its finished parts lie in `.NAME.parts` beside `out` until the bundle
    is whole. Raises BundleError naming the first graph that does not compute what the reference computes.
    """
    check_target(out, overwrite=True)
    options = options or Options()
    config, specs = model.config, graphs(model.config)
    stages = Stages(modules(model.eval(), preview, tiny), specs, options)
    work = _Work(stages, part_keys(stages.modules, specs, config, options), store or PartStore(), out, report)
    needed = work.needed()
    for job in jobs(options):
        if consume and job[0] not in TRACED:
            model.to("meta")
            gc.collect()  # traced programs refer to the weights, in cycles
        work.do(job, job in needed)
    work.report_origins()
    with new_bundle(out, overwrite=True) as folder:
        components = publish(folder, stages.done, config, options)
        components |= copy_perception(folder, sources.perception, specs)
        components |= copy_data(folder, sources.licence_text, sources.head)
        components[SELFTEST] = write_selftest(folder, work.answers, components, specs)
        components[RECORD] = write_record(folder, components, stages.done, work.keys, options)
        write_manifest(folder, Manifest(sources.name, config, sources.schedule, components,
                                        dict(sources.provenance), dict(sources.licences)))
    work.parts.clear()


class _Work:
    """The parts of one build: which are there, which must be made, and from where each comes."""

    def __init__(self, stages: Stages, keys: Mapping[Job, str], store: PartStore, out: Path,
                 report: Callable[[str], None]):
        self.stages, self.keys, self.store, self.report = stages, keys, store, report
        named = {_name(job): keys[job] for job in jobs(stages.options)}
        self.parts = Parts(out.with_name(f".{out.name}.parts"), named, report)
        self.equal = dict.fromkeys(store.origins, 0)  # parts of this build that each bundle has, too

    def needed(self) -> set[Job]:
        """What the bundle holds, and all that those of its parts that are not there yet are made from."""
        formats = self.stages.options.formats
        waiting = [job for job in self.keys if job[0].removesuffix(CHECK) in formats]
        waiting += [("reference", graph) for stage, graph in self.keys
                    if stage == SELFTEST and not self.store.find(self.keys[stage, graph])]
        needed: set[Job] = set()
        while waiting:
            job = waiting.pop()
            if job not in needed:
                needed.add(job)
                waiting += [] if self._is_there(job) else made_of(job, self.stages.options)
        return needed

    def do(self, job: Job, needed: bool) -> None:
        """Make a part, or take it from where it is."""
        name = _name(job)
        if not needed:
            self.parts.skip(name)
            return
        stored = self.store.find(self.keys[job])
        make: Callable[[Path], Facts] = partial(self.store.take, stored) if stored else partial(self.stages.run, job)
        self.stages.done[job] = self.parts.make(name, make, stored.origin if stored else None)
        if stored:
            self.equal[stored.origin] += 1

    def answers(self, graph: str) -> list[Case]:
        """The reference's of a graph, for the self-test: computed for this build, or what another bundle stored."""
        stored = self.store.find(self.keys[SELFTEST, graph])
        if ("reference", graph) in self.stages.done or not stored:
            return self.stages.cases(graph)
        return [self.store.answers(stored, self.stages.specs[graph])]

    def report_origins(self) -> None:
        """A line for each bundle that was to give parts."""
        for origin, count in self.equal.items():
            self.report(f"{count} of {len(self.parts.keys)} parts are those of {origin}" if count else
                        f"nothing of {origin} could be kept: it is of other weights, options, libraries or code")

    def _is_there(self, job: Job) -> bool:
        return self.parts.holds(_name(job)) or self.store.find(self.keys[job]) is not None


def _name(job: Job) -> str:
    return "/".join(job)
