"""Fidelity of Core ML's programs, graph by graph, where no Core ML runs."""
import sys

import numpy as np
import pytest

from caphuman_edge.export.check import reference_cases
from caphuman_edge.export.coreml_writer import PHONE, write_coreml
from caphuman_edge.quant.fidelity import graphs_alone
from caphuman_edge.quant.fidelity_report import as_markdown
from caphuman_edge.runtime.bundle import Bundle, new_bundle, record_files, write_manifest
from caphuman_edge.runtime.manifest import DATA, Component, Form, Manifest
from caphuman_edge.runtime.schedule import Schedule

pytest.importorskip("coremltools")
pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="there Core ML itself runs")
GRAPH = "text_encoder"


@pytest.fixture
def phone_bundle(micro, tmp_path) -> Bundle:
    """A bundle of one graph, written for phones, with a self-test of two texts."""
    with new_bundle(tmp_path / "bundle") as folder:
        path = folder / GRAPH / f"{GRAPH}.mlpackage"
        path.parent.mkdir()
        precision = write_coreml(micro.modules[GRAPH], micro.specs[GRAPH], path, PHONE)
        case = reference_cases(micro.modules[GRAPH], micro.specs[GRAPH])[-1]
        np.savez(folder / "selftest.npz", **{f"{GRAPH}/in/{name}": value for name, value in case.inputs.items()},
                 **{f"{GRAPH}/out/{name}": value for name, value in case.outputs.items()})
        form = Form(path.relative_to(folder).as_posix(), record_files(folder, [path]), precision)
        test = Form("selftest.npz", record_files(folder, [folder / "selftest.npz"]), "data")
        components = {GRAPH: Component({"coreml": form}, micro.specs[GRAPH].inputs, micro.specs[GRAPH].outputs),
                      "selftest": Component({DATA: test})}
        write_manifest(folder, Manifest("phone", micro.config, Schedule(), components))
    return Bundle.open(tmp_path / "bundle")


def test_a_program_is_measured_by_the_evaluator(phone_bundle, quick_collections):
    findings = graphs_alone(phone_bundle, ["coreml"])
    (verdict,) = findings.places[0].graphs
    assert (verdict.graph, verdict.backend) == (GRAPH, "coreml") and verdict.passed
    assert verdict.psnr_db < 90  # halves; what palettes lose, the evaluator's own tests say
    assert f"| {GRAPH} | {verdict.psnr_db:.1f} dB |" in as_markdown(findings)
