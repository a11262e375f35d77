"""Put a bundle's folder together from finished parts, perception graphs and data."""
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from caphuman_edge.export.check import Case, coarse_inputs
from caphuman_edge.export.coreml_writer import packages
from caphuman_edge.export.host_configs import FILE as CONFIG
from caphuman_edge.export.host_configs import write_config
from caphuman_edge.export.onnx_writer import WEIGHTS
from caphuman_edge.export.parts import FACTS, Part
from caphuman_edge.export.stages import COREML_FILE, MOBILE_FILE, OPENVINO_FILE, Job, Options
from caphuman_edge.runtime.backends import open_backend
from caphuman_edge.runtime.bundle import record_files
from caphuman_edge.runtime.contract import GATE, OFFICIAL_GRAPHS, PERCEPTION_GRAPHS, Config, GraphSpec, graphs
from caphuman_edge.runtime.manifest import DATA, Component, Form
from caphuman_edge.runtime.tokenizer import VOCABULARY

SELFTEST_SEED = 7


def publish(folder: Path, done: Mapping[Job, Part], config: Config, options: Options) -> dict[str, Component]:
    """Link every finished graph into the bundle's folder; returns their components."""
    specs, forms = graphs(config), dict[str, dict[str, Form]]()
    for kind in options.formats:
        for name in options.graphs_in(kind):
            place = options.folder_of(kind, name)
            part, parity = done[kind, place], done[f"{kind} check", name].facts
            _link_tree(part.folder, folder / place)
            write_config(name, config, folder / place)
            path, stored = _form_files(folder / place, kind, options.onnx_file(name))
            forms.setdefault(name, {})[kind] = Form(
                path.relative_to(folder).as_posix(), record_files(folder, stored), part.facts["precision"],
                {"psnr_db": _worst(parity), **parity})
    return {name: Component(kinds, specs[name].inputs, specs[name].outputs) for name, kinds in forms.items()}


def perception_in(folder: Path) -> dict[str, Path]:
    """The perception graphs that `export.perception` and `export.official` wrote into a folder."""
    official = [graph for graph in OFFICIAL_GRAPHS if (folder / graph).is_dir()]
    return {graph: folder / graph for graph in (*PERCEPTION_GRAPHS, *official)}


def copy_perception(folder: Path, perception: Mapping[str, Path],
                    specs: Mapping[str, GraphSpec]) -> dict[str, Component]:
    """Graphs that measure photos, as they are: ONNX, which ONNX Runtime runs on every platform and OpenVINO reads."""
    components = {}
    for graph, source in perception.items():
        shutil.copytree(source, folder / graph)
        form = Form(f"{graph}/model.onnx", record_files(folder, [folder / graph]), "mixed")
        components[graph] = Component({"onnx": form}, specs[graph].inputs, specs[graph].outputs)
    return components


def copy_data(folder: Path, licence_text: str, head: Path) -> dict[str, Component]:
    """Licence, head model and vocabulary."""
    (folder / "LICENSE").write_text(licence_text, encoding="utf-8")
    components = {"licence": _data(folder, "LICENSE")}
    for name, source in (("head", head), ("tokenizer", VOCABULARY)):
        (folder / name).mkdir()
        shutil.copyfile(source, folder / name / source.name)
        components[name] = _data(folder, f"{name}/{source.name}")
    return components


def write_selftest(folder: Path, cases_of: Callable[[str], list[Case]], components: Mapping[str, Component],
                   specs: Mapping[str, GraphSpec]) -> Component:
    """Inputs and expected outputs of every graph, for `caphuman verify` on whatever machine the bundle is on.

    Expected is what the reference gives; for perception, which has none here, what this machine's graph gives.
    Floats are halves: inputs come in steps that those hold exactly, so only outputs carry rounding.
    """
    arrays: dict[str, np.ndarray] = {}
    for name in (name for name in components if name in specs):
        forms = components[name].forms
        perception = name in PERCEPTION_GRAPHS or name in OFFICIAL_GRAPHS
        case = _measured(folder / forms["onnx"].path, specs[name]) if perception else cases_of(name)[-1]
        arrays |= {f"{name}/in/{tensor}": _stored(value) for tensor, value in case.inputs.items()}
        arrays |= {f"{name}/out/{tensor}": _stored(value) for tensor, value in case.outputs.items()}
    np.savez_compressed(folder / "selftest.npz", **arrays)  # type: ignore[arg-type]
    return _data(folder, "selftest.npz")


def link_file(source: Path, target: Path) -> None:
    """The same file in another place, without taking its room on the disk twice where that can be."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a disk without hard links
        shutil.copyfile(source, target)


def _worst(parity: Mapping[str, float]) -> float:
    """Of a graph's outputs; gates are thresholds and stand for themselves."""
    return min(decibels for name, decibels in parity.items() if not name.startswith(GATE))


def _form_files(place: Path, kind: str, onnx_file: str) -> tuple[Path, list[Path]]:
    """What loads a graph, of those in its folder, and all that it consists of."""
    if kind == "coreml":
        found = packages(place / COREML_FILE)
        return (found[0] if len(found) == 1 else place), found  # who loads a folder runs its chunks in turn
    path = place / {"onnx": onnx_file, "openvino": OPENVINO_FILE, "ort": MOBILE_FILE}[kind]
    beside = {"onnx": place / WEIGHTS, "openvino": path.with_suffix(".bin")}.get(kind, path)
    return path, [file for file in dict.fromkeys((path, beside, place / CONFIG)) if file.exists()]


def _link_tree(source: Path, target: Path) -> None:
    """The files of a part, without what the build noted about it; as links where the disk knows them."""
    for file in _files(source):
        place = target / file.relative_to(source)
        if file.name != FACTS and not place.exists():
            link_file(file, place)


def _files(folder: Path) -> Iterable[Path]:
    return (file for file in sorted(folder.rglob("*")) if file.is_file())


def _data(folder: Path, path: str) -> Component:
    return Component({DATA: Form(path, record_files(folder, [folder / path]), "data")})


def _measured(path: Path, spec: GraphSpec) -> Case:
    inputs = coarse_inputs(spec, SELFTEST_SEED)
    return Case(inputs, open_backend("ort").load(path)(inputs))


def _stored(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float16) if value.dtype == np.float32 else value
