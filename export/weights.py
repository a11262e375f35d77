"""Where a build's weights come from: official files into one reference model, with a record of what came from where.

The order is the official tool's: caphuman.ckpt, then the backbone (over its UNet, autoencoder and text encoder), then
the autoencoder alone; LoRAs are fused last. Weights stay memory-mapped wherever a file holds them in float32.
"""
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from caphuman_edge.export import diffusers_folder
from caphuman_edge.export.checkpoint_kinds import TINY_DECODER, refuse_other
from caphuman_edge.export.diffusers_names import AUTOENCODER, CONTROLNET, OFFICIAL_PREFIX, to_official
from caphuman_edge.export.lora import fuse, read_lora
from caphuman_edge.ref.caphuman import CapHuman
from caphuman_edge.ref.checkpoints import (
    POSE_PREFIX,
    conflicts,
    is_leftover,
    is_safetensors,
    load_strictly,
    prefixed,
    read_checkpoint,
    refuse_damaged_archive,
    refuse_stand_ins,
    safetensors_header,
    without_prefix,
)
from caphuman_edge.ref.sampler import alphas_cumprod
from caphuman_edge.ref.tiny_decoder import TinyDecoder, taesd_names
from caphuman_edge.runtime.cache import sha256_of
from caphuman_edge.runtime.contract import Config
from caphuman_edge.runtime.errors import CheckpointError

PARTS = {  # by what their official names begin with
    "unet": ("model.diffusion_model.",), "capface": ("control_model.",), "projections": ("id_linear.", "img_linear."),
    "text_encoder": ("cond_stage_model.",), "image_encoder": ("control_cond_stage_model.",),
    "autoencoder": ("first_stage_model.",), "controlnet": ("pose_control_model.",)}
VAE_PREFIX = "first_stage_model."
BACKBONE_PREFIXES = PARTS["unet"] + PARTS["text_encoder"] + PARTS["autoencoder"]
DIFFUSERS_CONTROLNET = "controlnet_cond_embedding."
TEXT_PREFIX = "cond_stage_model.transformer."
# CLIP's pairing of texts with pictures, which some merged checkpoints carry along; no picture depends on it.
UNREAD = ("cond_stage_model.logit_scale", "cond_stage_model.text_projection",
          "cond_stage_model.transformer.text_projection.weight")
OTHER_PREDICTIONS = ("v", "v_prediction", "velocity")  # as `modelspec.prediction_type` names them
V_MARK = "v_pred"  # a tensor that marks such files
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Report = Callable[[str], None]
Weights = dict[str, tuple[Tensor, Path]]  # by official name: the tensor, and the file that it lies in


@dataclass(frozen=True)
class Lora:
    """A LoRA to fuse, and how strongly (1: as it was trained)."""

    path: Path
    scale: float = 1.0


@dataclass(frozen=True)
class WeightFiles:
    """What a user passes: files, or diffusers folders for `backbone`, `vae` and `controlnet`."""

    caphuman: Path
    backbone: Path | None = None
    vae: Path | None = None
    controlnet: Path | None = None
    tiny_decoder: Path | None = None
    loras: tuple[Lora, ...] = ()


@dataclass(frozen=True)
class Origin:
    """One part's share of one file; a part in shards, or with a LoRA, has several."""

    part: str  # one of PARTS, or TINY_DECODER, of which no official checkpoint has a share
    file: str  # its name; behind its folder's where all such files are called alike
    sha256: str
    bytes: int  # of the file
    tensors: int  # that the part took from it; of a LoRA, those that it changed
    dtypes: tuple[str, ...]  # on disk
    lora_scale: float | None = None  # of a LoRA alone

    def to_json(self) -> dict[str, Any]:
        """For bundle.json."""
        return asdict(self) | {"dtypes": list(self.dtypes)}

    def describe(self) -> str:
        """One line for a person."""
        what = "changed by LoRA" if self.lora_scale is not None else "from"
        scale = f" at {self.lora_scale:g}" if self.lora_scale is not None else ""
        return (f"{self.part}: {self.tensors} tensors {what} {self.file}{scale} ({', '.join(self.dtypes)}, "
                f"sha256 {self.sha256[:12]})")


