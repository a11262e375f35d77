"""MIL's image resizing and sampling."""
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from caphuman_edge.export.mil_ops import OpTable

OPS = OpTable()


@OPS.mover
def upsample_nearest_neighbor(x: Tensor, scale_factor_height: float = 1.0, scale_factor_width: float = 1.0) -> Tensor:
    """The last two axes; lengths are rounded down."""
    return _nearest(x, math.floor(x.shape[-2] * scale_factor_height), math.floor(x.shape[-1] * scale_factor_width))


@OPS.mover
def resize_nearest_neighbor(x: Tensor, target_size_height: int, target_size_width: int) -> Tensor:
    return _nearest(x, target_size_height, target_size_width)


@OPS.op
def upsample_bilinear(x: Tensor, scale_factor_height: float = 1.0, scale_factor_width: float = 1.0,
                      align_corners: bool = True, half_pixel_centers: bool | None = None) -> Tensor:
    """The scale is computed anew from the rounded lengths."""
    centred = not align_corners if half_pixel_centers is None else half_pixel_centers
    mode = "STRICT_ALIGN_CORNERS" if align_corners else "UNALIGN_CORNERS" if centred else "DEFAULT"
    for axis, scale in ((x.ndim - 2, scale_factor_height), (x.ndim - 1, scale_factor_width)):
        x = _interpolate(x, axis, grid_points(x.shape[axis], math.floor(x.shape[axis] * scale), mode))
    return x


@OPS.op
def resize_bilinear(x: Tensor, target_size_height: int = 1, target_size_width: int = 1,
                    sampling_mode: str = "DEFAULT") -> Tensor:
    for axis, length in ((x.ndim - 2, target_size_height), (x.ndim - 1, target_size_width)):
        x = _interpolate(x, axis, grid_points(x.shape[axis], length, sampling_mode))
    return x


@OPS.op
def resize(x: Tensor, shape: list[int], resized_dims: int, interpolation_mode: str = "LINEAR",
           sampling_mode: str = "DEFAULT") -> Tensor:
    """The last `resized_dims` lengths come from `shape`, where 0 keeps x's."""
    for axis, length in zip(range(x.ndim - resized_dims, x.ndim), shape[len(shape) - resized_dims:], strict=True):
        points = grid_points(x.shape[axis], length or x.shape[axis], sampling_mode)
        if interpolation_mode == "LINEAR":
            x = _interpolate(x, axis, points)
        else:
            x = x.index_select(axis, points.round().long())
    return x


@OPS.mover
def crop(x: Tensor, crop_height: list[int], crop_width: list[int]) -> Tensor:
    (top, bottom), (left, right) = crop_height, crop_width
    return x[..., top:x.shape[-2] - bottom, left:x.shape[-1] - right]


@OPS.op
def crop_resize(x: Tensor, boxes: Tensor, box_indices: list[int] | None = None, target_height: int = 1,
                target_width: int = 1, normalized_coordinates: bool = False, spatial_scale: float = 1.0,
                box_coordinate_mode: str = "CORNERS_HEIGHT_FIRST", sampling_mode: str = "DEFAULT",
                pad_value: float = 0.0) -> Tensor:
    """iOS 17's form: (N, 4) boxes to (N, C, height, width); a sample outside of its image is `pad_value`."""
    height, width = x.shape[-2:]
    corners = _corners(boxes.float() * spatial_scale, box_coordinate_mode)  # (N, 4): top, left, bottom, right
    if normalized_coordinates:
        corners = corners * torch.tensor([height - 1, width - 1, height - 1, width - 1])
    crops = []
    for index, (top, left, bottom, right) in zip(box_indices or range(len(boxes)), corners.tolist(), strict=True):
        rows, columns = (_span(first, last, count, sampling_mode) for first, last, count in
                         ((top, bottom, target_height), (left, right, target_width)))
        inside = ((rows >= 0) & (rows <= height - 1))[:, None] & (columns >= 0) & (columns <= width - 1)
        part = _interpolate(x[index], 1, rows.clamp(0, height - 1))
        part = _interpolate(part, 2, columns.clamp(0, width - 1))
        crops.append(torch.where(inside, part, torch.full_like(part, pad_value)))
    return torch.stack(crops)


