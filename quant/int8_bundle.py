"""A finished float bundle to an int8 one: calibrate, rewrite, convert, check, publish.

What the recipes do not change is taken over by hard link. As a build does, this goes on where it was stopped: finished
parts lie in `.NAME.parts` beside the new bundle until it is whole. One weight, one call's arrays and one graph are in
memory at a time, so a full-size bundle takes about what its float denoiser takes to run.
"""
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx_ir as ir

from caphuman_edge import export, quant
from caphuman_edge.export.assemble import link_file
from caphuman_edge.export.check import Case, check_cases, load_cases, save_cases
from caphuman_edge.export.coreml_writer import SUFFIX
from caphuman_edge.export.onnx_writer import WEIGHTS, save
from caphuman_edge.export.parts import FACTS, Facts, Part, Parts
from caphuman_edge.export.stages import COREML_FILE, OPENVINO_FILE, RUN_BY
from caphuman_edge.quant.calibration import DECODER, NOTED, drawn_photos, photos_in, record, recorded
from caphuman_edge.quant.coreml_int8 import packages_at, rewrite_package
from caphuman_edge.quant.graph_reader import read_graph
from caphuman_edge.quant.int8_cases import decoder_cases, denoiser_cases, halved, single, stored_case
from caphuman_edge.quant.int8_command import PORTRAITS
from caphuman_edge.quant.ranges import Histograms, grids, load_histograms, observe, save_histograms
from caphuman_edge.quant.recipe import DENOISER, FOLDER, Recipe, read_recipe
from caphuman_edge.quant.rewrite import LayerGrids, layers_of, quantize_model
from caphuman_edge.runtime.backends import Graph, open_backend
from caphuman_edge.runtime.bundle import Bundle, check_target, new_bundle, record_files, write_manifest
from caphuman_edge.runtime.cache import sha256_of
from caphuman_edge.runtime.contract import graphs
from caphuman_edge.runtime.errors import BundleError
from caphuman_edge.runtime.manifest import DATA, Form

FORMATS = ("onnx", "openvino", "coreml")  # that have a recipe; other forms of a graph stay as they are
INT8, NAMELESS = "int8", "val_"
SELFTEST = "selftest"
FLOOR_DB = 20.0  # least PSNR of any output on real calls; a graph that computes something else has less than 10
Report = Callable[[str], None]


@dataclass(frozen=True)
class Calibration:
    """What the ranges of activations are measured on."""

    photos: tuple[Path, ...] = ()  # files and folders; none: portraits that the embedded miniature draws
    portraits: int = PORTRAITS  # to draw, of a photo each


def default_recipes() -> dict[str, Recipe]:
    """Those that were found on the miniature, by format."""
    return {kind: read_recipe(FOLDER / f"{kind}.json") for kind in FORMATS}


def quantize(source: Path, out: Path, recipes: Mapping[str, Recipe], data: Calibration = Calibration(),
             threads: int | None = None, report: Report = lambda line: None,
             accept: Callable[[Path], None] = lambda folder: None) -> None:
    """Write the int8 bundle at `out`, replacing an older one whole; `report` gets a line a part.

    `accept` gets the finished bundle's folder before it takes its place, and raises where it must not; the parts are
    kept then. Raises BundleError for a bundle that is int8 already, that has no ONNX graphs or whose layers have no
    names, and where a graph computes something else than the float one.
    """
    bundle = Bundle.open(source)
    check_target(out, overwrite=True)
    plan = _Plan(bundle, recipes)
    maker = _Maker(plan, data, threads, report)
    parts = Parts(out.with_name(f".{out.name}.parts"), maker.keys(), report)
    for name in maker.names():
        maker.done[name] = parts.make(name, partial(maker.make, name))
    with new_bundle(out, overwrite=True) as folder:
        _publish(bundle, maker, folder)
        accept(folder)
    parts.clear()


