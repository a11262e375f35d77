"""MIL's compressed constants (iOS 16's and iOS 18's forms) and its quantise and dequantise ops."""
import math

import torch
from torch import Tensor

from caphuman_edge.export.mil_ops import OpTable
from caphuman_edge.export.mil_weights import unpack

OPS = OpTable()


@OPS.op
def constexpr_affine_dequantize(quantized_data: Tensor, zero_point: Tensor, scale: Tensor, axis: int) -> Tensor:
    """scale * (data - zero point); scale and zero point are scalars or lie along an axis."""
    data = quantized_data.float()
    return (data - _along(zero_point, data, axis)) * _along(scale, data, axis)


@OPS.mover
def constexpr_cast(source_val: Tensor, output_dtype: str) -> Tensor:
    return source_val


@OPS.mover
def constexpr_lut_to_dense(indices: Tensor, lut: Tensor, shape: list[int] | None = None,
                           vector_axis: int | None = None) -> Tensor:
    """A palette's entries. iOS 16: one palette, indices packed in bytes. iOS 18: a palette a block, of vectors."""
    if shape is not None:
        bits = (lut.numel() - 1).bit_length()
        places = indices if bits == 8 else unpack(indices, bits, math.prod(shape))
        return lut.index_select(0, places.int()).reshape(shape)
    return _look_up(indices, lut, vector_axis)


@OPS.mover
def constexpr_sparse_to_dense(nonzero_data: Tensor, mask: Tensor, shape: list[int] | None = None) -> Tensor:
    """Zeros but where the mask is set. iOS 16: the mask is packed in bytes. iOS 18: it has the tensor's shape."""
    flags = mask if shape is None else unpack(mask, 1, math.prod(shape)).reshape(shape)
    return _dense(nonzero_data, flags)


@OPS.op
def constexpr_blockwise_shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """scale * (data - offset), one scale and offset a block."""
    return _shift_scale(data, scale, offset)


@OPS.mover
def constexpr_lut_to_sparse(indices_mask: Tensor, indices_nonzero_data: Tensor, lut: Tensor,
                            vector_axis: int | None = None) -> tuple[Tensor, Tensor]:
    """The mask of the palette's entries, and those that are not empty."""
    dense = _look_up(_dense(indices_nonzero_data, indices_mask), lut, vector_axis)
    mask = indices_mask if vector_axis is None else indices_mask.repeat_interleave(lut.shape[-1], vector_axis)
    return mask, dense[mask != 0]


@OPS.op
def constexpr_sparse_blockwise_shift_scale(data_mask: Tensor, nonzero_data: Tensor, scale: Tensor,
                                           offset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return data_mask, _shift_scale(_dense(nonzero_data, data_mask), scale, offset)[data_mask != 0]


@OPS.op
def quantize(input: Tensor, scale: Tensor, output_dtype: str, zero_point: Tensor | None = None,
             axis: int | None = None) -> Tensor:
    """round(input / scale) + zero point, within the range of the output type."""
    steps = (input / _along(scale, input, axis)).round()
    shifted = steps if zero_point is None else steps + _along(zero_point, input, axis)
    return shifted.clamp(*{"int8": (-128, 127), "uint8": (0, 255)}[output_dtype])


@OPS.op
def dequantize(input: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: int | None = None) -> Tensor:
    steps = input.float() if zero_point is None else input.float() - _along(zero_point, input, axis).float()
    return steps * _along(scale, input, axis)


def _along(parameter: Tensor, data: Tensor, axis: int | None) -> Tensor:
    """A scalar, or a vector along an axis; as float32."""
    if parameter.ndim == 0 or axis is None:
        return parameter.float()
    shape = [1] * data.ndim
    shape[axis] = -1
    return parameter.float().reshape(shape)


def _dense(nonzero: Tensor, mask: Tensor) -> Tensor:
    dense = torch.zeros(mask.shape, dtype=nonzero.dtype)
    dense[mask != 0] = nonzero
    return dense


def _shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    in_blocks, of_blocks = [], []  # (blocks, elements in a block) of every axis
    for length, blocks in zip(data.shape, scale.shape, strict=True):
        in_blocks += [blocks, length // blocks]
        of_blocks += [blocks, 1]
    values = data.float().reshape(in_blocks)
    values = values if offset is None else values - offset.float().reshape(of_blocks)
    return (values * scale.reshape(of_blocks)).reshape(data.shape)


def _look_up(indices: Tensor, lut: Tensor, vector_axis: int | None) -> Tensor:
    """`lut` is (blocks of every axis of indices, entries, elements of a vector)."""
    *blocks, entries, width = lut.shape
    first = torch.zeros([1] * indices.ndim, dtype=torch.int32)  # of an element's palette
    for axis, (length, count) in enumerate(zip(indices.shape, blocks, strict=True)):
        block = (torch.arange(length, dtype=torch.int32) // (length // count)) * math.prod(blocks[axis + 1:])
        first = first + block.reshape([-1 if k == axis else 1 for k in range(indices.ndim)])
    places = indices.int() + first * entries
    vectors = lut.reshape(-1, width).index_select(0, places.reshape(-1)).reshape(*indices.shape, width)
    if width == 1:
        return vectors.squeeze(-1)
    assert vector_axis is not None
    axis = vector_axis % indices.ndim
    return vectors.movedim(-1, axis + 1).flatten(axis, axis + 1)
