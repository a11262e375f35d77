"""Fidelity: likeness of pictures, paired figures, limits, what is compared, and the report."""
import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage.metrics import structural_similarity

from caphuman_edge.quant import fidelity_columns as columns_module
from caphuman_edge.quant.estimates import Estimate
from caphuman_edge.quant.fidelity import Candidate, Findings, Judging, Place, gate, open_bench
from caphuman_edge.quant.fidelity_columns import columns, machine_of, reference_of, settings_of, told, weights, written
from caphuman_edge.quant.fidelity_figures import (
    OWN,
    POSE,
    SSIM,
    Compared,
    compared,
    likeness,
    measures,
    step_errors,
)
from caphuman_edge.quant.fidelity_limits import limits_of, verdicts
from caphuman_edge.quant.fidelity_pixels import picture_psnr, ssim
from caphuman_edge.quant.fidelity_record import CONDITIONING, INDEPENDENT, light_degrees
from caphuman_edge.quant.fidelity_report import as_json, as_markdown
from caphuman_edge.quant.photos import Photos, open_pictures
from caphuman_edge.runtime.bundle import MANIFEST, Bundle
from caphuman_edge.runtime.errors import BadInput, BundleError
from caphuman_edge.runtime.head import directional_light
from caphuman_edge.runtime.machine import Machine
from caphuman_edge.runtime.pipeline import Pipeline
from caphuman_edge.runtime.request import Settings, complete
from caphuman_edge.runtime.schedule import SPACINGS, Schedule
from caphuman_edge.runtime.selftest import EXACT, Verdict

RNG = np.random.default_rng(5)


def float_form(bundle: Bundle) -> Bundle:
    """As if its weights were halves, and it were sampled as the official tool does."""
    parts = {name: dataclasses.replace(part, forms={kind: dataclasses.replace(form, precision="f16")
                                                    for kind, form in part.forms.items()})
             for name, part in bundle.manifest.components.items()}
    manifest = dataclasses.replace(bundle.manifest, components=parts, provenance={}, schedule=Schedule(guidance=4.0))
    return dataclasses.replace(bundle, manifest=manifest)


EMBEDDED = float_form(Bundle.open())


def bundle_with(**changes: object) -> Bundle:
    """The embedded bundle under another hash, with changes to its manifest."""
    return dataclasses.replace(EMBEDDED, digest="f" * 64, manifest=dataclasses.replace(EMBEDDED.manifest, **changes))


def int8_form() -> Bundle:
    """The embedded bundle as if its denoiser had int8 weights, and nobody said whose."""
    parts = dict(EMBEDDED.manifest.components)
    form = dataclasses.replace(parts["denoiser"].forms["onnx"], precision="int8")
    parts["denoiser"] = dataclasses.replace(parts["denoiser"], forms={"onnx": form})
    return bundle_with(components=parts)


def record(number: int, yaw: float = 20.0, off: float = 2.0, own: float = 0.3, **answer: object) -> dict:
    """A portrait that turns `off` degrees too far."""
    wanted = {"angles": {"yaw": yaw, "pitch": 0.0, "roll": 0.0}, "attributes": {"hair": "red", "smile": "yes"},
              "units": {"jawOpen": 0.1, "mouthSmile": 0.5, "eyeBlink": 0.2}}
    angles = {**wanted["angles"], "yaw": yaw + off}
    found = {"found": True, "angles": angles, "units": wanted["units"], "landmarks": 3.0, "light": 5.0,
             "attributes": {"hair": "red", "smile": "no"}, "own": {CONDITIONING: own, INDEPENDENT: own},
             "vectors": {CONDITIONING: [1.0, 0.0], INDEPENDENT: [0.6, 0.8]}}
    return {"pair": number, "wanted": wanted, "answer": {**found, **answer}}


@pytest.mark.parametrize("noise", [2.0, 40.0])
def test_ssim_is_scikit_images_with_the_paper_s_window(noise):
    picture = np.clip(RNG.normal(128, 60, (40, 56, 3)), 0, 255).astype(np.uint8)
    other = np.clip(picture + RNG.normal(0, noise, picture.shape), 0, 255).astype(np.uint8)
    theirs = structural_similarity(other, picture, channel_axis=-1, gaussian_weights=True, sigma=1.5,
                                   use_sample_covariance=False, data_range=255)
    assert ssim(other, picture) == pytest.approx(theirs, abs=1e-9)
    assert ssim(picture, picture) == pytest.approx(1)


