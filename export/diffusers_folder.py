"""Reading the folders that diffusers saves models in, as official weights.

A pipeline's folder holds unet/, vae/, text_encoder/ and scheduler/; each part has a config.json and its weights in one
file or in shards. Settings that our networks do not have are refused before any weight is read.
"""
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from caphuman_edge.export.checkpoint_kinds import OTHER_INPUTS, family_of
from caphuman_edge.export.diffusers_names import (
    AUTOENCODER,
    CONTROLNET,
    OFFICIAL_PREFIX,
    TEXT_ENCODER,
    UNET,
    to_official,
)
from caphuman_edge.ref.caphuman import POSE_CHANNELS
from caphuman_edge.ref.checkpoints import prefixed, read_checkpoint
from caphuman_edge.runtime.contract import Config
from caphuman_edge.runtime.errors import CheckpointError

FOLDERS = {UNET: "unet", AUTOENCODER: "vae", TEXT_ENCODER: "text_encoder"}
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
VARIANTS = ("", ".fp16")  # full precision first
INDEXES = ("{stem}.safetensors.index{variant}.json", "{stem}{variant}.safetensors.index.json",
           "{stem}.bin.index{variant}.json", "{stem}{variant}.bin.index.json")
CONTROLNET_CLASS = "ControlNetModel"
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction"}  # ours: diffusers'
LARGEST_JSON = 10_000_000  # bytes

Weights = dict[str, tuple[Tensor, Path]]  # by official name: the tensor, and the file that it lies in


def is_pipeline(folder: Path) -> bool:
    """Whether the folder holds at least a UNet's folder or the list of a pipeline's parts."""
    return (folder / "unet").is_dir() or (folder / "model_index.json").is_file()


def read_pipeline(folder: Path, config: Config) -> Weights:
    """UNet, autoencoder and text encoder of a pipeline's folder, as far as they are there.

    Raises CheckpointError for another model family, inpainting, another prediction type or noise schedule.
    """
    if not is_pipeline(folder):
        raise CheckpointError(f"{folder} is no diffusers folder (it has no unet/), expected one or a checkpoint file; "
                              "pass the folder that holds unet/, vae/ and text_encoder/")
    _refuse_other_pipeline(folder)
    _refuse_other_schedule(folder, config)
    weights: Weights = {}
    for part, name in FOLDERS.items():
        if (folder / name).is_dir():
            weights |= read_part(part, folder / name, config)
    return weights


def read_vae(folder: Path, config: Config) -> Weights:
    """The autoencoder of its own folder (with config.json), or of a pipeline's."""
    inner = folder / "vae"
    if not inner.is_dir() and is_pipeline(folder):
        raise CheckpointError(f"{folder} holds no vae/, expected an autoencoder; pass a folder that has one")
    return read_part(AUTOENCODER, inner if inner.is_dir() else folder, config)


def read_controlnet(folder: Path, config: Config) -> Weights:
    """The ControlNet of its own folder (with config.json), or of a pipeline's.

    Raises CheckpointError for what is no plain ControlNet of Stable Diffusion 1.x: another class of diffusers, another
    family, blue first, or residuals that are averaged over the picture.
    """
    inner = folder / "controlnet"
    if not inner.is_dir() and is_pipeline(folder):
        raise CheckpointError(f"{folder} holds no controlnet/, expected a ControlNet; pass a folder that has one")
    inner = inner if inner.is_dir() else folder
    path = inner / "config.json"
    kind = _read_json(path).get("_class_name", CONTROLNET_CLASS) if path.is_file() else CONTROLNET_CLASS
    if kind != CONTROLNET_CLASS:
        raise CheckpointError(f"{inner} holds a {kind!r:.80}, expected a {CONTROLNET_CLASS}; pass a ControlNet for "
                              "Stable Diffusion 1.5")
    return read_part(CONTROLNET, inner, config)


def read_part(part: str, folder: Path, config: Config) -> Weights:
    """One part's weights under their full official names."""
    _refuse_other_settings(part, folder, config)
    files = list(_weight_files(folder))
    weights: Weights = {}
    for path, names in files:
        tensors = read_checkpoint(path)
        if names is not None and tensors.keys() != names:
            raise CheckpointError(f"{path} does not hold the tensors that its index names; download the folder again")
        official = prefixed(to_official(part, tensors, config), OFFICIAL_PREFIX[part])
        weights |= {name: (tensor, path) for name, tensor in official.items()}
    return weights


