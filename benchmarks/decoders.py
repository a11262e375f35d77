"""The fast decoder beside the autoencoder's own: how far apart their pictures are, whose face they show, how long each
takes.

    python -m benchmarks.decoders [--bundle DIR] [--pictures DIR] [--portraits 60] [--sheet FILE]

Of held-out people a photo's latent is decoded by both, then a portrait's, whose face is measured in both pictures.
Times are the shortest of a few runs in turns, on a machine that should do nothing else.
"""
import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.score import PICTURES
from caphuman_edge.quant.heldout import Pair, Pictures, pair_up
from caphuman_edge.quant.measures import Measurer
from caphuman_edge.runtime.backends import BACKENDS
from caphuman_edge.runtime.bundle import Bundle
from caphuman_edge.runtime.errors import BundleError, CapHumanError
from caphuman_edge.runtime.image import save_png
from caphuman_edge.runtime.pipeline import Pipeline
from caphuman_edge.runtime.request import DECODERS, KL, TINY

PROMPT = "a photo of a person, smiling"
RUNS = 5
SHOWN = 12  # people in the sheet


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoders", description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, help="default: the embedded one")
    parser.add_argument("--backend", choices=BACKENDS, default="ort")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--pictures", type=Path, default=PICTURES, metavar="DIR")
    parser.add_argument("--portraits", type=int, default=60, metavar="N", help="default: %(default)d")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="a PNG: photos' and portraits' pictures in rows")
    options = parser.parse_args()
    try:
        pipe = Pipeline(Bundle.open(options.bundle), options.backend, options.threads)
        if DECODERS[TINY] not in pipe.bundle:
            raise BundleError(f"{pipe.bundle.root} has no {DECODERS[TINY]}; build one with --tiny-decoder")
        pictures = Pictures(options.pictures)
        rows, shown = measure(pipe, pictures, pair_up(pictures.names, options.portraits, "--portraits"))
    except CapHumanError as error:
        print(f"decoders: {error}", file=sys.stderr)
        return 2
    print(json.dumps({**summary(rows), "ms": times(pipe)}, indent=1))
    if options.sheet:
        save_png(options.sheet, np.concatenate(shown[:SHOWN]), {})
    return 0


def measure(pipe: Pipeline, pictures: Pictures, pairs: list[Pair]) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """Figures of each person, and what is to be seen of those who may be shown: a row of four pictures each."""
    measurer, rows, shown = Measurer(pipe, None), [], []
    for pair in pairs:
        subject = measurer.see(pictures.read(pair.reference))
        if subject is None:
            continue
        latents = {"photo": encoded(pipe, pictures.read(pair.reference))}
        *_, last = pipe.generate(subject, prompt=PROMPT, seed=pair.seed)
        latents["portrait"] = last.latent
        drawn = {(what, name): pipe.decode(latent, graph) for what, latent in latents.items()
                 for name, graph in DECODERS.items()}
        faces = [measurer.see(drawn["portrait", name]) for name in (KL, TINY)]
        row = {f"{what}_psnr_db": psnr_of(drawn[what, TINY], drawn[what, KL]) for what in latents}
        if all(faces):
            kl, tiny = (face.identity for face in faces if face)
            row |= {"identity_apart": float(kl @ tiny), "identity_kl": float(kl @ subject.identity),
                    "identity_tiny": float(tiny @ subject.identity)}
        rows.append(row)
        if pair.shown:
            shown.append(np.concatenate(list(drawn.values()), axis=1))
    return rows, shown


def encoded(pipe: Pipeline, picture: np.ndarray) -> np.ndarray:
    """The scaled latent of a picture of the bundle's size."""
    sample = picture.astype(np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
    mean = pipe.graph("vae_encoder")({"sample": sample})["latent_parameters"]
    return np.ascontiguousarray(mean[:, :pipe.bundle.config.vae.latent_channels])


def psnr_of(found: np.ndarray, wanted: np.ndarray) -> float:
    """Of pictures of bytes, dB."""
    error = np.square(found.astype(np.float64) - wanted).mean()
    return float(10 * np.log10(255**2 / error))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and worst of each figure, and how many pictures it is of."""
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: {"mean": round(float(np.mean(found)), 4), "worst": round(min(found), 4), "of": len(found)}
            for name, found in values.items()}


def times(pipe: Pipeline) -> dict[str, float]:
    """Milliseconds that each decoder takes."""
    latent = np.random.default_rng(0).normal(size=(1, *pipe.bundle.config.latent_shape)).astype(np.float32)
    found: dict[str, list[float]] = {name: [] for name in DECODERS}
    for _ in range(RUNS):
        for name, graph in DECODERS.items():
            started = time.perf_counter()
            pipe.decode(latent, graph)
            found[name].append(1000 * (time.perf_counter() - started))
    return {name: round(min(taken), 1) for name, taken in found.items()}


if __name__ == "__main__":
    sys.exit(main())
