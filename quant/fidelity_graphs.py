"""Graph by graph: what each backend makes of the inputs whose answers by the float reference every bundle carries."""
import dataclasses
import json
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from caphuman_edge.quant.fidelity_columns import Column, digest_of
from caphuman_edge.runtime.backends import Graph
from caphuman_edge.runtime.bundle import Bundle
from caphuman_edge.runtime.contract import graphs
from caphuman_edge.runtime.errors import MissingExtra
from caphuman_edge.runtime.ledger import write_whole
from caphuman_edge.runtime.machine import Machine, row_by_row
from caphuman_edge.runtime.selftest import Verdict, self_test

COREML = "coreml"


def graph_verdicts(bundle: Bundle, machine: Machine) -> list[Verdict]:
    """PSNR of every graph of the bundle's self-test that the machine runs, gates apart.

    Core ML's compressed programs are executed by the MIL evaluator where this is no Mac. Errors as `self_test`,
    MissingExtra where the evaluator's packages are not there.
    """
    if only_graphs(machine):
        machine = EvaluatedMachine(machine.backend, threads=machine.threads)
    return list(self_test(bundle, machine))


def kept_verdicts(column: Column, folder: Path) -> list[Verdict]:
    """The same of a column, computed once for a folder of results: of a full-size bundle that takes minutes."""
    file = folder / f"graphs-{digest_of(column.computing)}.json"
    with suppress(OSError, ValueError, TypeError):  # a damaged one is made again
        return [Verdict(**row) for row in json.loads(file.read_text())]
    found = graph_verdicts(column.bundle, column.machine)
    write_whole(file, json.dumps([dataclasses.asdict(verdict) for verdict in found]).encode())
    return found


def only_graphs(machine: Machine) -> bool:
    """Whether nothing but single graphs can be run here: Core ML away from a Mac."""
    return machine.backend == COREML and sys.platform != "darwin"


@dataclass(frozen=True)
class EvaluatedMachine(Machine):
    """Core ML's programs, executed by the MIL evaluator."""

    def load(self, bundle: Bundle, name: str) -> Graph:
        """Load a graph, for any number of rows."""
        if self.runner(bundle, name) != COREML:
            return super().load(bundle, name)
        try:
            from caphuman_edge.export.coreml_check import evaluated, run_chain
            from caphuman_edge.export.coreml_graphs import fixed
        except ImportError as error:
            raise MissingExtra("torch", "export", "running Core ML's programs away from a Mac") from error
        spec, path = graphs(bundle.config)[name], bundle.file(name, COREML)
        one = fixed(spec)
        return row_by_row(Graph(str(path), one.inputs, one.outputs, run_chain(path, spec, evaluated)), spec)
