"""Names of the same weights in diffusers' and in the official (Latent Diffusion) layout, as they follow from a config.

`official_names` maps every diffusers name to one official name, `to_official` and `to_diffusers` rename weights. Names
are those inside one network: `conv_in.weight` of a UNet is `input_blocks.0.0.weight`.
"""
import dataclasses
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from caphuman_edge.ref.autoencoder import Autoencoder
from caphuman_edge.ref.capface import CapFace
from caphuman_edge.ref.caphuman import POSE_CHANNELS
from caphuman_edge.ref.clip import TextEncoder
from caphuman_edge.ref.unet import UNet, encoder_widths
from caphuman_edge.runtime.contract import Config, UNetConfig, VaeConfig

UNET, AUTOENCODER, TEXT_ENCODER, CONTROLNET = "unet", "autoencoder", "text_encoder", "controlnet"
OFFICIAL_PREFIX = {UNET: "model.diffusion_model.", AUTOENCODER: "first_stage_model.",
                   TEXT_ENCODER: "cond_stage_model.transformer.", CONTROLNET: "pose_control_model."}

RES_BLOCK = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
             "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}
VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before diffusers 0.15
TEXT_MODEL = "text_model."  # transformers 5 no longer writes it


def official_names(part: str, config: Config) -> dict[str, str]:
    """Official name by diffusers name, of every weight of a part: one of the keys of OFFICIAL_PREFIX."""
    modules, build = _modules(part, config), _networks(config)[part]
    with torch.device("meta"):
        official = list(build().state_dict())
    return {_renamed(name, modules): name for name in official}


