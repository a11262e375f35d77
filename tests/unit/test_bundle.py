"""Bundles: what is written opens again; what is missing, altered or foreign is refused in one line that names it."""
import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest

from caphuman_edge.runtime.bundle import Bundle, new_bundle, record_files, write_manifest
from caphuman_edge.runtime.contract import NANO, graphs
from caphuman_edge.runtime.errors import BundleError, ShapeMismatch
from caphuman_edge.runtime.manifest import DATA, Component, FileRecord, Form, Manifest, check_graph, parse
from caphuman_edge.runtime.schedule import Schedule

DECODER = graphs(NANO)["preview_decoder"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CAPHUMAN_CACHE", str(tmp_path_factory.mktemp("cache")))


def data(path: str, files: dict[str, FileRecord]) -> Component:
    return Component({DATA: Form(path, files)})


def write(folder: Path) -> None:
    """One graph in two formats, the weights of one a second component shares, and two pieces of data."""
    (folder / "preview_decoder").mkdir()
    names = ("preview_decoder/model.onnx", "preview_decoder/model.xml", "weights.bin", "head.npz")
    graph, other, weights, head = (folder / name for name in names)
    for file in (graph, other, weights, head):
        file.write_bytes(file.name.encode())
    forms = {"onnx": Form(names[0], record_files(folder, [graph, weights]), "f16", {"psnr_db": 61.5, "sample": 61.5}),
             "openvino": Form(names[1], record_files(folder, [other]))}
    components = {
        "preview_decoder": Component(forms, DECODER.inputs, DECODER.outputs),
        "weights": data("weights.bin", record_files(folder, [weights])),
        "head": data("head.npz", record_files(folder, [head])),
    }
    write_manifest(folder, Manifest("test", NANO, Schedule(steps=4, guidance=1.0), components,
                                    {"unet": {"sha256": "ab"}}, {"head": "CC0-1.0"}))


@pytest.fixture
def folder(tmp_path):
    with new_bundle(tmp_path / "bundle") as scratch:
        write(scratch)
    return tmp_path / "bundle"


def edit(folder: Path, change) -> None:
    """Alter bundle.json by a function of its data."""
    data = json.loads((folder / "bundle.json").read_text())
    change(data)
    (folder / "bundle.json").write_text(json.dumps(data))


def head(data) -> dict:
    """Its form in the data of bundle.json."""
    return data["components"]["head"]["forms"]["data"]


def refusal(folder: Path, kind: type = BundleError) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_written_opens_again(folder):
    bundle = Bundle.open(folder)
    assert bundle.config == NANO
    assert bundle.schedule == Schedule(steps=4, guidance=1.0)
    assert bundle.manifest.components["preview_decoder"].inputs == DECODER.inputs
    assert bundle.manifest.licences == {"head": "CC0-1.0"}
    assert "head" in bundle and "unet" not in bundle
    assert bundle.file("head").read_bytes() == b"head.npz"
    assert bundle.file("preview_decoder", "openvino").read_bytes() == b"model.xml"


def test_a_manifest_survives_its_text(folder):
    manifest = Bundle.open(folder).manifest
    assert parse(manifest.to_text()) == manifest


def test_the_digest_changes_with_any_file(folder, tmp_path):
    first = Bundle.open(folder).digest
    with new_bundle(tmp_path / "other") as scratch:
        write(scratch)
        (scratch / "head.npz").write_bytes(b"another")
        edit(scratch, lambda data: head(data).update(
            files=dataclasses.asdict(Form("", record_files(scratch, [scratch / "head.npz"])))["files"]))
    assert Bundle.open(tmp_path / "other").digest != first


def test_opening_twice_takes_the_hashes_from_the_cache(folder, monkeypatch):
    Bundle.open(folder)
    monkeypatch.setattr("caphuman_edge.runtime.cache._sha256", lambda path: pytest.fail(f"{path} is hashed again"))
    Bundle.open(folder)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path):
    assert "no readable bundle.json" in refusal(tmp_path)
    assert "no readable bundle.json" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"[]", b"\xff\xfe"])
def test_a_bundle_json_that_is_no_object_is_refused(folder, content):
    (folder / "bundle.json").write_bytes(content)
    assert "bundle.json" in refusal(folder)


def test_a_huge_bundle_json_is_refused_unread(folder):
    with (folder / "bundle.json").open("r+b") as file:
        file.truncate(17 << 20)
    assert "over 16 MiB" in refusal(folder)


def test_another_format_version_is_named(folder):
    edit(folder, lambda data: data.update(format=1))
    assert refusal(folder) == "bundle.json has format 1, expected 2; rebuild the bundle with this version"


def test_a_missing_file_is_named(folder):
    (folder / "weights.bin").unlink()
    assert f"{folder / 'weights.bin'} is missing" in refusal(folder)


