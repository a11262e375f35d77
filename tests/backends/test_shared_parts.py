"""Bundles that share parts: what did not change is linked from another bundle, and never trusted unseen."""
import copy
import json
import os
import shutil
from types import SimpleNamespace

import pytest

from caphuman_edge.export import build_run, part_keys, part_store
from caphuman_edge.export.builder import Options, Sources, build
from caphuman_edge.export.graphs import PreviewDecoder
from caphuman_edge.export.part_store import PartStore
from caphuman_edge.runtime.bundle import Bundle, record_files
from caphuman_edge.runtime.cli import main
from caphuman_edge.runtime.errors import BundleError
from caphuman_edge.runtime.schedule import Schedule
from caphuman_edge.runtime.selftest import self_test

FEW = ("text_encoder", "preview_decoder")  # graphs that are quick to trace
SOURCES = Sources({}, "micro", Schedule(steps=2), {}, {}, "tests only")
KEPT = ["onnx/text_encoder", "onnx check/text_encoder"]
MADE = ["reference/preview_decoder", "onnx/preview_decoder", "onnx check/preview_decoder"]


@pytest.fixture(autouse=True, scope="module")
def few(tmp_path_factory):
    """Builds make a few graphs only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAPHUMAN_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(Options, "graphs_in", lambda *_: FEW)
        yield


@pytest.fixture(scope="module")
def first(micro, tmp_path_factory):
    """A bundle, not to be changed."""
    out = tmp_path_factory.mktemp("bundles") / "first"
    build(micro.model, micro.preview, SOURCES, out)
    return out


@pytest.fixture
def sibling(first, tmp_path):
    """A copy of it that a test may spoil."""
    return shutil.copytree(first, tmp_path / "first")


@pytest.fixture(scope="module")
def other(micro):
    """Another preview decoder: the change that costs least to build."""
    return PreviewDecoder(micro.preview.weight * 2, micro.preview.bias)


def log_of(model, preview, out, *like, **options):
    """Builds; gives (what was made, what was kept from which bundle, the other lines)."""
    lines = []
    build(model, preview, SOURCES, out, Options(**options), lines.append, store=PartStore(like))
    parts = [line.partition("] ")[2] for line in lines]
    made = [part.removesuffix(" ...") for part in parts if part.endswith(" ...")]
    kept = dict(part.split(": kept from ") for part in parts if ": kept from " in part)
    return made, kept, [line for line in lines if "]" not in line]


def inodes(folder):
    return {path.relative_to(folder).as_posix(): path.stat().st_ino for path in folder.rglob("*") if path.is_file()}


def passes(folder):
    """Whether the bundle verifies and its graphs compute what they should."""
    return all(verdict.passed for verdict in self_test(Bundle.open(folder)))


def test_only_what_changed_is_made_and_the_rest_is_linked(micro, other, first, tmp_path):
    out = tmp_path / "second"
    made, kept, rest = log_of(micro.model, other, out, first)
    assert made == MADE and kept == dict.fromkeys(KEPT, "first") and rest == ["2 of 6 parts are those of first"]
    theirs, ours = inodes(first), inodes(out)
    shared = {name for name, inode in ours.items() if theirs.get(name) == inode}
    assert shared == {"text_encoder/model.onnx", "text_encoder/weights.bin"}
    assert passes(out) and passes(first) and [path.name for path in tmp_path.iterdir()] == ["second"]


def test_the_result_is_that_of_a_build_from_scratch(micro, other, first, tmp_path):
    """Byte for byte, the self-test included, though its row of the kept graph comes from the other bundle."""
    log_of(micro.model, other, tmp_path / "linked", first)
    log_of(micro.model, other, tmp_path / "scratch")
    linked, scratch = (Bundle.open(tmp_path / name) for name in ("linked", "scratch"))
    assert linked.digest == scratch.digest


@pytest.mark.slow
def test_capface_lies_apart_and_is_kept_beside_any_unet(micro, monkeypatch, tmp_path):
    """In a bundle of the split form alone; `test_part_keys` tells what another UNet redoes."""
    apart = {"fused": False, "storage": "f16"}
    monkeypatch.setattr(Options, "graphs_in", lambda *_: ("capface",))
    log_of(micro.model, micro.preview, tmp_path / "first", **apart)
    monkeypatch.setattr(Options, "graphs_in", lambda *_: ("capface", "unet"))
    model = copy.deepcopy(micro.model)
    for tensor in model.unet.parameters():
        tensor.mul_(1.1)
    made, kept, _ = log_of(model, micro.preview, tmp_path / "second", tmp_path / "first", **apart)
    assert made == ["reference/unet", "onnx/unet", "onnx check/unet"]
    assert [*kept] == ["onnx/capface", "onnx check/capface"]
    first, second = (inodes(tmp_path / name) for name in ("first", "second"))
    assert {name for name, inode in second.items() if first.get(name) == inode} == {
        "capface/model.onnx", "capface/weights.bin"}
    assert "unet/weights.bin" in second and passes(tmp_path / "second")


def test_the_same_again_makes_nothing(micro, first, tmp_path):
    made, kept, _ = log_of(micro.model, micro.preview, tmp_path / "again", first)
    assert made == [] and kept.keys() == {f"{stage}/{name}" for stage in ("onnx", "onnx check") for name in FEW}
    assert Bundle.open(tmp_path / "again").digest == Bundle.open(first).digest


def test_each_part_comes_from_the_bundle_that_has_it(micro, other, first, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Options, "graphs_in", lambda *_: ("preview_decoder",))
        log_of(micro.model, other, tmp_path / "second")
    made, kept, rest = log_of(micro.model, other, tmp_path / "third", tmp_path / "second", first)
    assert made == [] and kept == dict.fromkeys(KEPT, "first") | dict.fromkeys(MADE[1:], "second")
    assert rest == ["2 of 6 parts are those of second", "2 of 6 parts are those of first"]
    assert passes(tmp_path / "third")


def test_another_format_is_made_of_the_graphs_that_are_there(micro, first, tmp_path):
    """Its check needs the reference's answers in full; those of a self-test are rounded."""
    made, kept, _ = log_of(micro.model, micro.preview, tmp_path / "both", first, formats=("onnx", "ort"))
    assert not any(name.startswith("onnx") for name in made) and len(kept) == 4
    assert set(made) == {f"{stage}/{name}" for stage in ("reference", "ort", "ort check") for name in FEW}
    made, kept, _ = log_of(micro.model, micro.preview, tmp_path / "ort", tmp_path / "both", formats=("ort",))
    assert made == [] and all(name.startswith("ort") for name in kept) and passes(tmp_path / "ort")


