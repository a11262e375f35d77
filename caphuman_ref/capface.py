"""CapFace: a copy of the UNet's encoder that reads face maps and face tokens and returns 13 residuals.

The same class with three hint channels and no mask head is a ControlNet for body pose.
Sources: Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models";
Liang et al. 2024, "CapHuman: Capture Your Moments in Parallel Universes".
"""
from collections.abc import Iterator

from jaxtyping import Float, Num
from torch import Tensor, nn

from caphuman_edge.ref.unet import UNetEncoder, encoder_widths, zeroed
from caphuman_edge.runtime.contract import UNetConfig


class CapFace(UNetEncoder):
    """Turns a noisy latent, face tokens and an encoded hint into residuals for the UNet's 12 skips and middle.

    `mask_bias` sets where the face mask starts: +2 opens it (sigmoid 0.88) for a training from scratch.
    """

    def __init__(self, config: UNetConfig, latent_channels: int = 4, mask_head: bool = True,
                 mask_bias: float | None = None):
        super().__init__(config, latent_channels)
        self.input_hint_block = nn.Sequential(*_hint_layers(config))
        widths = encoder_widths(config)
        self.zero_convs = nn.ModuleList(_zero_conv(width) for width in widths)
        self.middle_block_out = _zero_conv(widths[-1])
        if mask_head:
            self.mask_predict = _mask_head(config.model_channels, mask_bias)

    def encode_hint(self, maps: Float[Tensor, "b maps H W"]) -> Float[Tensor, "b ch h w"]:
        """The guided hint; it depends on neither timestep nor tokens, so once a portrait is enough."""
        return self.input_hint_block(maps)

    def predict_mask(self, hint: Float[Tensor, "b ch h w"]) -> Float[Tensor, "b 1 h w"]:
        """Probability, 0..1, that a latent cell belongs to the face."""
        return self.mask_predict(hint)

    def forward(self, latent: Float[Tensor, "b c h w"], timestep: Num[Tensor, "#b"],
                face_tokens: Float[Tensor, "b n ctx"], hint: Float[Tensor, "b ch h w"]) -> list[Tensor]:
        """13 residuals, neither scaled nor gated: those of the input blocks in order, then the middle's."""
        *features, middle = self.encode(latent, self.embed_time(timestep, latent.dtype), face_tokens, hint)
        residuals = [conv(feature) for conv, feature in zip(self.zero_convs, features, strict=True)]
        return [*residuals, self.middle_block_out(middle)]


def _hint_layers(config: UNetConfig) -> Iterator[nn.Module]:
    """3x3 convolutions that bring maps to latent size, halving three times."""
    widths = config.hint_widths
    yield from (nn.Conv2d(config.hint_channels, widths[0], 3, padding=1), nn.SiLU())
    for width, wider in zip(widths, widths[1:], strict=False):
        yield from (nn.Conv2d(width, width, 3, padding=1), nn.SiLU())
        yield from (nn.Conv2d(width, wider, 3, stride=2, padding=1), nn.SiLU())
    yield zeroed(nn.Conv2d(widths[-1], config.model_channels, 3, padding=1))


def _zero_conv(width: int) -> nn.Sequential:
    return nn.Sequential(zeroed(nn.Conv2d(width, width, 1)))


def _mask_head(width: int, bias: float | None) -> nn.Sequential:
    conv = nn.Conv2d(width, 1, 3, padding=1)
    if bias is not None:
        nn.init.constant_(conv.bias, bias)
    return nn.Sequential(conv, nn.Sigmoid())
