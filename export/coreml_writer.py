"""Write reference modules as Core ML packages (.mlpackage) with the contract's names, for iOS 17 and macOS 14.

Nothing here needs a Mac: packages are written, not compiled. docs/apple.md tells app developers how to use them.
"""
import contextlib
import gc
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from caphuman_edge.export.coreml_graphs import Attention, coreml_graphs
from caphuman_edge.export.coreml_metadata import describe
from caphuman_edge.export.graphs import example_inputs
from caphuman_edge.export.palette import palettise
from caphuman_edge.runtime.contract import GraphSpec, TensorSpec
from caphuman_edge.runtime.errors import BadInput, BundleError, MissingExtra

SUFFIX = ".mlpackage"
PALETTE_BITS = (4, 6, 8)  # what iOS 17 can look up, and is of use
ALWAYS_FLOAT = ("hint_encoder",)  # its gates are thresholds
CHUNKED = ("unet",)  # the one graph that is worth two packages
LOUD = ("vae_encoder", "vae_decoder")  # squares of their features may be more than a half holds
SINUSOIDS, VARIANCE = ("cos", "sin"), ("reduce_mean", "add", "sqrt")  # what follows a square in a norm
INHERITED = "Inherits the licences of the checkpoints that it was made from."


@dataclass(frozen=True)
class CoremlOptions:
    """How packages are written. Raises BadInput for values that there are not."""

    precision: Literal["f16", "f32"] = "f16"  # of arithmetic, and of weights that are not palettised
    attention: Attention = "original"  # split_einsum is the Neural Engine's form
    palettise_bits: int | None = None  # per weight; one table of 2**bits values a tensor
    chunks: int = 1  # packages that the UNet is written as
    licence: str = INHERITED

    def __post_init__(self) -> None:
        for name, allowed in (("precision", ("f16", "f32")), ("attention", ("original", "split_einsum")),
                              ("palettise_bits", (None, *PALETTE_BITS)), ("chunks", (1, 2))):
            if getattr(self, name) not in allowed:
                raise BadInput(f"Core ML option {name} is {getattr(self, name)!r}, expected one of "
                               f"{', '.join(map(str, allowed))}")


MAC = CoremlOptions()
PHONE = CoremlOptions(attention="split_einsum", palettise_bits=6, chunks=2)


def write_coreml(module: nn.Module, spec: GraphSpec, path: Path, options: CoremlOptions = MAC) -> str:
    """Write one graph to `path`, or the UNet in chunks to the places of `chunk_paths`; replaces what is there.

    Batch is 1 and text one window; ids are int32, all else float32. hint_encoder is always float32 and never
    palettised. Returns the precision that the weights are stored in: "f16", "f32", "palettised-6" and the like.
    A killed writing leaves at most a scratch folder `.NAME.writing-*` beside `path`.
    Raises BadInput for another suffix or a graph whose shapes are free, BundleError where coremltools does not
    understand a graph, MissingExtra where it is not installed.
    """
    if path.suffix != SUFFIX:
        raise BadInput(f"{path} ends in {path.suffix or 'nothing'}, expected {SUFFIX} for a Core ML package; rename it")
    path.parent.mkdir(parents=True, exist_ok=True)
    chunks = options.chunks if spec.name in CHUNKED else 1
    targets = chunk_paths(path) if chunks == 2 else [path]
    stored = _stored(spec, options)
    with _scratch(path) as scratch:
        parts = coreml_graphs(module, spec, options.attention, chunks)
        for number, (target, (part, part_spec)) in enumerate(zip(targets, parts, strict=True), start=1):
            _convert(part, part_spec, scratch / target.name, stored, options)
            _label(scratch / target.name, part_spec, options.licence, stored, (number, chunks))
        _publish(scratch, targets, {path, *chunk_paths(path)})
    return stored


def packages(path: Path) -> list[Path]:
    """The packages that a graph at `path` was written as, in the order in which a host runs them."""
    return [path] if path.exists() else [chunk for chunk in chunk_paths(path) if chunk.exists()]


def chunk_paths(path: Path) -> list[Path]:
    """Where the UNet's halves lie in place of `path`: unet_chunk1.mlpackage, unet_chunk2.mlpackage."""
    return [path.with_name(f"{path.stem}_chunk{number}{SUFFIX}") for number in (1, 2)]


def coremltools() -> Any:
    """The library, without its messages about Core ML itself, which only Macs have. Raises MissingExtra."""
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    try:
        import coremltools as library
    except ImportError as error:
        raise MissingExtra("coremltools", "coreml", "Core ML") from error
    return library


