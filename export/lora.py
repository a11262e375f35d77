"""LoRAs of all common layouts, fused into the weights of UNet and text encoder.

A LoRA adds a low-rank branch to a linear layer or a convolution; fused, W becomes W + scale * alpha / rank * up @ down
(Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"). Layouts: kohya's (`lora_unet_`, `lora_te_`, with
diffusers' or Latent Diffusion's module names) and diffusers' or PEFT's (`unet.`, `text_encoder.` or neither, ending in
`lora_A.weight`, `lora.down.weight`, `processor.to_q_lora.down.weight`, ...).
"""
import functools
import json
import math
import re
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from caphuman_edge.export.checkpoint_kinds import family_of, refuse_other
from caphuman_edge.export.diffusers_names import OFFICIAL_PREFIX, TEXT_ENCODER, UNET, official_names
from caphuman_edge.ref.caphuman import CapHuman
from caphuman_edge.ref.checkpoints import is_safetensors, read_checkpoint, safetensors_header
from caphuman_edge.runtime.contract import Config
from caphuman_edge.runtime.errors import BadInput, CheckpointError

OTHER_METHODS = (
    (re.compile(r"dora_scale|lora_magnitude_vector"), "DoRA"), (re.compile(r"\.hada_"), "LoHa"),
    (re.compile(r"\.lokr_"), "LoKr"), (re.compile(r"\.oft_"), "OFT"), (re.compile(r"\.[ab]1\.weight$"), "GLoRA"),
    (re.compile(r"\.lora_mid"), "LoCon with a middle matrix"),
    (re.compile(r"lora_B(\.\w+)?\.bias$"), "LoRA with biases"),
    (re.compile(r"\.(diff|diff_b|w_norm|b_norm)$"), "full differences"))
SDXL_BEGINNINGS = ("lora_te2_", "text_encoder_2.")
KOHYA = {"lora_unet_": UNET, "lora_te_": TEXT_ENCODER, "lora_te1_": TEXT_ENCODER}
WRAPPERS = ("base_model.model.", "model.diffusion_model.", "diffusion_model.")  # PEFT's, and training tools' own
PREFIXES = {"unet.": UNET, "text_encoder.": TEXT_ENCODER, "text_model.": TEXT_ENCODER}
# Which side of a branch a tensor is, by how its name ends; PEFT may put an adapter's name before `weight`.
SIDES = (
    (re.compile(r"(.+)\.(?:lora_down|lora\.down|lora_A|lora_linear_layer\.down)(?:(?:\.\w+)?\.weight)?"), "down"),
    (re.compile(r"(.+)\.(?:lora_up|lora\.up|lora_B|lora_linear_layer\.up)(?:(?:\.\w+)?\.weight)?"), "up"),
    (re.compile(r"(.+_lora)\.down(?:\.weight)?"), "down"),
    (re.compile(r"(.+_lora)\.up(?:\.weight)?"), "up"),
    (re.compile(r"(.+)\.alpha"), "alpha"))
OLD_MODULE = re.compile(r"(?:processor\.)?to_(q|k|v|out)_lora$")  # of attention in diffusers before 0.20
ADAPTER_METADATA = "lora_adapter_metadata"  # under which newer diffusers versions keep PEFT's settings, as JSON
LARGEST_JSON = 1_000_000  # bytes
NAMES_SHOWN = 5


@dataclass(frozen=True)
class Branch:
    """What a LoRA adds to one weight: factor * up @ down, with factor = alpha / rank."""

    down: Tensor  # (rank, inputs[, rows, columns])
    up: Tensor  # (outputs, rank[, 1, 1])
    factor: float

    def delta(self, shape: torch.Size) -> Tensor:
        """The change of the weight at scale 1, in float32 and in the weight's shape."""
        change = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (self.factor * change).reshape(shape)


