"""What a denoiser's step would take if each of its layers ran as fast as it runs alone: the ceiling of a machine.

    python -m benchmarks.ceiling MODEL [--texts 1] [--threads N] [--rounds 5] [--json]

MODEL is a denoiser's .xml or .onnx. Every convolution, matrix product with weights and attention in it is built again
as a network of its own, in each arithmetic that might be fastest, and timed by OpenVINO's own counters: the layer
itself, without what brings its input into shape. Networks take turns; the median of the rounds counts, the fastest
arithmetic of each shape is summed over how often the shape occurs.
"""
import argparse
import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openvino
from openvino import opset13 as op

LEAST = 2e-5  # seconds; what takes less is a node that was left empty
SPAN = 4.0  # of the numbers that int8 layers read
AROUND_WEIGHTS = ("Convert", "Multiply", "Subtract", "Reshape", "FakeQuantize", "Transpose")
ARITHMETICS = ("int8", "bf16", "f32")  # of attention in int8 queries and keys, its probabilities in bf16
COUNTED = {"conv": ("Convolution",), "attention": ("Subgraph", "MatMul", "Softmax"),  # OpenVINO's nodes, by kind
           "matmul": ("FullyConnected", "MatMul", "FullyConnectedQuantizedLegacy")}


class Layer(NamedTuple):
    """A kind of layer: what its time depends on."""

    kind: str  # conv: inputs, outputs, kernel, stride, rows; matmul: rows, inputs, outputs; attention: heads,
    sizes: tuple[int, ...]  # queries, keys, width

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        if self.kind == "conv":
            inputs, outputs, kernel, stride, rows = self.sizes
            return 2 * inputs * outputs * kernel**2 * (rows // stride)**2
        return 2 * int(np.prod(self.sizes)) * (2 if self.kind == "attention" else 1)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--texts", type=int, default=1)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(layers_of(options.model, options.texts), options.threads, options.rounds)
    print(json.dumps(found, indent=1) if options.json else as_text(found))


def layers_of(model: Path, texts: int) -> Counter[Layer]:
    """How often each layer occurs in a step with so many texts."""
    network = openvino.Core().read_model(model)
    lengths = {"batch": texts, "tokens": 77}
    network.reshape({port.get_any_name(): [texts if axis == 0 and n.is_dynamic else lengths["tokens"] if n.is_dynamic
                                           else n.get_length() for axis, n in enumerate(port.get_partial_shape())]
                     for port in network.inputs})
    return Counter(filter(None, map(_layer, network.get_ordered_ops())))


def measure(layers: Counter[Layer], threads: int | None, rounds: int) -> dict[str, Any]:
    """Seconds of each kind of layer and of all; the fastest arithmetic of each shape."""
    runs = {(layer, arithmetic): _Run(layer, arithmetic, threads)
            for layer in layers for arithmetic in ARITHMETICS}
    times: dict[tuple[Layer, str], list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            times[key].append(run())
    best: dict[Layer, tuple[float, str]] = {}
    for (layer, arithmetic), taken in times.items():
        best[layer] = min(best.get(layer, (np.inf, "")), (statistics.median(taken), arithmetic))
    rows = [{"kind": layer.kind, "sizes": layer.sizes, "count": count, "ms": round(1e3 * best[layer][0], 2),
             "arithmetic": best[layer][1], "tops": round(layer.operations / best[layer][0] / 1e12, 2)}
            for layer, count in layers.items()]
    by_kind = {kind: sum(count * best[layer][0] for layer, count in layers.items() if layer.kind == kind)
               for kind in dict.fromkeys(layer.kind for layer in layers)}
    operations = sum(count * layer.operations for layer, count in layers.items())
    return {"ceiling_s": sum(by_kind.values()), "by_kind_s": by_kind, "gop": operations / 1e9, "layers": sorted(
        rows, key=lambda row: -row["count"] * row["ms"])}


def as_text(found: dict[str, Any]) -> str:
    """A Markdown table of the dearest, then the sums."""
    lines = ["| layer | sizes | times | ms each | in | TOP/s |", "|---|---|---|---|---|---|"]
    lines += [f"| {row['kind']} | {' '.join(map(str, row['sizes']))} | {row['count']} | {row['ms']} | "
              f"{row['arithmetic']} | {row['tops']} |" for row in found["layers"][:20]]
    sums = ", ".join(f"{kind} {seconds:.2f} s" for kind, seconds in found["by_kind_s"].items())
    return "\n".join([*lines, "", f"{found['ceiling_s']:.2f} s for {found['gop']:.0f} GOP: {sums}"])


def _layer(node: Any) -> Layer | None:
    """The layer that an operation of a network is, if it is one that counts."""
    kind = node.get_type_name()
    if kind == "Softmax":
        _, heads, queries, keys = node.output(0).get_shape()
        return Layer("attention", (heads, queries, keys, _scores(node).input(0).get_shape()[-1]))
    if kind not in ("Convolution", "MatMul") or not _is_constant(node.input_value(1)):
        return None
    shape, weight = tuple(node.input(0).get_shape()), tuple(node.input(1).get_shape())
    if kind == "Convolution":
        stride = node.get_attributes()["strides"][0]
        return Layer("conv", (shape[0] * weight[1], weight[0], weight[2], stride, shape[2]))
    outputs = weight[-2] if node.get_attributes()["transpose_b"] else weight[-1]
    return Layer("matmul", (int(np.prod(shape[:-1])), shape[-1], outputs))


def _scores(softmax: Any) -> Any:
    """The product of queries and keys that a softmax reads."""
    node = softmax.input_value(0).get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    return node


def _is_constant(value: Any) -> bool:
    node = value.get_node()
    while node.get_type_name() in AROUND_WEIGHTS:
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Constant")


class _Run:
    """A layer as a network of its own; calling it gives its seconds."""

    def __init__(self, layer: Layer, arithmetic: str, threads: int | None):
        config = {"INFERENCE_PRECISION_HINT": "f32" if arithmetic == "f32" else "bf16", "PERF_COUNT": True,
                  "PERFORMANCE_HINT": "LATENCY", **({"INFERENCE_NUM_THREADS": threads} if threads else {})}
        network = openvino.Core().compile_model(_network(layer, arithmetic == "int8"), "CPU", config)
        rng = np.random.default_rng(0)
        self.inputs = [rng.standard_normal(tuple(port.get_shape())).astype(np.float32) for port in network.inputs]
        self.counted = COUNTED[layer.kind]
        self.request = network.create_infer_request()
        self.request.infer(self.inputs)

    def __call__(self) -> float:
        self.request.infer(self.inputs)
        return sum(row.real_time.total_seconds() for row in self.request.profiling_info
                   if row.node_type in self.counted and row.real_time.total_seconds() > LEAST)


def _network(layer: Layer, rounded: bool) -> openvino.Model:
    return openvino.Model(*(_attention if layer.kind == "attention" else _product)(layer, rounded))


def _product(layer: Layer, rounded: bool) -> tuple[list[Any], list[Any]]:
    if layer.kind == "conv":
        inputs, outputs, kernel, stride, rows = layer.sizes
        image = op.parameter([1, inputs, rows, rows], np.float32)
        pads = [kernel // 2] * 2
        weight = _weights((outputs, inputs, kernel, kernel), rounded)
        return [op.convolution(_read(image, rounded), weight, [stride] * 2, pads, pads, [1, 1])], [image]
    count, inputs, outputs = layer.sizes
    tokens = op.parameter([1, count, inputs], np.float32)
    product = op.matmul(_read(tokens, rounded), _weights((outputs, inputs), rounded), False, True)
    return [op.transpose(product, op.constant(np.array([0, 2, 1])))], [tokens]  # or it would write float32


def _attention(layer: Layer, rounded: bool) -> tuple[list[Any], list[Any]]:
    heads, queries, keys, width = layer.sizes
    ports = [op.parameter([1, count, heads * width], np.float32) for count in (queries, keys, keys)]

    def split(tokens: Any, order: tuple[int, ...]) -> Any:
        apart = op.reshape(tokens, op.constant(np.array([0, 0, heads, width])), True)
        return op.transpose(apart, op.constant(np.array(order)))

    query = op.multiply(split(ports[0], (0, 2, 1, 3)), op.constant(np.float32(width**-0.5)))
    scores = op.matmul(_read(query, rounded), _read(split(ports[1], (0, 2, 3, 1)), rounded), False, False)
    mixed = op.matmul(op.softmax(scores, -1),
                      split(ports[2], (0, 2, 1, 3)), False, False)
    return [mixed], ports


def _read(value: Any, rounded: bool) -> Any:
    if not rounded:
        return value
    low, high = op.constant(np.float32(-SPAN)), op.constant(np.float32(SPAN * 127 / 128))
    return op.fake_quantize(value, low, high, low, high, 256)


def _weights(shape: tuple[int, ...], rounded: bool) -> Any:
    rng = np.random.default_rng(1)
    if not rounded:
        return op.constant((rng.standard_normal(shape) * 0.02).astype(np.float32))
    scale = np.full([shape[0], *[1] * (len(shape) - 1)], 0.02 / 127, np.float32)
    return op.multiply(op.convert(op.constant(rng.integers(-127, 128, shape).astype(np.int8)), np.float32),
                       op.constant(scale))


if __name__ == "__main__":
    main()
