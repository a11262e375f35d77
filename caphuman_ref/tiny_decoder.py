"""The fast decoder: a plain convolutional network in place of the KL decoder, an eighteenth of its work at full size.

Layers and parameter names are those of TAESD's decoder (Bohan 2023, the Tiny AutoEncoder for Stable Diffusion), whose
published weights load into it. It has neither norms nor attention, so that it works on a picture of any size alike.
"""
import re
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from caphuman_edge.runtime.contract import Config

BLOCKS = 3  # a stage
BOUND = 3.0  # latents beyond it are squeezed
DIFFUSERS = re.compile(r"decoder\.layers\.(\d+)\.")  # how AutoencoderTiny's names begin: its layers lack the bound
DIFFUSERS_ENCODER = "encoder.layers."


class TinyDecoder(nn.Sequential):
    """A scaled latent to an image, about [-1, 1]; layer k of TAESD's decoder is layer k here."""

    def __init__(self, config: Config):
        width, doublings = config.tiny_channels, len(config.vae.channel_mult) - 1
        layers = [Bound(), _convolution(config.vae.latent_channels, width), nn.ReLU()]
        for _ in range(doublings):
            layers += [*(Block(width) for _ in range(BLOCKS)), nn.Upsample(scale_factor=2.0),
                       _convolution(width, width, bias=False)]
        super().__init__(*layers, Block(width), _convolution(width, 3))

    def forward(self, latent: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        return super().forward(latent) * 2 - 1  # its layers give [0, 1]


class Bound(nn.Module):
    """Values of any size to (-BOUND, BOUND); small ones stay."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / BOUND) * BOUND


class Block(nn.Module):
    """Three convolutions beside a shortcut."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Sequential(_convolution(width, width), nn.ReLU(), _convolution(width, width), nn.ReLU(),
                                  _convolution(width, width))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return torch.relu(self.conv(x) + x)


def taesd_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of diffusers' AutoencoderTiny under TAESD's names, without its encoder; others as they are."""
    if not any(map(DIFFUSERS.match, weights)):
        return dict(weights)
    return {DIFFUSERS.sub(lambda found: f"{int(found[1]) + 1}.", name): tensor for name, tensor in weights.items()
            if not name.startswith(DIFFUSERS_ENCODER)}


def _convolution(inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)
