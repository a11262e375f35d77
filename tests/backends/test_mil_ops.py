"""The MIL evaluator's arithmetic, op by op: against torch, and against coremltools' own constant folding.

Every case is a program of that op, saved as a package by coremltools without any optimisation, and read back.
"""
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from caphuman_edge.export.mil import load_program

ct = pytest.importorskip("coremltools")
pytestmark = pytest.mark.usefixtures("quick_collections")
mb, types = ct.converters.mil.Builder, ct.converters.mil.mil.types

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 3, 4, 5)).astype(np.float32) * 2
POSITIVE = np.abs(X) + 0.1
UNIT = np.tanh(X) * 0.9
HALVES = np.array([-2.5, -1.5, -0.5, 0, 0.5, 1.5, 2.5, 0.4, -0.6], np.float32)
ROW = RNG.normal(size=(3, 1, 5)).astype(np.float32)
INTEGERS = np.array([[-7, -1, 0, 3], [5, 8, -4, 100]], np.int32)
DIVISORS = np.array([2, -3, 5, 7], np.int32)
C = RNG.normal(size=3).astype(np.float32)  # one number a channel
V = np.abs(C) + 0.5
MATRIX = RNG.normal(size=(6, 5)).astype(np.float32)
KERNEL = RNG.normal(size=(4, 3, 3, 2)).astype(np.float32)
LINE = RNG.normal(size=(2, 4, 9)).astype(np.float32)
SPACE = RNG.normal(size=(1, 2, 5, 6, 4)).astype(np.float32)
IMAGE = RNG.normal(size=(2, 3, 7, 8)).astype(np.float32)


class Case(NamedTuple):
    """An op, how MIL's builder makes it, and the same in torch."""

    op: str
    build: Callable[..., object]
    torch: Callable[..., Tensor]
    inputs: tuple[np.ndarray, ...] = (X,)
    folds: bool = True  # whether coremltools' folding of it is a witness, too
    target: str = "iOS17"


def flag(make: Callable[..., object]) -> Callable[..., object]:
    """A truth value as an int32, because models give no bool."""
    return lambda **inputs: mb.cast(x=make(**inputs), dtype="int32")