def read_lora(path: Path, config: Config) -> dict[str, Branch]:
    """The branches of a LoRA file, by the full official name of the weight that each one changes.

    Raises CheckpointError for other methods than LoRA, other model families, incomplete pairs, other shapes, and for
    names that match no weight, which are listed.
    """
    tensors = read_checkpoint(path)
    refuse_other("lora", path, tensors, config)
    _refuse_other_methods(path, tensors)
    pairs, unmatched = _pairs(tensors)
    _refuse_other_family(path, pairs, config)
    names, alphas = module_names(config), _written_alphas(path)
    matched = {module: names.get(_key(module)) for module in pairs}
    unmatched += [module for module, name in matched.items() if name is None]
    if unmatched:
        raise CheckpointError(f"{path} holds {len(unmatched)} names that match no weight of UNet or text encoder "
                              f"({_shown(unmatched)}); pass a LoRA for Stable Diffusion 1.x")
    shapes = _shapes(config)
    branches: dict[str, Branch] = {}
    for module, name in matched.items():
        if name is None or name in branches:
            raise CheckpointError(f"{path} changes {name} twice, last by {module}; pass a LoRA in one layout")
        branches[name] = _branch(f"{path}: {module}", pairs[module], shapes[name], alphas)
    return branches


def fuse(weights: MutableMapping[str, Tensor], branches: Mapping[str, Branch], scale: float) -> None:
    """Add branches to weights, by official name, in float32; the tensors that were there are not written to.

    Raises BadInput for a scale that is no number.
    """
    if not math.isfinite(scale):
        raise BadInput(f"a LoRA's scale is {scale}, expected a number; 1 is as it was trained")
    for name, branch in branches.items():
        weight = weights[name].float()
        weights[name] = weight + scale * branch.delta(weight.shape)


def module_names(config: Config) -> dict[str, str]:
    """Full official weight name by module, of all layers that a LoRA may change, in both layouts' names.

    A module's key is its part, a colon, and its name with underscores for dots, as kohya writes it.
    """
    keys: dict[str, str] = {}
    for part in (UNET, TEXT_ENCODER):
        for diffusers, official in official_names(part, config).items():
            if official.endswith(".weight") and "embedding." not in official:
                for name in (diffusers, official):
                    key = f"{part}:{name.removesuffix('.weight').replace('.', '_')}"
                    keys[key] = OFFICIAL_PREFIX[part] + official
    shapes = _shapes(config)
    return {key: name for key, name in keys.items() if len(shapes[name]) > 1}  # norms are vectors


def _refuse_other_methods(path: Path, tensors: Iterable[str]) -> None:
    for name in tensors:
        for mark, method in OTHER_METHODS:
            if mark.search(name):
                raise CheckpointError(f"{path} is {method} (it holds {name}), expected a plain LoRA; pass one, or "
                                      "merge it into the backbone with another tool")


def _refuse_other_family(path: Path, pairs: Mapping[str, Mapping[str, Tensor]], config: Config) -> None:
    if any(module.startswith(SDXL_BEGINNINGS) for module in pairs):
        raise CheckpointError(f"{path} is a LoRA for SDXL (it changes a second text encoder), expected one for Stable "
                              "Diffusion 1.x; pass its 1.x edition")
    for module, sides in pairs.items():
        if _key(module).endswith("attn2_to_k") and "down" in sides and sides["down"].ndim > 1:
            width, wanted = sides["down"].shape[1], config.unet.context_width
            if width != wanted:
                raise CheckpointError(f"{path} is a LoRA for {family_of(width)} (its attention reads tokens {width} "
                                      f"wide), expected {wanted}; pass its Stable Diffusion 1.x edition")


