"""What runs a bundle's graphs here: which backend each one, on which device, in which precision."""
import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from .backends import FAST, Arrays, Graph, chosen_device, open_backend
from .bundle import Bundle
from .contract import OFFICIAL_GRAPHS, PERCEPTION_GRAPHS, GraphSpec, TensorSpec, graphs
from .errors import BundleError

FALLBACK = "ort"  # of the base installation, so always there
FUSED, SPLIT = ("denoiser",), ("capface", "unet")  # the two forms of what runs at each step
EACH_STEP = (*FUSED, *SPLIT, "controlnet")
INT8 = "int8"  # the precision of a form whose activations are rounded, too
THRESHOLDS = "hint_encoder"  # its gates are 0 or 1, so a small error may be a large one

Memory = Literal["keep", "steps", "stage"]  # for good; encoders until the first step; each until the next is needed


@dataclass(frozen=True)
class Machine:
    """The user's choice; None leaves a setting to the backend. Settings as in `backends.Backend.load`."""

    backend: str = FALLBACK
    device: str | None = None
    threads: int | None = None
    precision: str | None = None
    cache_dir: Path | None = None
    memory: Memory = "keep"  # how long graphs stay loaded; portraits are the same

    def check(self) -> None:
        """Raise BadInput or MissingExtra where the backend or the device is not to be had; loads no graph."""
        chosen_device(self.backend, self.device, open_backend(self.backend).devices())

    def denoiser(self, bundle: Bundle, split: bool = False) -> tuple[str, ...]:
        """The graphs of a step: FUSED, or SPLIT where only that is stored for the backend or `split` asks for it.

        Where memory is held by the stage they are SPLIT if both are stored.

        Raises BundleError where they are not to be had.
        """
        formats = open_backend(self.backend).FORMATS
        for names in (SPLIT,) if split else (SPLIT, FUSED) if self.memory == "stage" else (FUSED, SPLIT):
            if all(bundle.stored(name, formats) for name in names):
                return names
        held = [f"{name} ({', '.join(bundle.component(name).forms)})" for name in FUSED + SPLIT if name in bundle]
        wanted = "capface and unet" if split else "denoiser or capface and unet"
        why = ", since several people, a second control and enhancement take the split denoiser" if split else ""
        raise BundleError(f"{bundle.root} holds {', '.join(held) or 'no denoiser'}, expected {wanted} as "
                          f"{' or '.join(formats)}, which backend {self.backend} reads{why}; choose another backend, "
                          "or build a bundle that has it")

    def runner(self, bundle: Bundle, name: str) -> str:
        """The backend that runs a graph: the chosen one, or ort where the graph is stored as ONNX alone.

        Such are the graphs that measure photos in a bundle for Core ML. What runs at each step is never handed to ort:
        nobody asks for another backend to get that one there. Raises BundleError where neither can run it.
        """
        formats = open_backend(self.backend).FORMATS
        if name not in EACH_STEP and not bundle.stored(name, formats) and bundle.stored(name, ["onnx"]):
            return FALLBACK
        bundle.form(name, formats)  # raises
        return self.backend

    def in_halves(self, bundle: Bundle, name: str) -> bool:
        """Whether a graph is computed in 16 bits: asked for, or all that its form or the device knows."""
        runner = self.runner(bundle, name)
        if runner == "coreml":  # computes as the package says, whose weights are halves where its numbers are
            return bundle.form(name, open_backend(runner).FORMATS).precision != "f32"
        chosen = self._precision(bundle, name) in ("f16", "bf16", FAST) or (self.device or "").startswith("npu")
        return chosen and runner == self.backend and name != THRESHOLDS

    def load(self, bundle: Bundle, name: str) -> Graph:
        """Load a graph, for any number of rows. Raises BundleError, ShapeMismatch, BadInput, MissingExtra."""
        runner = self.runner(bundle, name)
        if runner != self.backend:
            if name not in PERCEPTION_GRAPHS + OFFICIAL_GRAPHS:
                warnings.warn(f"{name} is not stored for backend {self.backend}: {runner} runs it", stacklevel=2)
            return bundle.graph(name, runner, threads=self.threads)
        device = "cpu" if name == THRESHOLDS else self.device
        graph = bundle.graph(name, runner, device=device, threads=self.threads, cache_dir=self.cache_dir,
                             precision=self._precision(bundle, name), by_shape=name in EACH_STEP,
                             in_halves=self.memory == "stage")
        return row_by_row(graph, graphs(bundle.config)[name])

    def _precision(self, bundle: Bundle, name: str) -> str | None:
        """The arithmetic of a graph: OpenVINO's fastest where numbers were rounded to 8 bits, unless one is chosen."""
        if name == THRESHOLDS:
            return "f32"
        rounded = self.backend == "openvino" and bundle.form(name, open_backend(self.backend).FORMATS).precision == INT8
        return self.precision or (FAST if rounded else None)


def row_by_row(graph: Graph, contract: GraphSpec) -> Graph:
    """The graph itself, or where it takes one row and the contract any number, one that runs them in turn."""
    many = {spec.name for spec in (*contract.inputs, *contract.outputs) if spec.shape[0] == "batch"}
    inputs, outputs = _opened(graph.inputs, many), _opened(graph.outputs, many)
    if inputs == graph.inputs:
        return graph

    def run(arrays: Arrays) -> Arrays:
        count = next(len(array) for name, array in arrays.items() if name in many)
        rows = [graph.run({name: array[k:k + 1] if name in many else array for name, array in arrays.items()})
                for k in range(count)]
        return {name: np.concatenate([row[name] for row in rows]) if name in many else array
                for name, array in rows[0].items()}

    return dataclasses.replace(graph, inputs=inputs, outputs=outputs, run=run)


def _opened(specs: tuple[TensorSpec, ...], many: set[str]) -> tuple[TensorSpec, ...]:
    return tuple(dataclasses.replace(spec, shape=("batch", *spec.shape[1:])) if spec.name in many else spec
                 for spec in specs)
