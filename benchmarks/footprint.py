"""What an installation takes on disk, and how long the runtime takes to import.

    python -m benchmarks.footprint [--json]

Run it with the python of an environment in which caphuman-edge is installed from its wheel, not editable.
"""
import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from importlib.metadata import distribution, requires
from pathlib import Path

RUNS = 9
STATEMENTS = {"python alone": "pass", "numpy": "import numpy",
              "caphuman_edge.runtime.pipeline": "import caphuman_edge.runtime.pipeline",
              "caphuman --version": "from caphuman_edge.runtime.cli import main; main(['--version'])"}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    report = {"megabytes": sizes(), "import_seconds": import_seconds()}
    print(json.dumps(report, indent=1) if options.json else as_text(report))


def sizes() -> dict[str, float]:
    """Megabytes on disk of the package without its embedded bundle, of the bundle, and of each thing it requires."""
    files = _files("caphuman-edge")
    bundle = [path for path in files if "nano" in path.parts]
    needed = {name: _megabytes(_files(name)) for name in sorted(_requirements("caphuman-edge"))}
    own = {"caphuman-edge": _megabytes(set(files) - set(bundle)), "embedded bundle": _megabytes(bundle)}
    return {**own, **needed, "all but the bundle": round(own["caphuman-edge"] + sum(needed.values()), 1)}


def import_seconds() -> dict[str, float]:
    """Median wall time of a fresh interpreter for each statement, interleaved so that all meet the same machine."""
    times: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(RUNS):
        for name, statement in STATEMENTS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", statement], check=True, stdout=subprocess.DEVNULL)
            times[name].append(time.perf_counter() - start)
    return {name: round(statistics.median(values), 3) for name, values in times.items()}


def as_text(report: dict[str, dict[str, float]]) -> str:
    """Two Markdown tables."""
    units = {"megabytes": "MB", "import_seconds": "s"}
    tables = [[f"| {title.replace('_', ' ')} | {units[title]} |", "|---|---|",
               *(f"| {name} | {value} |" for name, value in values.items())] for title, values in report.items()]
    return "\n\n".join("\n".join(table) for table in tables)


def _requirements(name: str) -> set[str]:
    """Everything that an installation without extras pulls in, transitively."""
    found: set[str] = set()
    for line in requires(name) or ():
        need = re.split(r"[^\w.-]", line)[0].lower()
        if "extra ==" not in line and need not in found and _installed(need):
            found |= {need} | _requirements(need)
    return found


def _installed(name: str) -> bool:
    try:
        return bool(distribution(name))
    except ModuleNotFoundError:  # an environment marker left it out
        return False


def _files(name: str) -> list[Path]:
    return [Path(str(path.locate())) for path in distribution(name).files or ()]


def _megabytes(paths: object) -> float:
    return round(sum(path.stat().st_size for path in paths if path.exists()) / 1e6, 1)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
