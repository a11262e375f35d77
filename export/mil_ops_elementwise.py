"""MIL's elementwise ops: unary, binary, activations, select, cast."""
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from caphuman_edge.export.mil_ops import OpTable

OPS = OpTable()


def _unary() -> None:
    same_name = ("abs", "acos", "asin", "atan", "atanh", "ceil", "cos", "cosh", "erf", "exp", "exp2", "floor",
                 "logical_not", "round", "sigmoid", "sign", "sin", "sinh", "sqrt", "square", "tan", "tanh", "relu")
    for name in same_name:  # torch rounds halves to even, as MIL's value inference does
        OPS.add(name, _of_x(getattr(torch, name)))
    for name, function in {"relu6": F.relu6, "silu": F.silu, "softsign": F.softsign}.items():
        OPS.add(name, _of_x(function))


def _binary() -> None:
    functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "add": torch.add, "sub": torch.sub, "mul": torch.mul, "real_div": torch.div, "mod": torch.remainder,
        "floor_div": torch.floor_divide, "pow": torch.pow, "maximum": torch.maximum, "minimum": torch.minimum,
        "equal": torch.eq, "not_equal": torch.ne, "greater": torch.gt, "greater_equal": torch.ge, "less": torch.lt,
        "less_equal": torch.le, "logical_and": torch.logical_and, "logical_or": torch.logical_or,
        "logical_xor": torch.logical_xor,
    }
    for name, function in functions.items():
        OPS.add(name, _of_x_and_y(function))


def _of_x(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same with MIL's parameter name."""
    def op(x: Tensor) -> Tensor:
        return function(x)
    return op


def _of_x_and_y(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The same with MIL's parameter names."""
    def op(x: Tensor, y: Tensor) -> Tensor:
        return function(x, y)
    return op


_unary()
_binary()


@OPS.mover
def cast(x: Tensor, dtype: str) -> Tensor:
    """The evaluator converts to the declared type; floats lose their fraction, as in C."""
    return x


@OPS.mover
def identity(x: Tensor) -> Tensor:
    return x


@OPS.op
def clip(x: Tensor, alpha: float, beta: float) -> Tensor:
    return x.clamp(alpha, beta)


@OPS.op
def inverse(x: Tensor, epsilon: float = 1e-4) -> Tensor:
    return 1 / (x + epsilon)


@OPS.op
def log(x: Tensor, epsilon: float = 1e-45) -> Tensor:
    return (x + epsilon).log()


@OPS.op
def rsqrt(x: Tensor, epsilon: float = 1e-12) -> Tensor:
    return (x + epsilon).rsqrt()


@OPS.op
def threshold(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.maximum(x, alpha.to(x.dtype))


@OPS.mover
def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond, a, b)


@OPS.op
def clamped_relu(x: Tensor, alpha: float, beta: float) -> Tensor:
    return torch.where(x >= 0, x, alpha * x).clamp(max=beta)


@OPS.op
def elu(x: Tensor, alpha: float) -> Tensor:
    return F.elu(x, alpha)


@OPS.op
def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate={"EXACT": "none", "TANH_APPROXIMATION": "tanh"}[mode])


@OPS.op
def leaky_relu(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x >= 0, x, alpha * x)


@OPS.op
def linear_activation(x: Tensor, alpha: float, beta: float) -> Tensor:
    return alpha * x + beta


@OPS.op
def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x > 0, x, per_channel(alpha, x) * x)


@OPS.op
def scaled_tanh(x: Tensor, alpha: float, beta: float) -> Tensor:
    return alpha * torch.tanh(beta * x)


@OPS.op
def sigmoid_hard(x: Tensor, alpha: float, beta: float) -> Tensor:
    return (alpha * x + beta).clamp(0, 1)


@OPS.op
def softmax(x: Tensor, axis: int = -1) -> Tensor:
    return x.softmax(axis)


@OPS.op
def softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


@OPS.op
def softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return per_channel(alpha, x) * torch.logaddexp(per_channel(beta, x) * x, torch.zeros_like(x))


@OPS.op
def thresholded_relu(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x >= alpha, x, torch.zeros_like(x))


def per_channel(parameter: Tensor, x: Tensor, axis: int = 1) -> Tensor:
    """(C,) so shaped that it broadcasts along an axis of x."""
    shape = [1] * x.ndim
    shape[axis] = -1
    return parameter.to(x.dtype).reshape(shape)
