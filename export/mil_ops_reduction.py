"""MIL's reductions and normalisations."""
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from caphuman_edge.export.mil_ops import OpTable
from caphuman_edge.export.mil_ops_elementwise import per_channel

OPS = OpTable()
Reduction = Callable[[Tensor, list[int], bool], Tensor]  # of x, axes, whether to keep them


def _reduction(name: str, function: Reduction) -> None:
    """Register a reduction over axes, by default all; integers are reduced exactly, the mean of them as float64."""

    def op(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
        wide = x if x.is_floating_point() else x.double()
        return function(wide, list(range(x.ndim)) if axes is None else axes, keep_dims)

    OPS.add(name, op)


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


_REDUCTIONS: dict[str, Reduction] = {
    "reduce_l1_norm": lambda x, axes, keep: x.abs().sum(axes, keep),
    "reduce_l2_norm": lambda x, axes, keep: x.square().sum(axes, keep).sqrt(),
    "reduce_log_sum": lambda x, axes, keep: x.sum(axes, keep).log(),
    "reduce_log_sum_exp": lambda x, axes, keep: x.logsumexp(axes, keep),
    "reduce_max": lambda x, axes, keep: x.amax(axes, keep),
    "reduce_mean": lambda x, axes, keep: x.mean(axes, keep),
    "reduce_min": lambda x, axes, keep: x.amin(axes, keep),
    "reduce_prod": _product,
    "reduce_sum": lambda x, axes, keep: x.sum(axes, keep),
    "reduce_sum_square": lambda x, axes, keep: x.square().sum(axes, keep),
}
for _name, _function in _REDUCTIONS.items():
    _reduction(_name, _function)


@OPS.mover
def reduce_argmax(x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Tensor:
    return x.argmax(axis, keep_dims)


@OPS.mover
def reduce_argmin(x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Tensor:
    return x.argmin(axis, keep_dims)


@OPS.op
def batch_norm(x: Tensor, mean: Tensor, variance: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None,
               epsilon: float = 1e-5) -> Tensor:
    normal = (x - per_channel(mean, x)) * per_channel((variance + epsilon).rsqrt(), x)
    return _scaled(normal, gamma, beta)


@OPS.op
def instance_norm(x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None,
                  epsilon: float = 1e-5) -> Tensor:
    spatial = list(range(2, x.ndim))
    variance, mean = torch.var_mean(x, spatial, correction=0, keepdim=True)
    return _scaled((x - mean) * (variance + epsilon).rsqrt(), gamma, beta)


@OPS.op
def layer_norm(x: Tensor, axes: list[int] | None = None, gamma: Tensor | None = None, beta: Tensor | None = None,
               epsilon: float = 1e-5) -> Tensor:
    chosen = sorted(axis % x.ndim for axis in axes) if axes is not None else list(range(x.ndim))
    variance, mean = torch.var_mean(x, chosen, correction=0, keepdim=True)
    shape = [n if axis in chosen else 1 for axis, n in enumerate(x.shape)]
    normal = (x - mean) * (variance + epsilon).rsqrt()
    normal = normal if gamma is None else normal * gamma.to(x.dtype).reshape(shape)
    return normal if beta is None else normal + beta.to(x.dtype).reshape(shape)


@OPS.op
def l2_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Over the last three axes; those before are batch."""
    return x / (x.square().sum((-3, -2, -1), keepdim=True) + epsilon).sqrt()


@OPS.op
def local_response_norm(x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    return F.local_response_norm(x, size, alpha, beta, k)


def _scaled(normal: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    scaled = normal if gamma is None else normal * per_channel(gamma, normal)
    return scaled if beta is None else scaled + per_channel(beta, normal)
