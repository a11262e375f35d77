"""MIL's ops that move elements: reshape, transpose, slice, concatenate, split, pixel shuffles and the like."""
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from caphuman_edge.export.mil_ops import OpTable

OPS = OpTable()


@OPS.mover
def reshape(x: Tensor, shape: list[int]) -> Tensor:
    """0 takes the length of x at that place, counted from the right; -1 what remains."""
    sizes = [x.shape[k - len(shape)] if n == 0 and len(shape) - k <= x.ndim else n or 1 for k, n in enumerate(shape)]
    return x.reshape(sizes)


@OPS.mover
def reshape_like(x: Tensor, ref_tensors: list[Tensor], begins: list[int], ends: list[int],
                 end_masks: list[bool]) -> Tensor:
    """The lengths of references' axes begin..end, joined; with an end mask up to the last."""
    shape: list[int] = []
    for tensor, begin, end, masked in zip(ref_tensors, begins, ends, end_masks, strict=True):
        shape += tensor.shape[begin:None if masked else end]
    return x.reshape(shape)


@OPS.mover
def flatten2d(x: Tensor, axis: int = 1) -> Tensor:
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@OPS.mover
def expand_dims(x: Tensor, axes: list[int]) -> Tensor:
    for axis in sorted(axis % (x.ndim + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


@OPS.mover
def squeeze(x: Tensor, axes: list[int] | None = None) -> Tensor:
    """Axes longer than 1 stay."""
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


@OPS.mover
def transpose(x: Tensor, perm: list[int]) -> Tensor:
    return x.permute(perm)


@OPS.mover
def shape_(x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int32)


@OPS.mover
def reverse(x: Tensor, axes: list[int] | None = None) -> Tensor:
    return x.flip(list(range(x.ndim)) if axes is None else axes)


@OPS.mover
def reverse_sequence(x: Tensor, lengths: list[int], seq_axis: int = 0, batch_axis: int = 0) -> Tensor:
    """Of sample k along the batch axis, the first lengths[k] elements along the sequence axis in reverse order."""
    moved = x.movedim((batch_axis, seq_axis), (0, 1)).clone()
    for sample, length in zip(moved, lengths, strict=True):
        sample[:length] = sample[:length].flip(0)
    return moved.movedim((0, 1), (batch_axis, seq_axis))


@OPS.mover
def slice_by_index(x: Tensor, begin: list[int], end: list[int], stride: list[int] | None = None,
                   begin_mask: list[bool] | None = None, end_mask: list[bool] | None = None,
                   squeeze_mask: list[bool] | None = None) -> Tensor:
    picked = _slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    for axis, places in enumerate(picked):
        if places.step > 0:
            x = x[(slice(None),) * axis + (slice(places.start, places.stop, places.step),)]
        else:
            x = x.index_select(axis, torch.tensor(list(places)))
    return x.squeeze(tuple(axis for axis, alone in enumerate(squeeze_mask or []) if alone))


@OPS.mover
def slice_by_size(x: Tensor, begin: list[int], size: list[int]) -> Tensor:
    """A size of -1 takes what remains."""
    for axis, (start, count) in enumerate(zip(begin, size, strict=True)):
        first = start + x.shape[axis] if start < 0 else start
        x = x.narrow(axis, first, x.shape[axis] - first if count == -1 else count)
    return x


@OPS.mover
def slice_update(x: Tensor, update: Tensor, begin: list[int], end: list[int], stride: list[int] | None = None,
                 begin_mask: list[bool] | None = None, end_mask: list[bool] | None = None,
                 squeeze_mask: list[bool] | None = None) -> Tensor:
    """x with the elements that slice_by_index would take replaced."""
    picked = _slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    grid = torch.meshgrid(*(torch.tensor(list(places)) for places in picked), indexing="ij")
    result = x.clone()
    result[grid] = update.reshape(grid[0].shape)
    return result


@OPS.mover
def concat(values: list[Tensor], axis: int, interleave: bool = False) -> Tensor:
    if values[0].ndim == 0:
        return torch.stack(values)
    if interleave:  # first elements of all, then second elements of all
        return torch.stack(values, axis % values[0].ndim + 1).flatten(axis % values[0].ndim, axis % values[0].ndim + 1)
    return torch.cat(values, axis)


@OPS.mover
def stack(values: list[Tensor], axis: int) -> Tensor:
    return torch.stack(values, axis)


@OPS.mover
def split(x: Tensor, axis: int, num_splits: int | None = None, split_sizes: list[int] | None = None) -> tuple[
        Tensor, ...]:
    return torch.split(x, split_sizes or x.shape[axis] // (num_splits or 1), axis)


@OPS.mover
def tile(x: Tensor, reps: list[int]) -> Tensor:
    return x.repeat(reps)


@OPS.mover
def sliding_windows(x: Tensor, axis: int, size: int, stride: int = 1) -> Tensor:
    return x.unfold(axis, size, stride).movedim(-1, axis % x.ndim + 1)


@OPS.mover
def pixel_shuffle(x: Tensor, upscale_factor: int) -> Tensor:
    return F.pixel_shuffle(x, upscale_factor)


@OPS.mover
def pixel_unshuffle(x: Tensor, downscale_factor: int) -> Tensor:
    return F.pixel_unshuffle(x, downscale_factor)


@OPS.mover
def depth_to_space(x: Tensor, block_size: int) -> Tensor:
    """TensorFlow's order: the place in the block counts slower than the channel, unlike in pixel_shuffle."""
    n, c, h, w = x.shape
    blocks = x.reshape(n, block_size, block_size, c // block_size**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return blocks.reshape(n, c // block_size**2, h * block_size, w * block_size)


@OPS.mover
def space_to_depth(x: Tensor, block_size: int) -> Tensor:
    n, c, h, w = x.shape
    blocks = x.reshape(n, c, h // block_size, block_size, w // block_size, block_size).permute(0, 3, 5, 1, 2, 4)
    return blocks.reshape(n, c * block_size**2, h // block_size, w // block_size)


@OPS.mover
def space_to_batch(x: Tensor, block_shape: list[int], paddings: list[int]) -> Tensor:
    """TensorFlow's order: the place in the block counts slower than the sample."""
    top, bottom, left, right = paddings
    n, c, h, w = (x := F.pad(x, (left, right, top, bottom))).shape
    rows, columns = block_shape
    blocks = x.reshape(n, c, h // rows, rows, w // columns, columns).permute(3, 5, 0, 1, 2, 4)
    return blocks.reshape(n * rows * columns, c, h // rows, w // columns)


@OPS.mover
def batch_to_space(x: Tensor, block_shape: list[int], crops: list[int]) -> Tensor:
    n, c, h, w = x.shape
    rows, columns = block_shape
    top, bottom, left, right = crops
    blocks = x.reshape(rows, columns, n // (rows * columns), c, h, w).permute(2, 3, 4, 0, 5, 1)
    whole = blocks.reshape(n // (rows * columns), c, h * rows, w * columns)
    return whole[:, :, top:h * rows - bottom, left:w * columns - right]


def _slices(x: Tensor, begin: list[int], end: list[int], stride: list[int] | None, begin_mask: list[bool] | None,
            end_mask: list[bool] | None, squeeze_mask: list[bool] | None) -> list[range]:
    """The places that a slice takes along every axis. Negative bounds count from the end, as in Python."""
    free = [False] * x.ndim
    picked = []
    for size, first, last, step, from_start, to_end, alone in zip(
            x.shape, begin, end, stride or [1] * x.ndim, begin_mask or free, end_mask or free, squeeze_mask or free,
            strict=True):
        if alone:
            picked.append(range(size)[0 if from_start else first:][:1])
        else:
            picked.append(range(size)[None if from_start else first:None if to_end else last:step])
    return picked