class _Plan:
    """Which graphs change in which format, and where they lie."""

    def __init__(self, bundle: Bundle, recipes: Mapping[str, Recipe]):
        self.bundle, self.recipes = bundle, recipes
        self.forms = {(kind, graph): component.forms[kind] for graph, component in bundle.manifest.components.items()
                      for kind, recipe in recipes.items() if kind in component.forms and recipe.changes(graph)}
        self._check()

    def folders(self) -> dict[str, dict[str, str]]:
        """Of the ONNX graphs that change: folder, file in it, graph. Those of a folder share their weights."""
        found: dict[str, dict[str, str]] = {}
        for (kind, graph), form in self.forms.items():
            if kind == "onnx":
                path = PurePosixPath(form.path)
                found.setdefault(str(path.parent), {})[path.name] = graph
        return found

    def onnx(self, graph: str) -> Path:
        """A graph's float ONNX file, which every format is made from."""
        return self.bundle.file(graph, "onnx")

    def denoiser(self) -> list[str]:
        """The graphs that activations are recorded of: the fused one, or the split ones."""
        held = [graph for graph in DENOISER if self.bundle.stored(graph, ["onnx"])]
        return held[:1] if held[:1] == [DENOISER[0]] else held

    def _check(self) -> None:
        root = self.bundle.root
        lacking = {graph for _, graph in self.forms if not self.bundle.stored(graph, ["onnx"])}
        if lacking or not self.denoiser():
            raise BundleError(f"{root} has no ONNX form of {', '.join(sorted(lacking)) or 'the denoiser'}, which int8 "
                              "is made from; build it with --format onnx")
        for graph in {graph for _, graph in self.forms}:
            if self.bundle.component(graph).forms["onnx"].precision.startswith("int"):
                raise BundleError(f"{graph} of {root} is int8 already; quantize the float bundle that it was made from")
            names = [layer.name for layer in layers_of(ir.load(self.onnx(graph)).graph)]
            if nameless := [name for name in names if name.startswith(NAMELESS)]:
                raise BundleError(f"{graph} of {root} has layers without names ({nameless[0]}): an earlier version "
                                  "wrote it; build that bundle again")


