"""`caphuman inspect`: what a bundle is, what it holds, where it comes from."""
import argparse
import dataclasses
import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..contract import OFFICIAL_GRAPHS, PERCEPTION_GRAPHS
from ..manifest import DATA, Component, FileRecord, Form
from .report import add_json_flag, show

GROUPS = {  # as a portrait comes to be; what stands in none is data
    "to measure a photo": (*PERCEPTION_GRAPHS, *OFFICIAL_GRAPHS),
    "once a portrait": ("text_encoder", "image_encoder", "hint_encoder", "control_encoder", "vae_encoder",
                        "vae_decoder", "tiny_decoder"),
    "each step": ("denoiser", "capface", "unet", "controlnet", "preview_decoder"),
}
NOTES = {"each step": "the denoiser is one graph, or capface and unet; preview_decoder draws the thumbnails"}
SHA256 = re.compile("[0-9a-f]{64}")
WIDTH, NAMES = 100, 34  # characters, at most: a line, and a name in its first column


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("inspect", help="what a bundle holds and where it comes from",
                                   description="Verifies a bundle's files and says what it holds.")
    parser.add_argument("bundle", nargs="?", type=Path, help="folder of the bundle (default: the embedded one)")
    add_json_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Report on a bundle that verifies; one that does not raises BundleError."""
    show(facts(Bundle.open(args.bundle)), args.json, text)
    return 0


def facts(bundle: Bundle) -> dict[str, Any]:
    """Everything the command reports, ready for JSON."""
    manifest = bundle.manifest
    return {
        "name": manifest.name, "folder": str(bundle.root), "sha256": bundle.digest, "bytes": size_bytes(bundle),
        "bytes_by_format": _bytes_by_format(manifest.components.values()),
        "config": manifest.config.to_json(), "schedule": dataclasses.asdict(manifest.schedule),
        "components": {name: _component_facts(part) for name, part in manifest.components.items()},
        "licences": manifest.licences, "provenance": manifest.provenance,
    }


def size_bytes(bundle: Bundle) -> int:
    """Bytes of all files that the bundle lists, shared ones once."""
    return _bytes(form for part in bundle.manifest.components.values() for form in part.forms.values())


def text(report: dict[str, Any]) -> str:
    """The facts for a person."""
    config, schedule = report["config"], report["schedule"]
    sizes = ", ".join(f"{name} {size(count)}" for name, count in report["bytes_by_format"].items())
    return "\n".join([
        f"{report['name']}: portraits of {config['width']} x {config['height']} px in {schedule['steps']} "
        f"{schedule['kind']} steps ({schedule['timesteps']} timesteps), guidance {schedule['guidance']:g}, "
        f"of the person {schedule['identity_guidance']:g}", *_approximations(config), "",
        *_table({"folder": report["folder"], "sha256": report["sha256"],
                 "size": f"{size(report['bytes'])} ({sizes}; shared files once)"}.items(), ""),
        *_components(report["components"]),
        "", "parity with the reference: 40 dB is an error of 1 %, 60 dB of 0.1 % of a graph's largest output",
        "", "licences", *_table(report["licences"].items()), "", "made from", *_provenance(report["provenance"]),
    ])


def _approximations(config: Mapping[str, Any]) -> Iterator[str]:
    """A line for each that the bundle was built with."""
    if (edge := config["unet"]["key_pooling"]) > 1:
        yield f"approximation: {edge} x {edge} cells are one key of the finest self-attention"
    if edge := config["decoder_tile"]:
        yield f"approximation: vae_decoder makes tiles of {edge} px, which overlap"


def size(count: int) -> str:
    """Bytes for a person."""
    for unit, digits in (("kB", 0), ("MB", 1)):
        count_in_unit = count / {"kB": 1e3, "MB": 1e6}[unit]
        if count_in_unit < 999.5:
            return f"{count_in_unit:.{digits}f} {unit}"
    return f"{count / 1e9:.2f} GB"


def _component_facts(component: Component) -> dict[str, Any]:
    """One graph or piece of data; components that share files count them each."""
    return {"bytes": _bytes(component.forms.values()),
            "forms": {name: {"path": form.path, "bytes": _bytes([form]), "precision": form.precision,
                             "parity": form.parity} for name, form in component.forms.items()},
            "inputs": [spec.name for spec in component.inputs], "outputs": [spec.name for spec in component.outputs]}


def _bytes_by_format(components: Iterable[Component]) -> dict[str, int]:
    """Files that two formats share count for both."""
    forms: dict[str, list[Form]] = {}
    for component in components:
        for name, form in component.forms.items():
            forms.setdefault(name, []).append(form)
    return {name: _bytes(stored) for name, stored in sorted(forms.items(), key=lambda item: (item[0] == DATA, item[0]))}


def _bytes(forms: Iterable[Form]) -> int:
    files: dict[str, FileRecord] = {path: record for form in forms for path, record in form.files.items()}
    return sum(record.size for record in files.values())


def _components(components: Mapping[str, Any]) -> Iterator[str]:
    """A table of graphs by when they run, then data; a line for each form."""
    grouped = {name for names in GROUPS.values() for name in names}
    groups = {**GROUPS, "data": tuple(name for name in components if name not in grouped)}
    width = max(map(len, (*components, *groups))) + 2
    for title, names in groups.items():
        if held := [name for name in names if name in components]:
            yield ""
            columns = f"  {'format':10}{'weights':10}{'size':>8}  {'parity':>9}"
            yield title if title == "data" else f"{title:{width}}{columns}"
            for name in held:
                yield from _forms(name, components[name]["forms"], width)
            if title in NOTES:
                yield f"  ({NOTES[title]})"


def _forms(name: str, forms: Mapping[str, Any], width: int) -> Iterator[str]:
    for number, (format, form) in enumerate(forms.items()):
        label = "" if number else f"  {name}"
        kind, weights = ("", "") if format == DATA else (format, form["precision"])
        yield f"{label:{width}}  {kind:10}{weights:10}{size(form['bytes']):>8}  {_parity(form['parity']):>9}".rstrip()


def _parity(parity: Mapping[str, float]) -> str:
    """The graph's own figure, or the worst of its outputs'."""
    return f"{parity.get('psnr_db', min(parity.values())):.1f} dB" if parity else ""


def _provenance(entries: Mapping[str, Any], indent: str = "  ") -> list[str]:
    """Nested entries; what tells of one file is one line."""
    nested = {key: value for key, value in entries.items() if _is_nested(value)}
    lines = _table({_title(key): _value(value) for key, value in entries.items() if key not in nested}.items(), indent)
    for key, value in nested.items():
        lines.append(f"{indent}{_title(key)}")
        if isinstance(value, list):
            rows = [(str(each.get("part", number)), {name: fact for name, fact in each.items() if name != "part"})
                    for number, each in enumerate(value, 1)]
            lines += _table([(part, _value(facts)) for part, facts in rows], indent + "  ")
        else:
            lines += _provenance(value, indent + "  ")
    return lines


def _is_nested(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(each, dict) for each in value)
    return isinstance(value, dict) and not isinstance(value.get("file", value.get("sha256")), str)


def _value(value: Any) -> str:
    """One entry in a few words: hashes cut short, sizes and counts made readable."""
    if isinstance(value, dict):
        return ", ".join(_fact(name, fact) for name, fact in value.items() if fact not in (None, ""))
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value[:12]}…" if isinstance(value, str) and SHA256.fullmatch(value) else str(value)


def _fact(name: str, value: Any) -> str:
    """One of several facts about a file."""
    if name == "bytes":
        return size(value)
    if name.endswith("sha256"):
        return f"sha256 {_value(value)}"
    if name == "tensors":
        return f"{_value(value)} tensors"
    return _value(value) if name in ("file", "dtypes") else f"{_title(name)} {_value(value)}"


def _table(rows: Iterable[tuple[str, Any]], indent: str = "  ") -> list[str]:
    """Two columns, the second one wrapped; below a name that is too long for the first."""
    rows = list(rows)
    width = max((len(name) for name, _ in rows if len(name) <= NAMES), default=8)
    columns = min(WIDTH, shutil.get_terminal_size((WIDTH, 0)).columns)
    lines = []
    for name, value in rows:
        left, start = " " * (len(indent) + width + 2), f"{indent}{name:{width}}  "
        if len(name) > width:
            lines.append(indent + name)
            start = left
        lines += textwrap.wrap(str(value), max(columns, len(left) + 20), initial_indent=start, subsequent_indent=left,
                               break_long_words=False, break_on_hyphens=False) or [start.rstrip()]
    return lines


def _title(key: str) -> str:
    """A key as words, unless it names a file."""
    return key if "." in key or "/" in key else key.replace("_", " ")
