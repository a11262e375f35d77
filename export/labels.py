"""Labels for training the miniature, measured by the runtime itself.

    python -m caphuman_edge.export.labels measure --pictures DIR --perception DIR --parser DIR --out LABELS
    python -m caphuman_edge.export.labels encode  --pictures DIR --vae RUN --out LABELS [--edge 128]
    python -m caphuman_edge.export.labels render  --out LABELS

`labels.npz` and `latents-256.npz` are the compact pack that travels; `maps.npy` (several GB) is drawn from it again
where the training runs. Held-out seeds, unmeasurable faces and pictures that do not look like their identity are left
out. Pictures are encoded in one or several variants, most in other colours, half of them mirrored, each with captions
measured from that variant.
"""
import argparse
import io
import json
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from caphuman_edge.export.attributes import captions, head_attributes, mirrored, part_attributes, parts_of
from caphuman_edge.export.repaint import repainted
from caphuman_edge.ref.autoencoder import Autoencoder
from caphuman_edge.ref.training.weights import load_vae
from caphuman_edge.runtime.backends import Graph, open_backend
from caphuman_edge.runtime.cli import guarded
from caphuman_edge.runtime.condition import condition_maps
from caphuman_edge.runtime.contract import HELD_OUT_SEEDS, NANO, PERCEPTION_GRAPHS
from caphuman_edge.runtime.errors import CapHumanError
from caphuman_edge.runtime.head import HeadCode, HeadFitter, load_head
from caphuman_edge.runtime.image import load_photo
from caphuman_edge.runtime.perception import Perception, face_crop, face_hull, head_rotation, hull_mask, select_face
from caphuman_edge.runtime.perception.crop import CLIP_MEAN, CLIP_STD
from caphuman_edge.runtime.perception.detect import comparable_faces
from caphuman_edge.runtime.render import NumpyRenderer
from caphuman_edge.runtime.tokenizer import Tokenizer

CAPTION_VARIANTS = 6
CROP_QUALITY = 85  # JPEG
LEAST_SIMILARITY = 0.3  # cosine to the identity's other pictures
REPAINTED = 0.7  # share of variants in other colours
LATENT_CODES = 24.0  # int8 codes a standard deviation: finer than any noise that training adds
SCALING_PICTURES = 64  # from which the latents' scale is measured, whatever the size that is encoded
NEEDS = {"measure": ("pictures", "perception", "parser"), "encode": ("pictures", "vae"), "render": ()}  # by stage
Item = TypeVar("Item")
CODE_FIELDS = ("identity", "expression", "texture", "pose", "camera", "light", "crop")


@dataclass(frozen=True)
class Measured:
    """One picture's labels."""

    name: str  # NNNNN or NNNNN_x
    code: HeadCode
    identity: np.ndarray  # (d,) unit vector
    crop: bytes  # JPEG of the face on white
    mask: np.ndarray  # latent-size bool, the face hull
    attributes: dict[str, str]  # of the head: light, smile, mouth
    parts: np.ndarray  # (h, w) uint8, the face parser's labels


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("measure", "encode", "render"))
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--perception", type=Path, help="folder of the perception graphs")
    parser.add_argument("--parser", type=Path, help="folder of the face parser's graph, by `export.official`")
    parser.add_argument("--vae", type=Path, help="folder of a training.vae run")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--edge", type=int, default=NANO.height, help="size to encode at, px: 256, or 128")
    parser.add_argument("--variants", type=int, default=2, help="latents of each picture")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    for needed in NEEDS[options.stage]:
        if getattr(options, needed) is None:
            parser.error(f"{options.stage} needs --{needed}")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.stage == "measure":
        measure(options.pictures, options.perception, options.parser, options.out, options.workers)
    elif options.stage == "encode":
        encode(options.pictures, options.vae, options.out, options.edge, options.variants, options.workers)
    else:
        render(options.out, options.workers)
    return 0


def measure(pictures: Path, perception: Path, parser: Path, out: Path, workers: int) -> None:
    """Write labels.npz and parts.npz of every picture that may be trained on and can be measured."""
    paths = sorted(path for path in pictures.glob("*.jpg") if int(path.name[:5]) >= HELD_OUT_SEEDS)
    with ProcessPoolExecutor(workers) as pool:
        results = pool.map(partial(measure_picture, perception, parser), paths, chunksize=16)
        measured = [labels for labels in _progress(results, len(paths)) if labels is not None]
    kept = _alike(measured)
    print(f"{len(paths)} pictures, {len(measured)} measured, {len(kept)} kept", file=sys.stderr)
    _write_labels(out, kept)