def test_psnr_of_pictures_takes_the_full_range_as_its_peak():
    black = np.zeros((8, 8, 3), np.uint8)
    assert picture_psnr(black + np.uint8(1), black) == pytest.approx(20 * np.log10(255))
    assert picture_psnr(black, black) == EXACT


@pytest.mark.parametrize("text", ["ddim:20@4", "lcm:4@1", "dpm++:8@4.5", "ddim-trailing:8@1", "dpm++-leading:10@7"])
def test_schedules_are_read_as_they_are_written(text):
    assert written(complete(settings_of(text), EMBEDDED.schedule)) == text


def test_own_is_the_bundles_schedule():
    assert written(complete(settings_of("own"), Schedule("lcm", 4, 1.0, timesteps="trailing"))) == "lcm:4@1"


@pytest.mark.parametrize("text", ["", "ddim", "ddim:20", "euler:20@4", "ddim:x@4", "ddim:20@4 ", "DDIM:20@4"])
def test_what_is_no_schedule_is_refused_in_one_line_that_shows_how(text):
    with pytest.raises(BadInput, match="ddim:20@4") as refusal:
        settings_of(text)
    assert "\n" not in str(refusal.value) and all(kind in str(refusal.value) for kind in SPACINGS)


def test_timesteps_that_a_sampler_has_not_are_refused():
    with pytest.raises(BadInput, match="lcm"):
        complete(settings_of("lcm-leading:4@1"), EMBEDDED.schedule)


def test_backends_name_their_arithmetic():
    assert machine_of("openvino:bf16") == Machine("openvino", precision="bf16")
    assert told(machine_of("openvino:bf16")) == "openvino:bf16" and told(machine_of("ort")) == "ort"
    for wrong in ("torch", "ort:int8", "openvino:"):
        with pytest.raises(BadInput, match="--backends"):
            machine_of(wrong)


def test_the_reference_stands_first_and_is_no_candidate_of_itself():
    found = columns(EMBEDDED, EMBEDDED, ["ort", "openvino"], ["own", "dpm++:8@4"])
    own = written(found[0].settings)
    assert [column.title for column in found] == [
        f"nano ort {own}", "nano ort dpm++:8@4", f"nano openvino {own}", "nano openvino dpm++:8@4"]


def test_nothing_to_compare_is_refused():
    with pytest.raises(BadInput, match="its own reference"):
        columns(EMBEDDED, EMBEDDED, ["ort"], ["own"])


def test_bundles_of_one_name_are_told_apart_by_their_hash():
    first, second = columns(bundle_with(), EMBEDDED, ["ort"], ["own"])
    assert first.title.startswith(f"nano {EMBEDDED.digest[:6]} ort") and second.title.startswith("nano ffffff ort")


def test_bundles_of_one_name_are_told_apart_by_their_weights_where_those_differ():
    first, second = columns(int8_form(), EMBEDDED, ["ort"], ["own"])
    assert (first.label, second.label) == ("nano f16", "nano int8")
    assert (weights(first), weights(second)) == ("f16", "int8")


def test_bundles_of_different_sizes_are_refused():
    smaller = dataclasses.replace(EMBEDDED.config, height=128)
    with pytest.raises(BadInput, match="different sizes"):
        columns(bundle_with(config=smaller), EMBEDDED, ["ort"], ["own"])


def test_a_float_bundle_is_its_own_reference():
    assert reference_of(EMBEDDED, None) == EMBEDDED


def made_from(digest: str) -> Bundle:
    return bundle_with(provenance={"int8": {"from_bundle": digest}})


def test_a_bundle_is_compared_with_what_it_was_made_from():
    assert reference_of(made_from(EMBEDDED.digest), None).digest == EMBEDDED.digest
    with pytest.raises(BadInput, match="000000000000…, which is neither .* name its folder with --against"):
        reference_of(made_from("0" * 64), None)


