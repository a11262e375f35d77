"""Build a bundle from a reference model: every graph in every format asked for, each checked before it is published."""
import dataclasses
import gc
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from caphuman_edge import export, ref
from caphuman_edge.export.assemble import copy_data, copy_perception, publish, write_selftest
from caphuman_edge.export.graphs import PreviewDecoder, modules
from caphuman_edge.export.parts import Parts
from caphuman_edge.export.stages import TRACED, Options, Stages, jobs
from caphuman_edge.ref.caphuman import CapHuman
from caphuman_edge.runtime.bundle import check_target, new_bundle, write_manifest
from caphuman_edge.runtime.contract import graphs
from caphuman_edge.runtime.head.storage import OPEN_HEAD
from caphuman_edge.runtime.manifest import Manifest
from caphuman_edge.runtime.schedule import Schedule

LIBRARIES = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "openvino", "coremltools")


@dataclass(frozen=True)
class Sources:
    """Where a bundle's parts come from, besides the reference model."""

    perception: Mapping[str, Path]  # the folder of each graph that measures photos
    name: str
    schedule: Schedule
    provenance: Mapping[str, Any]  # it also tells builds of different weights apart
    licences: Mapping[str, str]
    licence_text: str
    head: Path = OPEN_HEAD


def build(model: CapHuman, preview: PreviewDecoder, sources: Sources, out: Path, options: Options | None = None,
          report: Callable[[str], None] = lambda line: None, consume: bool = False) -> None:
    """Write the bundle at `out`, replacing an older one whole; `report` gets a line a part.

    `consume`: the model is emptied once nothing needs it any more, since what follows needs as much memory again.
    A build that was stopped goes on where it was: its finished parts lie in `.NAME.parts` beside `out` until the bundle
    is whole. Raises BundleError naming the first graph that does not compute what the reference computes.
    """
    check_target(out, overwrite=True)
    options = options or Options()
    planned = jobs(options)
    config, specs = model.config, graphs(model.config)
    parts = Parts(out.with_name(f".{out.name}.parts"), _recipe(model, sources, options), len(planned), report)
    stages = Stages(modules(model.eval(), preview), specs, options)
    for job in planned:
        if consume and job[0] not in TRACED:
            model.to("meta")
            gc.collect()  # traced programs refer to the weights, in cycles
        stages.done[job] = parts.make(f"{job[0]}/{job[1]}", partial(stages.run, job))
    with new_bundle(out, overwrite=True) as folder:
        components = publish(folder, stages.done, config, options)
        components |= copy_perception(folder, sources.perception, specs)
        components |= copy_data(folder, sources.licence_text, sources.head)
        components["selftest"] = write_selftest(folder, stages.cases, components, specs)
        write_manifest(folder, Manifest(sources.name, config, sources.schedule, components,
                                        dict(sources.provenance), dict(sources.licences)))
    parts.clear()


def _recipe(model: CapHuman, sources: Sources, options: Options) -> dict[str, Any]:
    """All that decides what the parts of a build contain; weights by what provenance says of them.

    The preview decoder is left out: it is fitted anew each time, and its last bits differ.
    """
    return {"config": model.config.to_json(), "options": dataclasses.asdict(options), "code": _code(),
            "libraries": {name: _version(name) for name in LIBRARIES}, "provenance": dict(sources.provenance)}


def _code() -> str:
    """sha256 of the sources that make and define graphs."""
    digest = hashlib.sha256()
    for package in (export, ref):
        for path in sorted(file for folder in package.__path__ for file in Path(folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
