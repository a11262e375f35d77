"""The MIL evaluator's ops that move, gather, pad, sort and resample elements, each against torch or numpy.

Every case is a program of that op, saved as a package by coremltools without any optimisation, and read back.
"""
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from caphuman_edge.export.mil import load_program

ct = pytest.importorskip("coremltools")
pytestmark = pytest.mark.usefixtures("quick_collections")
mb, types = ct.converters.mil.Builder, ct.converters.mil.mil.types

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 3, 4, 6)).astype(np.float32)
FLAT = np.arange(1, 7, dtype=np.float32)
SQUARE = np.arange(1, 17, dtype=np.float32).reshape(1, 1, 4, 4)
PAIR = np.array([0, 1], np.float32).reshape(1, 1, 2)
CHANNELS = np.arange(2 * 8 * 2 * 3, dtype=np.float32).reshape(2, 8, 2, 3)
TIES = np.array([[3, 1, 2, 3, 0], [5, 5, 4, 9, 4]], np.float32)
PLACES = np.array([[2, 0], [1, 1]], np.int32)
ROWS = RNG.normal(size=(5, 3)).astype(np.float32)
POINTS = RNG.uniform(-1.6, 1.6, size=(2, 3, 5, 2)).astype(np.float32)
MODES = ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS", "DEFAULT", "OFFSET_CORNERS", "UNALIGN_CORNERS")


class Case(NamedTuple):
    """An op, how MIL's builder makes it, and what must come out, of torch tensors or as it is."""

    op: str
    build: Callable[..., object]
    wanted: object
    inputs: tuple[np.ndarray, ...] = (X,)
    target: str = "iOS17"