def test_what_a_bundle_was_made_from_is_found_beside_it(tmp_path):
    copy = tmp_path / "float"
    shutil.copytree(EMBEDDED.root, copy, copy_function=os.link)
    text = (copy / MANIFEST).read_text().replace('"name": "', '"name": "another ', 1)
    (copy / MANIFEST).unlink()
    (copy / MANIFEST).write_text(text)
    made = dataclasses.replace(made_from(Bundle.open(copy).digest), root=tmp_path / "int8")
    assert reference_of(made, None).root == copy


def test_coarse_weights_of_unknown_origin_need_a_reference():
    with pytest.raises(BadInput, match="int8 weights .* --against"):
        reference_of(int8_form(), None)


def test_a_difference_is_paired_and_so_surer_than_its_parts():
    base = RNG.normal(0.3, 0.2, 60)
    one = [record(k, own=float(value)) for k, value in enumerate(base)]
    other = [record(k, own=float(value) - 0.01) for k, value in enumerate(base)]
    row = compared(measures(True, True)[OWN[INDEPENDENT]][0], one, other)
    assert row.difference.value == pytest.approx(-0.01)
    assert row.difference.high - row.difference.low < 1e-9 < 0.05 < row.reference.high - row.reference.low
    assert row.triples == 60


def test_triples_without_a_face_count_as_not_found_and_in_no_difference():
    one, other = [record(k) for k in range(4)], [record(k, off=5.0) for k in range(4)]
    other[0]["answer"] = {"found": False}
    known = measures(True, True)
    pose = compared(known[POSE][0], one, other)
    assert (pose.triples, pose.difference.value) == (3, pytest.approx(3))
    assert compared(known["face found"][0], one, other).candidate.value == 0.75
    assert compared(known["text: hair"][0], one, other).candidate.value == 0.75  # and cannot say what was asked


def test_the_pose_error_is_the_angle_of_one_rotation():
    far = record(0, yaw=10.0, off=20.0)
    far["answer"]["angles"] |= {"pitch": 20.0}
    error = measures(True, True)[POSE][0]
    assert error(record(0, off=-7.0)) == pytest.approx(7)
    assert 20 < error(far) < 40


def test_without_judge_or_parser_their_rows_are_left_out():
    assert OWN[INDEPENDENT] not in measures(False, True) and OWN[CONDITIONING] in measures(False, True)
    names = measures(True, False)
    assert "text: smile" in names and "text: hair" not in names
    text, _ = names["text: all that it names"]
    assert text(record(0)) == 0  # the smile alone is measured, and wrong


def test_portraits_are_compared_face_by_face():
    one, other = [record(k) for k in range(3)], [record(k) for k in range(3)]
    for row in other:
        row["answer"]["vectors"] = {CONDITIONING: [0.0, 1.0], INDEPENDENT: [0.6, 0.8]}
    found = likeness(one, other, [{"psnr": 30.0, "ssim": 0.9}] * 3, True)
    assert [round(number.value, 6) for number, _ in found.values()] == [30, 0.9, 0, 1]


def test_errors_of_eps_are_means_over_trajectories():
    rows = [{"timesteps": [951, 1], "relative": [0.1, 0.3], "psnr": [20.0, 10.0]},
            {"timesteps": [951, 1], "relative": [0.3, 0.5], "psnr": [10.0, 8.0]}]
    first, last = step_errors(rows)
    assert (first.timestep, first.relative.value, first.psnr_db) == (951, pytest.approx(0.2), 15)
    assert (last.timestep, last.relative.value) == (1, pytest.approx(0.4))
    assert step_errors([]) == []


def test_light_is_compared_by_its_direction_whatever_its_strength():
    one = directional_light(0.0, 0.0)
    assert light_degrees(3 * directional_light(30.0, 0.0), one) == pytest.approx(30, abs=0.1)
    assert light_degrees(one, one) == pytest.approx(0, abs=1e-3)


def judged(column, reference, own: float, pose: float, alike: float) -> list[bool]:
    one = Estimate(0.0, 0.0, 0.0)
    rows = {name: Compared(one, one, Estimate(own, own, own), 8) for name in OWN.values()}
    rows[POSE] = Compared(one, one, Estimate(pose, pose, pose), 8)
    return [verdict.met for verdict in verdicts(column, reference, rows, {SSIM: Estimate(alike, alike, alike)})]


