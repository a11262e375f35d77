"""`caphuman quantize`, and what `caphuman build --precision int8` does once its float bundle is there."""
import argparse
import importlib.util
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from caphuman_edge.runtime.cli.report import add_json_flag, show
from caphuman_edge.runtime.cli.values import whole
from caphuman_edge.runtime.errors import BadInput, BundleError

NEEDED = ("torch", "onnx_ir", "onnxscript")  # of the export extra
if missing := [package for package in NEEDED if importlib.util.find_spec(package) is None]:
    raise ImportError(f"No module named {missing[0]!r}")  # the command line then leaves the command out
PORTRAITS = 8
GATED = 4  # triples of a build's gate: more than eight would take hours at full size


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("quantize", help="a bundle of float graphs to one of int8 graphs", description=(
        "Rewrites the denoiser to int8 weights and activations and other graphs to int8 weights, as recipes say that "
        "were found on the embedded miniature, and proves how close the new graphs come. Stop it at any time: the same "
        "command goes on from there. 'caphuman fidelity' measures what the portraits lose."))
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder of the float bundle, which has ONNX graphs")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the bundle to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a bundle that is there, once the new one is "
                        "whole")
    parser.add_argument("--photos", type=Path, nargs="+", default=[], metavar="PATH", help="photos of faces, or "
                        "folders of them, to calibrate with (default: portraits that the embedded miniature draws)")
    parser.add_argument("--portraits", type=whole(1, 1000), default=PORTRAITS, metavar="N", help="to draw for that, a "
                        "photo each (default: %(default)s)")
    parser.add_argument("--recipe", type=Path, action="append", default=[], metavar="FILE", help="in place of the "
                        "format's own: a file named after the format, such as openvino-mine.json, or coreml-mixed, "
                        "palettes of 4 to 8 bits for Core ML; may be given several times")
    parser.add_argument("--threads", type=whole(1, 1024), metavar="N", help="cores to use (default: all)")
    add_json_flag(parser)
    parser.set_defaults(run=_run)


def finish(source: Path, out: Path, photos: Sequence[Path], report: Callable[[str], None]) -> None:
    """Make the int8 bundle of a finished float one, for `caphuman build --precision int8`.

    It takes its place only if it keeps its limits. Raises BundleError where it surely does not.
    """
    from caphuman_edge.quant.int8_bundle import Calibration, default_recipes, quantize

    work = out.with_name(f".{out.name}.gate")
    quantize(source, out, default_recipes(), Calibration(tuple(photos)), report=report,
             accept=partial(_gate, source, work, report))
    shutil.rmtree(work, ignore_errors=True)


def _gate(source: Path, work: Path, report: Callable[[str], None], made: Path) -> None:
    """Draw a few portraits by both bundles and refuse the new one if it surely loses more than its limits."""
    from caphuman_edge.quant.fidelity import gate
    from caphuman_edge.runtime.bundle import Bundle

    findings = gate(Bundle.open(made), Bundle.open(source), work, triples=GATED,
                    progress=lambda label, done, count: report(f"gate: {label}: {done}/{count}"))
    for candidate in findings.candidates:
        for verdict in candidate.verdicts:
            found = verdict.found
            report(f"gate: {verdict.measure}: {found.value:.3f} [{found.low:.3f}, {found.high:.3f}], "
                   f"limit {verdict.limit:g}")
    if findings.refuted:
        worst = findings.refuted[0]
        raise BundleError(f"int8 fails its limits: {worst.measure} is {worst.found.value:.3f} on {findings.triples} "
                          f"triples, the limit {worst.limit:g}; build f16 and try 'caphuman quantize --recipe' with "
                          f"more layers in float, or keep f16 (portraits are in {work})")


def _run(args: argparse.Namespace) -> int:
    from caphuman_edge.quant.int8_bundle import Calibration, default_recipes, quantize
    from caphuman_edge.quant.recipe import read_recipe, recipe_file
    from caphuman_edge.runtime.bundle import Bundle, check_target
    from caphuman_edge.runtime.cli.inspect import facts, text

    check_target(args.out, args.overwrite)
    recipes = default_recipes()
    for path in map(recipe_file, args.recipe):
        kind = path.stem.split("-")[0]
        if kind not in recipes:
            raise BadInput(f"{path} is named after no format, expected {' or '.join(recipes)}; rename it to "
                           "onnx.json or openvino-mine.json")
        recipes[kind] = read_recipe(path)
    quantize(args.bundle, args.out, recipes, Calibration(tuple(args.photos), args.portraits), args.threads, _say)
    show(facts(Bundle.open(args.out)), args.json, text)
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
