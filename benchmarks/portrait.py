"""One portrait at full size, end to end: the reference, ours, what the machine could do, and peers.

    python -m benchmarks.portrait --bundle INT8 [--float BUNDLE] [--photo FILE] [--rounds 3] [--json]

INT8 is a bundle of full size in int8 with OpenVINO's form, fused and split, such as
    caphuman build --random-weights full --precision int8 --format onnx,openvino --denoiser both \\
        --schedule lcm --steps 4 --guidance 1 --out INT8
and the float bundle beside it, if given, is what peers of float arithmetic run. Weights are random: times do not depend
on them. Sides that are compared take turns in processes of their own, so that a shared machine treats them alike:

(a) the torch reference in float32 as officially scheduled: 20 steps of two passes, CapFace and UNet each; its time is
    put together from measured parts, 40 passes among them.
(b) ours with the same schedule: 20 guided steps, of which a few are measured.
(c) ours with 4 unguided steps, measured whole, with the KL decoder and with the tiny one.

What loads is told apart. Linux alone tells a process's largest resident size.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from skimage.data import astronaut

from caphuman_edge.runtime.image import save_png

Row = dict[str, Any]
OFFICIAL_STEPS, GUIDED, FEW = 20, 2, 4
KEYS = ("end_to_end_ratio", "end_to_end_ratio_kl", "same_schedule_ratio", "preview_s", "int8_step_s",
        "step_over_ceiling", "peak_rss_gb", "peak_rss_low_gb", "cached_start_s", "low_memory_portrait_s")
STARTS = 3
MEASURED = 3  # guided steps of (b)
ENCODERS = ("text_encoder", "image_encoder", "hint_encoder")
BELOW_AMX = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}  # as most laptops are; of older instruction sets AVX2_VNNI


class Side:
    """A worker process, which measures once each time it is asked."""

    def __init__(self, name: str, *options: object, environment: Mapping[str, str] = {}):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.portrait_worker", name, *map(str, options)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def __call__(self) -> Row:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a side of the benchmark ended: {self.process.args}; its message is above")
        return dict(json.loads(line))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--float", type=Path)
    parser.add_argument("--photo", type=Path, help="default: the astronaut of scikit-image")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", action="store_true", help="peers, too: half an hour, and 15 GB of memory")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        photo = options.photo or Path(folder) / "astronaut.png"
        if options.photo is None:
            save_png(photo, astronaut())
        report = {**end_to_end(options.bundle, photo, options.rounds), **starts(options.bundle, photo)}
        report |= ceiling(options.bundle, options.rounds)
        report["below_amx"] = below_amx(options.bundle)
        if options.peers:
            report["peers"] = peers(options.bundle, options.float, options.rounds)
    print(json.dumps(report, indent=1) if options.json else as_text(report))


def end_to_end(bundle: Path, photo: Path, rounds: int) -> Row:
    """(a), (b) and (c), side by side; medians, and of each the split."""
    base = ("--bundle", bundle, "--photo", photo, "--precision", "fast")
    with ExitStack() as stack:
        sides = {"reference": stack.enter_context(Side("reference")),
                 "same": stack.enter_context(Side("ours", *base, "--texts", GUIDED, "--steps", OFFICIAL_STEPS,
                                                  "--stop-after", MEASURED)),
                 "few_kl": stack.enter_context(Side("ours", *base, "--steps", FEW)),
                 "few": stack.enter_context(Side("ours", *base, "--steps", FEW, "--decoder", "tiny"))}
        rows = taken(sides, rounds)
    parts = {name: statistics.median(row["graphs"][name] for row in rows["reference"])
             for name in rows["reference"][0]["graphs"]}
    same, few_kl, few = (split(rows[name]) for name in ("same", "few_kl", "few"))
    once = {"perceive": same["perceive"], "maps": same["maps"],  # the official tool's own are not installed here
            "text_encoder": 2 * parts["text_encoder"], "image_encoder": parts["image_encoder"],
            "hint_encoder": parts["hint_encoder"]}
    passes = GUIDED * OFFICIAL_STEPS * parts["denoiser"]
    official = {**once, "step": GUIDED * parts["denoiser"], "decode": parts["vae_decoder"],
                "portrait": sum(once.values()) + passes + parts["vae_decoder"]}
    same["portrait"] += (OFFICIAL_STEPS - MEASURED) * same["step"]
    return {"reference": official, "same_schedule": same, "few_steps_kl": few_kl, "few_steps": few,
            "end_to_end_ratio": official["portrait"] / few["portrait"],
            "end_to_end_ratio_kl": official["portrait"] / few_kl["portrait"],
            "same_schedule_ratio": official["portrait"] / same["portrait"],
            "preview_s": few["perceive"] + few["maps"]}  # of a new photo; of a slider the maps alone


def taken(sides: Mapping[str, Side], rounds: int) -> dict[str, list[Row]]:
    """What each side measured in turns, after a first turn that loads and warms up."""
    for side in sides.values():
        side()
    rows: dict[str, list[Row]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            rows[name].append(side())
    return rows


def split(rows: Sequence[Row]) -> dict[str, float]:
    """Medians of a portrait's parts, seconds."""
    medians = {name: statistics.median(row[name] for row in rows) for name in ("perceive", "maps", "decode", *ENCODERS)}
    step = statistics.median(seconds for row in rows for seconds in row["step"])
    whole = statistics.median(row["perceive"] + row["portrait_s"] for row in rows)
    return {**medians, "step": step, "portrait": whole}


