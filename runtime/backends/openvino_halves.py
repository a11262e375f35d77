"""Cutting a graph in two, so that half of its weights need be held at a time."""
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import openvino

LEAST, MOST = 0.4, 0.6  # of the weights, in the first half
SUM = "Add"  # the one kind of node whose output crosses the cut: behind a sum nothing is rounded, nor fused with it


class _Cut(NamedTuple):
    """The first half's last node, in topological order, and the sums whose outputs the second half takes over."""

    last: int
    sums: list[int]


def halves(model: openvino.Model) -> list[openvino.Model]:
    """Two models that run in turn compute what the model does; its parts are used up. Shapes must be definite.

    The second takes what the first hands over by tensor names, the same in both. All but sums that either needs of the
    other's nodes it computes itself. Where no sum lies between `LEAST` and `MOST` of the weights, the model alone.
    """
    nodes = model.get_ordered_ops()
    cut = _best_cut(nodes)
    if cut is None:
        return [model]
    place = {_key(node): k for k, node in enumerate(nodes)}
    early, late = list[openvino.Node](), list[openvino.Node]()
    for result in model.get_results():
        (early if place[_key(result.input_value(0).get_node())] <= cut.last else late).append(result)
    crossing = [nodes[k].output(0) for k in cut.sums]
    for number, output in enumerate(crossing):
        output.get_tensor().add_names({f"cut.{number}"})
    first = _model([*early, *map(openvino.opset13.result, crossing)], model.get_parameters()).clone()
    taken = [_taken_over(output, f"cut.{number}") for number, output in enumerate(crossing)]
    return [first, _model(late, [*model.get_parameters(), *taken])]


def _taken_over(output: openvino.Output, name: str) -> openvino.op.Parameter:
    """A parameter in the place of a node's output."""
    parameter = openvino.op.Parameter(output.get_element_type(), output.get_partial_shape())
    parameter.set_friendly_name(name)
    parameter.output(0).get_tensor().set_names({name})
    for port in output.get_target_inputs():
        port.replace_source_output(parameter.output(0))
    return parameter


def _model(results: Sequence[openvino.Node], parameters: Sequence[openvino.op.Parameter]) -> openvino.Model:
    """The results' model, with those of the parameters that they depend on."""
    reached, rest = set[str](), list(results)
    while rest:
        node = rest.pop()
        if _key(node) not in reached:
            reached.add(_key(node))
            rest += _producers(node)
    return openvino.Model(list(results), [parameter for parameter in parameters if _key(parameter) in reached])


def _best_cut(nodes: Sequence[openvino.Node]) -> _Cut | None:
    """Behind that sum where the fewest bytes cross, if any do."""
    place = {_key(node): k for k, node in enumerate(nodes)}
    crosses = [_is_sum(node) for node in nodes]
    needed = [0] * len(nodes)  # the last node that needs a node's output, directly or by what is not taken over
    for k in range(len(nodes) - 1, -1, -1):
        if nodes[k].get_type_name() == "Result":
            continue
        for source in (place[_key(node)] for node in _producers(nodes[k])):
            needed[source] = max(needed[source], k, 0 if crosses[k] else needed[k])
    weights = np.cumsum([node.get_byte_size() if node.get_type_name() == "Constant" else 0 for node in nodes])
    bytes_at = np.zeros(len(nodes) + 1)
    for k in (k for k in range(len(nodes)) if crosses[k] and needed[k]):  # some are outputs alone
        size = _size(nodes[k])
        bytes_at[k] += size
        bytes_at[needed[k]] -= size
    loads = np.cumsum(bytes_at)[:-1]
    fit = np.array(crosses) & (weights >= LEAST * weights[-1]) & (weights <= MOST * weights[-1]) & (loads > 0)
    if not fit.any():
        return None
    last = int(np.argmin(np.where(fit, loads, np.inf)))
    return _Cut(last, [k for k in range(last + 1) if crosses[k] and needed[k] > last])


def _is_sum(node: openvino.Node) -> bool:
    return node.get_type_name() == SUM and node.output(0).get_element_type().is_real()


def _producers(node: openvino.Node) -> Iterator[openvino.Node]:
    return (node.input_value(k).get_node() for k in range(node.get_input_size()))


def _size(node: openvino.Node) -> int:
    return int(np.prod(node.output(0).get_shape())) * int(node.output(0).get_element_type().size)


def _key(node: openvino.Node) -> str:
    """A node's unique name: Python sees a new object each time."""
    return str(node.get_name())