def _stored(spec: GraphSpec, options: CoremlOptions) -> str:
    if spec.name in ALWAYS_FLOAT:
        return "f32"
    return f"palettised-{options.palettise_bits}" if options.palettise_bits else options.precision


def _convert(module: nn.Module, spec: GraphSpec, package: Path, stored: str, options: CoremlOptions) -> None:
    """Trace and convert into a new package. What it holds in memory is free again afterwards."""
    ct = coremltools()
    half = options.precision == "f16" and spec.name not in ALWAYS_FLOAT
    selector = partial(_may_be_half, spec.name)
    precision = ct.transform.FP16ComputePrecision(op_selector=selector) if half else ct.precision.FLOAT32
    with quiet(), _quick_collections():
        program = _program(module, spec)
        try:
            ct.convert(
                program, convert_to="mlprogram", minimum_deployment_target=ct.target.iOS17,
                compute_precision=precision, pass_pipeline=_passes(ct, stored, options), skip_model_load=True,
                package_dir=str(package), inputs=[ct.TensorType(tensor.name, tensor.shape, dtype=_dtype(tensor))
                                                  for tensor in spec.inputs],
                outputs=[ct.TensorType(tensor.name, dtype=_dtype(tensor)) for tensor in spec.outputs])
        except (ValueError, TypeError, LookupError, RuntimeError, AssertionError) as error:  # it has none of its own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise BundleError(f"{spec.name} cannot be converted to Core ML ({reason}); report the versions of torch "
                              "and coremltools") from error


def _program(module: nn.Module, spec: GraphSpec) -> torch.export.ExportedProgram:
    inputs = example_inputs(spec.inputs, seed=0, batch=1)
    return torch.export.export(module.eval(), tuple(inputs.values())).run_decompositions({})


def _passes(ct: Any, stored: str, options: CoremlOptions) -> Any:
    """The library's own passes; palettisation last, so that it sees weights as they will be stored."""
    pipeline = ct.PassPipeline()
    if stored.startswith("palettised"):
        assert options.palettise_bits is not None
        table = partial(palettise, bits=options.palettise_bits)
        coreml = ct.optimize.coreml
        config = coreml.OptimizationConfig(coreml.OpPalettizerConfig(mode="custom", lut_function=table))
        pipeline.append_pass("compression::palettize_weights")
        pipeline.set_options("compression::palettize_weights", {"config": config})
    return pipeline


def _may_be_half(graph: str, op: Any) -> bool:
    """All but the angles of the time features, up to 999 radians, single numbers such as 1 - alpha_bar, and variances
    of what is loud."""
    output = op.outputs[0]
    angle = op.op_type in SINUSOIDS or any(user.op_type in SINUSOIDS for user in output.child_ops)
    return not angle and np.prod(output.shape) > 1 and not (graph in LOUD and _is_variance(op))


def _is_variance(op: Any) -> bool:
    """Whether an op is a norm's square, its mean, or the root of that."""
    inputs = (op.inputs.get(name) for name in ("x", "y")) if op.op_type in VARIANCE else ()
    return op.op_type == "square" or any(given is not None and given.op is not None and _is_variance(given.op)
                                         for given in inputs)


def _dtype(tensor: TensorSpec) -> type:
    return np.int32 if tensor.dtype == "int64" else np.float32


def _label(package: Path, spec: GraphSpec, licence: str, stored: str, order: tuple[int, int]) -> None:
    """Write the metadata into a package's model file; its weights stay where they are."""
    utils = coremltools().models.utils
    file = next(package.glob("Data/*/*.mlmodel"))
    model = utils.load_spec(str(package))
    describe(model.description, spec, licence, stored, order)
    file.write_bytes(model.SerializeToString())


@contextlib.contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """A folder beside `path` that also takes the library's temporary files: /tmp may be small, or memory."""
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.stem}.writing-", dir=path.parent))
    former, tempfile.tempdir = tempfile.tempdir, str(scratch)
    try:
        yield scratch
    finally:
        tempfile.tempdir = former
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, which the library draws on stderr, and no warnings of its own deprecations and torch's."""
    with (open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere),
          warnings.catch_warnings(action="ignore")):
        yield


@contextlib.contextmanager
def _quick_collections() -> Iterator[None]:
    """The library collects garbage after each of its hundred passes: keep all that was there before out of it."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.collect()  # programs are full of cycles


def _publish(scratch: Path, targets: list[Path], replaced: set[Path]) -> None:
    """Rename finished packages into place; what was there, whole or in chunks, goes with the scratch folder."""
    for number, former in enumerate(path for path in replaced if path.exists()):
        os.replace(former, scratch / f"former{number}")
    for target in targets:
        os.replace(scratch / target.name, target)