SHAPES = [
    Case("reshape", lambda x: mb.reshape(x=x, shape=[6, -1, 2]), lambda x: x.reshape(6, 12, 2)),
    Case("reshape", lambda x: mb.reshape(x=x, shape=[1, 0, -1, 0]), lambda x: x.reshape(1, 3, 8, 6)),
    Case("reshape", lambda x: mb.reshape(x=x, shape=[0, 1, -1, 3]), lambda x: x.reshape(1, 1, 2, 3), (FLAT,)),
    Case("reshape_like", lambda x, y: mb.reshape_like(x=x, ref_tensors=(y, y), begins=(0, 1), ends=(1, 0),
                                                      end_masks=(False, True)),
         lambda x, y: x.reshape(2, 3), (FLAT, np.zeros((2, 3), np.float32))),
    Case("flatten2d", lambda x: mb.flatten2d(x=x, axis=2), lambda x: x.reshape(6, 24)),
    Case("expand_dims", lambda x: mb.expand_dims(x=x, axes=[0, -1, 2]), lambda x: x[None, :, None, :, None], (ROWS,)),
    Case("squeeze", lambda x: mb.squeeze(x=x, axes=[0, 1]), lambda x: x[0], (X[:1, :, :1],)),
    Case("squeeze", lambda x: mb.squeeze(x=x), lambda x: x[0, :, 0], (X[:1, :, :1],)),
    Case("transpose", lambda x: mb.transpose(x=x, perm=[2, 0, -1, 1]), lambda x: x.permute(2, 0, 3, 1)),
    Case("shape", lambda x: mb.shape(x=x), np.array([2, 3, 4, 6], np.int32)),
    Case("reverse", lambda x: mb.reverse(x=x, axes=[1, 3]), lambda x: x.flip(1, 3)),
    Case("reverse", lambda x: mb.reverse(x=x), lambda x: x.flip(0, 1, 2, 3)),
    Case("reverse_sequence", lambda x: mb.reverse_sequence(x=x, lengths=[2, 3, 1], seq_axis=1, batch_axis=0),
         np.array([[2, 1, 3], [6, 5, 4], [7, 8, 9]], np.float32), (np.arange(1.0, 10).reshape(3, 3).astype("f4"),)),
    Case("tile", lambda x: mb.tile(x=x, reps=[1, 2, 3, 1]), lambda x: x.repeat(1, 2, 3, 1)),
    Case("sliding_windows", lambda x: mb.sliding_windows(x=x, axis=2, size=2, stride=2),
         lambda x: x.reshape(2, 3, 2, 2, 6)),
    Case("stack", lambda x: mb.stack(values=(x, mb.square(x=x)), axis=1), lambda x: torch.stack([x, x * x], 1)),
    Case("concat", lambda x: mb.concat(values=(x, mb.square(x=x)), axis=-2), lambda x: torch.cat([x, x * x], 2)),
    Case("concat", lambda x: mb.concat(values=(x, mb.square(x=x)), axis=0, interleave=True),
         np.array([1, 1, 2, 4, 3, 9, 4, 16, 5, 25, 6, 36], np.float32), (FLAT,)),
    Case("split", lambda x: mb.split(x=x, axis=-1, num_splits=3)[1], lambda x: x[..., 2:4]),
    Case("split", lambda x: mb.split(x=x, axis=2, split_sizes=[1, 3])[1], lambda x: x[:, :, 1:]),
    Case("pixel_shuffle", lambda x: mb.pixel_shuffle(x=x, upscale_factor=2), lambda x: F.pixel_shuffle(x, 2),
         (CHANNELS,)),
    Case("pixel_unshuffle", lambda x: mb.pixel_unshuffle(x=x, downscale_factor=np.uint32(2)),
         lambda x: F.pixel_unshuffle(x, 2)),
    Case("depth_to_space", lambda x: mb.depth_to_space(x=x, block_size=2),
         lambda x: F.pixel_shuffle(x.reshape(2, 4, 2, 2, 3).transpose(1, 2).reshape(2, 8, 2, 3), 2), (CHANNELS,)),
    Case("space_to_depth", lambda x: mb.space_to_depth(x=x, block_size=2),
         lambda x: F.pixel_unshuffle(x, 2).reshape(2, 3, 4, 2, 3).transpose(1, 2).reshape(2, 12, 2, 3)),
    Case("space_to_batch", lambda x: mb.space_to_batch(x=x, block_shape=[2, 3], paddings=[[1, 1], [0, 3]]),
         lambda x: torch.cat([F.pad(x, (0, 3, 1, 1))[:, :, i::2, j::3] for i in range(2) for j in range(3)])),
    Case("batch_to_space", lambda x: mb.batch_to_space(  # the inverse, less a crop
        x=mb.space_to_batch(x=x, block_shape=[2, 3], paddings=[[0, 0], [0, 0]]), block_shape=[2, 3],
        crops=[[1, 0], [2, 1]]), lambda x: x[:, :, 1:, 2:-1]),
]
SLICES = [
    Case("slice_by_index", lambda x: mb.slice_by_index(x=x, begin=[0, -2, 1, 5], end=[2, 3, 4, 0],
                                                       stride=[1, 1, 2, -2]), lambda x: x[:, -2:, 1:4:2].flip(3)[
                                                           ..., :5:2]),
    Case("slice_by_index", lambda x: mb.slice_by_index(
        x=x, begin=[1, 9, 1, 0], end=[0, 9, 0, -1], begin_mask=[False, True, False, False],
        end_mask=[False, True, True, False], squeeze_mask=[True, False, False, False]), lambda x: x[1, :, 1:, :-1]),
    Case("slice_by_size", lambda x: mb.slice_by_size(x=x, begin=[1, 0, -3, 2], size=[1, 2, 2, -1]),
         lambda x: x[1:, :2, 1:3, 2:]),
    Case("slice_update", lambda x, y: mb.slice_update(x=x, update=y, begin=[5, 0], end=[0, 3], stride=[-2, 2],
                                                      end_mask=[True, False]),
         np.array([[0, 0, 0], [5, 0, 6], [0, 0, 0], [3, 0, 4], [0, 0, 0], [1, 0, 2]], np.float32),
         (np.zeros((6, 3), np.float32), FLAT.reshape(3, 2)), "iOS18"),
    Case("slice_update", lambda x, y: mb.slice_update(x=x, update=y, begin=[0, 1], end=[0, 0],
                                                      begin_mask=[True, False], end_mask=[True, False],
                                                      squeeze_mask=[False, True]),
         np.array([[0, 1], [0, 2]], np.float32), (np.zeros((2, 2), np.float32), FLAT[:2]), "iOS18"),
]
TENSORS = [
    Case("band_part", lambda x: mb.band_part(x=x, lower=1, upper=-1), lambda x: x.triu(-1)),
    Case("band_part", lambda x: mb.band_part(x=x, lower=-1, upper=0), torch.tril),
    Case("cumsum", lambda x: mb.cumsum(x=x, axis=2), lambda x: x.cumsum(2)),
    Case("cumsum", lambda x: mb.cumsum(x=x, axis=0, exclusive=True), np.array([0, 1, 3, 6, 10, 15], np.float32),
         (FLAT,)),
    Case("cumsum", lambda x: mb.cumsum(x=x, axis=0, exclusive=True, reverse=True),
         np.array([20, 18, 15, 11, 6, 0], np.float32), (FLAT,)),
    Case("fill", lambda x: mb.fill(shape=mb.shape(x=x), value=2.5), lambda x: torch.full_like(x, 2.5)),
    Case("fill_like", lambda x: mb.fill_like(ref_tensor=x, value=7), lambda x: torch.full(x.shape, 7).int()),
    Case("non_zero", lambda x: mb.non_zero(x=mb.relu(x=x)), lambda x: x.relu().nonzero().int()),
    Case("one_hot", lambda x: mb.one_hot(indices=x, one_hot_vector_size=3, axis=1, on_value=2.0, off_value=-1.0),
         lambda x: F.one_hot(x.long(), 3).movedim(-1, 1) * 3.0 - 1, (PLACES,)),
    Case("pad", lambda x: mb.pad(x=x, pad=[1, 0, 2, 3], mode="constant", constant_val=0.5),
         lambda x: F.pad(x, (2, 3, 1, 0), value=0.5)),
    Case("pad", lambda x: mb.pad(x=x, pad=[1, 0, 3, 2], mode="reflect"), lambda x: F.pad(x, (3, 2, 1, 0), "reflect")),
    Case("pad", lambda x: mb.pad(x=x, pad=[1, 0, 3, 2], mode="replicate"),
         lambda x: F.pad(x, (3, 2, 1, 0), "replicate")),
    Case("range_1d", lambda x: mb.range_1d(start=mb.squeeze(x=x), end=9.0, step=1.5),
         np.array([4, 5.5, 7, 8.5], np.float32), (np.array([4], np.float32),)),
    Case("argsort", lambda x: mb.argsort(x=x, axis=1), np.array([[0, 3, 2, 1, 4], [3, 0, 1, 2, 4]], np.int32), (TIES,)),
    Case("argsort", lambda x: mb.argsort(x=x, ascending=True), np.array([[4, 1, 2, 0, 3], [2, 4, 0, 1, 3]], np.int32),
         (TIES,)),
    Case("topk", lambda x: mb.topk(x=x, k=2, axis=2)[0], lambda x: x.topk(2, 2).values),
    Case("topk", lambda x: mb.topk(x=x, k=2, ascending=True)[1], lambda x: x.topk(2, largest=False).indices.int()),
]
GATHERS = [
    Case("gather", lambda x, y: mb.gather(x=x, indices=y, axis=1), lambda x, y: x[:, y.long()], (X, PLACES)),
    Case("gather", lambda x, y: mb.gather(x=x, indices=y, axis=2, batch_dims=1),
         lambda x, y: torch.stack([x[k][:, y[k].long()] for k in range(2)]), (X, PLACES)),
    Case("gather_along_axis", lambda x, y: mb.gather_along_axis(x=x, indices=y, axis=0),
         lambda x, y: torch.gather(x, 0, y.long()), (ROWS[:, :2], PLACES)),
    Case("gather_nd", lambda x, y: mb.gather_nd(x=x, indices=y), lambda x, y: x[[2, 1], [0, 1]], (ROWS, PLACES)),
    Case("gather_nd", lambda x, y: mb.gather_nd(x=x, indices=y, batch_dims=1),
         lambda x, y: torch.stack([x[0, 2, 0], x[1, 1, 1]]), (X, PLACES)),
] + [Case("scatter", lambda x, y, mode=mode: mb.scatter(data=x, indices=np.array([3, 1], np.int32), updates=y, axis=0,
                                                        mode=mode),
          lambda x, y, change=change: x.index_copy(0, torch.tensor([3, 1]), change(x[[3, 1]], y)), (ROWS, ROWS[:2]))
     for mode, change in {"update": lambda old, new: new, "add": torch.add, "sub": torch.sub, "mul": torch.mul,
                          "div": torch.div, "max": torch.maximum, "min": torch.minimum}.items()] + [
    Case("scatter", lambda x: mb.scatter(data=x, indices=np.array([0, 0], np.int32), updates=FLAT[:2], mode="add"),
         np.array([4, 2, 3, 4, 5, 6], np.float32), (FLAT,)),
    Case("scatter_along_axis",
         lambda x, y: mb.scatter_along_axis(data=x, indices=PLACES, updates=y, axis=0, mode="add"),
         lambda x, y: x.scatter_add(0, torch.tensor(PLACES).long(), y), (ROWS[:, :2], ROWS[:2, :2])),
    Case("scatter_nd", lambda x, y: mb.scatter_nd(data=x, indices=PLACES, updates=y, mode="update"),
         lambda x, y: x.index_put((torch.tensor([2, 1]), torch.tensor([0, 1])), y), (ROWS, FLAT[:2])),
]
IMAGES = [
    Case("upsample_nearest_neighbor",
         lambda x: mb.upsample_nearest_neighbor(x=x, scale_factor_height=2, scale_factor_width=3),
         lambda x: x.repeat_interleave(2, 2).repeat_interleave(3, 3)),
    Case("upsample_nearest_neighbor",
         lambda x: mb.upsample_nearest_neighbor(x=x, scale_factor_height=1.75, scale_factor_width=0.5),
         lambda x: F.interpolate(x, (7, 3))),
    Case("resize_nearest_neighbor", lambda x: mb.resize_nearest_neighbor(x=x, target_size_height=7,
                                                                         target_size_width=4),
         lambda x: F.interpolate(x, (7, 4))),
] + [Case("upsample_bilinear", lambda x, aligned=aligned: mb.upsample_bilinear(
         x=x, scale_factor_height=2.5, scale_factor_width=0.5, align_corners=aligned),
          lambda x, aligned=aligned: F.interpolate(x, (10, 3), mode="bilinear", align_corners=aligned))
     for aligned in (True, False)] + [
    # coremltools' documentation of resize_bilinear gives these numbers
    Case("resize_bilinear", lambda x, mode=mode: mb.resize_bilinear(x=x, target_size_height=1, target_size_width=5,
                                                                    sampling_mode=mode),
         np.array([[points]], np.float32), (PAIR,)) for mode, points in zip(MODES, (
        [0, 0.25, 0.5, 0.75, 1], [0, 0.25, 0.5, 0.75, 1], [0, 0.4, 0.8, 1, 1], [0.1, 0.3, 0.5, 0.7, 0.9],
        [0, 0.1, 0.5, 0.9, 1]), strict=True)] + [
    Case("resize", lambda x: mb.resize(x=x, shape=[1, 7, 0], resized_dims=np.uint32(2), interpolation_mode="LINEAR",
                                       sampling_mode="UNALIGN_CORNERS"),
         lambda x: F.interpolate(x, (7, 6), mode="bilinear")),
    Case("resize", lambda x: mb.resize(x=x, shape=[3, 2], resized_dims=np.uint32(2), sampling_mode="DEFAULT",
                                       interpolation_mode="NEAREST_NEIGHBOR"),  # coremltools' own test has these
         np.array([[[1, 1], [2, 2], [2, 2]]], np.float32), (FLAT[:2].reshape(1, 2, 1),)),
    Case("crop", lambda x: mb.crop(x=x, crop_height=[0, 1], crop_width=[2, 1]), lambda x: x[:, :, :-1, 2:-1]),
    Case("crop_resize", lambda x: mb.crop_resize(  # coremltools' own test has these
        x=x, boxes=np.array([[0.1, 0.3, 1.3, 1], [0.5, 1.8, 1, 0.3], [0, 0.4, 0.6, 0.7]], np.float32),
        box_indices=np.zeros(3, np.int32), target_width=2, target_height=2, normalized_coordinates=True,
        box_coordinate_mode="CORNERS_HEIGHT_FIRST", sampling_mode="ALIGN_CORNERS", pad_value=10.0),
         np.array([3.1, 5.2, 10, 10, 10, 7.9, 10, 13.9, 2.2, 3.1, 9.4, 10.3], np.float32).reshape(3, 1, 2, 2),
         (SQUARE,)),
    Case("crop_resize", lambda x: mb.crop_resize(
        x=x, boxes=np.array([[1.5, 2, 1, 2]], np.float32), target_width=2, target_height=1,
        sampling_mode="ALIGN_CORNERS", box_coordinate_mode="CENTER_SIZE_WIDTH_FIRST"),
         np.array([[[[10, 11]]]], np.float32), (SQUARE,)),
    Case("affine", lambda x: mb.affine(
        x=x, transform_matrix=np.array([[0.8, 0.3, 0.1, -0.2, 1.1, 0.2]], np.float32), output_height=5, output_width=3,
        sampling_mode="bilinear", padding_mode="constant", padding_value=0.0, align_corners=True,
        coordinates_mode="normalized_minus_one_to_one"),
         lambda x: F.grid_sample(x, F.affine_grid(torch.tensor([[[0.8, 0.3, 0.1], [-0.2, 1.1, 0.2]]]).expand(2, 2, 3),
                                                  [2, 3, 5, 3], align_corners=True), align_corners=True)),
] + [Case("resample", lambda x, y, mode=mode, padding=padding, aligned=aligned: mb.resample(
         x=x, coordinates=y, sampling_mode=mode, padding_mode=padding, padding_value=0.0, align_corners=aligned,
         coordinates_mode="normalized_minus_one_to_one"),
          lambda x, y, mode=mode, known=known, aligned=aligned: F.grid_sample(x, y, mode, known, aligned), (X, POINTS))
     for mode, padding, known, aligned in (
         ("bilinear", "constant", "zeros", True), ("bilinear", "constant", "zeros", False),
         ("nearest", "border", "border", False), ("bilinear", "reflection", "reflection", True),
         ("bilinear", "symmetric", "reflection", False))] + [
    Case("resample", lambda x: mb.resample(
        x=x, coordinates=np.array([[[[1, 2], [9, 9]]]], np.int32), sampling_mode="nearest", padding_mode="constant",
        padding_value=-3.0, coordinates_mode="unnormalized", align_corners=False),
         np.array([[[[10, -3]]]], np.float32), (SQUARE,)),
]
ALL = SHAPES + SLICES + TENSORS + GATHERS + IMAGES


@pytest.mark.parametrize("case", ALL, ids=[f"{case.op}-{k}" for k, case in enumerate(ALL)])
def test_op_gives_the_right_elements(case, tmp_path):
    specs = [mb.TensorSpec(shape=value.shape, dtype=types.numpy_type_to_builtin_type(value.dtype))
             for value in case.inputs]
    build = {1: lambda x: case.build(x=x), 2: lambda x, y: case.build(x=x, y=y)}[len(specs)]
    target = getattr(ct.target, case.target)
    model = ct.convert(mb.program(input_specs=specs, opset_version=target)(build), convert_to="mlprogram",
                       minimum_deployment_target=target, compute_precision=ct.precision.FLOAT32,
                       pass_pipeline=ct.PassPipeline.EMPTY, skip_model_load=True)
    model.save(str(tmp_path / "case.mlpackage"))
    program = load_program(tmp_path / "case.mlpackage")
    assert case.op in {step.op for step in program.steps}
    got, = program(dict(zip("xy", case.inputs, strict=False))).values()
    wanted = case.wanted(*map(torch.tensor, case.inputs)).numpy() if callable(case.wanted) else case.wanted
    assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
