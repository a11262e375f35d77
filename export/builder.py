"""Build a bundle of ONNX graphs from a reference model, and check every graph before it is published."""
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from caphuman_edge.export.check import check_graph, reference_outputs
from caphuman_edge.export.graphs import PreviewDecoder, example_inputs, modules
from caphuman_edge.export.onnx_writer import WEIGHTS, save, trace
from caphuman_edge.ref.caphuman import CapHuman
from caphuman_edge.runtime.backends import open_backend
from caphuman_edge.runtime.bundle import new_bundle, record_files, write_manifest
from caphuman_edge.runtime.contract import OFFICIAL_GRAPHS, PERCEPTION_GRAPHS, GraphSpec, graphs
from caphuman_edge.runtime.head.storage import OPEN_HEAD
from caphuman_edge.runtime.manifest import Component, Manifest
from caphuman_edge.runtime.schedule import Schedule
from caphuman_edge.runtime.tokenizer import VOCABULARY

FOLDERS = {  # graphs that share weights share a folder; every other graph has its own
    "denoiser": {"denoiser": "model.onnx", "capface": "capface.onnx", "unet": "unet.onnx"},
}
SELFTEST_SEED = 7


@dataclass(frozen=True)
class Sources:
    """Where a bundle's parts come from, besides the reference model."""

    perception: Path  # folder of graphs written by export.perception; may hold some of export.official besides
    name: str
    schedule: Schedule
    provenance: Mapping[str, Any]
    licences: Mapping[str, str]
    licence_text: str


def build(model: CapHuman, preview: PreviewDecoder, sources: Sources, out: Path,
          report: Callable[[str], None] = lambda line: None) -> None:
    """Write the bundle at `out`, replacing an older one whole; `report` gets a line a stage.

    Raises BundleError naming the first graph that does not compute what the reference computes.
    """
    specs, parts = graphs(model.config), modules(model.eval(), preview)
    with new_bundle(out, overwrite=True) as folder:
        components: dict[str, Component] = {}
        for place, files in _folders(parts).items():
            components |= _write_graphs(folder, place, files, parts, specs, report)
        components |= _copy_perception(folder, sources.perception, specs)
        components |= _copy_data(folder, sources.licence_text)
        report("selftest")
        components["selftest"] = _write_selftest(folder, parts, specs, components)
        write_manifest(folder, Manifest(sources.name, model.config, sources.schedule, components,
                                        dict(sources.provenance), dict(sources.licences)))


def _folders(parts: Mapping[str, nn.Module]) -> dict[str, dict[str, str]]:
    """Folder -> {graph: file name}."""
    grouped = {graph for files in FOLDERS.values() for graph in files}
    return {**{name: {name: "model.onnx"} for name in parts if name not in grouped}, **FOLDERS}


def _write_graphs(folder: Path, place: str, files: Mapping[str, str], parts: Mapping[str, nn.Module],
                  specs: Mapping[str, GraphSpec], report: Callable[[str], None]) -> dict[str, Component]:
    """Trace, save and check the graphs of one folder."""
    models = {}
    for name, file in files.items():
        report(f"exporting {name}")
        models[file] = trace(parts[name], specs[name])
    precision = save(models, folder / place)
    components, backend = {}, open_backend("ort")
    for name, file in files.items():
        report(f"checking {name}")
        path = folder / place / file
        parity = check_graph(path, specs[name], parts[name], backend)
        stored = [path, *(folder / place).glob(WEIGHTS)]
        components[name] = Component(f"{place}/{file}", record_files(folder, stored), precision,
                                     specs[name].inputs, specs[name].outputs, {"psnr_db": min(parity.values())})
    return components


def _copy_perception(folder: Path, source: Path, specs: Mapping[str, GraphSpec]) -> dict[str, Component]:
    official = [graph for graph in OFFICIAL_GRAPHS if (source / graph).is_dir()]
    components = {}
    for graph in (*PERCEPTION_GRAPHS, *official):
        shutil.copytree(source / graph, folder / graph)
        components[graph] = Component(f"{graph}/model.onnx", record_files(folder, [folder / graph]), "mixed",
                                      specs[graph].inputs, specs[graph].outputs)
    return components


def _copy_data(folder: Path, licence_text: str) -> dict[str, Component]:
    (folder / "LICENSE").write_text(licence_text, encoding="utf-8")
    components = {"licence": Component("LICENSE", record_files(folder, [folder / "LICENSE"]), "data")}
    for name, source in (("head", OPEN_HEAD), ("tokenizer", VOCABULARY)):
        (folder / name).mkdir()
        target = folder / name / source.name
        shutil.copyfile(source, target)
        components[name] = Component(f"{name}/{source.name}", record_files(folder, [target]), "data")
    return components


def _write_selftest(folder: Path, parts: Mapping[str, nn.Module], specs: Mapping[str, GraphSpec],
                    components: Mapping[str, Component]) -> Component:
    """Inputs and expected outputs of every graph, for `caphuman verify` on whatever machine the bundle is on.

    Expected is what the reference gives; for perception, which has none here, what this machine's graph gives.
    Floats are halves: inputs are rounded before anything runs on them, so only outputs carry rounding.
    """
    arrays: dict[str, np.ndarray] = {}
    for name in (name for name in components if name in specs):
        inputs = {tensor: _coarse(value) for tensor, value in example_inputs(specs[name].inputs, SELFTEST_SEED).items()}
        fed = {tensor: value.numpy() for tensor, value in inputs.items()}
        outputs = (reference_outputs(parts[name], specs[name], inputs) if name in parts
                   else open_backend("ort").load(folder / components[name].path)(fed))
        arrays |= {f"{name}/in/{tensor}": _stored(value) for tensor, value in fed.items()}
        arrays |= {f"{name}/out/{tensor}": _stored(value) for tensor, value in outputs.items()}
    np.savez_compressed(folder / "selftest.npz", **arrays)  # type: ignore[arg-type]
    return Component("selftest.npz", record_files(folder, [folder / "selftest.npz"]), "data")


def _coarse(value: torch.Tensor) -> torch.Tensor:
    """Floats in steps of 1/8, which compress; integers as they are."""
    return (value * 8).round() / 8 if value.is_floating_point() else value


def _stored(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float16) if value.dtype == np.float32 else value
