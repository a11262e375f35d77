"""`caphuman inspect`, `verify` and `doctor`, the parser around them, and commands of other packages."""
import dataclasses
import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import numpy as np
import pytest

from caphuman_edge.runtime import cli
from caphuman_edge.runtime.backends import BACKENDS
from caphuman_edge.runtime.bundle import Bundle, record_files, write_manifest
from caphuman_edge.runtime.cli import doctor, inspect
from caphuman_edge.runtime.kernels import attention_kernels
from caphuman_edge.runtime.manifest import DATA, Component

MAIN = "import sys; from caphuman_edge.runtime.cli import main; "


def test_inspect_tells_size_graphs_licences_and_what_it_was_made_from(caphuman):
    done = caphuman("inspect")
    bundle = Bundle.open()
    assert (done.code, done.err) == (0, "")
    titles = ("to measure a photo", "once a portrait", "each step", "data", "licences", "made from")
    for words in (bundle.manifest.name, bundle.digest, *titles, *bundle.manifest.components):
        assert words in done.out
    assert max(map(len, done.out.splitlines())) <= inspect.WIDTH


def test_inspect_shows_each_form_with_precision_and_parity_and_short_hashes_of_the_sources():
    form = {"path": "denoiser/model.onnx", "bytes": 3_440_000_000, "precision": "f16", "parity": {"psnr_db": 52.34}}
    parts = {"denoiser": {"forms": {"onnx": form, "coreml": {**form, "precision": "palette6", "parity": {
        "eps": 41.0, "x": 45.0}}}}, "head": {"forms": {"data": {**form, "parity": {}}}}}
    source = {"file": "caphuman.ckpt", "sha256": "ab" * 32, "bytes": 5_110_000_000, "tensors": 1304, "dtypes": ["f32"]}
    lora = {"part": "unet", "file": "lcm.safetensors", "sha256": "cd" * 32, "bytes": 67_500, "lora_scale": 0.5}
    made_from = {"weights": [{"part": "capface", **source, "lora_scale": None}, lora], "samples_seen": 67_848,
                 "perception": {"parser": {"file": "79999.pth", "file_sha256": ""}}}
    report = {**inspect.facts(Bundle.open()), "components": parts, "bytes_by_format": {"onnx": 3_440_000_000},
              "licences": {"caphuman.ckpt": "CC-BY-NC-4.0 " * 12}, "provenance": made_from}
    lines = inspect.text(report).splitlines()
    rows = [line.split() for line in lines]
    assert ["denoiser", "onnx", "f16", "3.44", "GB", "52.3", "dB"] in rows
    assert ["coreml", "palette6", "3.44", "GB", "41.0", "dB"] in rows
    assert ["head", "3.44", "GB"] in rows
    made = lines[lines.index("made from") + 1:]
    assert made == [
        "  samples seen  67,848", "  weights",
        "    capface  caphuman.ckpt, sha256 abababababab…, 5.11 GB, 1,304 tensors, f32",
        "    unet     lcm.safetensors, sha256 cdcdcdcdcdcd…, 68 kB, lora scale 0.5",
        "  perception", "    parser  79999.pth"]
    wrapped = [line for line in lines if line.startswith(" " * 17 + "CC-BY-NC-4.0")]
    assert wrapped and max(map(len, lines)) <= inspect.WIDTH


def test_inspect_reports_all_forms_as_json(caphuman):
    report = json.loads(caphuman("inspect", "--json").out)
    manifest = Bundle.open().manifest
    for name, part in manifest.components.items():
        told = report["components"][name]["forms"]
        assert {form: (row["path"], row["precision"], row["parity"]) for form, row in told.items()} == {
            form: (stored.path, stored.precision, stored.parity) for form, stored in part.forms.items()}
    assert report["provenance"] == manifest.provenance and report["licences"] == manifest.licences


