"""The stages of a build, one function a kind of part: the reference's answers, then each format written and checked."""
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from caphuman_edge.export.check import (
    FLOOR_DB,
    FLOOR_HALF_DB,
    Case,
    check_cases,
    load_cases,
    reference_cases,
    save_cases,
)
from caphuman_edge.export.coreml_writer import MAC, CoremlOptions, write_coreml
from caphuman_edge.export.mobile_writer import write_mobile
from caphuman_edge.export.onnx_writer import Storage, save, trace
from caphuman_edge.export.parts import Facts, Part
from caphuman_edge.runtime.backends import open_backend
from caphuman_edge.runtime.contract import GraphSpec
from caphuman_edge.runtime.machine import FUSED, SPLIT

SHARED = {"denoiser": {"denoiser": "model.onnx", "capface": "capface.onnx", "unet": "unet.onnx"}}  # weights, by folder
CONTROL = ("control_encoder", "controlnet")  # once a portrait, once a step
OPENVINO_FILE = "openvino_model.xml"  # the names under which other hosts look for it
COREML_FILE = "model.mlpackage"
MOBILE_FILE = "model.ort"
TRACED = ("reference", "onnx", "coreml")  # stages that need the reference
CONVERTED = ("openvino", "ort")  # formats that are made from the ONNX graphs
ALWAYS_EXACT = ("hint_encoder",)  # its gates are thresholds, and it is small
RUN_BY = {"onnx": "ort", "ort": "ort", "openvino": "openvino"}  # format: the backend that checks it
Job = tuple[str, str]  # stage, graph or folder


@dataclass(frozen=True)
class Options:
    """What is made of a model."""

    formats: tuple[str, ...] = ("onnx",)  # some of runtime.manifest.FORMATS
    storage: Storage = "exact"  # of the weights
    fused: bool = True  # the denoiser as one graph; Core ML never has it
    split: bool = True  # capface and unet apart; Core ML always has them, and so has what holds a ControlNet
    coreml: CoremlOptions = MAC
    control: bool = False  # the model has a second ControlNet, whose residuals only the split form can take
    tiny: bool = False  # there is a fast decoder, too

    def graphs_in(self, format_name: str) -> tuple[str, ...]:
        """The reference's graphs that this format holds, in the order of their use."""
        coreml = format_name == "coreml"
        split = self.split or self.control or coreml
        denoiser = (*(FUSED if self.fused and not coreml else ()), *(SPLIT if split else ()))
        return ("text_encoder", "image_encoder", "hint_encoder", *denoiser, *(CONTROL if self.control else ()),
                "vae_encoder", "vae_decoder", *(("tiny_decoder",) if self.tiny else ()), "preview_decoder")

    def folder_of(self, format_name: str, graph: str) -> str:
        """The folder in which a graph lies: in ONNX with the fused denoiser, if they share weights, else its own."""
        fused = self.fused and format_name == "onnx"
        return next((place for place, files in SHARED.items() if fused and graph in files), graph)

    def onnx_file(self, graph: str) -> str:
        """The name of a graph's ONNX file."""
        return SHARED.get(self.folder_of("onnx", graph), {}).get(graph, "model.onnx")


def jobs(options: Options) -> list[Job]:
    """Every part of a build, each after those that it needs; first those that need the reference itself."""
    wanted = dict.fromkeys(name for kind in options.formats for name in options.graphs_in(kind))
    planned = [("reference", name) for name in wanted]
    if set(options.formats) - {"coreml"}:
        places = (options.folder_of("onnx", name) for name in options.graphs_in("onnx"))
        planned += [("onnx", place) for place in dict.fromkeys(places)]
    if "coreml" in options.formats:
        planned += [("coreml", name) for name in options.graphs_in("coreml")]
    for kind in options.formats:
        for name in options.graphs_in(kind):
            planned += [(kind, name)] if kind in CONVERTED else []
            planned.append((f"{kind} check", name))
    return planned


class Stages:
    """Makes the parts of one build; `done` holds those that are finished."""

    def __init__(self, parts: Mapping[str, nn.Module], specs: Mapping[str, GraphSpec], options: Options):
        self.modules, self.specs, self.options = parts, specs, options
        self.done: dict[Job, Part] = {}

    def run(self, job: Job, folder: Path) -> Facts:
        """Make one part in this folder."""
        stage, name = job
        makers: dict[str, Callable[[str, Path], Facts]] = {
            "reference": self._reference, "onnx": self._onnx, "openvino": self._openvino, "coreml": self._coreml,
            "ort": self._mobile}
        if stage in makers:
            return makers[stage](name, folder)
        return self._check(stage.removesuffix(" check"), name, folder)

    def cases(self, graph: str) -> list[Case]:
        """What the reference gave; Core ML takes a text batch of one alone, so bundles with it are tested with that."""
        cases = load_cases(self.done["reference", graph].folder / "cases.npz")
        return cases[:1] if "coreml" in self.options.formats else cases

    def file(self, kind: str, graph: str) -> Path:
        """A finished graph's file in one format."""
        if kind == "onnx":
            return self.done[kind, self.options.folder_of(kind, graph)].folder / self.options.onnx_file(graph)
        files = {"openvino": OPENVINO_FILE, "coreml": COREML_FILE, "ort": MOBILE_FILE}
        return self.done[kind, graph].folder / files[kind]

    def _reference(self, graph: str, folder: Path) -> Facts:
        save_cases(reference_cases(self.modules[graph], self.specs[graph]), folder / "cases.npz")
        return {}

    def _onnx(self, place: str, folder: Path) -> Facts:
        names = [name for name in self.options.graphs_in("onnx") if self.options.folder_of("onnx", name) == place]
        models = {self.options.onnx_file(name): trace(self.modules[name], self.specs[name]) for name in names}
        return {"precision": save(models, folder, "exact" if place in ALWAYS_EXACT else self.options.storage)}

    def _openvino(self, graph: str, folder: Path) -> Facts:
        from caphuman_edge.export.openvino_writer import write_openvino

        write_openvino(self.file("onnx", graph), folder / OPENVINO_FILE)
        return {"precision": self.done["onnx", self.options.folder_of("onnx", graph)].facts["precision"]}

    def _mobile(self, graph: str, folder: Path) -> Facts:
        write_mobile(self.file("onnx", graph), folder / MOBILE_FILE)
        return {"precision": "f32"}  # the casts from halves are folded

    def _coreml(self, graph: str, folder: Path) -> Facts:
        stored = write_coreml(self.modules[graph], self.specs[graph], folder / COREML_FILE, self.options.coreml)
        return {"precision": stored}

    def _check(self, kind: str, name: str, folder: Path) -> Facts:
        path = self.file(kind, name)
        if kind == "coreml":
            from caphuman_edge.export.coreml_check import FLOORS_DB, check_packages

            floor = FLOORS_DB[self.done[kind, name].facts["precision"]]
            return check_packages(path, self.specs[name], self.cases(name)[:1], floor)
        floor = FLOOR_HALF_DB if self.options.storage == "f16" and name not in ALWAYS_EXACT else FLOOR_DB
        graph = open_backend(RUN_BY[kind]).load(path, precision="f32", cache_dir=folder / "compiled")
        parity = check_cases(str(path), graph, self.cases(name), floor)
        shutil.rmtree(folder / "compiled", ignore_errors=True)
        return parity
