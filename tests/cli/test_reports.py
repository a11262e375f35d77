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
from caphuman_edge.runtime.bundle import Bundle, record_files, write_manifest
from caphuman_edge.runtime.cli import doctor

MAIN = "import sys; from caphuman_edge.runtime.cli import main; "


def test_inspect_tells_size_graphs_licences_and_provenance(caphuman):
    done = caphuman("inspect")
    bundle = Bundle.open()
    assert (done.code, done.err) == (0, "")
    for words in (bundle.manifest.name, bundle.digest, "licences", "provenance", *bundle.manifest.components):
        assert words in done.out


def test_inspect_counts_shared_files_once(caphuman):
    report = json.loads(caphuman("inspect", "--json").out)
    bundle = Bundle.open()
    listed = {path for part in bundle.manifest.components.values() for path in part.files}
    assert report["bytes"] == sum((bundle.root / path).stat().st_size for path in listed)
    assert report["bytes"] < sum(part["bytes"] for part in report["components"].values())


def test_verify_passes_on_this_machine(caphuman):
    done = caphuman("verify", "--json")
    report = json.loads(done.out)
    assert done.code == 0 and report["passed"]
    assert {row["graph"] for row in report["graphs"]} >= {"denoiser", "hint_encoder", "vae_decoder", "text_encoder"}
    assert all(row["psnr_db"] >= row["floor_db"] for row in report["graphs"])


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
    selftest = dataclasses.replace(manifest.components["selftest"], files=files)
    write_manifest(folder, dataclasses.replace(manifest, components=manifest.components | {"selftest": selftest}))


def test_doctor_tells_versions_renderer_extras_bundle_and_cache(caphuman, tmp_path):
    report = json.loads(caphuman("doctor", "--json").out)
    assert report["packages"]["numpy"] == np.__version__
    assert report["packages"]["onnxruntime"] and report["cores"] >= 1
    assert {"gl", "openvino", "export"} <= report["extras"].keys() and "dev" not in report["extras"]
    assert report["cache"] == str(tmp_path.parent / "cache")
    assert Bundle.open().manifest.name in report["bundle"]


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