class _Maker:
    """Makes the parts of an int8 bundle; `done` holds those that are finished."""

    def __init__(self, plan: _Plan, data: Calibration, threads: int | None, report: Report):
        self.plan, self.data, self.threads, self.report = plan, data, threads, report
        self.done: dict[str, Part] = {}

    def names(self) -> list[str]:
        """Every part, each after those that it needs."""
        graphs = dict.fromkeys(graph for _, graph in self.plan.forms)
        converted = [f"{kind}/{graph}" for kind, graph in self.plan.forms if kind != "onnx"]
        return ["samples", "ranges", *(f"answers/{graph}" for graph in graphs),
                *(f"onnx/{folder}" for folder in self.plan.folders()), *converted,
                *(f"{kind} check/{graph}" for kind, graph in self.plan.forms)]

    def keys(self) -> dict[str, str]:
        """What decides each part."""
        photos = sha256_of(file for place in self.data.photos
                           for file in (sorted(place.iterdir()) if place.is_dir() else [place]) if file.is_file())
        code = sha256_of(file for package in (export, quant) for file in sorted(Path(package.__path__[0]).glob("*.py")))
        common = [self.plan.bundle.digest, list(photos.values()), self.data.portraits, list(code.values())]
        return {name: hashlib.sha256(json.dumps([name, common, self._recipe_text(name)]).encode()).hexdigest()
                for name in self.names()}

    def make(self, name: str, folder: Path) -> Facts:
        """Make one part in this folder."""
        stage, _, subject = name.partition("/")
        if stage == "samples":
            return self._samples(folder)
        if stage == "ranges":
            return self._ranges(folder)
        if stage == "answers":
            return self._answers(subject, folder)
        if stage == "onnx":
            return self._rewrite(self.plan.folders()[subject], folder, self.plan.recipes["onnx"])
        if stage == "coreml":
            return self._coreml(subject, folder)
        return self._openvino(subject, folder) if stage == "openvino" else self._check(stage, subject, folder)

    def file(self, kind: str, graph: str) -> Path:
        """A finished graph's file, or of Core ML the package, or the folder of its chunks."""
        if kind == "coreml":
            return self._like(self.done[f"{kind}/{graph}"].folder, self.plan.bundle.file(graph, kind))
        if kind == "openvino":
            return self.done[f"{kind}/{graph}"].folder / OPENVINO_FILE
        path = PurePosixPath(self.plan.forms[kind, graph].path)
        return self.done[f"onnx/{path.parent}"].folder / path.name

    def cases(self, graph: str) -> list[Case]:
        """A graph's inputs and what the float graph gives."""
        return load_cases(self.done[f"answers/{graph}"].folder / "cases.npz")

    def _samples(self, folder: Path) -> Facts:
        photos = photos_in(self.data.photos) if self.data.photos else drawn_photos(self.data.portraits)
        drawn = record(self.plan.bundle, photos, self.data.portraits, folder, self.threads, self.report)
        return {"portraits": drawn, "calls": len(list(folder.iterdir()))}

    def _ranges(self, folder: Path) -> Facts:
        samples = self.done["samples"].folder
        found: Histograms = {}
        decoder = [DECODER] * any(recipe.rounds(DECODER) for recipe in self.plan.recipes.values())
        for graph in (*self.plan.denoiser(), *decoder):
            found |= observe(self.plan.onnx(graph), partial(recorded, samples, graph), self.threads,
                             self.report)
        save_histograms(found, folder / "histograms.npz")
        return {"activations": len(found)}

    def _answers(self, graph: str, folder: Path) -> Facts:
        if graph in DENOISER:
            cases = denoiser_cases(graph, self.done["samples"].folder, self._load)
        elif graph == DECODER:
            cases = decoder_cases(graph, self.done["samples"].folder, self._load(graph))
        else:
            cases = [stored_case(self.plan.bundle.file(SELFTEST), graph, self._load(graph))]
        save_cases(cases, folder / "cases.npz")
        return {}

    def _rewrite(self, graphs: Mapping[str, str], folder: Path, recipe: Recipe, signed: bool = False) -> Facts:
        """Graphs of one folder, by file."""
        found = self._grids(recipe)
        models, counts = {}, dict[str, Any]()
        for file, graph in graphs.items():
            models[file] = read_graph(self.plan.onnx(graph))
            counts[graph] = quantize_model(models[file], partial(recipe.treatment, graph), found,
                                           recipe.round_outputs, signed, recipe.rounds_scores)
        save(models, folder)
        return counts

    def _openvino(self, graph: str, folder: Path) -> Facts:
        from caphuman_edge.export.openvino_writer import write_openvino

        scratch, recipe = folder / "onnx", self.plan.recipes["openvino"]
        counts = self._rewrite({"model.onnx": graph}, scratch, recipe, signed=not recipe.affine)
        write_openvino(scratch / "model.onnx", folder / OPENVINO_FILE)
        shutil.rmtree(scratch)
        return counts

    def _coreml(self, graph: str, folder: Path) -> Facts:
        recipe, counts = self.plan.recipes["coreml"], dict[str, Any]()
        found = self._grids(dataclasses.replace(recipe, affine=False))  # whatever it says: Core ML has no zero points
        names = [layer.name for layer in layers_of(ir.load(self.plan.onnx(graph)).graph)]
        for package in packages_at(self.plan.bundle.file(graph, "coreml")):
            counts |= {package.name: rewrite_package(package, folder / package.name, names,
                                                     partial(recipe.treatment, graph), found,
                                                     recipe.precision(graph))}
        return counts

    def _grids(self, recipe: Recipe) -> Mapping[str, LayerGrids]:
        return grids(load_histograms(self.done["ranges"].folder / "histograms.npz"), recipe.clip, recipe.affine)

    def _check(self, stage: str, graph: str, folder: Path) -> Facts:
        kind = stage.removesuffix(" check")
        path = self.file(kind, graph)
        if kind == "coreml":
            return self._check_coreml(graph, path)
        network = open_backend(RUN_BY[kind]).load(path, threads=self.threads, precision="f32",
                                                  cache_dir=folder / "compiled")
        found = check_cases(str(path), network, self.cases(graph), FLOOR_DB)
        shutil.rmtree(folder / "compiled", ignore_errors=True)
        return found

    def _check_coreml(self, graph: str, path: Path) -> Facts:
        """By the MIL evaluator, and on a Mac by Core ML, too: packages take batches of one."""
        from caphuman_edge.export.coreml_check import check_packages

        spec = graphs(self.plan.bundle.config)[graph]
        whole = path if path.suffix == SUFFIX else path / COREML_FILE
        return check_packages(whole, spec, [single(case, spec) for case in self.cases(graph)], FLOOR_DB)

    @staticmethod
    def _like(made: Path, form: Path) -> Path:
        """Where a part holds what the float bundle has as `form`."""
        return made / form.name if form.suffix == SUFFIX else made

    def _load(self, graph: str) -> Graph:
        return self.plan.bundle.graph(graph, threads=self.threads)

    def _recipe_text(self, name: str) -> str:
        kind = name.split("/")[0].removesuffix(" check")
        return self.plan.recipes[kind].to_text() if kind in self.plan.recipes else ""


