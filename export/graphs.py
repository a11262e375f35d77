"""The reference, cut into the contract's graphs: modules whose inputs and outputs are those of runtime.contract.

The rewrites that export needs live here, so that the reference stays clean.
"""
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from caphuman_edge.ref.caphuman import CapHuman, face_gates
from caphuman_edge.ref.tiny_decoder import TinyDecoder
from caphuman_edge.runtime.contract import GATE, TEXT_TOKENS, TensorSpec, residual_levels


class HintEncoder(nn.Module):
    """Once a portrait: maps and identity features to the guided hint, the mask, its gates and the face tokens."""

    def __init__(self, model: CapHuman):
        super().__init__()
        self.control, self.img_linear, self.id_linear = model.control_model, model.img_linear, model.id_linear
        self.levels = len(model.config.unet.channel_mult)

    def forward(self, maps: Tensor, image_tokens: Tensor, identity: Tensor) -> tuple[Tensor, ...]:
        hint = self.control.encode_hint(maps)
        mask = self.control.predict_mask(hint)
        face_tokens = torch.cat([self.img_linear(image_tokens), self.id_linear(identity)[:, None]], dim=1)
        return hint, mask, *face_gates(mask, self.levels), face_tokens


class Denoiser(nn.Module):
    """One fused step for one person: CapFace once, the UNet for every text of the batch."""

    def __init__(self, model: CapHuman):
        super().__init__()
        self.control, self.unet = model.control_model, model.unet
        self.levels = residual_levels(model.config.unet)

    def forward(self, latent: Tensor, timestep: Tensor, text_tokens: Tensor, face_tokens: Tensor, hint: Tensor,
                *gates_and_scales: Tensor) -> Tensor:
        *gates, scales = gates_and_scales
        residuals = self.control(latent, timestep, face_tokens, hint)
        gated = [residual * (gates[level] * scale)
                 for residual, level, scale in zip(residuals, self.levels, scales.unbind(), strict=True)]
        return self.unet(_repeat(latent, text_tokens), timestep, text_tokens, gated)


class SplitCapFace(nn.Module):
    """One person's raw residuals, for the split form."""

    def __init__(self, model: CapHuman):
        super().__init__()
        self.control = model.control_model

    def forward(self, latent: Tensor, timestep: Tensor, face_tokens: Tensor, hint: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.control(latent, timestep, face_tokens, hint))


class SplitUNet(nn.Module):
    """The UNet with 13 residuals that the caller scaled, gated and summed."""

    def __init__(self, model: CapHuman):
        super().__init__()
        self.unet = model.unet

    def forward(self, latent: Tensor, timestep: Tensor, text_tokens: Tensor, *residuals: Tensor) -> Tensor:
        return self.unet(_repeat(latent, text_tokens), timestep, text_tokens, list(residuals))


class ControlEncoder(nn.Module):
    """Once a portrait: the second ControlNet's picture, [0, 1], to its guided hint."""

    def __init__(self, model: CapHuman):
        super().__init__()
        self.control = model.pose_control_model

    def forward(self, image: Tensor) -> Tensor:
        return self.control.encode_hint(image)


class ControlNet(nn.Module):
    """The second ControlNet's raw residuals, for every text of the batch: unlike CapFace it reads the text."""

    def __init__(self, model: CapHuman):
        super().__init__()
        self.control = model.pose_control_model

    def forward(self, latent: Tensor, timestep: Tensor, text_tokens: Tensor, hint: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.control(_repeat(latent, text_tokens), timestep, text_tokens, hint))


class VaeEncoder(nn.Module):
    """An image, about [-1, 1], to its scaled latent's mean and, in the channels behind it, log variance.

    The scale is inside, as it is in the decoder: a host that multiplies by a scaling factor of 1 gets what it wants.
    """

    def __init__(self, model: CapHuman):
        super().__init__()
        self.autoencoder = model.first_stage_model

    def forward(self, sample: Tensor) -> Tensor:
        mean, log_variance = self.autoencoder.moments(sample)
        scale = self.autoencoder.config.latent_scale
        return torch.cat([mean * scale, log_variance + 2 * math.log(scale)], dim=1)


class VaeDecoder(nn.Module):
    """A scaled latent to an image, about [-1, 1]."""

    def __init__(self, model: CapHuman):
        super().__init__()
        self.autoencoder = model.first_stage_model

    def forward(self, latent_sample: Tensor) -> Tensor:
        return self.autoencoder.decode(latent_sample)


class PreviewDecoder(nn.Module):
    """A linear guess of the colours at latent resolution: what a progress preview needs."""

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, latent_sample: Tensor) -> Tensor:
        return F.conv2d(latent_sample, self.weight, self.bias)


class FastDecoder(nn.Module):
    """A scaled latent to an image, about [-1, 1], by the small network that takes the autoencoder's place."""

    def __init__(self, decoder: TinyDecoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, latent_sample: Tensor) -> Tensor:
        return self.decoder(latent_sample)


def modules(model: CapHuman, preview: PreviewDecoder, tiny: TinyDecoder | None = None) -> dict[str, nn.Module]:
    """Every graph that is made from the reference, by its name in the contract; a ControlNet's where it has one."""
    control = {"control_encoder": ControlEncoder, "controlnet": ControlNet} if has_control(model) else {}
    return {
        "text_encoder": model.text_encoder, "image_encoder": model.image_encoder, "hint_encoder": HintEncoder(model),
        "denoiser": Denoiser(model), "capface": SplitCapFace(model), "unet": SplitUNet(model),
        **{name: make(model) for name, make in control.items()},
        "vae_encoder": VaeEncoder(model), "vae_decoder": VaeDecoder(model), "preview_decoder": preview,
        **({"tiny_decoder": FastDecoder(tiny)} if tiny else {}),
    }


def has_control(model: CapHuman) -> bool:
    """Whether the model has a second ControlNet beside CapFace."""
    return hasattr(model, "pose_control_model")


def example_inputs(inputs: tuple[TensorSpec, ...], seed: int, batch: int = 2) -> dict[str, Tensor]:
    """Seeded inputs of realistic range for a graph; symbolic lengths become `batch`, one text window and odd sizes."""
    generator = torch.Generator().manual_seed(seed)
    lengths = {"batch": batch, "tokens": TEXT_TOKENS, "height": 64 * batch - 1, "width": 48 * batch + 1}
    return {spec.name: _example(spec, [lengths[n] if isinstance(n, str) else n for n in spec.shape], generator)
            for spec in inputs}


def _example(spec: TensorSpec, shape: list[int], generator: torch.Generator) -> Tensor:
    if spec.dtype == "int64":
        return torch.randint(0, 49407, shape, generator=generator)
    if spec.name == "timestep":
        return torch.tensor([501.0])
    if spec.name.startswith(GATE):
        return (torch.rand(shape, generator=generator) > 0.4).float()
    if spec.name in ("image", "face"):
        return torch.rand(shape, generator=generator) * (255 if spec.name == "face" else 1)
    if spec.name in ("maps", "sample"):
        return torch.rand(shape, generator=generator) * 2 - 1
    return torch.randn(shape, generator=generator)


def _repeat(latent: Tensor, text_tokens: Tensor) -> Tensor:
    """The one latent for every text of the batch."""
    return latent.expand(text_tokens.shape[0], -1, -1, -1)
