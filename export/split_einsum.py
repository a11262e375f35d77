"""Attention in the form that the Neural Engine runs best, as a copy of a module that shares its weights.

The principles are those of Apple's "Deploying Transformers on the Apple Neural Engine" (2022): channels first,
(B, C, 1, S), so that the long axis S is the last and contiguous one; 1x1 convolutions in place of linear layers; heads
one by one, as einsums that need no transpose of queries and values; layer norm over the channels.
The reference stays as it is: only the copy's transformer layers are replaced.
"""
import copy
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from caphuman_edge.ref.clip import Encoder, EncoderLayer
from caphuman_edge.ref.unet import SpatialTransformer, TransformerBlock

QUICK_GELU = 1.702  # CLIP's: x * sigmoid(1.702 x)


def split_einsum(module: nn.Module) -> nn.Module:
    """A copy of the module that computes the same with split-einsum attention. Parameters are shared, not copied.

    Rewrites the transformers of UNet, CapFace and CLIP; a module without any comes back as a plain copy. The
    autoencoder's one attention layer, single-headed and made of 1x1 convolutions already, is left as it is.
    """
    tensors = (*module.parameters(), *module.buffers())
    twin = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
    return _rewritten(twin)


class ChannelsFirstTransformer(SpatialTransformer):
    """A SpatialTransformer whose tokens stay (B, C, 1, H*W) throughout."""

    def __init__(self, original: SpatialTransformer):
        nn.Module.__init__(self)  # not the parent's, which would make weights of its own
        self.pooling = original.pooling
        self.norm, self.proj_in, self.proj_out = original.norm, original.proj_in, original.proj_out
        blocks = (_TransformerBlock(block) for block in original.transformer_blocks
                  if isinstance(block, TransformerBlock))
        self.transformer_blocks = nn.ModuleList(blocks)
        assert len(self.transformer_blocks) == len(original.transformer_blocks)

    def forward(self, hidden: Float[Tensor, "b c h w"], context: Float[Tensor, "b n ctx"]) -> Float[Tensor, "b c h w"]:
        tokens = self.proj_in(self.norm(hidden)).flatten(2)[:, :, None]  # (B, C, 1, H*W)
        channels_first = _channels_first(context)
        for block in self.transformer_blocks:
            tokens = block(tokens, channels_first, lambda seen: self._pooled(seen, hidden))
        return hidden + self.proj_out(tokens.reshape(hidden.shape))

    def _pooled(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        if self.pooling == 1:
            return tokens
        return F.avg_pool2d(tokens.reshape(hidden.shape), self.pooling).flatten(2)[:, :, None]  # (B, C, 1, fewer)


class ChannelsFirstEncoder(nn.Module):
    """CLIP's transformer layers on tokens that stay (B, C, 1, N) throughout."""

    def __init__(self, original: Encoder):
        super().__init__()
        self.layers = nn.ModuleList(_ClipLayer(layer) for layer in original.layers if isinstance(layer, EncoderLayer))
        assert len(self.layers) == len(original.layers)

    def forward(self, tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        hidden = _channels_first(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden[:, :, 0].transpose(1, 2)


class _TransformerBlock(nn.Module):
    def __init__(self, original: TransformerBlock):
        super().__init__()
        self.attn1, self.attn2 = (_Attention(one.to_q, one.to_k, one.to_v, one.to_out[0], one.heads)
                                  for one in (original.attn1, original.attn2))
        self.norm1, self.norm2, self.norm3 = (_ChannelNorm(norm) for norm in
                                              (original.norm1, original.norm2, original.norm3))
        self.widen, self.narrow = _pointwise(original.ff.net[0].proj), _pointwise(original.ff.net[2])

    def forward(self, tokens: Float[Tensor, "b c 1 p"], context: Float[Tensor, "b ctx 1 n"],
                pooled: Callable[[Tensor], Tensor]) -> Tensor:
        normed = self.norm1(tokens)
        tokens = tokens + self.attn1(normed, pooled(normed))
        tokens = tokens + self.attn2(self.norm2(tokens), context)
        value, gate = self.widen(self.norm3(tokens)).chunk(2, dim=1)
        return tokens + self.narrow(value * F.gelu(gate))


class _ClipLayer(nn.Module):
    def __init__(self, original: EncoderLayer):
        super().__init__()
        attention = original.self_attn
        self.attention = _Attention(attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj,
                                    attention.heads, attention.causal)
        self.norm1, self.norm2 = _ChannelNorm(original.layer_norm1), _ChannelNorm(original.layer_norm2)
        self.widen, self.narrow = _pointwise(original.mlp.fc1), _pointwise(original.mlp.fc2)

    def forward(self, tokens: Float[Tensor, "b c 1 n"]) -> Float[Tensor, "b c 1 n"]:
        normed = self.norm1(tokens)
        tokens = tokens + self.attention(normed, normed)
        hidden = self.widen(self.norm2(tokens))
        return tokens + self.narrow(hidden * torch.sigmoid(QUICK_GELU * hidden))


class _Attention(nn.Module):
    """Multi-head attention, a head at a time; causal where a token may not see later ones."""

    def __init__(self, query: nn.Module, key: nn.Module, value: nn.Module, out: nn.Module, heads: int,
                 causal: bool = False):
        super().__init__()
        self.query, self.key, self.value, self.out = (_pointwise(linear) for linear in (query, key, value, out))
        self.heads, self.causal = heads, causal
        self.width = self.query.out_channels // heads

    def forward(self, tokens: Float[Tensor, "b c 1 p"],
                context: Float[Tensor, "b ctx 1 n"]) -> Float[Tensor, "b c 1 p"]:
        queries = (self.query(tokens) * self.width**-0.5).split(self.width, dim=1)
        keys = self.key(context).transpose(1, 3).split(self.width, dim=3)  # heads of (B, N, 1, C/heads)
        values = self.value(context).split(self.width, dim=1)
        mask = _causal_mask(tokens) if self.causal else None
        mixed = [self._head(*parts, mask) for parts in zip(queries, keys, values, strict=True)]
        return self.out(torch.cat(mixed, dim=1))

    def _head(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """One head: (B, C/heads, 1, P), (B, N, 1, C/heads) and (B, C/heads, 1, N) to (B, C/heads, 1, P)."""
        scores = torch.einsum("bnhc,bchp->bnhp", key, query)
        weights = (scores if mask is None else scores + mask).softmax(dim=1)  # over the N tokens attended to
        return torch.einsum("bchn,bnhp->bchp", value, weights)


class _ChannelNorm(nn.Module):
    """Layer norm over the channels of (B, C, 1, S)."""

    def __init__(self, original: nn.LayerNorm):
        super().__init__()
        self.weight, self.bias, self.eps = original.weight, original.bias, original.eps

    def forward(self, x: Float[Tensor, "b c 1 s"]) -> Float[Tensor, "b c 1 s"]:
        centred = x - x.mean(dim=1, keepdim=True)
        normed = centred * ((centred * centred).mean(dim=1, keepdim=True) + self.eps).rsqrt()
        return normed * self.weight[:, None, None] + self.bias[:, None, None]


def _rewritten(module: nn.Module) -> nn.Module:
    """The module, or its replacement; replaced in place below."""
    replacements: tuple[tuple[type[nn.Module], Callable[..., nn.Module]], ...] = (
        (SpatialTransformer, ChannelsFirstTransformer), (Encoder, ChannelsFirstEncoder))
    for kind, replacement in replacements:
        if isinstance(module, kind):
            return replacement(module).train(module.training)
    for name, child in module.named_children():
        setattr(module, name, _rewritten(child))
    return module


def _pointwise(linear: nn.Module | Tensor) -> nn.Conv2d:
    """The linear layer as a 1x1 convolution on a view of its weight."""
    assert isinstance(linear, nn.Linear)
    conv = nn.Conv2d(linear.in_features, linear.out_features, 1, bias=linear.bias is not None, device="meta")
    conv.weight = nn.Parameter(linear.weight.data[:, :, None, None], requires_grad=False)
    conv.bias = linear.bias
    return conv


def _channels_first(tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b c 1 n"]:
    return tokens.transpose(1, 2)[:, :, None]


def _causal_mask(tokens: Float[Tensor, "b c 1 n"]) -> Float[Tensor, "n 1 n"]:
    """Added to scores (B, key, 1, query): no weight where the key comes after the query."""
    later = torch.ones(tokens.shape[-1], tokens.shape[-1], dtype=torch.bool, device=tokens.device).tril(-1)
    return torch.zeros(later.shape, device=tokens.device).masked_fill(later, -torch.inf)[:, None]