def measure_picture(perception: Path, parser: Path, path: Path) -> Measured | None:
    """Labels of one picture, or None where its face cannot be measured."""
    see, image = _perception(perception), load_photo(path)
    try:
        boxes = see.detect(image)
        if comparable_faces(boxes) > 1:
            return None
        face = see.landmarks(image, select_face(boxes))
        code = _fitter().fit(face.points, face.blendshapes, head_rotation(face), image)
    except CapHumanError:
        return None
    return Measured(path.stem, code, see.identity(image, face), _jpeg(face_crop(image, face, NANO.vision.image_size)),
                    _latent_mask(hull_mask(face_hull(face), *image.shape[:2])),
                    head_attributes(image, face, code.light), parts_of(image, _parser(parser)))


def encode(pictures: Path, vae: Path, out: Path, edge: int, variants: int, workers: int) -> None:
    """Write latents-EDGE.npz: int8 codes of scaled latents (n, variants, 4, h, w), and each one's captions.

    They are scaled to unit variance at the pictures' own size.
    """
    model = load_vae(vae)
    with np.load(out / "labels.npz") as labels, np.load(out / "parts.npz") as parts:
        names, told = labels["names"], [json.loads(str(text)) for text in labels["attributes"]]
        jobs = [(pictures / f"{name}.jpg", *labels_of) for name, *labels_of in
                zip(names, told, parts["parts"], strict=True)]
    first = np.stack([np.asarray(Image.open(path)) for path, *_ in jobs[:SCALING_PICTURES]])
    scale = float(1 / _means(model, first).std())
    with ProcessPoolExecutor(workers) as pool:
        results = _progress(pool.map(partial(_encoded, vae, edge, variants), jobs, chunksize=16), len(jobs))
        means, flips, ids = zip(*results, strict=True)
    codes = np.clip(np.rint(np.stack(means) * scale * LATENT_CODES), -127, 127).astype(np.int8)
    np.savez_compressed(out / f"latents-{edge}.npz", names=names, latents=codes, mirrored=np.stack(flips),
                        captions=np.stack(ids), step=np.float32(1 / LATENT_CODES),
                        config=json.dumps(asdict(model.config) | {"latent_scale": scale}))


def render(out: Path, workers: int) -> None:
    """Write maps.npy, (n, 9, height, width) float16: each picture's head code on another picture's identity."""
    with np.load(out / "labels.npz") as labels:
        names, fields = labels["names"], {field: labels[f"code_{field}"] for field in CODE_FIELDS}
    worn = [_worn(names, fields, i) for i in range(len(names))]
    part = out / "maps.part.npy"
    maps = np.lib.format.open_memmap(part, "w+", np.float16, (len(names), 9, NANO.height, NANO.width))
    with ProcessPoolExecutor(workers) as pool:
        for i, drawn in enumerate(_progress(pool.map(_draw, worn, chunksize=16), len(worn))):
            maps[i] = drawn
    maps.flush()
    part.replace(out / "maps.npy")


def _worn(names: np.ndarray, fields: dict[str, np.ndarray], index: int) -> dict[str, np.ndarray]:
    """The picture's own code, but identity and texture of the identity's next picture, as a user's would be."""
    mates = np.flatnonzero(np.char.startswith(names, names[index][:5]))
    mate = mates[(np.flatnonzero(mates == index)[0] + 1) % len(mates)]
    return {field: values[mate if field in ("identity", "texture") else index].astype(np.float32)
            for field, values in fields.items()}


def _draw(fields: dict[str, np.ndarray]) -> np.ndarray:
    head = _fitter().model
    code = HeadCode(head.layout, **fields)
    return condition_maps(NumpyRenderer(), head, code, NANO.height, NANO.width).astype(np.float16)