def starts(bundle: Path, photo: Path) -> Row:
    """A cold and a cached start, and the largest resident sizes of fresh processes that draw one portrait.

    `cached_start_s` is the time from opening the bundle to the end of the first step, less what the photo, the
    encoders and that step take in a later portrait; the median of some.
    """
    base = ("ours", "--bundle", bundle, "--photo", photo, "--steps", FEW, "--precision", "fast")
    found: Row = {}
    with tempfile.TemporaryDirectory() as cache:
        for name, memory in {"cold": "steps", "low": "stage", "low_cached": "stage"}.items():
            with Side(*base, "--memory", memory, environment={"CAPHUMAN_CACHE": cache}) as side:
                found[name] = side()
        cached, net = zip(*(_start(base, cache) for _ in range(STARTS)), strict=True)
    return {"starts": {**found, "cached": cached[-1], "net_s": net}, "cached_start_s": statistics.median(net),
            "peak_rss_gb": cached[-1]["largest"] / 1e3, "peak_rss_low_gb": found["low_cached"]["largest"] / 1e3,
            "low_memory_portrait_s": found["low_cached"]["portrait_s"]}


def _start(base: tuple[object, ...], cache: str) -> tuple[Row, float]:
    """A cached start, and its seconds less what of it was work, measured in the next breath."""
    environment = {"CAPHUMAN_CACHE": cache}
    with Side(*base, "--memory", "steps", environment=environment) as side:
        first = side()
    with Side(*base, environment=environment) as side:
        warm = [side(), side()][-1]
    work = sum(warm[name] for name in ("perceive", "maps", *ENCODERS)) + warm["step"][0]
    return first, float(first["first_step_s"] - work)


def ceiling(bundle: Path, rounds: int) -> Row:
    """The int8 step over the sum of its layers' best times, each measured in turns with the other."""
    model = bundle / "denoiser" / "openvino_model.xml"
    command = [sys.executable, "-m", "benchmarks.ceiling", str(model), "--rounds", "5", "--json"]
    steps, sums = list[float](), list[Row]()
    with Side("graph", "--bundle", bundle, "--precision", "fast") as side:
        side()
        for _ in range(rounds):
            steps += [side()["step"][0] for _ in range(3)]
            sums.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
            steps += [side()["step"][0] for _ in range(3)]
    middle = sorted(sums, key=lambda row: row["ceiling_s"])[len(sums) // 2]
    return {"int8_step_s": statistics.median(steps), "ceiling": middle,
            "step_over_ceiling": statistics.median(steps) / middle["ceiling_s"]}


def below_amx(bundle: Path) -> Row:
    """A step in turns with and without the matrix units that laptops lack."""
    graph = ("graph", "--bundle", bundle, "--precision")
    with Side(*graph, "fast") as with_amx, Side(*graph, "fast", environment=BELOW_AMX) as without:
        rows = taken({"amx": with_amx, "below_amx": without}, 3)
    return {name: statistics.median(row["step"][0] for row in side) for name, side in rows.items()}


def peers(bundle: Path, exact: Path | None, rounds: int) -> Row:
    """Each peer's step of one text, in turns with ours."""
    listed: dict[str, tuple[object, ...]] = {
        "diffusers, torch float32": ("diffusers",),
        "diffusers, torch bfloat16": ("diffusers", "--dtype", "bfloat16"),
        "our int8 graph, ONNX Runtime": ("graph", "--bundle", bundle, "--backend", "ort")}
    if exact:
        listed |= {"float graph, OpenVINO float32": ("graph", "--bundle", exact, "--precision", "f32"),
                   "float graph, OpenVINO bfloat16": ("graph", "--bundle", exact, "--precision", "bf16"),
                   "float graph, ONNX Runtime": ("graph", "--bundle", exact, "--backend", "ort")}
    found: Row = {}
    with Side("graph", "--bundle", bundle, "--precision", "fast") as ours:
        for name, options in listed.items():
            with Side(*map(str, options)) as peer:
                rows = taken({"peer": peer, "ours": ours}, rounds)
            seconds = {side: statistics.median(row["step"][0] for row in taken_) for side, taken_ in rows.items()}
            found[name] = {**seconds, "ratio": seconds["peer"] / seconds["ours"]}
    return found


def as_text(report: Row) -> str:
    """Markdown tables."""
    return "\n".join(_lines(report))


def _lines(report: Row) -> Iterator[str]:
    columns = {"(a) reference": "reference", "(b) ours, same schedule": "same_schedule",
               "(c) ours, 4 steps, KL": "few_steps_kl", "(c) ours, 4 steps, tiny": "few_steps"}
    rows = ("perceive", "maps", *ENCODERS, "step", "decode", "portrait")
    yield f"| seconds | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    for row in rows:
        yield f"| {row} | {' | '.join(f'{report[key][row]:.2f}' for key in columns.values())} |"
    yield ""
    for key in KEYS:
        yield f"- {key}: {report[key]:.2f}"
    kinds = ", ".join(f"{kind} {seconds:.2f} s" for kind, seconds in report["ceiling"]["by_kind_s"].items())
    yield f"- the ceiling is {report['ceiling']['ceiling_s']:.2f} s: {kinds}"
    yield "- a step with AMX {amx:.2f} s, without {below_amx:.2f} s".format(**report["below_amx"])
    for name, row in report.get("peers", {}).items():
        yield f"- {name}: a step {row['peer']:.2f} s, ours {row['ours']:.2f} s, ratio {row['ratio']:.2f}"


if __name__ == "__main__":
    main()