def _weight_files(folder: Path) -> Iterator[tuple[Path, set[str] | None]]:
    """The file, or the shards, each with the names that its index gives it."""
    for variant in VARIANTS:
        for stem in STEMS:
            for suffix in (".safetensors", ".bin"):
                path = folder / f"{stem}{variant}{suffix}"
                if path.is_file():
                    yield path, None
                    return
            for pattern in INDEXES:
                index = folder / pattern.format(stem=stem, variant=variant)
                if index.is_file():
                    yield from _shards(index)
                    return
    raise CheckpointError(f"{folder} holds no weights, expected {STEMS[0]}.safetensors, a .bin or their fp16 variants; "
                          "download the whole folder")


def _shards(index: Path) -> Iterator[tuple[Path, set[str]]]:
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{index} lists no weights, expected a weight_map; download the folder again")
    for file in sorted(set(places.values())):
        if Path(file).name != file:
            raise CheckpointError(f"{index} names {file}, expected a file beside it; the folder is not to be trusted")
        if not (index.parent / file).is_file():
            raise CheckpointError(f"{index.parent / file} is missing, one of the shards that {index.name} lists; "
                                  "download the whole folder")
        yield index.parent / file, {name for name, place in places.items() if place == file}


def _refuse_other_pipeline(folder: Path) -> None:
    path = folder / "model_index.json"
    kind = str(_read_json(path).get("_class_name", "")) if path.is_file() else ""
    for mark, what in {"XL": "an SDXL pipeline", "Inpaint": "an inpainting pipeline", "Flux": "a Flux pipeline",
                       "InstructPix2Pix": "an image-editing pipeline", "StableDiffusion3": "an SD 3 pipeline"}.items():
        if mark in kind:
            raise CheckpointError(f"{folder} seems to be {what} ({kind}), expected Stable Diffusion 1.x; "
                                  "pass a text-to-image model of that family")


def _refuse_other_schedule(folder: Path, config: Config) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    settings = _read_json(path) if path.is_file() else {}
    wanted = {"prediction_type": PREDICTIONS[config.unet.prediction], "beta_schedule": "scaled_linear",
              "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000, "rescale_betas_zero_snr": False}
    _refuse_settings(path, settings, wanted)


def _refuse_other_settings(part: str, folder: Path, config: Config) -> None:
    path = folder / "config.json"
    settings = _read_json(path) if path.is_file() else {}
    if part in (UNET, CONTROLNET):
        _refuse_other_unet(path, settings, config)
    unet = {"attention_head_dim": config.unet.num_heads,  # diffusers' name for the number of heads
            "num_attention_heads": config.unet.num_heads, "norm_num_groups": config.unet.norm_groups,
            "use_linear_projection": False, "class_embed_type": None, "addition_embed_type": None}
    wanted: dict[str, dict[str, Any]] = {
        UNET: unet,
        CONTROLNET: {**unet, "conditioning_channels": POSE_CHANNELS, "global_pool_conditions": False,
                     "controlnet_conditioning_channel_order": "rgb"},
        AUTOENCODER: {"latent_channels": config.vae.latent_channels, "scaling_factor": config.vae.latent_scale,
                      "norm_num_groups": config.vae.norm_groups},
        TEXT_ENCODER: {"num_attention_heads": config.text.heads, "hidden_act": "quick_gelu"},
    }
    _refuse_settings(path, settings, wanted[part])


def _refuse_other_unet(path: Path, settings: Mapping[str, Any], config: Config) -> None:
    width, channels = settings.get("cross_attention_dim"), settings.get("in_channels")
    if isinstance(width, int) and width != config.unet.context_width:
        raise CheckpointError(f"{path} seems to be for {family_of(width)}: its attention reads tokens {width} wide, "
                              f"expected {config.unet.context_width}; pass a model of the same family as caphuman.ckpt")
    if isinstance(channels, int) and channels != config.vae.latent_channels:
        raise CheckpointError(f"{path} seems to be {OTHER_INPUTS.get(channels, 'another model')}: its UNet reads "
                              f"{channels} channels, expected {config.vae.latent_channels}; pass a text-to-image model")


def _refuse_settings(path: Path, settings: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """A setting that is absent or null is diffusers' default, which is Stable Diffusion 1.5's."""
    for name, value in wanted.items():
        given = settings.get(name)
        if given is not None and given != value and given != [value] * _length(given):
            raise CheckpointError(f"{path} has {name} {given!r}, expected {value!r}: a model of another kind; "
                                  "pass one with the settings of Stable Diffusion 1.5")


def _length(setting: object) -> int:
    """Of a setting that is given once a level; 0 where it is given once."""
    return len(setting) if isinstance(setting, list) else 0


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise CheckpointError(f"{path} is {path.stat().st_size} bytes, expected a short table; it is another file")
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); download the folder again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is no table of settings, expected one; download the folder again")
    return content