def to_official(part: str, weights: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """A part's diffusers weights under official names and in official shapes; unknown names stay as they are.

    Names of older diffusers and newer transformers versions are understood as well.
    """
    names = official_names(part, config)
    return dict(_official_item(part, name, tensor, names) for name, tensor in weights.items())


def to_diffusers(part: str, weights: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """A part's official weights under diffusers' names and in its shapes. Raises KeyError for an unknown name."""
    names = {official: name for name, official in official_names(part, config).items()}
    return {names[official]: tensor[:, :, 0, 0] if _is_vae_projection(part, official) else tensor
            for official, tensor in weights.items()}


def _official_item(part: str, name: str, tensor: Tensor, names: Mapping[str, str]) -> tuple[str, Tensor]:
    official = names.get(_current(part, name), name)
    if _is_vae_projection(part, official) and tensor.ndim == 2:  # a linear layer there, a 1x1 convolution here
        tensor = tensor[:, :, None, None]
    return official, tensor


def _current(part: str, name: str) -> str:
    """The name as the newest diffusers and the older transformers versions have it."""
    if part == TEXT_ENCODER and not name.startswith(TEXT_MODEL):
        return TEXT_MODEL + name
    if part == AUTOENCODER and ".attentions." in name:
        head, leaf = name.rsplit(".", 1)
        module, last = head.rsplit(".", 1)
        return f"{module}.{OLD_VAE_ATTENTION.get(last, last)}.{leaf}"
    return name


def _is_vae_projection(part: str, official: str) -> bool:
    return part == AUTOENCODER and ".attn_1." in official and official.endswith(".weight") and ".norm." not in official


def _renamed(official: str, modules: Mapping[str, str]) -> str:
    """The diffusers name, by the longest module of the table that the official name lies in."""
    parts = official.split(".")
    for length in range(len(parts), 0, -1):
        module = ".".join(parts[:length])
        if module in modules:
            return ".".join([modules[module], *parts[length:]])
    return official


def _networks(config: Config) -> dict[str, Callable[[], nn.Module]]:
    control = dataclasses.replace(config.unet, hint_channels=POSE_CHANNELS)
    return {UNET: lambda: UNet(config.unet, config.vae.latent_channels),
            AUTOENCODER: lambda: Autoencoder(config.vae), TEXT_ENCODER: lambda: TextEncoder(config.text),
            CONTROLNET: lambda: CapFace(control, config.vae.latent_channels, mask_head=False)}


def _modules(part: str, config: Config) -> dict[str, str]:
    """Diffusers module by official module, wherever they differ."""
    tables = {UNET: lambda: _unet_modules(config.unet), AUTOENCODER: lambda: _vae_modules(config.vae),
              CONTROLNET: lambda: _controlnet_modules(config.unet)}
    return dict(tables[part]()) if part in tables else {}


def _unet_modules(config: UNetConfig) -> Iterator[tuple[str, str]]:
    yield from _encoder_modules(config)
    yield from _up_modules(config)
    yield from (("out.0", "conv_norm_out"), ("out.2", "conv_out"))


def _controlnet_modules(config: UNetConfig) -> Iterator[tuple[str, str]]:
    """The UNet's encoder, one 1x1 convolution a residual, and those that bring the picture to latent size."""
    yield from _encoder_modules(config)
    yield "middle_block_out.0", "controlnet_mid_block"
    for i in range(len(encoder_widths(config))):
        yield f"zero_convs.{i}.0", f"controlnet_down_blocks.{i}"
    hints = ["conv_in", *(f"blocks.{i}" for i in range(2 * (len(config.hint_widths) - 1))), "conv_out"]
    for i, name in enumerate(hints):  # an activation between each two
        yield f"input_hint_block.{2 * i}", f"controlnet_cond_embedding.{name}"


def _encoder_modules(config: UNetConfig) -> Iterator[tuple[str, str]]:
    """Time embedding, input blocks and middle block."""
    yield from (("time_embed.0", "time_embedding.linear_1"), ("time_embed.2", "time_embedding.linear_2"),
                ("input_blocks.0.0", "conv_in"))
    yield from _down_modules(config)
    yield from _res_block("middle_block.0", "mid_block.resnets.0")
    yield "middle_block.1", "mid_block.attentions.0"
    yield from _res_block("middle_block.2", "mid_block.resnets.1")


def _down_modules(config: UNetConfig) -> Iterator[tuple[str, str]]:
    block, levels = 1, len(config.channel_mult)
    for level in range(levels):
        for i in range(config.num_res_blocks):
            yield from _res_block(f"input_blocks.{block}.0", f"down_blocks.{level}.resnets.{i}")
            yield f"input_blocks.{block}.1", f"down_blocks.{level}.attentions.{i}"
            block += 1
        if level < levels - 1:
            yield f"input_blocks.{block}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
            block += 1


def _up_modules(config: UNetConfig) -> Iterator[tuple[str, str]]:
    block, levels = 0, len(config.channel_mult)
    for up, level in enumerate(reversed(range(levels))):
        for i in range(config.num_res_blocks + 1):
            yield from _res_block(f"output_blocks.{block}.0", f"up_blocks.{up}.resnets.{i}")
            yield f"output_blocks.{block}.1", f"up_blocks.{up}.attentions.{i}"
            block += 1
        if level:  # the last block of a level ends in the upsampling, behind attention where there is one
            place = 2 if level in config.attention_levels else 1
            yield f"output_blocks.{block - 1}.{place}.conv", f"up_blocks.{up}.upsamplers.0.conv"


def _res_block(official: str, diffusers: str) -> Iterator[tuple[str, str]]:
    for ours, theirs in RES_BLOCK.items():
        yield f"{official}.{ours}", f"{diffusers}.{theirs}"


def _vae_modules(config: VaeConfig) -> Iterator[tuple[str, str]]:
    last = len(config.channel_mult) - 1
    for side in ("encoder", "decoder"):
        yield f"{side}.norm_out", f"{side}.conv_norm_out"
        yield f"{side}.mid.block_1", f"{side}.mid_block.resnets.0"
        yield f"{side}.mid.block_2", f"{side}.mid_block.resnets.1"
        for ours, theirs in VAE_ATTENTION.items():
            yield f"{side}.mid.attn_1.{ours}", f"{side}.mid_block.attentions.0.{theirs}"
    for level in range(last + 1):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{last - level}"
        yield from _vae_blocks(f"encoder.down.{level}", down, config.num_res_blocks)
        yield f"encoder.down.{level}.downsample.conv", f"{down}.downsamplers.0.conv"
        yield from _vae_blocks(f"decoder.up.{level}", up, config.num_res_blocks + 1)
        yield f"decoder.up.{level}.upsample.conv", f"{up}.upsamplers.0.conv"


def _vae_blocks(official: str, diffusers: str, count: int) -> Iterator[tuple[str, str]]:
    for i in range(count):
        yield f"{official}.block.{i}", f"{diffusers}.resnets.{i}"
        yield f"{official}.block.{i}.nin_shortcut", f"{diffusers}.resnets.{i}.conv_shortcut"
