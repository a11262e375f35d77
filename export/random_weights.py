"""Seeded random weights in the official layout, for tests and benchmarks of what a build does to real ones.

Each tensor is drawn by its own name, so that any of them can be made alone. Scales preserve variance: activations stay
near 1, predicted noise too. No tensor is zero, not even where a training starts from zero convolutions: with those,
every comparison of two CapFaces would hold.
"""
import hashlib
import json
import math
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from caphuman_edge.ref.caphuman import CapHuman
from caphuman_edge.ref.checkpoints import POSE_PREFIX
from caphuman_edge.ref.tiny_decoder import TinyDecoder
from caphuman_edge.runtime.contract import TEXT_TOKENS, Config

VAE_PREFIX = "first_stage_model."
TINY_PREFIX = "tiny_decoder."  # of ours, so that its weights' names tell their gains
BACKBONE_PREFIXES = ("model.diffusion_model.", VAE_PREFIX, "cond_stage_model.")
AFTER_SILU = 1.68  # SiLU leaves 0.355 of a unit normal variable's second moment
AFTER_GELU = 1.53  # exact or quick GELU: 0.425
AFTER_RELU = 1.41  # ReLU: 0.5
BRANCH = 0.3  # what ends in a sum with what it began from
GAINS = (  # the first pattern found in a weight's name tells its gain; the standard deviation is gain / sqrt(fan-in)
    (r"\.time_embed\.0\.", 1.41), (r"\.time_embed\.2\.", AFTER_SILU), (r"\.emb_layers\.1\.", 0.5 * AFTER_SILU),
    (r"\.in_layers\.2\.", AFTER_SILU), (r"\.out_layers\.3\.", BRANCH * AFTER_SILU),
    (r"\.proj_out\.", BRANCH), (r"\.ff\.net\.2\.", 0.5 * AFTER_GELU), (r"\.to_out\.0\.", 0.5),
    (r"\.zero_convs\.", BRANCH), (r"\.middle_block_out\.", BRANCH),
    (r"\.input_hint_block\.0\.", 2.0), (r"\.input_hint_block\.", AFTER_SILU),
    (r"\.mask_predict\.", 3.0),  # logits far on both sides of zero, so that gates open and close
    (r"model\.diffusion_model\.out\.2\.", AFTER_SILU),
    (r"first_stage_model.*\.conv1\.", AFTER_SILU), (r"first_stage_model.*\.conv2\.", BRANCH * AFTER_SILU),
    (r"first_stage_model\.decoder\.conv_out\.", 0.5 * AFTER_SILU), (r"first_stage_model.*\.conv_out\.", AFTER_SILU),
    (r"\.post_quant_conv\.", 0.18),  # a latent comes divided by its scale
    (r"tiny_decoder\..*\.conv\.4\.", BRANCH * AFTER_RELU), (r"tiny_decoder\.1\.", 1.0),
    (r"tiny_decoder\.19\.", 0.5 * AFTER_RELU), (r"tiny_decoder\.", AFTER_RELU),
    (r"\.mlp\.fc2\.", 0.5 * AFTER_GELU), (r"\.out_proj\.", 0.5))
IDENTITY = re.compile(r"^id_linear\.weight$")  # identity vectors have length 1, whatever their width
NORM_SPREAD, BIAS_SPREAD = 0.1, 0.05
PICKLE_PROTOCOL = 2  # torch.save's
ALIGNMENT = 64  # bytes, so that memory-mapped tensors start where torch's own would
WRITTEN_AT = (2024, 1, 1, 0, 0, 0)  # in zip archives: equal seeds make equal files

Shapes = Mapping[str, Sequence[int]]
Report = Callable[[str], None]


def official_shapes(config: Config, controlnet: bool = False) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights, by official name; position indices are left out. `controlnet`: with those of one more."""
    with torch.device("meta"):
        model = CapHuman(config, pose_net=controlnet)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def random_weights(config: Config, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Every weight of a model, one at a time, float32, by official name."""
    for name, shape in official_shapes(config).items():
        yield name, random_weight(name, shape, seed)


def random_weight(name: str, shape: Sequence[int], seed: int) -> np.ndarray:
    """One weight: a function of name, shape and seed alone. Uniform, float32, never all zero."""
    values = _generator(name, seed).random(math.prod(shape), dtype=np.float32)
    values -= np.float32(0.5)
    centre, spread = _distribution(name, shape)
    values *= np.float32(2 * spread)
    if centre:
        values += np.float32(centre)
    return values.reshape(tuple(shape))


