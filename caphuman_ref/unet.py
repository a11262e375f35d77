"""The UNet of Stable Diffusion 1.x, whose encoder CapFace shares.

Module and parameter names equal those of the official checkpoints (`input_blocks.1.0.in_layers.2.weight`).
Source: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models".
"""
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor, nn

from caphuman_edge.ref.sampler import alphas_cumprod
from caphuman_edge.runtime.contract import UNetConfig

TRANSFORMER_NORM_EPS = 1e-6  # unlike the 1e-5 of every other norm here


class UNetEncoder(nn.Module):
    """Time embedding, input blocks and middle block: the half that the UNet and CapFace have in common."""

    def __init__(self, config: UNetConfig, latent_channels: int = 4):
        super().__init__()
        self.config = config
        self.time_embed = nn.Sequential(
            nn.Linear(config.model_channels, _time_width(config)), nn.SiLU(),
            nn.Linear(_time_width(config), _time_width(config)))
        self.input_blocks = nn.ModuleList(_input_blocks(config, latent_channels))
        widest = config.channel_mult[-1] * config.model_channels
        self.middle_block = Block(ResBlock(config, widest, widest), SpatialTransformer(config, widest),
                                  ResBlock(config, widest, widest))

    def embed_time(self, timestep: Num[Tensor, "b"], dtype: torch.dtype) -> Float[Tensor, "b time"]:
        """Features of the timesteps (0..999) that every residual block reads."""
        return self.time_embed(sinusoids(timestep, self.config.model_channels).to(dtype))

    def encode(self, latent: Float[Tensor, "b c h w"], time: Float[Tensor, "#b time"],
               context: Float[Tensor, "b n ctx"], hint: Float[Tensor, "b ch h w"] | None = None) -> list[Tensor]:
        """Outputs of the input blocks, then of the middle block; `hint` is added after the first convolution."""
        features = [self.input_blocks[0](latent, time, context)]
        if hint is not None:
            features = [features[0] + hint]
        for block in self.input_blocks[1:]:
            features.append(block(features[-1], time, context))
        return [*features, self.middle_block(features[-1], time, context)]


class UNet(UNetEncoder):
    """Predicts the noise in a latent, given its timestep, text tokens and, if any, CapFace's residuals."""

    def __init__(self, config: UNetConfig, latent_channels: int = 4):
        super().__init__(config, latent_channels)
        self.output_blocks = nn.ModuleList(_output_blocks(config))
        self.out = nn.Sequential(nn.GroupNorm(config.norm_groups, config.model_channels), nn.SiLU(),
                                 zeroed(nn.Conv2d(config.model_channels, latent_channels, 3, padding=1)))
        if config.prediction == "v":
            self.register_buffer("alphas_cumprod", alphas_cumprod(), persistent=False)

    def forward(self, latent: Float[Tensor, "b c h w"], timestep: Num[Tensor, "#b"], context: Float[Tensor, "b n ctx"],
                residuals: Sequence[Tensor] | None = None) -> Float[Tensor, "b c h w"]:
        """The noise eps. Residuals are 13, scaled, gated and summed over people; the last one is the middle's."""
        time = self.embed_time(timestep, latent.dtype)
        features = self.encode(latent, time, context)
        if residuals is not None:
            features = [feature + residual for feature, residual in zip(features, residuals, strict=True)]
        *skips, hidden = features
        for block, skip in zip(self.output_blocks, reversed(skips), strict=True):
            hidden = block(torch.cat([hidden, skip], dim=1), time, context)
        predicted = self.out(hidden)
        return self._eps_of_v(predicted, latent, timestep) if self.config.prediction == "v" else predicted

    def _eps_of_v(self, v: Tensor, latent: Tensor, timestep: Tensor) -> Tensor:
        """v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans and Ho 2022, section 4), solved for eps."""
        alpha_bar = self.alphas_cumprod[timestep.long()][:, None, None, None]
        return alpha_bar.sqrt() * v + (1 - alpha_bar).sqrt() * latent


class Block(nn.ModuleList):
    """Layers in sequence, each given the inputs that it reads."""

    def __init__(self, *layers: nn.Module):
        super().__init__(layers)

    def forward(self, hidden: Tensor, time: Tensor, context: Tensor) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                hidden = layer(hidden, time)
            elif isinstance(layer, SpatialTransformer):
                hidden = layer(hidden, context)
            else:
                hidden = layer(hidden)
        return hidden


class ResBlock(nn.Module):
    """Two normalised 3x3 convolutions with the time features added between them, around a skip connection."""

    def __init__(self, config: UNetConfig, inputs: int, outputs: int):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(config.norm_groups, inputs), nn.SiLU(),
                                       nn.Conv2d(inputs, outputs, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(_time_width(config), outputs))
        self.out_layers = nn.Sequential(nn.GroupNorm(config.norm_groups, outputs), nn.SiLU(),
                                        nn.Identity(),  # dropout's place in the official numbering
                                        zeroed(nn.Conv2d(outputs, outputs, 3, padding=1)))
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, hidden: Float[Tensor, "b i h w"], time: Float[Tensor, "#b time"]) -> Float[Tensor, "b o h w"]:
        change = self.in_layers(hidden) + self.emb_layers(time)[:, :, None, None]
        return self.skip_connection(hidden) + self.out_layers(change)