@OPS.op
def resample(x: Tensor, coordinates: Tensor, sampling_mode: str, padding_mode: str, padding_value: float,
             coordinates_mode: str, align_corners: bool) -> Tensor:
    """Sample at (x, y) points; outside of the image as `padding_mode` says."""
    size = torch.tensor([x.shape[-1], x.shape[-2]], dtype=torch.float32)
    points = coordinates.float()
    if coordinates_mode != "unnormalized":
        unit = (points + 1) / 2 if coordinates_mode == "normalized_minus_one_to_one" else points
        points = unit * (size - 1) if align_corners else unit * size - 0.5
    if padding_mode == "symmetric":  # mirrored at the outer edges of the outer pixels
        folded = (points + 0.5).remainder(2 * size)
        points = torch.minimum((torch.minimum(folded, 2 * size - folded) - 0.5).clamp(min=0), size - 1)
    grid = points * 2 / (size - 1).clamp(min=1) - 1
    known = {"constant": "zeros", "border": "border", "reflection": "reflection", "symmetric": "border"}[padding_mode]
    shift = padding_value if padding_mode == "constant" else 0.0
    return F.grid_sample(x - shift, grid, sampling_mode, known, align_corners=True) + shift


@OPS.op
def affine(x: Tensor, transform_matrix: Tensor, output_height: int, output_width: int, sampling_mode: str,
           padding_mode: str, padding_value: float, coordinates_mode: str, align_corners: bool) -> Tensor:
    """MIL allows one value only of all but the first four parameters: bilinear, zeros outside, corners aligned."""
    transforms = transform_matrix.reshape(-1, 2, 3).expand(len(x), 2, 3)
    grid = F.affine_grid(transforms, [len(x), x.shape[1], output_height, output_width], align_corners=True)
    return F.grid_sample(x, grid, sampling_mode.lower(), "zeros", align_corners=True)


def grid_points(size: int, count: int, mode: str) -> Tensor:
    """Where `count` output elements lie among `size` input elements, 0..size-1 (resize_bilinear's documentation)."""
    steps = torch.arange(count, dtype=torch.float32)
    if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        points = steps * ((size - 1) / max(1, count - 1))
        if mode == "ALIGN_CORNERS" and count == 1:
            points = torch.tensor([(size - 1) / 2])
    elif mode == "DEFAULT":
        points = steps * (size / count)
    elif mode == "OFFSET_CORNERS":
        points = (steps + 0.5) * (max(1, size - 1) / count)
    elif mode == "UNALIGN_CORNERS":
        points = (steps + 0.5) * (size / count) - 0.5
    else:
        raise ValueError(f"sampling mode {mode!r} is not among MIL's five")
    return points.clamp(0, size - 1)


def _interpolate(x: Tensor, axis: int, points: Tensor) -> Tensor:
    """x at fractional places along an axis, linearly."""
    lower = points.floor()
    shape = [1] * x.ndim
    shape[axis] = -1
    weight = (points - lower).reshape(shape)
    upper = (lower + 1).clamp(max=x.shape[axis] - 1)
    return x.index_select(axis, lower.long()) * (1 - weight) + x.index_select(axis, upper.long()) * weight


def _nearest(x: Tensor, height: int, width: int) -> Tensor:
    """Output place k takes input place floor(k * size / count), as in PyTorch."""
    for axis, count in ((x.ndim - 2, height), (x.ndim - 1, width)):
        x = x.index_select(axis, torch.arange(count) * x.shape[axis] // count)
    return x


def _corners(boxes: Tensor, mode: str) -> Tensor:
    if mode.endswith("WIDTH_FIRST"):
        boxes = boxes[:, [1, 0, 3, 2]]
    if mode.startswith("CENTER_SIZE"):
        return torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], dim=1)
    return boxes


def _span(first: float, last: float, count: int, mode: str) -> Tensor:
    """Sample places across a box; only the modes that end in its corners are documented without doubt."""
    if mode not in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        raise ValueError(f"crop_resize with sampling mode {mode!r} is not covered, only (STRICT_)ALIGN_CORNERS")
    if count == 1:
        return torch.tensor([(first + last) / 2 if mode == "ALIGN_CORNERS" else first])
    return first + torch.arange(count) * ((last - first) / (count - 1))