def write_checkpoints(folder: Path, config: Config, seed: int, report: Report = lambda line: None,
                      controlnet: bool = False) -> dict[str, Path]:
    """Write caphuman.ckpt, v1-5, vae and tiny_decoder.safetensors as the published files are laid out; their paths.

    The first three hold different numbers, so that it shows which one a part was taken from. One tensor at a time is
    in memory. `controlnet`: write controlnet.safetensors, too. At full size: 7 + 4.3 + 0.3 (+ 1.4) GB of disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shapes = official_shapes(config)
    backbone = {name: shape for name, shape in shapes.items() if name.startswith(BACKBONE_PREFIXES)}
    autoencoder = {name: shape for name, shape in shapes.items() if name.startswith(VAE_PREFIX)}
    paths = {"caphuman": folder / "caphuman.ckpt", "backbone": folder / "v1-5.safetensors",
             "vae": folder / "vae.safetensors", "tiny_decoder": folder / "tiny_decoder.safetensors"}
    report(f"writing {paths['caphuman']}")
    write_torch(paths["caphuman"], shapes, _positions(config), seed)
    report(f"writing {paths['backbone']}")
    write_safetensors(paths["backbone"], backbone, seed + 1)
    report(f"writing {paths['vae']}")
    write_safetensors(paths["vae"], autoencoder, seed + 2, VAE_PREFIX)
    write_safetensors(paths["tiny_decoder"], _tiny_shapes(config), seed + 4, TINY_PREFIX)
    return paths | (_write_controlnet(folder, config, seed + 3, report) if controlnet else {})


def write_safetensors(path: Path, shapes: Shapes, seed: int, unprefix: str = "") -> None:
    """Random weights as .safetensors; names lose the prefix."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name.removeprefix(unprefix)] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            file.write(random_weight(name, shape, seed).data)


def write_torch(path: Path, shapes: Shapes, extra: Mapping[str, np.ndarray], seed: int) -> None:
    """Random weights as torch.save writes `{"state_dict": ...}`, with some arrays more; one tensor at a time."""
    entries = [*((name, tuple(shape), np.dtype(np.float32)) for name, shape in shapes.items()),
               *((name, array.shape, array.dtype) for name, array in extra.items())]
    with zipfile.ZipFile(path, "w") as archive:
        _write_record(archive, "data.pkl", _state_dict_pickle(entries))
        _write_record(archive, "byteorder", b"little")
        for key, (name, shape, _) in enumerate(entries):
            array = extra[name] if name in extra else random_weight(name, shape, seed)
            _write_record(archive, f"data/{key}", array.tobytes())
        _write_record(archive, "version", b"3\n")


def _write_controlnet(folder: Path, config: Config, seed: int, report: Report) -> dict[str, Path]:
    """Its names begin with control_model., as published ones do."""
    path = folder / "controlnet.safetensors"
    report(f"writing {path}")
    own = {name: shape for name, shape in official_shapes(config, controlnet=True).items()
           if name.startswith(f"pose_{POSE_PREFIX}")}
    write_safetensors(path, own, seed, unprefix="pose_")
    return {"controlnet": path}


def _tiny_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        decoder = TinyDecoder(config)
    return {TINY_PREFIX + name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}


def _generator(name: str, seed: int) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return np.random.Generator(np.random.SFC64(int.from_bytes(digest[:16], "little")))


def _distribution(name: str, shape: Sequence[int]) -> tuple[float, float]:
    """Centre and half-width of a weight's uniform distribution."""
    if name.endswith(".bias"):
        return 0.0, BIAS_SPREAD
    if len(shape) == 1:
        return (0.0, math.sqrt(3)) if "embedding" in name else (1.0, NORM_SPREAD)
    if "position_embedding" in name:
        return 0.0, 0.5
    if "token_embedding" in name or IDENTITY.match(name):
        return 0.0, math.sqrt(3)
    gain = next((gain for pattern, gain in GAINS if re.search(pattern, f".{name}")), 1.0)
    return 0.0, gain * math.sqrt(3 / math.prod(shape[1:]))


def _positions(config: Config) -> dict[str, np.ndarray]:
    """The position indices that checkpoints of transformers 4.24 carry beside their weights."""
    counts = {"cond_stage_model.transformer.text_model": TEXT_TOKENS,
              "control_cond_stage_model.transformer.vision_model": config.vision.tokens}
    return {f"{name}.embeddings.position_ids": np.arange(count)[None] for name, count in counts.items()}


def _write_record(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    """One stored entry whose bytes start at a multiple of ALIGNMENT."""
    entry = zipfile.ZipInfo(f"archive/{name}", WRITTEN_AT)
    file = archive.fp
    assert file is not None
    start = file.tell() + 30 + len(entry.filename) + 4  # of the content, behind header, name and an empty extra field
    entry.extra = struct.pack("<HH", 0x4246, -start % ALIGNMENT) + b"Z" * (-start % ALIGNMENT)
    archive.writestr(entry, content)


def _state_dict_pickle(entries: Sequence[tuple[str, tuple[int, ...], np.dtype[Any]]]) -> bytes:
    buffer = BytesIO()
    tensors = {name: _Tensor(str(key), shape, dtype) for key, (name, shape, dtype) in enumerate(entries)}
    _StoragePickler(buffer).dump({"state_dict": tensors})
    return buffer.getvalue()


class _Storage:
    """Stands for the bytes of a tensor, which lie in a record of their own."""

    def __init__(self, key: str, count: int, dtype: np.dtype[Any]):
        self.identity = ("storage", {"f": torch.FloatStorage, "i": torch.LongStorage}[dtype.kind], key, "cpu", count)


class _Tensor:
    """Pickles as torch's tensors do."""

    def __init__(self, key: str, shape: tuple[int, ...], dtype: np.dtype[Any]):
        self.shape = shape
        self.storage = _Storage(key, math.prod(shape), dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        strides = tuple(math.prod(self.shape[axis + 1:]) for axis in range(len(self.shape)))
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, self.shape, strides, False, OrderedDict())


class _StoragePickler(pickle.Pickler):
    def __init__(self, file: BinaryIO):
        super().__init__(file, PICKLE_PROTOCOL)

    def persistent_id(self, value: object) -> Any:
        return value.identity if isinstance(value, _Storage) else None