def _pairs(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """The sides of each module's branch, and the names that are no side of any."""
    pairs: dict[str, dict[str, Tensor]] = {}
    others = []
    for name, tensor in tensors.items():
        matches = [(match.group(1), side) for pattern, side in SIDES if (match := pattern.fullmatch(name))]
        if matches:
            module, side = matches[0]
            pairs.setdefault(module, {})[side] = tensor
        else:
            others.append(name)
    return pairs, others


def _key(module: str) -> str:
    """A module as `module_names` has it, whatever layout named it."""
    for prefix, part in KOHYA.items():
        if module.startswith(prefix):
            return f"{part}:{module.removeprefix(prefix)}"
    for wrapper in WRAPPERS:
        module = module.removeprefix(wrapper)
    part = next((part for prefix, part in PREFIXES.items() if module.startswith(prefix)), UNET)
    module = module.removeprefix("unet.").removeprefix("text_encoder.")
    if part == UNET:
        module = OLD_MODULE.sub(lambda found: "to_out.0" if found[1] == "out" else f"to_{found[1]}", module)
    else:
        module = OLD_MODULE.sub(lambda found: f"{found[1]}_proj", module)
        module = module if module.startswith("text_model.") else f"text_model.{module}"
    return f"{part}:{module.replace('.', '_')}"


def _branch(where: str, sides: Mapping[str, Tensor], shape: torch.Size, alphas: Mapping[str, Any]) -> Branch:
    """A checked branch for a weight of that shape."""
    if "down" not in sides or "up" not in sides:
        raise CheckpointError(f"{where} has {' and '.join(sorted(sides))} alone, expected down and up; the file is "
                              "incomplete: download it again")
    down, up = sides["down"], sides["up"]
    rank = down.shape[0] if down.ndim else 0
    kernel = tuple(shape[2:]) if any(size > 1 for size in shape[2:]) else ()
    fits = (down.ndim in (2, 4) and up.ndim in (2, 4) and 0 < rank == up.shape[1]
            and (up.shape[0], down.shape[1]) == (shape[0], shape[1])
            and _kernel(down) == kernel and _kernel(up) == ())
    if not fits:
        raise CheckpointError(f"{where} is down {tuple(down.shape)} and up {tuple(up.shape)}, which is no branch for a "
                              f"weight {tuple(shape)}; pass a LoRA for Stable Diffusion 1.x")
    factor = _factor(where, sides, rank, alphas)
    if not (down.isfinite().all() and up.isfinite().all() and math.isfinite(factor)):
        raise CheckpointError(f"{where} holds NaN or infinity; the file is damaged: download it again")
    return Branch(down, up, factor)


def _kernel(tensor: Tensor) -> tuple[int, ...]:
    """Rows and columns of a convolution; none of a 1x1 one, which is a linear layer."""
    return tuple(tensor.shape[2:]) if any(size > 1 for size in tensor.shape[2:]) else ()


def _factor(where: str, sides: Mapping[str, Tensor], rank: int, settings: Mapping[str, Any]) -> float:
    """alpha / rank; alpha is the branch's own, or what the file's settings say, or the rank."""
    if "alpha" in sides:
        if sides["alpha"].numel() != 1:
            raise CheckpointError(f"{where} has an alpha of {sides['alpha'].numel()} numbers, expected one; "
                                  "pass another file")
        return float(sides["alpha"]) / rank
    part = _key(where.rsplit(": ", 1)[-1]).split(":")[0]
    alpha = settings.get(f"{part}.lora_alpha", settings.get("lora_alpha", rank))
    root = settings.get(f"{part}.use_rslora", settings.get("use_rslora", False))
    return float(alpha) / (math.sqrt(rank) if root else rank)


def _written_alphas(path: Path) -> dict[str, Any]:
    """PEFT's settings, from the file's metadata or from adapter_config.json beside it; empty where there are none."""
    beside = path.with_name("adapter_config.json")
    if path.stem == "adapter_model" and beside.is_file() and beside.stat().st_size <= LARGEST_JSON:
        text = beside.read_text(errors="replace")
    else:
        metadata = safetensors_header(path).get("__metadata__") if is_safetensors(path) else None
        text = str(metadata.get(ADAPTER_METADATA, "{}")) if isinstance(metadata, dict) else "{}"
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has LoRA settings that are no JSON ({error}); pass another file") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} has LoRA settings that are no table; pass another file")
    for name, value in settings.items():
        if name.endswith("alpha_pattern") and value:
            raise CheckpointError(f"{path} sets alpha module by module ({name}), which is not supported; "
                                  "save it in kohya's layout")
        if name.endswith("lora_alpha") and not isinstance(value, (int, float)):
            raise CheckpointError(f"{path} has {name} {value!r}, expected a number; pass another file")
    return settings


@functools.cache
def _shapes(config: Config) -> dict[str, torch.Size]:
    """Shapes by full official name."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in CapHuman(config).state_dict().items()}


def _shown(names: Iterable[str]) -> str:
    ordered = sorted(set(names))
    return ", ".join(ordered[:NAMES_SHOWN]) + (", ..." if len(ordered) > NAMES_SHOWN else "")