def test_core_ml_packages_are_linked_file_by_file(micro, tmp_path, monkeypatch):
    pytest.importorskip("coremltools")
    monkeypatch.setattr(Options, "graphs_in", lambda *_: ("preview_decoder",))
    log_of(micro.model, micro.preview, tmp_path / "first", formats=("coreml",))
    made, kept, _ = log_of(micro.model, micro.preview, tmp_path / "second", tmp_path / "first", formats=("coreml",))
    assert made == [] and [*kept] == ["coreml/preview_decoder", "coreml check/preview_decoder"]
    first, second = (inodes(tmp_path / name) for name in ("first", "second"))
    assert {name for name, inode in second.items() if first.get(name) == inode} == {
        name for name in first if ".mlpackage/" in name}
    assert Bundle.open(tmp_path / "second").digest == Bundle.open(tmp_path / "first").digest


def test_other_code_keeps_nothing_and_says_so(micro, first, tmp_path, monkeypatch):
    monkeypatch.setattr(part_keys, "_code", lambda: "another version")
    monkeypatch.setattr(Options, "graphs_in", lambda *_: ("preview_decoder",))
    made, kept, rest = log_of(micro.model, micro.preview, tmp_path / "second", first)
    assert made == MADE and kept == {} and rest == [
        "nothing of first could be kept: it is of other weights, options, libraries or code"]


