"""KL autoencoder of Latent Diffusion (Rombach et al. 2022): eight pixels to a latent cell.

Parameter names equal Stable Diffusion's `first_stage_model.*`.
"""
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from caphuman_edge.runtime.contract import VaeConfig

NORM_EPS = 1e-6


class Autoencoder(nn.Module):
    """Images in [-1, 1] to latent moments and back."""

    def __init__(self, config: VaeConfig):
        super().__init__()
        self.config = config
        moments = 2 * config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(moments, moments, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def moments(self, image: Float[Tensor, "b 3 H W"]) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        """Mean and log-variance of the unscaled latent; log-variance clamped to [-30, 20]."""
        mean, logvar = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """The scaled latent that the denoiser works on, without sampling noise."""
        return self.moments(image)[0] * self.config.latent_scale

    def decode(self, latent: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """Image, about [-1, 1] and not clamped, of a scaled latent."""
        return self.decoder(self.post_quant_conv(latent / self.config.latent_scale))


class Encoder(nn.Module):
    """Residual blocks at four resolutions, halved with right/bottom padding."""

    def __init__(self, config: VaeConfig):
        super().__init__()
        width = config.channels
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList()
        for level, mult in enumerate(config.channel_mult):
            blocks = nn.ModuleList()
            for _ in range(config.num_res_blocks):
                blocks.append(ResBlock(width, mult * config.channels, config.norm_groups))
                width = mult * config.channels
            stage = nn.Module()
            stage.block = blocks
            if level < len(config.channel_mult) - 1:
                stage.downsample = Downsample(width)
            self.down.append(stage)
        self.mid = _middle(width, config.norm_groups)
        self.norm_out = nn.GroupNorm(config.norm_groups, width, eps=NORM_EPS)
        self.conv_out = nn.Conv2d(width, 2 * config.latent_channels, 3, padding=1)

    def forward(self, image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b m h w"]:
        x = self.conv_in(image)
        for stage in self.down:
            for block in stage.block:
                x = block(x)
            if hasattr(stage, "downsample"):
                x = stage.downsample(x)
        x = _run_middle(self.mid, x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """The encoder's mirror, one block more a level, doubled by nearest neighbour and a convolution."""

    def __init__(self, config: VaeConfig):
        super().__init__()
        width = config.channel_mult[-1] * config.channels
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.mid = _middle(width, config.norm_groups)
        stages = []
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            blocks = nn.ModuleList()
            for _ in range(config.num_res_blocks + 1):
                blocks.append(ResBlock(width, mult * config.channels, config.norm_groups))
                width = mult * config.channels
            stage = nn.Module()
            stage.block = blocks
            if level:
                stage.upsample = Upsample(width)
            stages.insert(0, stage)  # the official list is ordered fine to coarse
        self.up = nn.ModuleList(stages)
        self.norm_out = nn.GroupNorm(config.norm_groups, width, eps=NORM_EPS)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, latent: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        x = _run_middle(self.mid, self.conv_in(latent))
        for stage in reversed(self.up):
            for block in stage.block:
                x = block(x)
            if hasattr(stage, "upsample"):
                x = stage.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class ResBlock(nn.Module):
    """Two normalised convolutions beside a shortcut."""

    def __init__(self, width: int, out_width: int, norm_groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, width, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(width, out_width, 3, padding=1)
        self.norm2 = nn.GroupNorm(norm_groups, out_width, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1)
        if width != out_width:
            self.nin_shortcut = nn.Conv2d(width, out_width, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        shortcut = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        x = self.conv1(F.silu(self.norm1(x)))
        return shortcut + self.conv2(F.silu(self.norm2(x)))


class Attention(nn.Module):
    """Single-head self-attention over all cells, with 1x1 convolutions for its projections."""

    def __init__(self, width: int, norm_groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, width, eps=NORM_EPS)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        normed = self.norm(x)
        q, k, v = (project(normed).flatten(2).transpose(1, 2)[:, None] for project in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)  # (B, 1, h*w, C)
        return x + self.proj_out(attended[:, 0].transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c h w"]:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c H W"]:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def image_to_uint8(image: Float[Tensor, "b 3 H W"]) -> Tensor:
    """Official conversion to (b, H, W, 3) uint8: scaled, clipped, then truncated."""
    scaled = (image.float() * 127.5 + 127.5).clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1)


def _middle(width: int, norm_groups: int) -> nn.Module:
    middle = nn.Module()
    middle.block_1 = ResBlock(width, width, norm_groups)
    middle.attn_1 = Attention(width, norm_groups)
    middle.block_2 = ResBlock(width, width, norm_groups)
    return middle


def _run_middle(middle: nn.Module, x: Tensor) -> Tensor:
    return middle.block_2(middle.attn_1(middle.block_1(x)))
