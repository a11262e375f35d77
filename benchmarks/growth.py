"""How a portrait's time and memory grow with its size, its steps and its people.

    python -m benchmarks.growth BUNDLE ... [--backend openvino] [--json]

Bundles of several sizes, such as `caphuman build --random-weights nano --denoiser both --size 384x384` makes; steps and
people are varied with the first. Each case is a process of its own; they take turns, medians of the rounds count.
"""
import argparse
import json
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from skimage.data import astronaut

from benchmarks.portrait import Side, taken
from caphuman_edge.runtime import Bundle
from caphuman_edge.runtime.image import save_png

STEPS, PEOPLE, USUAL = (1, 2, 4, 8, 16), (1, 2, 3, 4), 4


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = [row for group in cases(options.bundles) for row in measure(group, options.backend, options.rounds)]
    print(json.dumps(found, indent=1) if options.json else as_text(found))


def cases(bundles: list[Path]) -> list[dict[str, tuple[object, ...]]]:
    """Groups of cases that are compared, by their names: options of a worker."""
    sizes = {f"{bundle.config.width}x{bundle.config.height} px": ("--bundle", bundle.root, "--steps", USUAL)
             for bundle in map(Bundle.open, bundles)}
    first = ("--bundle", bundles[0])
    return [dict(sizes), {f"{steps} steps": (*first, "--steps", steps) for steps in STEPS},
            {f"{people} people": (*first, "--steps", USUAL, "--people", people) for people in PEOPLE}]


def measure(group: dict[str, tuple[object, ...]], backend: str, rounds: int) -> list[dict[str, Any]]:
    """Medians of each case."""
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        photo = Path(folder) / "astronaut.png"
        save_png(photo, astronaut())
        sides = {name: stack.enter_context(Side("ours", "--photo", photo, "--backend", backend, *options))
                 for name, options in group.items()}
        rows = taken(sides, rounds)
    return [{"case": name, "portrait_s": _median(each, "portrait_s"), "decode_s": _median(each, "decode"),
             "step_s": statistics.median(seconds for row in each for seconds in row["step"]),
             "largest_mb": each[-1]["largest"]} for name, each in rows.items()]


def as_text(rows: list[dict[str, Any]]) -> str:
    """A Markdown table."""
    lines = [f"| {row['case']} | {row['portrait_s']:.2f} | {row['step_s']:.3f} | {row['decode_s']:.2f} | "
             f"{row['largest_mb']:.0f} |" for row in rows]
    return "\n".join(["| case | portrait, s | step, s | decoding, s | VmHWM, MB |", "|---|---|---|---|---|", *lines])


def _median(rows: list[dict[str, Any]], name: str) -> float:
    return statistics.median(row[name] for row in rows)


if __name__ == "__main__":
    main()