def test_where_links_cannot_be_had_files_are_copied(micro, first, tmp_path, monkeypatch):
    def no_links(source, target):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    _, kept, _ = log_of(micro.model, micro.preview, tmp_path / "copy", first)
    assert len(kept) == 4 and not set(inodes(first).values()) & set(inodes(tmp_path / "copy").values())
    assert Bundle.open(tmp_path / "copy").digest == Bundle.open(first).digest


def test_a_link_to_a_file_elsewhere_is_followed(micro, sibling, tmp_path):
    """Caches of downloads lay files apart, with links in the folder that names them."""
    file = sibling / "preview_decoder/model.onnx"
    file.rename(tmp_path / "blob")
    file.symlink_to(tmp_path / "blob")
    log_of(micro.model, micro.preview, tmp_path / "second", sibling)
    ours = tmp_path / "second/preview_decoder/model.onnx"
    assert not ours.is_symlink() and ours.samefile(tmp_path / "blob")


def test_bundles_that_share_files_live_and_die_apart(micro, other, sibling, tmp_path):
    out = tmp_path / "second"
    log_of(micro.model, micro.preview, out, sibling)
    shared = out / "preview_decoder/model.onnx"
    assert shared.samefile(sibling / "preview_decoder/model.onnx")
    log_of(micro.model, other, sibling)  # over the first, of other weights
    assert not shared.samefile(sibling / "preview_decoder/model.onnx") and passes(out) and passes(sibling)
    shutil.rmtree(sibling)
    assert passes(out)


def test_a_bundle_is_built_over_itself(micro, other, sibling):
    made, kept, _ = log_of(micro.model, other, sibling, sibling)
    assert made == MADE and [*kept] == KEPT and passes(sibling)


def test_a_stopped_build_goes_on_with_what_it_took(micro, other, first, tmp_path):
    def stop(line):
        if "check/preview_decoder ..." in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(micro.model, other, SOURCES, tmp_path / "second", report=stop, store=PartStore([first]))
    made, kept, _ = log_of(micro.model, other, tmp_path / "second", first)
    assert made == ["onnx check/preview_decoder"] and kept == {} and passes(tmp_path / "second")


@pytest.mark.parametrize("damage", [
    lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]),
    lambda file: file.write_bytes(file.read_bytes()[:-1]),
    lambda file: file.unlink(),
])
def test_a_damaged_bundle_is_refused(sibling, damage):
    damage(sibling / "text_encoder/model.onnx")
    with pytest.raises(BundleError, match=r"text_encoder/model\.onnx .*(altered|missing)"):
        PartStore([sibling])


def test_damage_that_comes_after_it_was_opened_is_seen(micro, sibling, tmp_path):
    store = PartStore([sibling])
    file = sibling / "text_encoder/model.onnx"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(BundleError, match=r"text_encoder/model\.onnx is not what its bundle says"):
        build(micro.model, micro.preview, SOURCES, tmp_path / "second", store=store)
    file.unlink()
    with pytest.raises(BundleError, match=r"text_encoder/model\.onnx cannot be read"):
        build(micro.model, micro.preview, SOURCES, tmp_path / "second", store=store)
    assert not (tmp_path / "second").exists()


def test_a_copy_that_went_wrong_is_seen(micro, first, tmp_path, monkeypatch):
    monkeypatch.setattr(part_store, "_linked", lambda source, target: False)
    monkeypatch.setattr(part_store.shutil, "copyfile", lambda source, target: target.write_bytes(b"half"))
    with pytest.raises(BundleError, match=r"model\.onnx is not what its bundle says"):
        build(micro.model, micro.preview, SOURCES, tmp_path / "second", store=PartStore([first]))