def load_model(files: WeightFiles, config: Config,
               report: Report = lambda line: None) -> tuple[CapHuman, list[Origin]]:
    """The model, in float32 and ready to infer, and where each part's tensors came from.

    `report` gets a line for everything that is read. Raises CheckpointError for files that are missing, truncated,
    damaged, of another kind than their role, that lack names or have unknown or mis-shaped ones, or that hold NaN.
    """
    sources = list(_read_all(files, config, report))
    model = _empty_model(config, controlnet=files.controlnet is not None)
    wanted = {name: tensor for name, tensor in model.state_dict().items() if not is_leftover(name)}
    merged = _merge(sources, wanted, report)
    origins = _origins(merged)
    weights = {name: tensor for name, (tensor, _) in merged.items()}
    paths = {name: path for name, (_, path) in merged.items()}
    del sources, merged  # or what is converted would be held twice
    _convert(weights, paths)
    for lora in files.loras:
        origins += _fused(lora, weights, config)
    load_strictly(model, weights, files.caphuman.name, assign=True)
    for origin in origins:
        report(origin.describe())
    return model.eval().requires_grad_(False), origins


def load_tiny_decoder(path: Path, config: Config,
                      report: Report = lambda line: None) -> tuple[TinyDecoder, Origin]:
    """The fast decoder in a file of TAESD's or of diffusers' AutoencoderTiny, and where it came from; as `load_model`.
    """
    report(f"reading {path} (tiny decoder)")
    weights = taesd_names(_read_file(TINY_DECODER, path, config))
    origin = _origin(TINY_DECODER, path, list(weights.values()))
    _convert(weights, dict.fromkeys(weights, path))
    decoder = TinyDecoder(config)
    load_strictly(decoder, weights, path.name)
    report(origin.describe())
    return decoder.eval().requires_grad_(False), origin


def part_of(name: str) -> str:
    """The part that an official name belongs to. Raises KeyError where it belongs to none."""
    for part, prefixes in PARTS.items():
        if name.startswith(prefixes):
            return part
    raise KeyError(name)


def _empty_model(config: Config, controlnet: bool) -> CapHuman:
    """The model without memory for its weights; buffers that no file holds are made."""
    with torch.device("meta"):
        model = CapHuman(config, pose_net=controlnet)
    if config.unet.prediction == "v":
        model.unet.alphas_cumprod = alphas_cumprod()
    return model


def _read_all(files: WeightFiles, config: Config, report: Report) -> Iterator[tuple[Path, Weights]]:
    """What each file or folder holds, under official names, in the official order."""
    readers = (("caphuman", files.caphuman, _read_caphuman), ("backbone", files.backbone, _read_backbone),
               ("vae", files.vae, _read_vae), ("controlnet", files.controlnet, _read_controlnet))
    for role, path, read in readers:
        if path is not None:
            report(f"reading {path} ({role})")
            yield path, read(path, config)


def _read_caphuman(path: Path, config: Config) -> Weights:
    return _of_file(path, _read_file("caphuman", path, config))


def _read_backbone(path: Path, config: Config) -> Weights:
    if path.is_dir():
        return diffusers_folder.read_pipeline(path, config)
    tensors = _read_file("backbone", path, config)
    _refuse_other_prediction(path, tensors, config)
    return _of_file(path, {_current_name(name): tensor for name, tensor in tensors.items()
                           if name not in (*UNREAD, V_MARK)})


def _read_vae(path: Path, config: Config) -> Weights:
    if path.is_dir():
        return diffusers_folder.read_vae(path, config)
    tensors = without_prefix(_read_file("vae", path, config), VAE_PREFIX)
    if any(".down_blocks." in name or ".up_blocks." in name for name in tensors):
        tensors = to_official(AUTOENCODER, tensors, config)
    return _of_file(path, prefixed(tensors, OFFICIAL_PREFIX[AUTOENCODER]))


def _read_controlnet(path: Path, config: Config) -> Weights:
    """Names with or without their prefix, or diffusers'; files of early 2023 hold a whole backbone besides."""
    if path.is_dir():
        return diffusers_folder.read_controlnet(path, config)
    tensors = {name: tensor for name, tensor in _read_file("controlnet", path, config).items()
               if not name.startswith(BACKBONE_PREFIXES)}
    if any(name.startswith(DIFFUSERS_CONTROLNET) for name in tensors):
        tensors = to_official(CONTROLNET, tensors, config)
    return _of_file(path, prefixed(without_prefix(tensors, POSE_PREFIX), OFFICIAL_PREFIX[CONTROLNET]))


def _read_file(role: str, path: Path, config: Config) -> dict[str, Tensor]:
    refuse_stand_ins(path)
    refuse_damaged_archive(path)
    tensors = read_checkpoint(path)
    refuse_other(role, path, tensors, config)
    return tensors


