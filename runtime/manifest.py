"""bundle.json as data: what a bundle holds, parsed strictly and checked against the contract.

    {"format": 2, "name": "nano", "config": {...}, "schedule": {...}, "provenance": {...}, "licences": {...},
     "components": {
      "denoiser": {"forms": {"onnx": {"path": "denoiser/model.onnx", "precision": "int8", "parity": {"psnr_db": 41.2},
                                      "files": {"denoiser/model.onnx": {"sha256": "...", "size": 123}}},
                             "openvino": {...}},
                   "inputs": [{"name": "latent", "shape": [1, 4, 32, 32], "dtype": "float32"}], "outputs": [...]},
      "head": {"forms": {"data": {"path": "head/open_head.npz", ...}}, "inputs": [], "outputs": []}}}

A component is a graph, stored in one or several formats, or data: tokenizer, head model, self-test.
"""
import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from .contract import FULL, Config, GraphSpec, TensorSpec, graphs
from .errors import BundleError, ShapeMismatch
from .schedule import LEADING, SPACINGS, Schedule

FORMAT = 2
FORMATS = ("onnx", "openvino", "coreml", "ort")  # that a graph may be stored in; ort is ONNX Runtime Mobile's
DATA = "data"  # the form of what is no graph
REBUILD = "rebuild the bundle with this version"


@dataclass(frozen=True)
class FileRecord:
    """What one file of a bundle must be."""

    sha256: str  # hex
    size: int  # bytes


@dataclass(frozen=True)
class Form:
    """One way in which a component is stored. Paths are relative to the bundle, with forward slashes."""

    path: str  # the file or folder to load
    files: dict[str, FileRecord]  # all that it needs, itself included; forms and components may share files
    precision: str = "f32"  # of the stored weights
    parity: dict[str, float] = field(default_factory=dict)  # against the reference, by metric, or by output: psnr_db


