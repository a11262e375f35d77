"""The contract's graphs as Core ML takes them: batch 1, one text window, split-einsum attention, the UNet in halves.

Core ML packages have fixed shapes: a second guidance branch is a second call.
"""
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from caphuman_edge.export.graphs import HintEncoder, SplitUNet
from caphuman_edge.export.split_einsum import split_einsum
from caphuman_edge.ref.caphuman import GATE_THRESHOLD
from caphuman_edge.ref.unet import UNet, UNetEncoder
from caphuman_edge.runtime.contract import RESIDUALS, TEXT_TOKENS, GraphSpec, TensorSpec
from caphuman_edge.runtime.errors import BadInput

Attention = Literal["original", "split_einsum"]
LENGTHS = {"batch": 1, "tokens": TEXT_TOKENS}  # what symbolic lengths become


def fixed(spec: GraphSpec) -> GraphSpec:
    """The graph with batch 1 and one text window. Raises BadInput where another length is free, as of pictures."""
    return dataclasses.replace(spec, inputs=_fixed_tensors(spec, spec.inputs),
                               outputs=_fixed_tensors(spec, spec.outputs))


def coreml_graphs(module: nn.Module, spec: GraphSpec, attention: Attention,
                  chunks: int) -> Iterator[tuple[nn.Module, GraphSpec]]:
    """The modules to convert, in the order in which a host runs them; one, or the UNet's two halves.

    A host keeps all named arrays: each package takes its inputs from them and adds its outputs.
    """
    spec = fixed(spec)
    rewritten = split_einsum(module) if attention == "split_einsum" else module
    if isinstance(rewritten, HintEncoder):
        rewritten = PooledHintEncoder(rewritten)
    if chunks == 2 and isinstance(rewritten, SplitUNet):
        yield from _halves(rewritten.unet, spec)
    else:
        yield rewritten, spec


class PooledHintEncoder(nn.Module):
    """The hint encoder with its mask resized by pooling.

    Core ML has no bilinear op that shrinks by the contract's exact factors. Shrinking by 2**k without antialias reads
    the mean of the two by two cells in the middle of each block, which is pooling with a stride.
    """

    def __init__(self, original: HintEncoder):
        super().__init__()
        self.control, self.levels = original.control, original.levels
        self.img_linear, self.id_linear = original.img_linear, original.id_linear

    def forward(self, maps: Tensor, image_tokens: Tensor, identity: Tensor) -> tuple[Tensor, ...]:
        hint = self.control.encode_hint(maps)
        mask = self.control.predict_mask(hint)
        face_tokens = torch.cat([self.img_linear(image_tokens), self.id_linear(identity)[:, None]], dim=1)
        return hint, mask, *self.gates(mask), face_tokens

    def gates(self, mask: Float[Tensor, "1 1 h w"]) -> list[Tensor]:
        """0/1 gates of every level. Sides are multiples of the coarsest level's cells."""
        coarsest = 2 ** (self.levels - 1)
        assert not any(side % coarsest for side in mask.shape[2:]), f"{mask.shape} is no multiple of {coarsest}"
        return [(_shrunk(mask, level) > GATE_THRESHOLD).to(mask.dtype) for level in range(self.levels)]


class UNetStart(UNetEncoder):
    """Time features, input blocks and middle, residuals added, and the first `cut` output blocks."""

    def __init__(self, unet: UNet, cut: int):
        nn.Module.__init__(self)  # not the parent's, which would make weights of its own
        self.config, self.time_embed = unet.config, unet.time_embed
        self.input_blocks, self.middle_block = unet.input_blocks, unet.middle_block
        self.output_blocks = nn.ModuleList(unet.output_blocks[:cut])

    def forward(self, latent: Float[Tensor, "1 c h w"], timestep: Float[Tensor, "1"], text_tokens: Tensor,
                *residuals: Tensor) -> tuple[Tensor, ...]:
        """The hidden features, the time features, and the skips that are left, in input-block order."""
        time = self.embed_time(timestep, latent.dtype)
        features = self.encode(latent, time, text_tokens)
        *skips, hidden = (feature + residual for feature, residual in zip(features, residuals, strict=True))
        for block in self.output_blocks:
            hidden = block(torch.cat([hidden, skips.pop()], dim=1), time, text_tokens)
        return hidden, time, *skips


