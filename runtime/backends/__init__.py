"""Backends: one short module each, and the checked callable that all of them return.

A backend is a module with `NAME`, `FORMATS`, `devices` and `load`; its heavy import happens when it is opened, not
before.
"""
import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

import numpy as np

from ..contract import GraphSpec, TensorSpec
from ..errors import BadInput, MissingExtra, ShapeMismatch

BACKENDS = ("ort", "openvino", "coreml")
EXTRAS = {"openvino": "openvino", "coreml": "coremltools"}  # backend, and so the extra's name: the package in it
ANY_DEVICE = ("auto", "all")  # names that leave the choice to the backend
FAST = "fast"  # the arithmetic that a device has the fastest units for

Arrays = dict[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]  # of a call's arrays, by name


def _nothing(_: Shapes) -> None:
    """What most graphs do to prepare."""


@dataclass(frozen=True)
class Graph:
    """A loaded network: a dict of arrays in, a dict of arrays out.

    Calling it checks names, shapes and dtypes against `inputs` first and raises ShapeMismatch; a symbolic length such
    as "batch" must be one number throughout a call. Values are not checked: NaN goes in and comes out.
    """

    name: str  # for messages: the graph's file
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    run: Callable[[Arrays], Arrays]  # the backend's own call, on verified arrays
    prepare: Callable[[Shapes], None] = _nothing  # does what it can of the first call with such shapes, on any thread

    def __call__(self, arrays: Mapping[str, np.ndarray]) -> Arrays:
        check_arrays(self.name, self.inputs, arrays)
        return self.run(dict(arrays))


@runtime_checkable
class Backend(Protocol):
    """What a backend module offers."""

    @property
    def NAME(self) -> str:
        """The name that --backend takes."""

    @property
    def FORMATS(self) -> tuple[str, ...]:
        """Formats of graphs that it can load, those of `manifest.FORMATS`, the best first."""

    def devices(self) -> tuple[str, ...]:
        """What this machine has of "cpu", "gpu", "npu", "all", the default first.

        Raises BadInput where the backend cannot run on such a machine at all.
        """

    def load(
        self, path: Path, *, device: str | None = None, threads: int | None = None, cache_dir: Path | None = None,
        precision: str | None = None, by_shape: GraphSpec | None = None, in_halves: bool = False,
    ) -> Graph:
        """Load one graph; raises BundleError where the file cannot be, BadInput for settings it does not have.

        `device`: one of `devices`, or "auto"; None for the first. `threads`: at most so many cores, None for all.
        `cache_dir`: a folder for compiled models, where the backend compiles to files; None for the user's cache.
        `precision`: the arithmetic to compute in; None changes no number for speed, as far as the device can, and FAST
        is for graphs whose numbers were rounded to 8 bits before. `by_shape`: what the file should hold, for graphs
        that are called often with the same lengths: where the backend compiles, it compiles for these, once it knows
        them, and looks at the file no sooner. `in_halves`: where the backend can, hold half of such a graph at a time.
        """


def open_backend(name: str) -> Backend:
    """The backend of that name, imported now.

    Raises BadInput for an unknown name or a runtime that does not load, MissingExtra for one that is not installed.
    """
    if name not in BACKENDS:
        raise BadInput(f"backend {name!r} is unknown; choose one of {', '.join(BACKENDS)}")
    try:
        return cast(Backend, importlib.import_module(f"{__name__}.{name}"))
    except ImportError as error:  # missing, or installed without a library that it needs
        if isinstance(error, ModuleNotFoundError) and error.name == EXTRAS.get(name):
            raise MissingExtra(EXTRAS[name], name, f"backend {name}") from error
        raise BadInput(f"backend {name} cannot be loaded ({(str(error).splitlines() or ['no reason given'])[0]}); "
                       "'caphuman doctor' names what is missing and how to install it") from error


def chosen_device(backend: str, device: str | None, offered: tuple[str, ...]) -> str:
    """The device, or the default where None or "auto" leaves the choice. Raises BadInput for one that is not there."""
    check_choice(backend, "device", device, tuple(dict.fromkeys((*offered, *ANY_DEVICE))))
    return device if device in offered else offered[0]


def check_choice(backend: str, setting: str, value: str | None, offered: tuple[str, ...]) -> None:
    """Raise BadInput unless the backend offers this value of a setting; None is always offered."""
    if value is not None and value not in offered:
        raise BadInput(f"backend {backend} has no {setting} {value} here; choose {' or '.join(offered)}, "
                       "or leave it out")


def check_threads(threads: int | None) -> None:
    """Raise BadInput for no threads."""
    if threads is not None and threads < 1:
        raise BadInput(f"threads is {threads}, expected 1 or more; leave it out to use every core")


def check_arrays(graph: str, specs: Iterable[TensorSpec], arrays: Mapping[str, np.ndarray]) -> None:
    """Raise ShapeMismatch unless the arrays are exactly what the specs name, in name, dtype and shape."""
    wanted = {spec.name: spec for spec in specs}
    if missing := wanted.keys() - arrays.keys():
        raise ShapeMismatch(f"{graph} needs {_names(missing)}, got {_names(arrays)}; pass every input")
    if extra := arrays.keys() - wanted.keys():
        raise ShapeMismatch(f"{graph} has no input {_names(extra)}, it takes {_names(wanted)}; leave it out")
    lengths: dict[str, int] = {}
    for name, array in arrays.items():
        _check_array(f"{graph}: {name}", wanted[name], array, lengths)


def _check_array(label: str, spec: TensorSpec, array: np.ndarray, lengths: dict[str, int]) -> None:
    if array.dtype != spec.dtype:
        raise ShapeMismatch(f"{label} is {array.dtype}, expected {spec.dtype}; cast it with astype")
    if array.ndim == len(spec.shape):
        for got, want in zip(array.shape, spec.shape, strict=True):
            if isinstance(want, str):
                lengths.setdefault(want, got)  # a symbol takes its first length in the call
    wanted = tuple(lengths.get(n, n) if isinstance(n, str) else n for n in spec.shape)
    if array.shape != wanted:
        raise ShapeMismatch(f"{label} has shape {_shape(array.shape)}, expected {_shape(wanted)}; "
                            "reshape it, or rebuild the bundle")


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def _shape(shape: tuple[int | str, ...]) -> str:
    return f"({', '.join(map(str, shape))})"