def resealed(bundle, path, content):
    """Another file in a bundle whose manifest lists it: what a tool would leave that changes a finished bundle."""
    (bundle / path).write_bytes(content)
    record = record_files(bundle, [bundle / path])[path]
    manifest = json.loads((bundle / "bundle.json").read_text())
    for component in manifest["components"].values():
        for form in component["forms"].values():
            if path in form["files"]:
                form["files"][path] = {"sha256": record.sha256, "size": record.size}
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    Bundle.open(bundle)
    return bundle


def test_a_graph_that_was_rewritten_since_its_build_is_made_anew(micro, sibling, first, tmp_path):
    """And so is the check, which was of the graph as it had been."""
    path = "preview_decoder/model.onnx"
    resealed(sibling, path, (first / "text_encoder/model.onnx").read_bytes())
    made, kept, _ = log_of(micro.model, micro.preview, tmp_path / "second", sibling)
    assert made == MADE and [*kept] == KEPT
    assert (tmp_path / "second" / path).read_bytes() == (first / path).read_bytes()


def test_a_rewritten_self_test_gives_no_rows(micro, sibling, tmp_path):
    resealed(sibling, "selftest.npz", (sibling / "selftest.npz").read_bytes() + b" ")
    made, _, _ = log_of(micro.model, micro.preview, tmp_path / "second", sibling)
    assert made == [f"reference/{name}" for name in FEW]


def entry(**fields):
    whole = {"key": "a", "facts": {"precision": "f16"}, "files": {"text_encoder/model.onnx": "b"}}
    return json.dumps({"onnx/text_encoder": whole | fields})


@pytest.mark.parametrize("record", [
    "{", "[]", "{}", "[" * 100_000, '{"onnx/unet": 3}', '{"onnx/unet": {"key": "a"}}', entry(key=1),
    entry(facts={"precision": [1]}), entry(files=["a"]), entry(files={"model.onnx": "b"}),
    entry(files={"text_encoder/part.json": "b"}), entry(files={"text_encoder/config.json": "b"}),
    pytest.param(" " * (part_store.MAX_RECORD + 1), id="large"),
])
def test_a_record_that_is_none_is_one_clear_error(sibling, record):
    resealed(sibling, "parts.json", record.encode())
    with pytest.raises(BundleError, match=r"parts\.json is no record of a build's parts; build without --like"):
        PartStore([sibling])


def test_a_bundle_without_a_record_has_nothing_to_give(micro, sibling, tmp_path, monkeypatch):
    monkeypatch.setattr(Options, "graphs_in", lambda *_: ("preview_decoder",))
    manifest = json.loads((sibling / "bundle.json").read_text())
    del manifest["components"]["parts"]
    (sibling / "bundle.json").write_text(json.dumps(manifest))
    made, _, rest = log_of(micro.model, micro.preview, tmp_path / "second", sibling)
    assert made == MADE and "nothing of first could be kept" in rest[0]


def test_the_command_names_any_number_of_bundles(first, sibling, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(build_run, "gather", lambda *_: (SimpleNamespace(first_stage_model=None), None, None))
    monkeypatch.setattr(build_run, "preview_of", lambda _: None)

    def take(*_, store, **__):
        seen["origins"] = store.origins
        shutil.copytree(first, tmp_path / "out")

    monkeypatch.setattr(build_run, "build", take)
    flags = ["--random-weights", "nano", "--out", str(tmp_path / "out"), "--like", str(first), "--like", str(sibling)]
    assert main(["build", *flags, "--json"]) == 0 and seen["origins"] == ["first", "first"]


def test_a_bundle_that_is_none_is_refused_before_anything_is_read(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(build_run, "gather", lambda *_: pytest.fail("read"))
    flags = ["--random-weights", "nano", "--out", str(tmp_path / "out"), "--like", str(tmp_path / "none")]
    assert main(["build", *flags]) == 2
    out, err = capfd.readouterr()
    assert out == "" and "none is not a bundle: no readable bundle.json in it" in err and err.count("\n") == 1
