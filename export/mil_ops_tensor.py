"""MIL's tensor operations (pad, fill, sort, ...), gather and scatter."""
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from caphuman_edge.export.mil_ops import OpTable

OPS = OpTable()


@OPS.mover
def band_part(x: Tensor, lower: int = -1, upper: int = -1) -> Tensor:
    """Zeros outside the diagonals -lower..upper of the last two axes; a negative number sets no bound."""
    below = torch.arange(x.shape[-2])[:, None] - torch.arange(x.shape[-1])
    kept = ((below <= lower) | (lower < 0)) & ((-below <= upper) | (upper < 0))
    return torch.where(kept, x, torch.zeros_like(x))


@OPS.op
def cumsum(x: Tensor, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Tensor:
    ordered = x.flip(axis) if reverse else x
    sums = ordered.cumsum(axis)
    if exclusive:
        sums = torch.cat([torch.zeros_like(sums.narrow(axis, 0, 1)), sums.narrow(axis, 0, sums.shape[axis] - 1)], axis)
    return sums.flip(axis) if reverse else sums


@OPS.mover
def fill(shape: list[int], value: Tensor | None = None) -> Tensor:
    return (torch.tensor(0.0) if value is None else value).reshape(()).expand(shape)


@OPS.mover
def fill_like(ref_tensor: Tensor, value: Tensor | None = None) -> Tensor:
    return (torch.tensor(0.0) if value is None else value).reshape(()).expand(ref_tensor.shape)


@OPS.mover
def non_zero(x: Tensor) -> Tensor:
    return x.nonzero()


@OPS.mover
def one_hot(indices: Tensor, one_hot_vector_size: int, axis: int = -1, on_value: Tensor | None = None,
            off_value: Tensor | None = None) -> Tensor:
    on, off = (torch.tensor(n) if value is None else value for n, value in ((1, on_value), (0, off_value)))
    hit = indices.unsqueeze(-1) == torch.arange(one_hot_vector_size)
    return torch.where(hit, on, off).movedim(-1, axis)


@OPS.mover
def pad(x: Tensor, pad: list[int], mode: str = "constant", constant_val: Tensor | None = None) -> Tensor:
    """(before, after) of the last axes, in their order."""
    amounts = list(zip(pad[::2], pad[1::2], strict=True))
    if mode == "constant":
        value = 0.0 if constant_val is None else constant_val.item()
        return F.pad(x, [n for pair in reversed(amounts) for n in pair], value=value)
    for axis, (before, after) in enumerate(amounts, start=x.ndim - len(amounts)):
        last = x.shape[axis] - 1
        places = torch.arange(-before, last + 1 + after)
        # reflect: without repeating the edge
        places = last - (last - places.abs()).abs() if mode == "reflect" else places.clamp(0, last)
        x = x.index_select(axis, _checked(places, x.shape[axis]))
    return x


@OPS.op
def range_1d(start: Tensor, end: Tensor, step: Tensor) -> Tensor:
    return torch.arange(start.item(), end.item(), step.item(), dtype=start.dtype)


@OPS.mover
def argsort(x: Tensor, axis: int = -1, ascending: bool = False) -> Tensor:
    """Equal values stay in order."""
    return x.argsort(dim=axis, descending=not ascending, stable=True)


@OPS.mover
def topk(x: Tensor, k: int = 1, axis: int = -1, ascending: bool = False, sort: bool = True,
         return_indices: bool = True, output_indices_dtype: str = "int32") -> Tensor | tuple[Tensor, ...]:
    """Always sorted; of equal values the first come first. A k of -1 takes all."""
    values, indices = (part.narrow(axis, 0, x.shape[axis] if k == -1 else k)
                       for part in x.sort(dim=axis, descending=not ascending, stable=True))
    return (values, indices) if return_indices else values


@OPS.mover
def gather(x: Tensor, indices: Tensor, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:
    if batch_dims:
        parts = [gather(part, chosen, axis % x.ndim - 1, batch_dims - 1) for part, chosen in
                 zip(x, indices, strict=True)]
        return torch.stack(parts)
    axis %= x.ndim
    taken = x.index_select(axis, _checked(indices.reshape(-1), x.shape[axis]))
    return taken.reshape(x.shape[:axis] + indices.shape + x.shape[axis + 1:])


@OPS.mover
def gather_along_axis(x: Tensor, indices: Tensor, axis: int = 0, validate_indices: bool = False) -> Tensor:
    return x.gather(axis, _checked(indices, x.shape[axis]))


@OPS.mover
def gather_nd(x: Tensor, indices: Tensor, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:
    if batch_dims:
        return torch.stack([gather_nd(part, chosen, batch_dims - 1) for part, chosen in zip(x, indices, strict=True)])
    return x[tuple(_checked(place, size) for place, size in zip(indices.unbind(-1), x.shape, strict=False))]


@OPS.op
def scatter(data: Tensor, indices: Tensor, updates: Tensor, axis: int = 0, mode: str = "add",
            validate_indices: bool = False) -> Tensor:
    places = _places(data).index_select(axis, _checked(indices.reshape(-1), data.shape[axis]))
    return _scatter(data, places, updates, mode)


@OPS.op
def scatter_along_axis(data: Tensor, indices: Tensor, updates: Tensor, axis: int = 0, mode: str = "add",
                       validate_indices: bool = False) -> Tensor:
    return _scatter(data, _places(data).gather(axis, _checked(indices, data.shape[axis])), updates, mode)


@OPS.op
def scatter_nd(data: Tensor, indices: Tensor, updates: Tensor, mode: str = "add",
               validate_indices: bool = False) -> Tensor:
    places = _places(data)[tuple(_checked(place, size) for place, size in
                                 zip(indices.unbind(-1), data.shape, strict=False))]
    return _scatter(data, places, updates, mode)


def _places(data: Tensor) -> Tensor:
    """Every element's position in the flat tensor."""
    return torch.arange(data.numel()).reshape(data.shape)


def _scatter(data: Tensor, places: Tensor, updates: Tensor, mode: str) -> Tensor:
    flat, at, new = data.reshape(-1), places.reshape(-1), updates.reshape(-1)
    modes: dict[str, Callable[[], Tensor]] = {
        "update": lambda: flat.scatter(0, at, new),
        "add": lambda: flat.scatter_add(0, at, new),
        "sub": lambda: flat.scatter_add(0, at, -new),
        "mul": lambda: flat.scatter_reduce(0, at, new, "prod"),
        "div": lambda: flat / torch.ones_like(flat).scatter_reduce(0, at, new, "prod"),
        "max": lambda: flat.scatter_reduce(0, at, new, "amax"),
        "min": lambda: flat.scatter_reduce(0, at, new, "amin"),
    }
    return modes[mode]().reshape(data.shape)


def _checked(indices: Tensor, size: int) -> Tensor:
    """int64 indices. iOS 17 leaves negative ones and those beyond the end undefined: ValueError."""
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= size):
        raise ValueError(f"indices {int(indices.min())}..{int(indices.max())} leave 0..{size - 1}")
    return indices.long()