UNARY = [Case(name, lambda x, name=name: getattr(mb, name)(x=x), function, (values,)) for name, function, values in (
    ("abs", torch.abs, X), ("acos", torch.acos, UNIT), ("asin", torch.asin, UNIT), ("atan", torch.atan, X),
    ("atanh", torch.atanh, UNIT), ("ceil", torch.ceil, X), ("cos", torch.cos, X), ("cosh", torch.cosh, X),
    ("erf", torch.erf, X), ("exp", torch.exp, X), ("exp2", torch.exp2, X), ("floor", torch.floor, X),
    ("round", torch.round, HALVES), ("sign", torch.sign, HALVES), ("sin", torch.sin, X), ("sinh", torch.sinh, X),
    ("sqrt", torch.sqrt, POSITIVE), ("square", torch.square, X), ("tan", torch.tan, X), ("tanh", torch.tanh, X),
    ("relu", torch.relu, X), ("relu6", F.relu6, X * 4), ("sigmoid", torch.sigmoid, X), ("silu", F.silu, X),
    ("softplus", F.softplus, X * 4), ("softsign", F.softsign, X), ("identity", lambda x: x, X),
)]
PARAMETRIC = [
    Case("clip", lambda x: mb.clip(x=x, alpha=-0.5, beta=1.25), lambda x: x.clamp(-0.5, 1.25)),
    Case("threshold", lambda x: mb.threshold(x=x, alpha=0.25), lambda x: x.clamp(min=0.25)),
    Case("inverse", lambda x: mb.inverse(x=x, epsilon=0.5), lambda x: 1 / (x + 0.5), (POSITIVE,)),
    Case("log", lambda x: mb.log(x=x, epsilon=0.5), lambda x: (x + 0.5).log(), (POSITIVE,)),
    Case("rsqrt", lambda x: mb.rsqrt(x=x, epsilon=0.5), lambda x: (x + 0.5) ** -0.5, (POSITIVE,)),
    Case("clamped_relu", lambda x: mb.clamped_relu(x=x, alpha=0.3, beta=1.5),
         lambda x: F.leaky_relu(x, 0.3).clamp(max=1.5)),
    Case("elu", lambda x: mb.elu(x=x, alpha=0.7), lambda x: F.elu(x, 0.7)),
    Case("gelu", lambda x: mb.gelu(x=x, mode="EXACT"), F.gelu),
    Case("gelu", lambda x: mb.gelu(x=x, mode="TANH_APPROXIMATION"), lambda x: F.gelu(x, approximate="tanh")),
    Case("gelu", lambda x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"), lambda x: x * torch.sigmoid(1.702 * x)),
    Case("leaky_relu", lambda x: mb.leaky_relu(x=x, alpha=0.3), lambda x: F.leaky_relu(x, 0.3)),
    Case("linear_activation", lambda x: mb.linear_activation(x=x, alpha=0.3, beta=2.0), lambda x: 0.3 * x + 2),
    Case("prelu", lambda x: mb.prelu(x=x, alpha=C), lambda x: F.prelu(x, torch.tensor(C))),
    Case("scaled_tanh", lambda x: mb.scaled_tanh(x=x, alpha=0.3, beta=2.0), lambda x: 0.3 * torch.tanh(2 * x)),
    Case("sigmoid_hard", lambda x: mb.sigmoid_hard(x=x, alpha=1 / 6, beta=0.5), F.hardsigmoid),
    Case("softmax", lambda x: mb.softmax(x=x, axis=1), lambda x: x.softmax(1)),
    Case("softplus_parametric", lambda x: mb.softplus_parametric(x=x, alpha=C, beta=V),
         lambda x: torch.tensor(C)[:, None, None] * F.softplus(torch.tensor(V)[:, None, None] * x)),
    Case("thresholded_relu", lambda x: mb.thresholded_relu(x=x, alpha=0.4), lambda x: F.threshold(x, 0.4, 0),
         folds=False),  # folding changes its input in place
    Case("cast", lambda x: mb.cast(x=x, dtype="int32"), lambda x: x.int()),
    Case("cast", lambda x: mb.cast(x=mb.cast(x=x, dtype="uint16"), dtype="int32"), lambda x: x.int(),
         (POSITIVE * 30_000,), folds=False),
    Case("cast", flag(lambda x: mb.cast(x=x, dtype="bool")), lambda x: x != 0, (HALVES,)),
    Case("logical_not", flag(lambda x: mb.logical_not(x=mb.greater(x=x, y=0.0))), lambda x: ~(x > 0)),
    Case("select", lambda x: mb.select(cond=mb.greater(x=x, y=0.0), a=x, b=mb.square(x=x)),
         lambda x: torch.where(x > 0, x, x * x)),
]
BINARY = [Case(name, lambda x, y, name=name: getattr(mb, name)(x=x, y=y), function, inputs)
          for name, function, inputs in (
    ("add", torch.add, (X, ROW)), ("sub", torch.sub, (ROW, X)), ("mul", torch.mul, (X, ROW)),
    ("real_div", torch.div, (X, ROW)), ("maximum", torch.maximum, (X, ROW)), ("minimum", torch.minimum, (X, ROW)),
    ("pow", torch.pow, (POSITIVE, ROW)), ("mod", torch.remainder, (X, ROW)),
    ("floor_div", lambda x, y: (x / y).floor(), (X, ROW)),
    ("add", torch.add, (INTEGERS, DIVISORS)), ("mod", torch.remainder, (INTEGERS, DIVISORS)),
    ("floor_div", lambda x, y: torch.div(x, y, rounding_mode="floor"), (INTEGERS, DIVISORS)),
)]
COMPARISONS = [Case(name, flag(lambda x, y, name=name: getattr(mb, name)(x=x, y=y)), function, (INTEGERS, DIVISORS))
               for name, function in (
    ("equal", torch.eq), ("not_equal", torch.ne), ("greater", torch.gt), ("greater_equal", torch.ge),
    ("less", torch.lt), ("less_equal", torch.le))]
LOGIC = [Case(name, flag(lambda x, y, name=name: getattr(mb, name)(x=mb.greater(x=x, y=0), y=mb.greater(x=y, y=3))),
              lambda x, y, function=function: function(x > 0, y > 3), (INTEGERS, DIVISORS))
         for name, function in (("logical_and", torch.logical_and), ("logical_or", torch.logical_or),
                                ("logical_xor", torch.logical_xor))]
REDUCTIONS = [Case(name, lambda x, name=name, keep=keep: getattr(mb, name)(x=x, axes=[1, -1], keep_dims=keep),
                   lambda x, function=function, keep=keep: function(x, (1, 3), keep), (values,))
              for keep in (False, True) for name, function, values in (
    ("reduce_l1_norm", lambda x, axes, keep: x.abs().sum(axes, keep), X),
    ("reduce_l2_norm", lambda x, axes, keep: torch.linalg.vector_norm(x, dim=axes, keepdim=keep), X),
    ("reduce_log_sum", lambda x, axes, keep: x.sum(axes, keep).log(), POSITIVE),
    ("reduce_log_sum_exp", torch.logsumexp, X), ("reduce_max", torch.amax, X), ("reduce_mean", torch.mean, X),
    ("reduce_min", torch.amin, X), ("reduce_sum", torch.sum, X),
    ("reduce_prod", lambda x, axes, keep: x.prod(axes[1], keepdim=keep).prod(axes[0], keepdim=keep), UNIT),
    ("reduce_sum_square", lambda x, axes, keep: x.square().sum(axes, keep), X))] + [
    Case("reduce_mean", lambda x: mb.reduce_mean(x=x), torch.mean),
    Case("reduce_mean", lambda x: mb.reduce_mean(x=x, axes=[1]), lambda x: torch.tensor([-1, 27]), (INTEGERS,)),
    Case("reduce_argmax", lambda x: mb.reduce_argmax(x=x, axis=1), lambda x: x.argmax(1)),
    Case("reduce_argmin", lambda x: mb.reduce_argmin(x=x, axis=-1, keep_dims=True), lambda x: x.argmin(-1, True)),
]
NORMS = [
    Case("batch_norm", lambda x: mb.batch_norm(x=x, mean=C, variance=V, gamma=V, beta=C, epsilon=1e-3),
         lambda x: F.batch_norm(x, *map(torch.tensor, (C, V, V, C)), eps=1e-3)),
    Case("instance_norm", lambda x: mb.instance_norm(x=x, gamma=V, beta=C, epsilon=1e-3),
         lambda x: F.instance_norm(x, weight=torch.tensor(V), bias=torch.tensor(C), eps=1e-3)),
    Case("layer_norm", lambda x: mb.layer_norm(x=x, axes=[2, 3], gamma=MATRIX[:4], beta=MATRIX[2:], epsilon=1e-3),
         lambda x: F.layer_norm(x, (4, 5), torch.tensor(MATRIX[:4]), torch.tensor(MATRIX[2:]), 1e-3)),
    Case("layer_norm", lambda x: mb.layer_norm(x=x, axes=[1], gamma=V, beta=C, epsilon=1e-3),
         lambda x: F.layer_norm(x.movedim(1, -1), (3,), torch.tensor(V), torch.tensor(C), 1e-3).movedim(-1, 1)),
    Case("l2_norm", lambda x: mb.l2_norm(x=x, epsilon=1e-3),
         lambda x: x / (x.square().sum((1, 2, 3), keepdim=True) + 1e-3).sqrt()),
    Case("local_response_norm", lambda x: mb.local_response_norm(x=x, size=3, alpha=0.1, beta=0.5, k=2.0),
         lambda x: F.local_response_norm(x, 3, 0.1, 0.5, 2.0)),
]
PRODUCTS = [
    Case("linear", lambda x: mb.linear(x=x, weight=MATRIX, bias=MATRIX[:, 0]),
         lambda x: F.linear(x, torch.tensor(MATRIX), torch.tensor(MATRIX[:, 0])), (X[0],)),
    Case("matmul", lambda x, y: mb.matmul(x=x, y=y, transpose_y=True), lambda x, y: x @ y.T, (X, MATRIX)),
    Case("matmul", lambda x, y: mb.matmul(x=x, y=y, transpose_x=True), lambda x, y: x.mT @ y, (X, X[:1])),
    Case("matmul", lambda x, y: mb.matmul(x=x, y=y), torch.matmul, (INTEGERS, INTEGERS.T)),
    Case("einsum", lambda x, y: mb.einsum(values=(x, y), equation="nchw,nwhu->nchu"),
         lambda x, y: torch.einsum("nchw,nwhu->nchu", x, y), (X, X.transpose(0, 3, 2, 1)[:, :, :, :2])),
    Case("einsum", lambda x, y: mb.einsum(values=(x, y), equation="chw,whr->chr"),
         lambda x, y: torch.einsum("chw,whr->chr", x, y.expand(5, 4, 3)), (X[0], X[0].transpose(2, 1, 0)[:, :1])),
    Case("scaled_dot_product_attention",
         lambda x, y: mb.scaled_dot_product_attention(query=x, key=y, value=mb.square(x=y)),
         lambda x, y: (x @ y.mT / 5**0.5).softmax(-1) @ y.square(), (X, X[:, :, ::-1] * 2), target="iOS18"),
    Case("scaled_dot_product_attention",
         lambda x, y: mb.scaled_dot_product_attention(query=x, key=x, value=x, attn_mask=y),
         lambda x, y: (x @ x.mT / 5**0.5 + y).softmax(-1) @ x, (X, X[:, :1, :, :4]), target="iOS18", folds=False),
]


def pair(*amounts: int) -> tuple[int, ...]:
    """MIL's (before, after) of every axis as torch's, which begin with the last axis."""
    return tuple(n for k in range(len(amounts) - 2, -1, -2) for n in amounts[k:k + 2])


W = torch.tensor(KERNEL)
CONVOLUTIONS = [
    Case("conv", lambda x: mb.conv(x=x, weight=KERNEL, bias=KERNEL[:, 0, 0, 0], pad_type="custom", pad=[1, 2, 0, 3],
                                   strides=[2, 1], dilations=[1, 2]),
         lambda x: F.conv2d(F.pad(x, pair(1, 2, 0, 3)), W, W[:, 0, 0, 0], (2, 1), 0, (1, 2)), (IMAGE,)),
    Case("conv", lambda x: mb.conv(x=x, weight=KERNEL, pad_type="valid"), lambda x: F.conv2d(x, W), (IMAGE,)),
    Case("conv", lambda x: mb.conv(x=x, weight=KERNEL, pad_type="same"),
         lambda x: F.conv2d(F.pad(x, pair(1, 1, 0, 1)), W), (IMAGE,)),
    Case("conv", lambda x: mb.conv(x=x, weight=KERNEL, pad_type="same_lower", strides=[2, 3]),
         lambda x: F.conv2d(F.pad(x, pair(1, 1, 0, 0)), W, None, (2, 3)), (IMAGE,)),
    Case("conv", lambda x: mb.conv(x=x, weight=KERNEL[:3, :1], groups=3, pad_type="valid"),
         lambda x: F.conv2d(x, W[:3, :1], groups=3), (IMAGE,)),
    Case("conv", lambda x: mb.conv(x=x, weight=LINE, pad_type="custom", pad=[2, 1]),
         lambda x: F.conv1d(F.pad(x, (2, 1)), torch.tensor(LINE)), (LINE,)),
    Case("conv", lambda x: mb.conv(x=x, weight=SPACE[:, :, :2, :3, :2], pad_type="valid"),
         lambda x: F.conv3d(x, torch.tensor(SPACE[:, :, :2, :3, :2])), (SPACE,)),
    Case("conv_transpose", lambda x: mb.conv_transpose(x=x, weight=KERNEL[:3], bias=C, strides=[2, 3], dilations=[1, 2],
                                                       pad_type="custom", pad=[1, 1, 0, 0]),
         lambda x: F.conv_transpose2d(x, W[:3], torch.tensor(C), (2, 3), (1, 0), dilation=(1, 2)), (IMAGE,)),
    Case("conv_transpose", lambda x: mb.conv_transpose(x=x, weight=KERNEL[:3], strides=[2, 2], pad_type="custom",
                                                       pad=[1, 1, 1, 1], output_shape=[2, 3, 14, 15]),
         lambda x: F.conv_transpose2d(x, W[:3], None, 2, 1, (1, 1)), (IMAGE,)),
    Case("conv_transpose", lambda x: mb.conv_transpose(x=x, weight=LINE, groups=2, pad_type="valid", strides=[2]),
         lambda x: F.conv_transpose1d(x, torch.tensor(LINE), None, 2, groups=2), (LINE[:, :2],)),
    Case("avg_pool", lambda x: mb.avg_pool(x=x, kernel_sizes=[3, 2], strides=[2, 2], pad_type="custom",
                                           pad=[1, 1, 1, 1], ceil_mode=True),
         lambda x: F.avg_pool2d(x, (3, 2), 2, 1, ceil_mode=True), (IMAGE,)),
    Case("avg_pool", lambda x: mb.avg_pool(x=x, kernel_sizes=[3, 2], strides=[2, 2], pad_type="custom",
                                           pad=[1, 1, 1, 1], exclude_padding_from_average=True),
         lambda x: F.avg_pool2d(x, (3, 2), 2, 1, count_include_pad=False), (IMAGE,)),
    Case("avg_pool", lambda x: mb.avg_pool(x=x, kernel_sizes=[2, 2, 2], pad_type="valid"),
         lambda x: F.avg_pool3d(x, 2, 1), (SPACE,)),
    Case("max_pool", lambda x: mb.max_pool(x=x, kernel_sizes=[3, 2], strides=[2, 2], pad_type="custom",
                                           pad=[1, 1, 1, 1], ceil_mode=True),
         lambda x: F.max_pool2d(x, (3, 2), 2, 1, ceil_mode=True), (IMAGE - 9,)),
    Case("max_pool", lambda x: mb.max_pool(x=x, kernel_sizes=[3], strides=[2], pad_type="same"),
         lambda x: F.max_pool1d(x, 3, 2, 1), (LINE - 9,)),
    Case("l2_pool", lambda x: mb.l2_pool(x=x, kernel_sizes=[2, 3], strides=[1, 2], pad_type="valid"),
         lambda x: F.lp_pool2d(x, 2, (2, 3), (1, 2)), (IMAGE,)),
]
ALL = UNARY + PARAMETRIC + BINARY + COMPARISONS + LOGIC + REDUCTIONS + NORMS + PRODUCTS + CONVOLUTIONS


def saved(case: Case, folder):
    """The case's program, read back from the package that coremltools wrote."""
    specs = [mb.TensorSpec(shape=value.shape, dtype=types.numpy_type_to_builtin_type(value.dtype))
             for value in case.inputs]
    names = ["x", "y"][:len(specs)]
    build = {1: lambda x: case.build(x=x), 2: lambda x, y: case.build(x=x, y=y)}[len(specs)]
    target = getattr(ct.target, case.target)
    program = mb.program(input_specs=specs, opset_version=target)(build)
    model = ct.convert(program, convert_to="mlprogram", minimum_deployment_target=target, skip_model_load=True,
                       compute_precision=ct.precision.FLOAT32, pass_pipeline=ct.PassPipeline.EMPTY)
    model.save(str(folder / "case.mlpackage"))
    return load_program(folder / "case.mlpackage"), dict(zip(names, case.inputs, strict=True))


def folded(case: Case) -> np.ndarray | None:
    """What coremltools itself computes where all inputs are constants; None where it does not."""
    with ct.converters.mil.mil.Function({}, opset_version=getattr(ct.target, case.target)):
        return case.build(**{name: value.copy() for name, value in zip("xy", case.inputs, strict=False)}).val


@pytest.mark.parametrize("case", ALL, ids=[f"{case.op}-{k}" for k, case in enumerate(ALL)])
def test_op_computes_what_torch_and_folding_do(case, tmp_path):
    program, inputs = saved(case, tmp_path)
    assert case.op in {step.op for step in program.steps}
    got, = program(inputs).values()
    wanted = case.torch(*map(torch.tensor, case.inputs)).numpy()
    assert got.shape == wanted.shape and got.dtype == (np.float32 if wanted.dtype.kind == "f" else np.int32)
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)
    witness = folded(case) if case.folds else None
    if witness is not None:
        np.testing.assert_allclose(got, witness, rtol=1e-4, atol=1e-4)
