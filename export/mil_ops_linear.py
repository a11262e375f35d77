"""MIL's convolutions, pooling, matrix products and attention."""
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from caphuman_edge.export.mil_ops import OpTable
from caphuman_edge.export.mil_ops_elementwise import per_channel

OPS = OpTable()
_CONV = (F.conv1d, F.conv2d, F.conv3d)
_CONV_TRANSPOSE = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_AVERAGE = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_MAXIMUM = (F.max_pool1d, F.max_pool2d, F.max_pool3d)


@OPS.op
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product = torch.matmul(x, weight.to(x.dtype).transpose(0, 1))  # F.linear knows no integers
    return product if bias is None else product + bias.to(x.dtype)


@OPS.op
def matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    left = x.transpose(-1, -2) if transpose_x and x.ndim > 1 else x
    right = y.transpose(-1, -2) if transpose_y and y.ndim > 1 else y
    return torch.matmul(left, right)


@OPS.op
def einsum(values: list[Tensor], equation: str) -> Tensor:
    return torch.einsum(equation, *values)


@OPS.op
def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor,
                                 attn_mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask)


@OPS.op
def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, strides: list[int] | None = None,
         pad_type: str = "valid", pad: list[int] | None = None, dilations: list[int] | None = None,
         groups: int = 1) -> Tensor:
    rank = x.ndim - 2
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    reach = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilations, strict=True)]
    padded = _pad(x, paddings(pad_type, pad, list(x.shape[2:]), reach, strides), 0.0)
    return _CONV[rank - 1](padded, weight, bias, strides, 0, dilations, groups)


@OPS.op
def conv_transpose(x: Tensor, weight: Tensor, bias: Tensor | None = None, pad: list[int] | None = None,
                   output_shape: list[int] | None = None, pad_type: str = "valid", strides: list[int] | None = None,
                   dilations: list[int] | None = None, groups: int = 1) -> Tensor:
    """The whole transposed convolution, then cropped (or, beyond its end, zeros), then the bias."""
    rank = x.ndim - 2
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    whole = _CONV_TRANSPOSE[rank - 1](x, weight, None, strides, 0, 0, groups, dilations)
    for axis in range(rank):
        size = whole.shape[2 + axis]
        before, after = (pad[2 * axis], pad[2 * axis + 1]) if pad and pad_type == "custom" else (0, 0)
        if pad_type == "same":
            spare = max(0, size - x.shape[2 + axis] * strides[axis])
            before, after = spare // 2, spare - spare // 2
        length = output_shape[2 + axis] if output_shape else size - before - after
        if pad_type == "same":
            length = output_shape[2 + axis] if output_shape else x.shape[2 + axis] * strides[axis]
        missing = [0] * 2 * (rank - axis - 1) + [0, max(0, before + length - size)]
        whole = F.pad(whole, missing).narrow(2 + axis, before, length)
    return whole if bias is None else whole + per_channel(bias, whole)


@OPS.op
def avg_pool(x: Tensor, kernel_sizes: list[int], pad_type: str, strides: list[int] | None = None,
             pad: list[int] | None = None, ceil_mode: bool = False,
             exclude_padding_from_average: bool = False) -> Tensor:
    """The divisor counts padding unless it is excluded, but never what ceil_mode adds beyond it, as in PyTorch."""
    strides = strides or [1] * len(kernel_sizes)
    around, beyond = _pool_paddings(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    counted = torch.ones_like(x)
    counted = _pad(_pad(counted, around, 0.0 if exclude_padding_from_average else 1.0), beyond, 0.0)
    pool = _AVERAGE[x.ndim - 3]
    return pool(_pad(_pad(x, around, 0.0), beyond, 0.0), kernel_sizes, strides) / pool(counted, kernel_sizes, strides)


@OPS.op
def max_pool(x: Tensor, kernel_sizes: list[int], pad_type: str, strides: list[int] | None = None,
             pad: list[int] | None = None, ceil_mode: bool = False) -> Tensor:
    strides = strides or [1] * len(kernel_sizes)
    around, beyond = _pool_paddings(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    padded = _pad(_pad(x, around, -math.inf), beyond, -math.inf)
    return _MAXIMUM[x.ndim - 3](padded, kernel_sizes, strides)


@OPS.op
def l2_pool(x: Tensor, kernel_sizes: list[int], pad_type: str, strides: list[int] | None = None,
            pad: list[int] | None = None, ceil_mode: bool = False) -> Tensor:
    """Root of the sum of squares of every window."""
    strides = strides or [1] * len(kernel_sizes)
    around, beyond = _pool_paddings(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    squares = _pad(_pad(x.square(), around, 0.0), beyond, 0.0)
    return (_AVERAGE[x.ndim - 3](squares, kernel_sizes, strides) * math.prod(kernel_sizes)).sqrt()


def paddings(kind: str, custom: list[int] | None, sizes: list[int], reach: list[int],
             strides: list[int]) -> list[tuple[int, int]]:
    """(before, after) of every spatial axis; `reach` is a kernel's extent with its dilation.

    "same" gives ceil(size / stride) outputs; the odd element goes behind, with "same_lower" before.
    """
    if kind == "valid":
        return [(0, 0)] * len(sizes)
    if kind == "custom":
        flat = custom or [0] * 2 * len(sizes)
        return list(zip(flat[::2], flat[1::2], strict=True))
    totals = [max(0, (math.ceil(n / s) - 1) * s + k - n) for n, k, s in zip(sizes, reach, strides, strict=True)]
    halves = {"same": [(total // 2, total - total // 2) for total in totals],
              "same_lower": [(total - total // 2, total // 2) for total in totals]}
    return halves[kind]


def _pool_paddings(x: Tensor, kernel: list[int], strides: list[int], pad_type: str, pad: list[int] | None,
                   ceil_mode: bool) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The padding that was asked for, and what ceil_mode needs behind it for its last window."""
    sizes = list(x.shape[2:])
    around = paddings(pad_type.lower(), pad, sizes, kernel, strides)
    beyond = []
    for n, (before, after), k, s in zip(sizes, around, kernel, strides, strict=True):
        windows = math.ceil((n + before + after - k) / s) + 1 if ceil_mode else 0
        if windows and before + after > 0 and (windows - 1) * s >= n + before:  # it would begin in the padding
            windows -= 1
        beyond.append((0, max(0, (windows - 1) * s + k - (n + before + after))))
    return around, beyond


def _pad(x: Tensor, amounts: list[tuple[int, int]], value: float) -> Tensor:
    """Pad the last axes; torch wants the last axis first."""
    flat = [n for pair in reversed(amounts) for n in pair]
    return F.pad(x, flat, value=value) if any(flat) else x