def test_a_truncated_file_is_named_with_both_sizes(folder):
    (folder / "head.npz").write_bytes(b"head")
    assert f"{folder / 'head.npz'} has 4 bytes, expected 8" in refusal(folder)


def test_an_altered_file_of_the_same_size_is_named(folder):
    (folder / "head.npz").write_bytes(b"HEAD.npz")
    assert f"{folder / 'head.npz'} has sha256" in refusal(folder)


@pytest.mark.parametrize("path", ["../head.npz", "/etc/passwd", "a/../../b", "c:\\x", "..\\x", "", "."])
def test_a_path_that_leaves_the_bundle_is_refused(folder, path):
    edit(folder, lambda data: head(data).update(path=path))
    assert "bundle.json" in refusal(folder)
    edit(folder, lambda data: head(data).update(path="head.npz"))
    edit(folder, lambda data: head(data)["files"].update({path: {"sha256": "", "size": 0}}))
    assert "stay inside" in refusal(folder)


def test_a_path_that_no_record_covers_is_refused(folder):
    edit(folder, lambda data: head(data).update(path="weights.bin"))
    assert "components.head.forms.data.path is weights.bin" in refusal(folder)


def test_a_component_may_be_a_folder(tmp_path):
    with new_bundle(tmp_path / "bundle") as scratch:
        package = scratch / "unet.mlpackage" / "Data"
        package.mkdir(parents=True)
        (package / "weight.bin").touch()
        part = data("unet.mlpackage", record_files(scratch, [package.parent]))
        write_manifest(scratch, Manifest("test", NANO, Schedule(), {"part": part}))
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.file("part").is_dir()
    assert list(bundle.component("part").forms[DATA].files) == ["unet.mlpackage/Data/weight.bin"]


@pytest.mark.parametrize("change", [
    lambda data: data.pop("config"),
    lambda data: data.update(colour="red"),
    lambda data: data.update(name=3),
    lambda data: data["config"].pop("unet"),
    lambda data: data["config"].update(height="256"),
    lambda data: data["config"].update(height=True),
    lambda data: data["config"]["unet"].update(depth=1),
    lambda data: data["config"]["unet"].update(channel_mult=[1, "2"]),
    lambda data: data["config"]["vae"].update(channel_mult=[]),
    lambda data: data["config"]["vision"].update(patch_size=0),
    lambda data: data["schedule"].update(steps=4.5),
    lambda data: data["schedule"].update(sampler="ddim"),
    lambda data: data["schedule"].update(kind="euler"),
    lambda data: head(data).update(parity={"psnr_db": "61.5"}),
    lambda data: head(data).update(parity={"psnr_db": True}),
    lambda data: data.update(components=[]),
    lambda data: data["components"].update(head=None),
    lambda data: data["components"]["head"].update(forms=[]),
    lambda data: head(data).pop("files"),
    lambda data: head(data)["files"].update({"head.npz": "abc"}),
    lambda data: head(data)["files"]["head.npz"].update(size="8"),
    lambda data: data["components"]["preview_decoder"]["inputs"][0].update(shape=[1, None]),
    lambda data: data["components"]["head"].update(inputs=[{"name": "x", "shape": [1], "dtype": "float32"}]),
    lambda data: data["components"]["weights"]["forms"]["data"]["files"]["weights.bin"].update(sha256="0" * 64),
])
def test_a_malformed_manifest_is_refused_in_one_line(folder, change):
    edit(folder, change)
    assert "bundle.json" in refusal(folder)


@pytest.mark.parametrize(("component", "change", "match"), [
    ("head", lambda forms: forms.clear(), "components.head.forms are nothing, expected some of onnx, openvino"),
    ("head", lambda forms: forms.update(tflite=forms.pop("data")), "head.forms are tflite, expected some of onnx"),
    ("head", lambda forms: forms.update(onnx=forms["data"]), "forms are data, onnx, expected .* or data alone"),
    ("head", lambda forms: forms.update(onnx=forms.pop("data")), "head is an unknown graph, known are .*denoiser"),
    ("preview_decoder", lambda forms: (forms.update(data=forms.pop("onnx")), forms.pop("openvino")),
     "preview_decoder is data, expected a graph"),
])
def test_a_component_is_a_graph_in_known_formats_or_data(folder, component, change, match):
    edit(folder, lambda data: change(data["components"][component]["forms"]))
    message = refusal(folder)
    assert re.search(match, message), message


def test_asking_for_a_form_that_is_not_there_names_those_that_are(folder):
    with pytest.raises(BundleError, match="preview_decoder of .* is stored as onnx and openvino, expected coreml;"):
        Bundle.open(folder).file("preview_decoder", "coreml")
    with pytest.raises(BundleError, match="is stored as onnx and openvino, expected data"):
        Bundle.open(folder).file("preview_decoder")


