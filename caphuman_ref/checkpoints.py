"""Reading checkpoints safely, and loading them strictly.

Pickled checkpoints are read with torch's weights-only unpickler, so a file cannot run code.
"""
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from caphuman_edge.runtime.errors import CheckpointError

SCHEDULE_BUFFERS = frozenset((  # recomputed by the sampler; every Latent Diffusion checkpoint carries them
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "logvar", "lvlb_weights"))
UNREAD_SUFFIXES = (".position_ids", ".num_batches_tracked")  # there or not, by the version that wrote the file
TRAINING_PREFIXES = ("model_ema.", "loss.")  # second copies and discriminators of published SD and VAE files
FOREIGN_PACKAGE = "pytorch_lightning."  # its class names occur beside the weights in SD 1.x files
NAMES_SHOWN = 5
MOST_WRAPPED = 4  # a file may name itself as its own `state_dict`
# What torch was seen to raise on damaged files: they share no base class.
DAMAGE = (pickle.UnpicklingError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError,
          OverflowError, RuntimeError, TypeError, ValueError, struct.error, zipfile.BadZipFile, zlib.error)
POSE_PREFIX = "control_model."  # of published ControlNets
ZIP_START = b"PK\x03\x04"
LONGEST_HEADER = 100_000_000  # bytes; the safetensors format allows no more

Network = TypeVar("Network", bound=nn.Module)


def read_checkpoint(path: Path, part: str | None = None) -> dict[str, Tensor]:
    """Tensors by name of a .safetensors file or of a pickled one, without leftovers that no model of ours has.

    A nested `state_dict` is unwrapped. Where a file holds several networks by name, `part` says which one is wanted.
    Raises CheckpointError if the file is missing or is no checkpoint.
    """
    refuse_stand_ins(path)
    content = _read_safetensors(path) if is_safetensors(path) else _read_pickle(path)
    if part is not None:
        if not isinstance(content, Mapping) or part not in content:
            raise CheckpointError(f"{path} holds no network {part}, expected one; pass the official file")
        content = content[part]
    for _ in range(MOST_WRAPPED):
        if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
            content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(_is_plain(*item) for item in content.items()):
        raise CheckpointError(f"{path} holds no plain table of tensors, expected one; pass a model's checkpoint")
    return {name: value for name, value in content.items() if not is_leftover(name)}


def load_strictly(module: nn.Module, weights: Mapping[str, Tensor], source: str, assign: bool = False) -> None:
    """Copy weights into the module; any unknown, missing or mis-shaped name is a CheckpointError that tells them.

    `source` names the weights in that message. Leftovers (see `is_leftover`) may be there or not. With `assign` the
    module holds these very tensors afterwards instead of copies: what is memory-mapped stays so, a module on the meta
    device becomes real.
    """
    wanted = {name: tensor for name, tensor in module.state_dict().items() if not is_leftover(name)}
    given = {name: tensor for name, tensor in weights.items() if not is_leftover(name)}
    problems = conflicts(given, wanted)
    if problems:
        raise CheckpointError(f"{source} does not fit {type(module).__name__}: {problems}; "
                              "pass the matching checkpoint or config")
    module.load_state_dict(given, strict=False, assign=assign)


