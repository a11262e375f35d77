"""Whether memory stays flat over many portraits: the process's own memory after every so many of them.

    python -m benchmarks.endurance [--portraits 200] [--steps 2] [--json]

Photos, heads, prompts, seeds and settings change from portrait to portrait; everything goes through one pipeline, as in
`caphuman batch`. Linux alone tells a process's memory in /proc.
"""
import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from skimage.data import astronaut

from caphuman_edge.runtime import Bundle, Person, Pipeline

MARKS = 10  # rows of the table
PROMPTS = ("a portrait, blue background", "smiling, red hair", "", "a (portrait:1.3), " + "long hair, " * 40)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--portraits", type=int, default=200)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = endure(options.portraits, options.steps)
    print(json.dumps(rows, indent=1) if options.json else as_text(rows))


def endure(portraits: int, steps: int) -> list[dict[str, float]]:
    """Memory in MB after portrait 1 and every tenth part of them."""
    rows = []
    with Pipeline(Bundle.open()) as pipe, tempfile.TemporaryDirectory() as folder:
        for number in range(1, portraits + 1):
            _portrait(pipe, number, steps, Path(folder))
            if number == 1 or number % max(1, portraits // MARKS) == 0:
                rows.append({"portraits": number, **memory()})
    return rows


def memory() -> dict[str, float]:
    """This process's anonymous memory now, and its largest resident size so far, MB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: round(int(lines[key].split()[0]) / 1000, 1) for name, key in (("anonymous", "RssAnon"),
                                                                                ("largest", "VmHWM"))}


def as_text(rows: list[dict[str, float]]) -> str:
    """A Markdown table."""
    lines = [f"| {row['portraits']} | {row['anonymous']:.0f} | {row['largest']:.0f} |" for row in rows]
    return "\n".join(["| portraits | RssAnon, MB | VmHWM, MB |", "|---|---|---|", *lines])


def _portrait(pipe: Pipeline, number: int, steps: int, folder: Path) -> None:
    """A photo measured anew, and a portrait of one person or, every fourth time, two."""
    subject = pipe.perceive(np.roll(astronaut(), number % 8, axis=1), face=1)
    people = [Person(subject, subject.head.posed(yaw=number % 60 - 30.0))]
    if number % 4 == 0:
        people.append(Person(subject, subject.head.moved(x=0.4, scale=0.5)))
    for step in pipe.generate(people, steps=steps, seed=number, prompt=PROMPTS[number % len(PROMPTS)]):
        step.preview()
    step.image.save(folder / "portrait.jpg")


if __name__ == "__main__":
    main()
