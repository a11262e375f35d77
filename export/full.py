"""What a bundle of official checkpoints holds besides the model: networks that measure photos, licences, provenance."""
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from caphuman_edge.export.builder import Sources
from caphuman_edge.export.official import IdentityGraph, export_graph, export_official
from caphuman_edge.export.weights import Origin, WeightFiles
from caphuman_edge.ref.identity import FaceNet
from caphuman_edge.runtime.bundle import EMBEDDED
from caphuman_edge.runtime.cache import cache_dir, sha256_of
from caphuman_edge.runtime.contract import NANO, Config
from caphuman_edge.runtime.head.storage import OPEN_HEAD
from caphuman_edge.runtime.schedule import Schedule

SOURCES = "sources.json"  # where export_official says what it made graphs from
LANDMARKER = ("face_detector", "face_landmarks", "face_blendshapes")  # those of the embedded bundle
IDENTITY = "id_encoder"
WEIGHT_LICENCES = {  # by the field of WeightFiles that names the file
    "caphuman": "CC-BY-NC-4.0, if it is the official caphuman.ckpt: non-commercial use only",
    "backbone": "that of its author; CreativeML Open RAIL-M, if it is Stable Diffusion 1.5",
    "vae": "that of its author; MIT, if it is sd-vae-ft-mse",
    "tiny_decoder": "that of its author; MIT, if it is TAESD",
    "controlnet": "that of its author; OpenRAIL, if it is one of the official ControlNet 1.1",
    "loras": "that of their authors",
}
COMMON_LICENCES = {
    ", ".join(LANDMARKER): "Apache-2.0, Google (face_landmarker)",
    "tokenizer": "MIT, OpenAI (CLIP vocabulary)",
}
NOTICE = """\
This bundle inherits the licences of all that it was made from. It comes without warranty of any kind.
Do not use it to deceive, or to depict a person without that person's consent.
"""
Measure = tuple[Path, dict[str, Any]]  # a network's folder, and what it was made from
Report = Callable[[str], None]


def sources_of(files: WeightFiles | None, origins: Sequence[Origin], measures: Sequence[Measure], name: str,
               schedule: Schedule, head: Path, seed: int = 0) -> Sources:
    """Everything besides the model; `files` is None where its weights are random, of this seed."""
    made_from = ({"weights": [origin.to_json() for origin in origins]} if files else
                 {"weights": f"random, seed {seed}"})
    described = [source for _, source in measures]
    licences = {**_weight_licences(files), **COMMON_LICENCES, **{each["graph"]: each["licence"] for each in described},
                "head": "CC0-1.0, from MakeHuman data" if head == OPEN_HEAD else "that of the head that you added"}
    provenance = {**made_from, "perception": {each["graph"]: {key: each[key] for key in ("file", "file_sha256")}
                                              for each in described}}
    text = NOTICE + "".join(f"\n{what}: {licence}" for what, licence in licences.items()) + "\n"
    perception = {**{graph: EMBEDDED / graph for graph in LANDMARKER},
                  **{source["graph"]: folder for folder, source in measures}}
    return Sources(perception, name, schedule, provenance, licences, text, head)


def official_networks(files: Mapping[str, Path], report: Report) -> list[Measure]:
    """Graphs of these networks' checkpoints; each is exported once and kept in the user's cache."""
    return [_official_network(graph, path, report) for graph, path in files.items()]


def random_identity(config: Config, folder: Path, seed: int) -> Measure:
    """A face-recognition network that recognises nobody, for bundles of random weights; the miniature keeps its own."""
    if config.identity_width == NANO.identity_width:
        return EMBEDDED / IDENTITY, {"graph": IDENTITY, "file": "SFace of the embedded bundle", "file_sha256": "",
                                     "licence": "Apache-2.0, OpenCV Zoo (SFace)"}
    torch.manual_seed(seed)
    if not (folder / IDENTITY).is_dir():  # of a build that was stopped
        export_graph(IDENTITY, IdentityGraph(FaceNet().eval().requires_grad_(False)), folder)
    return folder / IDENTITY, {"graph": IDENTITY, "file": f"random weights, seed {seed}", "file_sha256": "",
                               "licence": "none: random weights"}


def _official_network(graph: str, path: Path, report: Report) -> Measure:
    digest = sha256_of([path])[path]
    folder = cache_dir() / "official-networks" / version("caphuman-edge") / f"{graph}-{digest[:24]}"
    if not (folder / SOURCES).is_file():
        report(f"exporting {graph} from {path.name}")
        export_official({graph: path}, folder, report)
    (source,) = json.loads((folder / SOURCES).read_text())
    return folder / graph, source


def _weight_licences(files: WeightFiles | None) -> dict[str, str]:
    if files is None:
        return {"weights": "none: random weights"}
    return {field: text for field, text in WEIGHT_LICENCES.items() if getattr(files, field)}