def conflicts(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Which names are unknown, missing or mis-shaped, in one line; empty where they fit."""
    problems = [
        _listing("unknown", given.keys() - wanted.keys()),
        _listing("missing", wanted.keys() - given.keys()),
        _listing("mis-shaped", _shape_conflicts(given, wanted)),
    ]
    return "; ".join(filter(None, problems))


def load_network(network: Network, path: Path, part: str | None = None, ignored: tuple[str, ...] = ()) -> Network:
    """Fill a network from one file and return it, ready to infer. Names that start with one of `ignored` are left out.

    `part`: see `read_checkpoint`. Raises CheckpointError for a file that does not fit.
    """
    weights = {name: tensor for name, tensor in read_checkpoint(path, part).items() if not name.startswith(ignored)}
    load_strictly(network, weights, path.name)
    return network.eval().requires_grad_(False)


def is_leftover(name: str) -> bool:
    """Whether a name is a schedule buffer, a position index, or a training state that no weights depend on."""
    return name in SCHEDULE_BUFFERS or name.endswith(UNREAD_SUFFIXES) or name.startswith(TRAINING_PREFIXES)


def prefixed(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The same tensors under a module's prefix."""
    return {prefix + name: tensor for name, tensor in weights.items()}


def without_prefix(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The same tensors without the prefix, where a name has it."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items()}


def is_safetensors(path: Path) -> bool:
    """Whether a file is of that format by its name, or by its beginning where a site named it .ckpt."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] <= LONGEST_HEADER


def refuse_stand_ins(path: Path) -> None:
    """Raise CheckpointError for what is absent, a folder, empty, truncated, a web page or a Git LFS pointer."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, expected a checkpoint file; pass the file in it")
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist, expected a checkpoint file; check the path")
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise CheckpointError(f"{path} is empty, expected a checkpoint; download it again")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull`, or download the file")
    if start.lstrip().startswith(b"<"):
        raise CheckpointError(f"{path} is a web page, expected a checkpoint; download the file itself")
    if start.startswith(ZIP_START) and not _is_zip(path):
        raise CheckpointError(f"{path} is truncated (its archive has no end); download it again")
    if is_safetensors(path):
        _refuse_truncated_safetensors(path)


def refuse_damaged_archive(path: Path) -> None:
    """Raise CheckpointError where a zipped checkpoint's bytes do not have their recorded checksums. Reads all of it.

    Archives that torch wrote without checksums record zeros: those cannot be judged.
    """
    if not _is_zip(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() if any(entry.CRC for entry in archive.infolist()) else None
    except DAMAGE as error:
        raise CheckpointError(f"{path} is damaged ({error}); download it again") from error
    if damaged:
        raise CheckpointError(f"{path} is damaged: the checksum of {damaged} does not hold; download it again")


def safetensors_header(path: Path) -> dict[str, Any]:
    """The header of a .safetensors file: shapes and places by tensor name, texts under `__metadata__`.

    Raises CheckpointError where there is none.
    """
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(LONGEST_HEADER, path.stat().st_size):
            raise CheckpointError(f"{path} is no safetensors file (its header has no sensible length), expected one; "
                                  "download it again")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is no safetensors file (its header is damaged), expected one; "
                                  "download it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is no safetensors file (its header is no table), expected one; "
                              "download it again")
    return header


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except DAMAGE as error:  # seen on altered ends
        raise CheckpointError(f"{path} is damaged ({error}), expected a PyTorch checkpoint; "
                              "download it again") from error


def _refuse_truncated_safetensors(path: Path) -> None:
    header = safetensors_header(path)
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__" and _has_place(entry)]
    with path.open("rb") as file:
        announced = 8 + struct.unpack("<Q", file.read(8))[0] + max(ends, default=0)
    if path.stat().st_size < announced:
        raise CheckpointError(f"{path} is truncated ({path.stat().st_size} of {announced} bytes); download it again")


def _has_place(entry: object) -> bool:
    places = entry.get("data_offsets") if isinstance(entry, dict) else None
    return isinstance(places, list) and len(places) == 2 and all(isinstance(place, int) for place in places)


def _is_plain(name: object, value: object) -> bool:
    """Whether an entry is a name and numbers that can be copied into a network."""
    return (isinstance(name, str) and isinstance(value, Tensor) and value.layout is torch.strided
            and not value.is_meta and not value.is_complex())


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no safetensors file ({error}), expected one; download it again") from error


def _read_pickle(path: Path) -> object:
    try:
        zipped = _is_zip(path)  # files from before PyTorch 1.6 are not: BiSeNet's, MTCNN's
        with torch.serialization.safe_globals(_foreign_names(path) if zipped else []):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except DAMAGE as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if isinstance(error, pickle.UnpicklingError):  # torch would advise to read it unsafely
            reason = "it holds more than tensors, or is damaged"
        raise CheckpointError(f"{path} cannot be read as weights ({reason}), expected a PyTorch checkpoint; "
                              "convert it to .safetensors or download it again") from error


def _foreign_names(path: Path) -> list[tuple[type, str]]:
    """Stand-ins for training classes that a checkpoint names beside its weights."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return [(_Foreign, name) for name in names if name.startswith(FOREIGN_PACKAGE)]


class _Foreign:
    """Stands in for a class that we neither have nor need; it does nothing."""


def _shape_conflicts(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    return [f"{name} is {tuple(given[name].shape)} not {tuple(wanted[name].shape)}"
            for name in given.keys() & wanted.keys() if given[name].shape != wanted[name].shape]


def _listing(kind: str, names: Iterable[str]) -> str:
    """`kind (count): first names`, or nothing."""
    ordered = sorted(names)
    shown = ", ".join(ordered[:NAMES_SHOWN]) + (", ..." if len(ordered) > NAMES_SHOWN else "")
    return f"{len(ordered)} {kind} ({shown})" if ordered else ""