def test_inspect_counts_shared_files_once(caphuman):
    report = json.loads(caphuman("inspect", "--json").out)
    bundle = Bundle.open()
    listed = {path for part in bundle.manifest.components.values() for form in part.forms.values()
              for path in form.files}
    assert report["bytes"] == sum((bundle.root / path).stat().st_size for path in listed)
    assert report["bytes"] < sum(part["bytes"] for part in report["components"].values())
    assert report["bytes"] == sum(report["bytes_by_format"].values())  # no file is both a graph's and data


def test_verify_passes_on_this_machine(caphuman):
    done = caphuman("verify", "--json")
    report = json.loads(done.out)
    assert done.code == 0 and report["passed"]
    assert {row["graph"] for row in report["graphs"]} >= {"denoiser", "hint_encoder", "vae_decoder", "text_encoder"}
    assert all(row["psnr_db"] >= row["floor_db"] for row in report["graphs"])


def test_verify_runs_on_the_backend_that_is_asked_for(caphuman):
    pytest.importorskip("openvino")
    done = caphuman("verify", "--backend", "openvino", "--device", "auto", "--precision", "f32", "--json")
    report = json.loads(done.out)
    assert done.code == 0 and report["passed"]
    assert {row["backend"] for row in report["graphs"]} == {"openvino"}
    assert (report["backend"], report["device"], report["precision"]) == ("openvino", "auto", "f32")


@pytest.mark.parametrize("command", [("verify",), ("generate", "x.png"), ("preview", "x.png")])
def test_a_backend_that_is_not_installed_is_one_line_with_the_command_that_installs_it(refusal, monkeypatch, photo,
                                                                                       command):
    monkeypatch.delitem(sys.modules, "caphuman_edge.runtime.backends.openvino", raising=False)
    monkeypatch.setitem(sys.modules, "openvino", None)  # makes the import fail
    line = refusal(command[0], *([photo] if command[1:] else []), "--backend", "openvino")
    assert line == "caphuman: backend openvino needs openvino: pip install 'caphuman-edge[openvino]'\n"


@pytest.mark.skipif(sys.platform == "darwin", reason="this is a Mac")
def test_a_backend_of_another_platform_is_one_line(refusal):
    assert "runs on macOS alone" in refusal("verify", "--backend", "coreml")


def test_doctor_names_the_devices_of_each_backend_or_what_is_in_the_way(caphuman, monkeypatch):
    monkeypatch.delitem(sys.modules, "caphuman_edge.runtime.backends.openvino", raising=False)
    monkeypatch.setitem(sys.modules, "openvino", None)
    lines = caphuman("doctor").out.splitlines()
    rows = {line[:18].strip(): line[19:] for line in lines}
    assert rows["--backend ort"] == "cpu"
    assert rows["--backend openvino"] == ("not usable: backend openvino needs openvino: "
                                          "pip install 'caphuman-edge[openvino]'")


def test_verify_fails_where_a_graph_computes_something_else(caphuman, bundle_copy):
    with np.load(bundle_copy / "selftest.npz") as archive:
        arrays = {key: archive[key] for key in archive.files if key.startswith(("vae_decoder/", "text_encoder/"))}
    arrays["vae_decoder/out/sample"] = arrays["vae_decoder/out/sample"] * 1.1
    replace_selftest(bundle_copy, arrays)
    done = caphuman("verify", bundle_copy)
    lines = {line.split()[0]: line for line in done.out.splitlines()}
    assert done.code == 2
    assert "FAILED" in lines["vae_decoder"] and "ok" in lines["text_encoder"]


def test_verify_refuses_a_selftest_that_does_not_fit(refusal, bundle_copy):
    with np.load(bundle_copy / "selftest.npz") as archive:
        arrays = {key: archive[key] for key in archive.files if key.startswith("vae_decoder/")}
    arrays["vae_decoder/out/sample"] = arrays["vae_decoder/out/sample"][..., :-1]
    replace_selftest(bundle_copy, arrays)
    assert "vae_decoder: selftest.npz expects sample" in refusal("verify", bundle_copy)


@pytest.mark.parametrize("kept", ["vae_decoder/in/", "no graph"])
def test_verify_refuses_a_selftest_without_outputs(refusal, bundle_copy, kept):
    with np.load(bundle_copy / "selftest.npz") as archive:
        arrays = {key: archive[key] for key in archive.files if key.startswith(kept)}
    replace_selftest(bundle_copy, arrays)
    assert "selftest.npz" in refusal("verify", bundle_copy)