def test_limits_are_stricter_where_the_schedule_is_the_same():
    reference, few, same, _ = columns(EMBEDDED, EMBEDDED, ["ort", "openvino"], ["own", "dpm++:8@4"])
    assert judged(same, reference, -0.009, 0.9, 0.91) == [True, True, True, True]
    assert judged(same, reference, -0.011, 1.1, 0.89) == [False, False, False, False]
    assert judged(few, reference, -0.029, 1.9, 0.1) == [True, True, True]
    assert judged(few, reference, -0.031, 2.1, 0.1) == [False, False, False]


def test_a_figure_without_a_value_meets_no_limit():
    reference, *_, same, _ = columns(EMBEDDED, EMBEDDED, ["ort", "openvino"], ["own", "dpm++:8@4"])
    assert judged(same, reference, np.nan, np.nan, np.nan) == [False] * 4


def test_a_limit_is_refuted_where_the_whole_interval_misses_it():
    """What a gate of a few triples goes by."""
    reference, *_, same, _ = columns(EMBEDDED, EMBEDDED, ["ort", "openvino"], ["own", "dpm++:8@4"])
    none = Estimate(0.0, 0.0, 0.0)

    def refuted(own, pose, alike):
        rows = {name: Compared(none, none, own, 8) for name in OWN.values()} | {POSE: Compared(none, none, pose, 8)}
        return [verdict.refuted for verdict in verdicts(same, reference, rows, {SSIM: alike})]

    poor = Estimate(-0.05, -0.08, -0.02), Estimate(3.0, 1.5, 4.0), Estimate(0.8, 0.7, 0.85)
    unsure = Estimate(-0.05, -0.08, 0.0), Estimate(3.0, 0.5, 4.0), Estimate(0.8, 0.7, 0.95)
    assert refuted(*poor) == [True] * 4 and refuted(*unsure) == [False] * 4
    assert refuted(*3 * [Estimate(np.nan, np.nan, np.nan)]) == [False] * 4  # random weights show no faces


def test_a_bundle_may_carry_its_own_limits():
    own = {"equal_schedule": {"ssim": 0.5}, "other_schedule": {}}
    reference, candidate = columns(bundle_with(provenance={"fidelity_limits": own}), EMBEDDED, ["ort"], ["own"])
    assert limits_of(candidate, reference) == {"ssim": 0.5}
    assert limits_of(reference, reference)["pose_loss_degrees"] == 1


@pytest.mark.parametrize("limits", [3, {"equal_schedule": {}}, {"equal_schedule": {"hue": 1}, "other_schedule": {}},
                                    {"equal_schedule": {"ssim": "high"}, "other_schedule": {}}])
def test_limits_that_are_none_are_refused_in_one_line(limits):
    reference, candidate = columns(bundle_with(provenance={"fidelity_limits": limits}), EMBEDDED, ["ort"], ["own"])
    with pytest.raises(BundleError, match="fidelity_limits") as refusal:
        limits_of(candidate, reference)
    assert "\n" not in str(refusal.value)


@pytest.fixture
def findings() -> Findings:
    reference, candidate = columns(bundle_with(), EMBEDDED, ["ort"], ["own"])
    one, other = [record(k, own=0.3) for k in range(3)], [record(k, own=0.2, off=2.5) for k in range(3)]
    rows = {name: (compared(measure, one, other), style) for name, (measure, style) in measures(True, True).items()}
    alike = likeness(one, other, [{"psnr": 30.0, "ssim": 0.95}] * 3, True)
    limits = verdicts(candidate, reference, {name: row for name, (row, _) in rows.items()},
                      {name: number for name, (number, _) in alike.items()})
    steps = step_errors([{"timesteps": [951, 1], "relative": [0.1, 0.3], "psnr": [20.0, 10.0]}])
    places = [Place(reference.place, [Verdict("denoiser", 84.4, 45.0, "ort")]),
              Place(candidate.place, [Verdict("denoiser", 20.0, 35.0, "ort")], steps, 1)]
    return Findings(reference, places, [Candidate(candidate, rows, alike, limits)], 3, 1, ["Left out: hats."])