@dataclass(frozen=True)
class Component:
    """One graph in at least one format, or one piece of data."""

    forms: dict[str, Form]  # by format: some of FORMATS for a graph, DATA alone for data
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """All of bundle.json but its format number."""

    name: str
    config: Config
    schedule: Schedule
    components: dict[str, Component]
    provenance: dict[str, Any] = field(default_factory=dict)  # such as the sha256 of every source checkpoint
    licences: dict[str, str] = field(default_factory=dict)  # source: its licence, which the bundle inherits

    def to_text(self) -> str:
        """The text that `parse` turns back into an equal manifest."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n"


def parse(text: str) -> Manifest:
    """Parse bundle.json and check it against the contract.

    Raises BundleError for another format, a missing or foreign key or a path that leaves the bundle, ShapeMismatch for
    a graph whose inputs or outputs are not the contract's.
    """
    data = _json(text)
    if data.get("format") != FORMAT:
        raise BundleError(f"bundle.json has format {data.get('format')!r}, expected {FORMAT}; {REBUILD}")
    fields = _record(data, "bundle.json", format=int, name=str, config=dict, schedule=dict, components=dict,
                     provenance=dict, licences=dict)
    config = Config.from_json(_like(_completed(fields["config"]), FULL.to_json(), "config"))
    schedule = _schedule(fields["schedule"])
    components = {name: _component(data, f"components.{name}") for name, data in fields["components"].items()}
    _check_contract(config, components)
    return Manifest(fields["name"], config, schedule, components, fields["provenance"], fields["licences"])


def check_graph(label: str, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec], want: GraphSpec) -> GraphSpec:
    """The contract's graph, each length as definite as either side knows it.

    A symbolic length on one side fits any on the other; order does not matter. Raises ShapeMismatch for another name,
    dtype or shape.
    """
    return GraphSpec(want.name, _matched_all(f"{label} inputs", inputs, want.inputs),
                     _matched_all(f"{label} outputs", outputs, want.outputs))


def _schedule(data: object) -> Schedule:
    defaults = dataclasses.asdict(Schedule())
    given = data
    if isinstance(data, dict):
        given = {"identity_guidance": 1.0, "timesteps": LEADING, **data}  # which bundles of before lack
    schedule = Schedule(**_like(given, defaults, "schedule"))
    for name, known in (("kind", tuple(SPACINGS)), ("timesteps", SPACINGS.get(schedule.kind, ()))):
        if getattr(schedule, name) not in known:
            raise BundleError(f"bundle.json: schedule.{name} is {getattr(schedule, name)!r:.40}, expected one of "
                              f"{_names(known)}; {REBUILD}")
    return schedule


def _check_contract(config: Config, components: Mapping[str, Component]) -> None:
    try:
        contract = graphs(config)
    except (ArithmeticError, LookupError) as error:
        raise BundleError(f"bundle.json: config is inconsistent ({error}); {REBUILD}") from error
    for name, component in components.items():
        if name in contract and DATA not in component.forms:
            check_graph(f"bundle.json: {name}", component.inputs, component.outputs, contract[name])
        elif name in contract or DATA not in component.forms:
            kind = "data, expected a graph" if name in contract else f"an unknown graph, known are {_names(contract)}"
            raise BundleError(f"bundle.json: {name} is {kind}; {REBUILD}")
        elif component.inputs or component.outputs:
            raise BundleError(f"bundle.json: {name} is data and has inputs or outputs, expected none; {REBUILD}")


def _matched_all(label: str, found: Iterable[TensorSpec], want: Iterable[TensorSpec]) -> tuple[TensorSpec, ...]:
    found_by_name, want_by_name = {spec.name: spec for spec in found}, {spec.name: spec for spec in want}
    if found_by_name.keys() != want_by_name.keys():
        raise ShapeMismatch(f"{label} are {_names(found_by_name)}, expected {_names(want_by_name)}; {REBUILD}")
    return tuple(_matched(label, found_by_name[name], spec) for name, spec in want_by_name.items())


def _matched(label: str, found: TensorSpec, want: TensorSpec) -> TensorSpec:
    pairs = list(zip(found.shape, want.shape, strict=False))
    clash = any(isinstance(f, int) and isinstance(w, int) and f != w for f, w in pairs)
    if found.dtype != want.dtype or len(found.shape) != len(want.shape) or clash:
        raise ShapeMismatch(f"{label}: {want.name} is {found.dtype} {list(found.shape)}, "
                            f"expected {want.dtype} {list(want.shape)}; {REBUILD}")
    definite = tuple(f if isinstance(f, int) else w for f, w in pairs)
    return TensorSpec(want.name, definite, want.dtype)


def _component(data: object, where: str) -> Component:
    fields = _record(data, where, forms=dict, inputs=list, outputs=list)
    names = fields["forms"].keys()
    if names != {DATA} and not (names and names <= set(FORMATS)):
        raise BundleError(f"bundle.json: {where}.forms are {_names(names)}, expected some of {', '.join(FORMATS)}, "
                          f"or {DATA} alone; {REBUILD}")
    forms = {name: _form(form, f"{where}.forms.{name}") for name, form in fields["forms"].items()}
    inputs = tuple(_tensor(spec, f"{where}.inputs") for spec in fields["inputs"])
    outputs = tuple(_tensor(spec, f"{where}.outputs") for spec in fields["outputs"])
    return Component(forms, inputs, outputs)


def _form(data: object, where: str) -> Form:
    fields = _record(data, where, path=str, files=dict, precision=str, parity=dict)
    files = {_inside(path): _file(record, f"{where}.files.{path}") for path, record in fields["files"].items()}
    path = PurePosixPath(_inside(fields["path"]))
    if not any(path in (file, *file.parents) for file in map(PurePosixPath, files)):
        raise BundleError(f"bundle.json: {where}.path is {path}, which its files do not list; {REBUILD}")
    return Form(str(path), files, fields["precision"], _parity(fields["parity"], where))


def _parity(data: dict[str, Any], where: str) -> dict[str, float]:
    if not all(type(value) in (int, float) for value in data.values()):
        raise BundleError(f"bundle.json: {where}.parity is {data!r:.60}, expected numbers; {REBUILD}")
    return {metric: float(value) for metric, value in data.items()}


def _file(data: object, where: str) -> FileRecord:
    return FileRecord(**_record(data, where, sha256=str, size=int))


def _tensor(data: object, where: str) -> TensorSpec:
    fields = _record(data, where, name=str, shape=list, dtype=str)
    if not all(type(length) in (int, str) for length in fields["shape"]):
        raise BundleError(f"bundle.json: {where}.{fields['name']} has shape {fields['shape']}, "
                          f"expected integers and names of lengths; {REBUILD}")
    return TensorSpec(fields["name"], tuple(fields["shape"]), fields["dtype"])


def _inside(path: str) -> str:
    """The path itself, once it is sure not to leave the bundle on any platform."""
    parts = PurePosixPath(path).parts
    if not parts or ".." in parts or path.startswith("/") or "\\" in path or ":" in path:
        raise BundleError(f"bundle.json names {path!r}, which does not stay inside the bundle; do not use this bundle")
    return path


def _json(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"bundle.json is not JSON ({error}); fetch or build the bundle again") from error
    if not isinstance(data, dict):
        raise BundleError(f"bundle.json holds a {type(data).__name__}, expected an object; {REBUILD}")
    return data


def _record(data: object, where: str, **kinds: type) -> dict[str, Any]:
    """The object itself, once it has exactly these keys with values of these types."""
    if not isinstance(data, dict) or data.keys() != kinds.keys():
        found = _names(data) if isinstance(data, dict) else f"{data!r:.40}"
        raise BundleError(f"bundle.json: {where} has {found}, expected {_names(kinds)}; {REBUILD}")
    for key, kind in kinds.items():
        if type(data[key]) is not kind:
            raise BundleError(f"bundle.json: {where}.{key} is {data[key]!r:.40}, expected a {kind.__name__}; {REBUILD}")
    return data


def _completed(config: dict[str, Any]) -> dict[str, Any]:
    """The sizes with what bundles of before lack."""
    unet = config.get("unet")
    newer = {"unet": {"key_pooling": FULL.unet.key_pooling, **unet}} if isinstance(unet, dict) else {}
    return {"tiny_channels": FULL.tiny_channels, "decoder_tile": FULL.decoder_tile, **config, **newer}


def _like(data: object, pattern: dict[str, Any], where: str) -> dict[str, Any]:
    """The object itself, once its keys and types are the pattern's, all the way down."""
    fields = _record(data, where, **{key: list if isinstance(value, tuple) else type(value)
                                     for key, value in pattern.items()})
    for key, value in pattern.items():
        if isinstance(value, dict):
            _like(fields[key], value, f"{where}.{key}")
        if isinstance(value, tuple) and any(type(item) is not int for item in fields[key]):
            raise BundleError(f"bundle.json: {where}.{key} is {fields[key]}, expected integers; {REBUILD}")
    return fields


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"