def _of_file(path: Path, tensors: Mapping[str, Tensor]) -> Weights:
    return {name: (tensor, path) for name, tensor in tensors.items()}


def _current_name(name: str) -> str:
    """Some checkpoints of 2022 leave `text_model.` out."""
    rest = name.removeprefix(TEXT_PREFIX)
    old = rest != name and rest.startswith(("embeddings.", "encoder.", "final_layer_norm."))
    return f"{TEXT_PREFIX}text_model.{rest}" if old else name


def _refuse_other_prediction(path: Path, tensors: Mapping[str, Tensor], config: Config) -> None:
    header = safetensors_header(path) if is_safetensors(path) else {}
    metadata = header.get("__metadata__")
    named = metadata.get("modelspec.prediction_type") if isinstance(metadata, dict) else None
    if config.unet.prediction == "eps" and (V_MARK in tensors or named in OTHER_PREDICTIONS):
        raise CheckpointError(f"{path} says that it predicts v, expected a model that predicts noise (epsilon) as "
                              "CapHuman's does; pass another backbone")


def _merge(sources: Sequence[tuple[Path, Weights]], wanted: Mapping[str, Tensor], report: Report) -> Weights:
    """Later files over earlier ones, a whole part at a time. All that does not fit is told in one error."""
    merged: Weights = {}
    problems = []
    for path, weights in sources:
        given = {name: tensor for name, (tensor, _) in weights.items()}
        parts = {part for part in map(_part_or_none, given) if part}
        expected = {name: tensor for name, tensor in wanted.items() if part_of(name) in parts}
        problem = conflicts(given, expected)
        problems += [f"{path.name}: {problem}"] if problem else []
        replaced = sorted({part_of(name) for name in merged if part_of(name) in parts})
        if replaced:
            report(f"{path.name} takes the place of what was read before: {', '.join(replaced)}")
        merged |= {name: entry for name, entry in weights.items() if name in wanted}
    absent = sorted({part_of(name) for name in wanted} - {part_of(name) for name in merged})
    problems += [f"no file holds the {', the '.join(part.replace('_', ' ') for part in absent)}"] if absent else []
    if problems:
        raise CheckpointError(f"the weights do not fit the model: {' | '.join(problems)}; "
                              "pass the matching checkpoints or config")
    return merged


def _part_or_none(name: str) -> str | None:
    try:
        return part_of(name)
    except KeyError:
        return None


def _convert(weights: dict[str, Tensor], paths: Mapping[str, Path]) -> None:
    """Bring each tensor to float32, in place of the one before, so that little is held twice."""
    for name, tensor in weights.items():
        if tensor.dtype not in FLOATS:
            raise CheckpointError(f"{paths[name]} holds {name} as {_dtype(tensor)}, expected float32 or float16: it is "
                                  "quantised; pass the full weights")
        weights[name] = tensor = tensor.to(torch.float32).contiguous()
        # a sum is one pass without memory of its own, and no NaN or infinity leaves it finite
        if not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise CheckpointError(f"{paths[name]} holds NaN or infinity, first in {name}; it is damaged or badly "
                                  "trained: download it again or pass another")


def _origins(merged: Weights) -> list[Origin]:
    """A record for each part and file, in the order of PARTS."""
    shares: dict[tuple[str, Path], list[Tensor]] = {}
    for name, (tensor, path) in merged.items():
        shares.setdefault((part_of(name), path), []).append(tensor)
    ordered = sorted(shares, key=lambda share: (list(PARTS).index(share[0]), share[1]))
    return [_origin(part, path, shares[part, path]) for part, path in ordered]


def _origin(part: str, path: Path, tensors: list[Tensor]) -> Origin:
    name = f"{path.parent.name}/{path.name}" if path.name.startswith(diffusers_folder.STEMS) else path.name
    return Origin(part, name, sha256_of([path])[path], path.stat().st_size, len(tensors),
                  tuple(sorted({_dtype(tensor) for tensor in tensors})))


def _fused(lora: Lora, weights: dict[str, Tensor], config: Config) -> list[Origin]:
    refuse_stand_ins(lora.path)
    refuse_damaged_archive(lora.path)
    branches = read_lora(lora.path, config)
    shares: dict[str, list[Tensor]] = {}
    for name, branch in branches.items():
        shares.setdefault(part_of(name), []).append(branch.down)
    fuse(weights, branches, lora.scale)
    return [replace(_origin(part, lora.path, tensors), lora_scale=lora.scale) for part, tensors in shares.items()]


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
