"""`caphuman verify`: whether this machine computes what the bundle was built to compute."""
import argparse
import dataclasses
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..selftest import self_test
from . import USER_ERROR
from .machine_flags import add_machine_flags, chosen_machine
from .report import add_json_flag, show


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("verify", help="whether this machine computes what a bundle should", description=(
        "Verifies a bundle's files, then runs its self-test; exit code 2 if a graph is further off than its floor."))
    parser.add_argument("bundle", nargs="?", type=Path, help="folder of the bundle (default: the embedded one)")
    add_machine_flags(parser)
    add_json_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the self-test and report."""
    bundle = Bundle.open(args.bundle)
    machine = chosen_machine(args)
    machine.check()
    verdicts = list(self_test(bundle, machine))
    passed = all(verdict.passed for verdict in verdicts)
    graphs = [{**dataclasses.asdict(verdict), "passed": verdict.passed} for verdict in verdicts]
    show({"bundle": bundle.manifest.name, "sha256": bundle.digest, "backend": args.backend, "device": args.device,
          "precision": args.precision, "passed": passed, "graphs": graphs}, args.json, _text)
    return 0 if passed else USER_ERROR


def _text(report: dict[str, Any]) -> str:
    rows = [f"{row['graph']:18}{row['psnr_db']:7.1f} dB, {'ok' if row['passed'] else 'FAILED'} "
            f"(at least {row['floor_db']:g}{_elsewhere(row, report)})" for row in report["graphs"]]
    chosen = [report[name] for name in ("backend", "device", "precision") if report[name]]
    return "\n".join([f"{report['bundle']} on {', '.join(chosen)}", *rows])


def _elsewhere(row: dict[str, Any], report: dict[str, Any]) -> str:
    return "" if row["backend"] == report["backend"] else f", on {row['backend']}"