class UNetEnd(UNet):
    """The output blocks from `cut` on, and the last layer."""

    def __init__(self, unet: UNet, cut: int):
        nn.Module.__init__(self)
        self.config, self.out = unet.config, unet.out
        self.output_blocks = nn.ModuleList(unet.output_blocks[cut:])
        if unet.config.prediction == "v":
            self.register_buffer("alphas_cumprod", unet.get_buffer("alphas_cumprod"), persistent=False)

    def forward(self, hidden: Tensor, time: Tensor, text_tokens: Tensor,  # type: ignore[override]  # half of it
                *rest: Tensor) -> Tensor:
        """The noise eps. `rest` are the skips and, where the last layer gives v, the latent and the timestep."""
        skips = rest[:len(self.output_blocks)]
        for block, skip in zip(self.output_blocks, reversed(skips), strict=True):
            hidden = block(torch.cat([hidden, skip], dim=1), time, text_tokens)
        return self._eps_of_v(self.out(hidden), *rest[-2:]) if self.config.prediction == "v" else self.out(hidden)


def balanced_cut(unet: UNet) -> int:
    """How many output blocks go with the encoder, so that the larger half is as small as can be."""
    blocks = [_size(block) for block in unet.output_blocks]
    total = _size(unet)
    first = list(itertools.accumulate(blocks, initial=total - sum(blocks) - _size(unet.out)))
    return min(range(len(blocks)), key=lambda cut: max(first[cut], total - first[cut]))


def _halves(unet: UNet, spec: GraphSpec) -> Iterator[tuple[nn.Module, GraphSpec]]:
    cut = balanced_cut(unet)
    tensors = {tensor.name: tensor for tensor in spec.inputs}
    latent, timestep, text = (tensors[name] for name in ("latent", "timestep", "text_tokens"))
    residuals = spec.inputs[-RESIDUALS:]
    skips = tuple(TensorSpec(f"skip_{i:02}", residuals[i].shape) for i in range(RESIDUALS - 1 - cut))
    state = (*_state(unet, cut, skips[-1]), *skips)
    given_again = (latent, timestep) if unet.config.prediction == "v" else ()
    yield UNetStart(unet, cut), GraphSpec(f"{spec.name}_chunk1", spec.inputs, state)
    yield UNetEnd(unet, cut), GraphSpec(f"{spec.name}_chunk2", (*state[:2], text, *skips, *given_again), spec.outputs)


def _state(unet: UNet, cut: int, skip: TensorSpec) -> tuple[TensorSpec, TensorSpec]:
    """Hidden features, which are as large as the next skip, and time features."""
    _, channels, rows, columns = skip.shape
    assert isinstance(channels, int)
    normed = unet.get_parameter(f"output_blocks.{cut}.0.in_layers.0.weight").numel()  # hidden and skip together
    time = unet.get_parameter("time_embed.2.bias").numel()
    return TensorSpec("hidden", (1, normed - channels, rows, columns)), TensorSpec("time", (1, time))


def _fixed_tensors(spec: GraphSpec, tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    return tuple(dataclasses.replace(tensor, shape=tuple(_length(spec, n) for n in tensor.shape)) for tensor in tensors)


def _length(spec: GraphSpec, length: int | str) -> int:
    if isinstance(length, str) and length not in LENGTHS:
        raise BadInput(f"{spec.name} takes any {length}, expected fixed shapes for Core ML; keep this graph in ONNX")
    return LENGTHS[length] if isinstance(length, str) else length


def _shrunk(mask: Float[Tensor, "1 1 h w"], level: int) -> Float[Tensor, "1 1 h>>level w>>level"]:
    if level == 0:
        return mask
    first = 2 ** (level - 1) - 1
    from_first = mask[..., first:, first:] if first else mask  # a slice of everything would not convert
    return F.avg_pool2d(from_first, 2, stride=2**level)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