class SpatialTransformer(nn.Module):
    """One transformer layer over the pixels of a feature map, around a skip connection.

    With `pooling` the mean of each square of so many cells is one key and value of self-attention, so that each query
    sees fewer: an approximation, as in pyramid vision transformers (Wang et al. 2021, "PVT v2", linear attention).
    """

    def __init__(self, config: UNetConfig, width: int, pooling: int = 1):
        super().__init__()
        self.pooling = pooling
        self.norm = nn.GroupNorm(config.norm_groups, width, eps=TRANSFORMER_NORM_EPS)
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(config, width)])
        self.proj_out = zeroed(nn.Conv2d(width, width, 1))

    def forward(self, hidden: Float[Tensor, "b c h w"], context: Float[Tensor, "b n ctx"]) -> Float[Tensor, "b c h w"]:
        tokens = self.proj_in(self.norm(hidden)).flatten(2).transpose(1, 2)  # (B, H*W, C)
        for block in self.transformer_blocks:
            tokens = block(tokens, context, lambda seen: self._pooled(seen, hidden))
        return hidden + self.proj_out(tokens.transpose(1, 2).reshape(hidden.shape))


    def _pooled(self, tokens: Float[Tensor, "b p c"], hidden: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k c"]:
        if self.pooling == 1:
            return tokens
        return F.avg_pool2d(tokens.transpose(1, 2).reshape(hidden.shape), self.pooling).flatten(2).transpose(1, 2)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the context, and a gated feed-forward layer, each pre-normalised."""

    def __init__(self, config: UNetConfig, width: int):
        super().__init__()
        self.attn1 = Attention(width, width, config.num_heads)
        self.ff = FeedForward(width)
        self.attn2 = Attention(width, config.context_width, config.num_heads)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, tokens: Float[Tensor, "b p c"], context: Float[Tensor, "b n ctx"],
                pooled: Callable[[Tensor], Tensor]) -> Float[Tensor, "b p c"]:
        """`pooled` makes of tokens those that self-attention attends to."""
        normed = self.norm1(tokens)
        tokens = tokens + self.attn1(normed, pooled(normed))
        tokens = tokens + self.attn2(self.norm2(tokens), context)
        return tokens + self.ff(self.norm3(tokens))


class Attention(nn.Module):
    """Multi-head attention of `tokens` to `context`; queries, keys and values have no bias."""

    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, tokens: Float[Tensor, "b p c"], context: Float[Tensor, "b n ctx"]) -> Float[Tensor, "b p c"]:
        query, key, value = (self._split(x) for x in (self.to_q(tokens), self.to_k(context), self.to_v(context)))
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.to_out(mixed.transpose(1, 2).reshape(tokens.shape))

    def _split(self, x: Tensor) -> Tensor:
        batch, count, width = x.shape
        return x.reshape(batch, count, self.heads, width // self.heads).transpose(1, 2)  # (B, heads, N, C/heads)


class FeedForward(nn.Module):
    """GEGLU (Shazeer 2020, "GLU Variants Improve Transformer") of four times the width, and a projection back."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)


class GEGLU(nn.Module):
    """A projection gated by the exact (erf) gelu of another one."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.proj = nn.Linear(inputs, 2 * outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        value, gate = self.proj(tokens).chunk(2, dim=-1)
        return value * F.gelu(gate)


class Downsample(nn.Module):
    """Halves rows and columns by a convolution of stride 2."""

    def __init__(self, width: int):
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.op(hidden)


class Upsample(nn.Module):
    """Doubles rows and columns by nearest neighbour, then convolves."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.conv(F.interpolate(hidden, scale_factor=2.0, mode="nearest"))


def sinusoids(timestep: Num[Tensor, "b"], width: int) -> Float[Tensor, "b width"]:
    """[cos | sin] of the timestep at `width / 2` frequencies, 1 down to nearly 1/10000."""
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angles = timestep.float()[:, None] * torch.exp(-math.log(10000) * exponents)[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def zeroed(conv: nn.Conv2d) -> nn.Conv2d:
    """The convolution with zero parameters, so that a fresh branch adds nothing."""
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv


def encoder_widths(config: UNetConfig) -> list[int]:
    """Channels of each input block's output, in order."""
    widths = [config.model_channels]
    for level, mult in enumerate(config.channel_mult):
        width = mult * config.model_channels
        widths += [width] * (config.num_res_blocks + (level < len(config.channel_mult) - 1))
    return widths


def _input_blocks(config: UNetConfig, latent_channels: int) -> Iterator[Block]:
    width = config.model_channels
    yield Block(nn.Conv2d(latent_channels, width, 3, padding=1))
    for level, mult in enumerate(config.channel_mult):
        for _ in range(config.num_res_blocks):
            yield Block(*_level_layers(config, level, width, mult * config.model_channels))
            width = mult * config.model_channels
        if level < len(config.channel_mult) - 1:
            yield Block(Downsample(width))


def _output_blocks(config: UNetConfig) -> Iterator[Block]:
    skips = encoder_widths(config)
    width = skips[-1]
    for level, mult in reversed(list(enumerate(config.channel_mult))):
        for i in range(config.num_res_blocks + 1):
            layers = _level_layers(config, level, width + skips.pop(), mult * config.model_channels)
            width = mult * config.model_channels
            if level and i == config.num_res_blocks:
                layers.append(Upsample(width))
            yield Block(*layers)


def _level_layers(config: UNetConfig, level: int, inputs: int, outputs: int) -> list[nn.Module]:
    layers: list[nn.Module] = [ResBlock(config, inputs, outputs)]
    if level in config.attention_levels:
        finest = level == min(config.attention_levels)
        layers.append(SpatialTransformer(config, outputs, config.key_pooling if finest else 1))
    return layers


def _time_width(config: UNetConfig) -> int:
    return 4 * config.model_channels