def replace_selftest(folder, arrays):
    for name in ("selftest.npz", "bundle.json"):
        (folder / name).unlink()  # links to the embedded bundle's
    np.savez(folder / "selftest.npz", **arrays)
    manifest = Bundle.open().manifest
    files = record_files(folder, [folder / "selftest.npz"])
    form = dataclasses.replace(manifest.components["selftest"].forms[DATA], files=files)
    selftest = Component({DATA: form})
    write_manifest(folder, dataclasses.replace(manifest, components=manifest.components | {"selftest": selftest}))


def test_doctor_tells_versions_renderer_extras_bundle_and_cache(caphuman, tmp_path):
    report = json.loads(caphuman("doctor", "--json").out)
    assert report["packages"]["numpy"] == np.__version__
    assert report["packages"]["onnxruntime"] and report["cores"] >= 1
    assert {"gl", "openvino", "export"} <= report["extras"].keys() and "dev" not in report["extras"]
    assert report["backends"]["ort"] == "cpu" and report["backends"].keys() == set(BACKENDS)
    assert report["cache"].startswith(f"{tmp_path.parent / 'cache'}, compiled models ")
    assert Bundle.open().manifest.name in report["bundle"]
    assert report["kernels"].startswith(", ".join(attention_kernels()) or "none: reinstall with a C++ compiler")


def test_doctor_prints_the_install_command_of_what_is_missing(caphuman, monkeypatch):
    installed = doctor.found
    monkeypatch.setattr(doctor, "found", lambda name: None if name == "moderngl" else installed(name))
    assert "moderngl not installed: pip install 'caphuman-edge[gl]'" in caphuman("doctor").out


@pytest.mark.parametrize("package", ["numpy", "PIL", "onnxruntime", "jaxtyping"])
def test_doctor_runs_where_even_the_base_is_broken(package):
    done = subprocess.run([sys.executable, "-c", f"{MAIN} sys.modules[{package!r}] = None; sys.exit(main(['doctor']))"],
                          capture_output=True, text=True, check=True)
    assert "python" in done.stdout and "Traceback" not in done.stderr


def test_generate_without_its_packages_points_to_the_doctor():
    done = subprocess.run([sys.executable, "-c", f"{MAIN} sys.modules['numpy'] = None; sys.exit(main(['generate']))"],
                          capture_output=True, text=True)
    assert done.returncode == 2
    assert "caphuman: command generate cannot be loaded" in done.stderr and "caphuman doctor" in done.stderr


def test_version_and_help_are_no_errors(caphuman):
    assert caphuman("--version").out.startswith("caphuman-edge ")
    assert all(command in caphuman("--help").out for command in cli.BUILT_IN)
    assert "--yaw" in caphuman("generate", "--help").out


def test_commands_of_other_packages_are_listed_and_run(caphuman, monkeypatch):
    def add(subparsers):
        parser = subparsers.add_parser("greet", help="say hello")
        parser.set_defaults(run=lambda args: print("hello") or 0)

    monkeypatch.setitem(sys.modules, "greeter", SimpleNamespace(add=add))
    monkeypatch.setattr(cli, "entry_points", lambda group: [EntryPoint("greet", "greeter:add", group)])
    assert "say hello" in caphuman("--help").out
    assert caphuman("greet").out == "hello\n"


def test_commands_that_cannot_be_imported_are_left_out_and_refused(caphuman, refusal, monkeypatch):
    monkeypatch.setattr(cli, "entry_points", lambda group: [EntryPoint("build", "no_such_package:add", group)])
    assert "build" not in caphuman("--help").out
    assert "no_such_package" in refusal("build", "--anything")


def test_a_reader_that_has_seen_enough_is_no_error():
    with subprocess.Popen([sys.executable, "-c", f"{MAIN} sys.exit(main(['doctor']))"], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == cli.BROKEN_PIPE