def test_the_first_format_that_is_there_is_taken(folder):
    bundle = Bundle.open(folder)
    assert bundle.form("preview_decoder", ("coreml", "openvino", "onnx")).path == "preview_decoder/model.xml"
    assert bundle.form("preview_decoder", ("onnx", "openvino")).path == "preview_decoder/model.onnx"


@pytest.mark.parametrize(("change", "match"), [
    (lambda graph: graph["inputs"][0].update(name="z"), "preview_decoder inputs are z, expected latent_sample"),
    (lambda graph: graph["inputs"][0].update(dtype="float16"), "latent_sample is float16 .*, expected float32"),
    (lambda graph: graph["inputs"][0].update(shape=[1, 4, 64, 64]), r"\[1, 4, 64, 64\], expected .* \[1, 4, 32, 32\]"),
    (lambda graph: graph["outputs"][0].update(shape=[1, 3]), "outputs: sample"),
    (lambda graph: graph.update(outputs=[]), "outputs are nothing, expected sample"),
])
def test_a_graph_that_is_not_the_contract_s_is_refused_with_both_sides(folder, change, match):
    edit(folder, lambda data: change(data["components"]["preview_decoder"]))
    message = refusal(folder, ShapeMismatch)
    assert re.search(match, message), message


def test_a_symbolic_length_fits_any_and_the_definite_one_is_kept():
    text = graphs(NANO)["text_encoder"]
    fixed = [dataclasses.replace(t, shape=(1, *t.shape[1:])) for t in (*text.inputs, *text.outputs)]
    assert check_graph("x", fixed[:1], fixed[1:], text).inputs[0].shape == (1, 77)
    loose = [dataclasses.replace(t, shape=("n", *t.shape[1:])) for t in (*text.inputs, *text.outputs)]
    assert check_graph("x", loose[:1], loose[1:], text) == text


def test_asking_for_what_is_not_there_lists_what_is(folder):
    with pytest.raises(BundleError, match="no component unet, it has head, preview_decoder, weights"):
        Bundle.open(folder).file("unet")


def test_data_is_not_run(folder):
    with pytest.raises(BundleError, match="is data, not a graph"):
        Bundle.open(folder).graph("head")


def test_a_build_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), new_bundle(tmp_path / "bundle") as scratch:
        write(scratch)
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_build_that_does_not_verify_is_not_published(tmp_path):
    with pytest.raises(BundleError, match="head.npz"), new_bundle(tmp_path / "bundle") as scratch:
        write(scratch)
        (scratch / "head.npz").write_bytes(b"changed after it was recorded")
    assert list(tmp_path.iterdir()) == []


def test_two_builds_of_one_bundle_do_not_touch_each_other(tmp_path):
    with new_bundle(tmp_path / "bundle", overwrite=True) as first:
        write(first)
        with new_bundle(tmp_path / "bundle", overwrite=True) as second:
            write(second)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_bundle_may_be_read_by_those_who_may_read_the_folder_beside_it(folder, tmp_path):
    (tmp_path / "beside").mkdir()
    assert folder.stat().st_mode == (tmp_path / "beside").stat().st_mode


def test_a_bundle_of_before_there_was_a_fast_decoder_opens(folder):
    edit(folder, lambda data: data["config"].pop("tiny_channels"))
    assert Bundle.open(folder).config.tiny_channels == 64


def test_a_bundle_that_a_killed_build_had_moved_away_is_put_back(folder, tmp_path):
    folder.rename(tmp_path / ".bundle.old")
    with pytest.raises(BundleError, match="exists"), new_bundle(folder):
        pytest.fail("the build began")
    assert Bundle.open(folder) and not (tmp_path / ".bundle.old").exists()


def test_an_error_of_the_builder_itself_is_not_taken_for_one_of_the_place(tmp_path):
    with pytest.raises(FileNotFoundError), new_bundle(tmp_path / "bundle"):
        (tmp_path / "no checkpoint").read_bytes()


def test_a_bundle_is_overwritten_only_when_asked_and_a_foreign_folder_never(folder, tmp_path):
    with pytest.raises(BundleError, match="exists"), new_bundle(folder):
        pytest.fail("the build began")
    with new_bundle(folder, overwrite=True) as scratch:
        write(scratch)
        shutil.copy(scratch / "head.npz", scratch / "new")
    assert (folder / "new").exists() and [path.name for path in tmp_path.iterdir()] == ["bundle"]
    (tmp_path / "photos").mkdir()
    with pytest.raises(BundleError, match="is no bundle"), new_bundle(tmp_path / "photos", overwrite=True):
        pytest.fail("the build began")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="cannot write bundle"), new_bundle(tmp_path / "file" / "bundle"):
        pytest.fail("the build began")


def test_the_embedded_bundle_is_the_miniature_and_verifies():
    config = Bundle.open().config
    latent_scale = NANO.vae.latent_scale  # measured on the training's latents, so each bundle's own
    vae = dataclasses.replace(config.vae, latent_scale=latent_scale)
    assert dataclasses.replace(config, vae=vae) == NANO
