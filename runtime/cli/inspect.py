"""`caphuman inspect`: what a bundle is, what it holds, where it comes from."""
import argparse
import dataclasses
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..manifest import Component
from .report import add_json_flag, show


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
        "config": manifest.config.to_json(), "schedule": dataclasses.asdict(manifest.schedule),
        "components": {name: component_facts(part) for name, part in sorted(manifest.components.items())},
        "licences": manifest.licences, "provenance": manifest.provenance,
    }


def component_facts(component: Component) -> dict[str, Any]:
    """One graph or piece of data; components that share files count them each."""
    return {"path": component.path, "bytes": sum(file.size for file in component.files.values()),
            "precision": component.precision, "parity": component.parity,
            "inputs": [spec.name for spec in component.inputs], "outputs": [spec.name for spec in component.outputs]}


def size_bytes(bundle: Bundle) -> int:
    """Bytes of all files that the bundle lists, shared ones once."""
    files = {path: file.size for part in bundle.manifest.components.values() for path, file in part.files.items()}
    return sum(files.values())


def text(report: dict[str, Any]) -> str:
    """The facts for a person."""
    config, schedule = report["config"], report["schedule"]
    return "\n".join([
        f"{report['name']}: {config['width']} x {config['height']} px, {report['bytes'] / 1e6:.1f} MB, "
        f"{schedule['steps']} {schedule['kind']} steps, guidance {schedule['guidance']:g}",
        f"folder {report['folder']}", f"sha256 {report['sha256']}", "",
        f"{'component':18}{'precision':>10}{'MB':>9}  parity",
        *(_component_line(name, part) for name, part in report["components"].items()),
        *_section("licences", report["licences"]), *_section("provenance", report["provenance"]),
    ])


def _component_line(name: str, part: dict[str, Any]) -> str:
    parity = ", ".join(f"{metric} {value:.4g}" for metric, value in part["parity"].items())
    return f"{name:18}{part['precision']:>10}{part['bytes'] / 1e6:9.2f}  {parity}".rstrip()


def _section(title: str, entries: dict[str, Any], indent: str = "  ") -> list[str]:
    lines = [] if indent > "  " else [""]
    lines.append(f"{indent[2:]}{title}")
    for key, value in entries.items():
        lines += _section(key, value, indent + "  ") if isinstance(value, dict) else [f"{indent}{key}: {value}"]
    return lines
