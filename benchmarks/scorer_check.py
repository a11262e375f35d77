"""Can the independent scorer tell held-out people apart? Cosines within and across identities, by the set's own poses.

    python -m benchmarks.scorer_check [--identities N]
"""
import argparse
import sys
from pathlib import Path

import numpy as np

from benchmarks.score import PICTURES
from caphuman_edge.quant.heldout import Pictures
from caphuman_edge.quant.judges import FaceNet, default_path
from caphuman_edge.runtime.bundle import Bundle
from caphuman_edge.runtime.errors import CapHumanError, FaceError
from caphuman_edge.runtime.pipeline import Pipeline


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scorer_check", description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, help="whose perception finds the faces (default: the embedded one)")
    parser.add_argument("--identities", type=int, default=100, metavar="N", help="default: %(default)d")
    parser.add_argument("--pictures", type=Path, default=PICTURES, metavar="DIR")
    parser.add_argument("--scorer", type=Path, default=default_path(), metavar="FILE")
    options = parser.parse_args()
    try:
        pipe, scorer = Pipeline(Bundle.open(options.bundle)), FaceNet(options.scorer)
        names, vectors = embed(pipe, scorer, Pictures(options.pictures), options.identities)
    except CapHumanError as error:
        print(f"scorer_check: {error}", file=sys.stderr)
        return 2
    print(comparison(names, vectors))
    return 0


def embed(pipe: Pipeline, scorer: FaceNet, pictures: Pictures, identities: int) -> tuple[list[str], np.ndarray]:
    """Names and unit vectors (n, 512) of all measurable pictures of the first identities."""
    names, vectors = [], []
    for name in sorted(name for name in pictures.names if int(name[:5]) < identities):
        try:
            subject = pipe.perceive(pictures.read(name), face=1, fit="squash")
        except FaceError:
            continue
        names.append(name)
        vectors.append(scorer(subject.photo, subject.face))
    return names, np.stack(vectors)


def comparison(names: list[str], vectors: np.ndarray) -> str:
    """One line: both means, and how often a same-person pair is the nearer one."""
    people = np.array([name[:5] for name in names])
    cosines = (vectors @ vectors.T)[np.triu_indices(len(names), 1)]
    alike = (people[:, None] == people)[np.triu_indices(len(names), 1)]
    same, different = cosines[alike], np.sort(cosines[~alike])
    nearer = np.searchsorted(different, same).mean() / len(different)
    return (f"{len(names)} pictures of {len(set(people))} identities: cosine {same.mean():.3f} within an identity, "
            f"{different.mean():.3f} across; a pair of one person is nearer in {100 * nearer:.1f} % of comparisons")


if __name__ == "__main__":
    sys.exit(main())
