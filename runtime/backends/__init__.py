"""Backends: one short module each, and the checked callable that all of them return.

A backend is a module with `NAME`, `SUFFIXES` and `load`; its heavy import happens when it is opened, not before.
"""
import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

import numpy as np

from ..contract import TensorSpec
from ..errors import BadInput, ShapeMismatch

BACKENDS = ("ort",)

Arrays = dict[str, np.ndarray]


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
    def SUFFIXES(self) -> tuple[str, ...]:
        """Suffixes of the graph files it can load."""

    def load(
        self, path: Path, *, device: str = "cpu", threads: int | None = None, cache_dir: Path | None = None,
        precision: str | None = None,
    ) -> Graph:
        """Load one graph; raises BundleError where the file cannot be, BadInput for settings it does not have.

        `threads`: at most so many cores, None for all. `cache_dir`: a folder for compiled models. `precision`: the
        arithmetic to compute in, None for the one that the graph is stored in.
        """


def open_backend(name: str) -> Backend:
    """The backend of that name, imported now. Raises BadInput for an unknown name or a runtime that does not load."""
    if name not in BACKENDS:
        raise BadInput(f"backend {name!r} is unknown; choose one of {', '.join(BACKENDS)}")
    try:
        return cast(Backend, importlib.import_module(f"{__name__}.{name}"))
    except ImportError as error:  # missing, or installed without a library that it needs
        raise BadInput(f"backend {name} cannot be loaded ({(str(error).splitlines() or ['no reason given'])[0]}); "
                       "'caphuman doctor' names what is missing and how to install it") from error


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