def _encoded(vae: Path, edge: int, variants: int, job: tuple[Path, dict[str, str], np.ndarray]) -> tuple[
        np.ndarray, np.ndarray, np.ndarray]:
    """One picture's variants: latent means, whether each is mirrored, and token ids of its captions."""
    torch.set_num_threads(1)
    path, told, parts = job
    photo = np.asarray(Image.open(path).convert("RGB"))
    images, flips, ids = [], [], []
    for variant in range(variants):
        rng = np.random.default_rng([int(path.name[:5]), len(path.stem), ord(path.stem[-1]), variant])
        flipped = bool(rng.random() < 0.5)
        image = repainted(photo, parts, rng) if rng.random() < REPAINTED else photo
        attributes = (mirrored(told) if flipped else told) | part_attributes(image, parts)
        ids.append(np.concatenate([_tokenizer().encode(text) for text in captions(attributes, CAPTION_VARIANTS, rng)]))
        small = Image.fromarray(image).resize((edge, edge), Image.Resampling.BOX)
        images.append(np.asarray(small)[:, ::-1 if flipped else 1])
        flips.append(flipped)
    return _means(_autoencoder(vae), np.stack(images)), np.array(flips), np.stack(ids).astype(np.uint16)


def _means(model: Autoencoder, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        means, _ = model.moments(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1)
    return means.numpy()


def _alike(measured: list[Measured]) -> list[Measured]:
    """Pictures whose identity vector agrees with the mean of their identity's other pictures, if it has any."""
    by_seed: dict[str, list[Measured]] = {}
    for labels in measured:
        by_seed.setdefault(labels.name[:5], []).append(labels)
    return [labels for mates in by_seed.values() for labels in mates
            if len(mates) == 1 or _similarity(labels, mates) > LEAST_SIMILARITY]


def _similarity(labels: Measured, mates: list[Measured]) -> float:
    others = np.mean([mate.identity for mate in mates if mate is not labels], axis=0)
    return float(labels.identity @ others / np.linalg.norm(others))


def _write_labels(out: Path, measured: list[Measured]) -> None:
    np.savez_compressed(out / "parts.npz", parts=np.stack([labels.parts for labels in measured]))
    codes: dict[str, Any] = {f"code_{field}": np.stack([getattr(labels.code, field) for labels in measured])
                             .astype(np.float16) for field in CODE_FIELDS}
    np.savez_compressed(
        out / "labels.npz", names=np.array([labels.name for labels in measured]), **codes,
        identities=np.stack([labels.identity for labels in measured]).astype(np.float16),
        masks=np.packbits(np.stack([labels.mask for labels in measured]), axis=-1),
        attributes=np.array([json.dumps(labels.attributes) for labels in measured]),
        empty_caption=_tokenizer().encode("")[0].astype(np.uint16),
        crops=np.frombuffer(b"".join(labels.crop for labels in measured), np.uint8),
        crop_ends=np.cumsum([len(labels.crop) for labels in measured]))


def _latent_mask(mask: np.ndarray) -> np.ndarray:
    """The mask at latent size: cells that it covers by half or more."""
    cell = NANO.vae.downscale
    rows, columns = (length // cell for length in mask.shape)
    return np.asarray(mask.reshape(rows, cell, columns, cell).mean(axis=(1, 3)) >= 0.5)


def _jpeg(crop: np.ndarray) -> bytes:
    """A normalised crop as the picture it was, compressed."""
    pixels = np.clip((crop.transpose(1, 2, 0) * CLIP_STD + CLIP_MEAN) * 255, 0, 255).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=CROP_QUALITY)
    return buffer.getvalue()


def _progress(items: Iterable[Item], count: float) -> Iterator[Item]:
    """Pass items on; a line on stderr now and then."""
    for done, item in enumerate(items, start=1):
        yield item
        if done % 100 == 0:
            print(f"{done}/{round(count)}", file=sys.stderr, flush=True)


@cache
def _perception(folder: Path) -> Perception:
    load = open_backend("ort").load
    detector, landmarks, blendshapes, identity = (load(folder / name / "model.onnx", threads=1)
                                                  for name in PERCEPTION_GRAPHS)
    return Perception(detector, landmarks, blendshapes, identity)


@cache
def _parser(folder: Path) -> Graph:
    return open_backend("ort").load(folder / "parser" / "model.onnx", threads=1)


@cache
def _autoencoder(folder: Path) -> Autoencoder:
    return load_vae(folder)


@cache
def _fitter() -> HeadFitter:
    return HeadFitter(load_head())


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer()


if __name__ == "__main__":
    sys.exit(guarded(main))