def _publish(bundle: Bundle, maker: _Maker, folder: Path) -> None:
    """Put the new bundle's folder together: what changed from the parts, the rest from the float bundle."""
    plan, facts = maker.plan, maker.done["samples"].facts
    changed = {key: _link_made(maker.file(*key), plan.forms[key], folder) for key in plan.forms}
    _write_selftest(bundle, maker, folder)
    components = {}
    for graph, component in bundle.manifest.components.items():
        forms = {kind: _form(bundle, form, changed.get((kind, graph), []), folder)
                 for kind, form in component.forms.items()}
        forms |= {kind: dataclasses.replace(forms[kind], precision=plan.recipes[kind].precision(graph),
                                            parity=_parity(maker, kind, graph))
                  for kind, name in changed if name == graph}
        components[graph] = dataclasses.replace(component, forms=forms)
    provenance = {**bundle.manifest.provenance, INT8: {
        "from_bundle": bundle.digest, "portraits": facts["portraits"],
        "photos": "given" if maker.data.photos else "drawn by the embedded miniature",
        "recipes": {kind: hashlib.sha256(plan.recipes[kind].to_text().encode()).hexdigest()
                    for kind in dict.fromkeys(kind for kind, _ in changed)}}}
    write_manifest(folder, dataclasses.replace(bundle.manifest, components=components, provenance=provenance))


def _link_made(made: Path, form: Form, folder: Path) -> list[str]:
    """Link a new graph and its weights to where the old ones lay; returns their paths in the bundle."""
    place = PurePosixPath(form.path)
    if made.is_dir():  # Core ML's
        paths = {str(place / file.relative_to(made)): file for file in sorted(made.rglob("*"))
                 if file.is_file() and file.name != FACTS}
    else:
        files = [file for file in (made, made.with_name(WEIGHTS), made.with_suffix(".bin")) if file.exists()]
        paths = {str(place.parent / file.name): file for file in files}
    for path, file in paths.items():
        if not (folder / path).exists():
            link_file(file, folder / path)
    return list(paths)


def _form(bundle: Bundle, form: Form, made: list[str], folder: Path) -> Form:
    """The form with its new files, if any; what those do not replace is the float bundle's."""
    replaced = {*made, form.path, str(PurePosixPath(form.path).parent / WEIGHTS)} if made else set()
    kept = [path for path in form.files if path not in replaced]
    for path in kept:
        if not (folder / path).exists():
            link_file(bundle.root / path, folder / path)
    return dataclasses.replace(form, files=record_files(folder, [folder / path for path in (*made, *kept)]))


def _write_selftest(bundle: Bundle, maker: _Maker, folder: Path) -> None:
    """The float bundle's, but of denoiser and decoder a call of a real trajectory: grids are made for those."""
    with np.load(bundle.file(SELFTEST), allow_pickle=False) as stored:
        rows = {name: stored[name] for name in stored.files}
    for graph in {graph for _, graph in maker.plan.forms if graph in NOTED}:
        cases = maker.cases(graph)
        case = cases[len(cases) // 2]
        rows = {name: row for name, row in rows.items() if not name.startswith(f"{graph}/")}
        for side, arrays in (("in", case.inputs), ("out", case.outputs)):
            rows |= {f"{graph}/{side}/{name}": halved(array) for name, array in arrays.items()}
    np.savez_compressed(folder / bundle.form(SELFTEST, [DATA]).path, **rows)


def _parity(maker: _Maker, kind: str, graph: str) -> dict[str, float]:
    found: dict[str, float] = maker.done[f"{kind} check/{graph}"].facts
    return {"psnr_db": min(found.values()), **found}
