"""`caphuman fidelity` on two photos and two steps: report, resumption, exit codes, errors."""
import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from caphuman_edge.quant import fidelity as fidelity_module
from caphuman_edge.quant import fidelity_limits, fidelity_record
from caphuman_edge.quant.fidelity import Judging
from caphuman_edge.runtime.bundle import MANIFEST, Bundle

JUDGED = "--judge", "sface", "--threads", 1


@pytest.fixture
def photos(astronaut, tmp_path) -> Path:
    """The astronaut and her mirror image."""
    folder = tmp_path / "photos"
    folder.mkdir()
    astronaut.save(folder / "a.png")
    Image.fromarray(np.asarray(astronaut)[:, ::-1]).save(folder / "b.png")
    return folder


@pytest.fixture
def quick(bundle_copy) -> Path:
    """The embedded bundle, but for a default of two unguided steps of DDIM."""
    manifest = json.loads((bundle_copy / MANIFEST).read_text())
    manifest["schedule"] |= {"kind": "ddim", "timesteps": "leading", "steps": 2, "guidance": 1.0}
    (bundle_copy / MANIFEST).unlink()  # a link to the embedded one's
    (bundle_copy / MANIFEST).write_text(json.dumps(manifest))
    return bundle_copy


@pytest.fixture
def fidelity(caphuman, quick, photos):
    """`fidelity("--gate")` runs the command on them."""
    return lambda *flags: caphuman("fidelity", quick, "--against", quick, "--pictures", photos, "--schedules",
                                   "dpm++:2@1", *JUDGED, *flags)


def test_a_stopped_run_goes_on_and_reports(fidelity, folder, monkeypatch):
    measured = fidelity_record._measured
    calls = []

    def stop_at_the_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measured(*arguments)

    monkeypatch.setattr(fidelity_record, "_measured", stop_at_the_third)
    stopped = fidelity()
    assert (stopped.code, stopped.out) == (130, "") and "interrupted" in stopped.err
    drawn = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    assert len(drawn) == 3
    done = fidelity("--json")
    assert done.code == 0 and len(calls) == 5, done.err
    assert {path: path.stat().st_mtime_ns for path in drawn} == drawn
    report = json.loads(done.out)
    (candidate,) = report["candidates"].values()
    assert (report["triples"], candidate["backend"], candidate["written"]) == (2, "ort", "dpm++:2@1")
    assert 0 < candidate["likeness"]["SSIM"]["value"] < 1 and candidate["measures"]["face found"]["triples"] == 2
    assert not report["places"]["nano ort"]["steps"]  # the reference's own graphs
    files = sorted(path.suffix for path in (folder / "fidelity").glob("nano-*"))
    assert files == [".json", ".md", ".png"]
    (sheet,) = (folder / "fidelity").glob("*.png")
    assert Image.open(sheet).size == (4 * 262 + 6, 2 * 282 + 6)
    monkeypatch.setattr(fidelity_limits, "limits_of", lambda *_: {"ssim": 1.1})
    again = fidelity()
    assert again.code == 0 and len(calls) == 5 and "Left out: hair" in again.out and "| missed |" in again.out
    assert fidelity("--gate").code == 1


def test_another_backend_is_compared_step_by_step_and_keeps_the_limits(caphuman, quick, photos, monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.setattr(fidelity_module, "kept_verdicts", lambda *_: [])  # single graphs take long
    done = caphuman("fidelity", quick, "--against", quick, "--pictures", photos, "--backends", "openvino",
                    "--trajectories", 1, "--gate", "--json", *JUDGED)
    report = json.loads(done.out)
    (candidate,) = report["candidates"].values()
    steps = report["places"]["nano openvino"]["steps"]
    assert [step["timestep"] for step in steps] == [501, 1] and all(step["psnr_db"] > 30 for step in steps)
    assert max(step["relative"]["value"] for step in steps) < 0.1  # of int8, which backends round each in its own way
    assert done.code == 0 and candidate["likeness"]["SSIM"]["value"] > 0.99


def test_a_gate_draws_its_own_people_and_lets_an_equal_bundle_pass(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(fidelity_module, "kept_verdicts", lambda *_: [])  # single graphs take long
    reference = Bundle.open(quick)
    manifest = dataclasses.replace(reference.manifest, name="equal")
    equal = dataclasses.replace(reference, manifest=manifest, digest="0" * 64)
    findings = fidelity_module.gate(equal, reference, tmp_path / "gate", triples=2, judging=Judging("sface"), threads=1)
    assert findings.triples == 2 and not findings.missed
    (candidate,) = findings.candidates
    assert candidate.likeness["SSIM"][0].value == 1 and not findings.places[1].steps
    assert len(list((tmp_path / "gate").glob("strangers-2/*.png"))) == 2


def test_graphs_alone_are_compared_with_the_recorded_answers(caphuman, folder):
    done = caphuman("fidelity", "--against", "reference", "--threads", 1)
    assert (done.code, done.err) == (0, "") and "| denoiser |" in done.out
    assert os.listdir(folder) == []


def test_users_errors_are_one_line(refusal, quick, photos, tmp_path):
    own = "fidelity", quick, "--against", quick
    assert "'fast'" in refusal(*own, "--schedules", "fast", "--pictures", photos)
    assert "--backends" in refusal(*own, "--backends", "torch", "--pictures", photos)
    assert "nothing to compare" in refusal(*own, "--pictures", photos)
    assert "expected 1 to 2" in refusal(*own, "--schedules", "ddim:4@1", "--pictures", photos, "--triples", 3)
    assert "not a bundle" in refusal("fidelity", quick, "--against", tmp_path, "--pictures", photos)