def test_the_report_says_what_was_lost_and_which_limits_were_missed(findings):
    text = as_markdown(findings)
    assert "3 triples of photo, head and prompt, 1 skipped" in text and "Left out: hats." in text
    assert "| cosine to the photo, independent one | 0.300 [0.300, 0.300] | 0.200; -0.100 [-0.100, -0.100] |" in text
    assert "| pose error | 2.0° [2.0, 2.0] | 2.5°; +0.5° [0.5, 0.5] |" in text
    assert "| nano ffffff ort ddim:20@4 | SSIM at least | 0.9 | 0.950 [0.950, 0.950] | met |" in text
    assert text.count("| missed |") == 2 and findings.missed  # identity, by both networks
    assert "| denoiser | 84.4 dB | 20.0 dB * |" in text
    assert "| 951 | 10 %, 20.0 dB |" in text
    widths = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert len(set(widths)) <= 5


def test_the_report_as_json_is_valid_and_complete(findings):
    data = json.loads(json.dumps(as_json(findings), allow_nan=False))
    (candidate,) = data["candidates"].values()
    assert candidate["measures"]["pose error"]["difference"]["value"] == pytest.approx(0.5)
    assert candidate["denoiser_bytes"] < candidate["bytes"]
    assert [limit["met"] for limit in candidate["limits"]] == [False, False, True, True] and data["missed"]
    assert data["places"]["nano ffffff ort"]["steps"][0]["relative"]["low"] is None


@pytest.fixture
def photo_folder(tmp_path: Path) -> Path:
    for name in ("b.jpg", "a.png", "c.JPEG"):
        Image.new("RGB", (64, 64)).save(tmp_path / name, format="PNG")
    (tmp_path / "notes.txt").write_text("no photo")
    return tmp_path


def test_each_photo_gets_the_head_of_the_next(photo_folder):
    source, pairs = open_pictures(photo_folder)
    assert isinstance(source, Photos) and source.fit == "face"
    assert [(pair.reference, pair.targets[0], pair.seed, pair.shown) for pair in pairs] == [
        ("a.png", "b.jpg", 0, True), ("b.jpg", "c.JPEG", 1, True), ("c.JPEG", "a.png", 2, True)]


def test_other_photos_of_the_same_names_are_another_source(photo_folder):
    before = Photos(photo_folder).digest
    Image.new("RGB", (64, 65)).save(photo_folder / "a.png")
    assert Photos(photo_folder).digest != before


@pytest.mark.parametrize("count", [0, 4])
def test_more_triples_than_photos_are_refused(photo_folder, count):
    with pytest.raises(BadInput, match=f"--triples is {count}, expected 1 to 3"):
        open_pictures(photo_folder, count)


def test_a_folder_without_photos_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(BadInput, match="--pictures|give another"):
            open_pictures(folder)


def test_missing_judges_are_noted_with_the_remedy(tmp_path, photo_folder):
    pytest.importorskip("openvino")
    with Pipeline(EMBEDDED, renderer="numpy") as pipe:
        judging = Judging(scorer=tmp_path / "none", parser=tmp_path)
        bench, notes = open_bench(pipe, Photos(photo_folder), judging, tmp_path)
    assert bench.judge is None and bench.measurer.parser is None
    assert len(notes) == 2 and all("--fetch" in note and note.startswith("Left out") for note in notes)


def test_a_bundle_that_facenet_conditions_is_judged_by_another_network(tmp_path):
    from caphuman_edge.quant.judges import open_judge

    config = dataclasses.replace(EMBEDDED.config, identity_size=160, identity_width=512)
    assert open_judge("auto", tmp_path / "none", False, bundle_with(config=config)).name == "sface"


def test_a_gate_stays_affordable(tmp_path):
    with pytest.raises(BadInput, match="2 to 8 triples, not 300"):
        gate(EMBEDDED, EMBEDDED, tmp_path, triples=300)


def test_settings_of_a_column_are_complete():
    first, *_ = columns(bundle_with(), EMBEDDED, ["ort"], ["own"])
    assert None not in (getattr(first.settings, name) for name in columns_module.SAMPLING)
    assert first.settings == complete(Settings(), EMBEDDED.schedule)
