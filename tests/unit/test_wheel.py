"""The wheel as a user meets it: built from the sources, installed in a fresh environment far from the checkout."""
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("caphuman_ref", "export", "quant", "runtime", "shaders")
FILES = ("pyproject.toml", "README.md", "LICENSE", "NOTICE")
MAX_WHEEL = 60 << 20  # bytes; the embedded bundle may take 48 MB

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that neither stale build/ folders get in nor new ones are left."""
    copy = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    run(sys.executable, "-m", "build", "--wheel", "--outdir", copy / "dist", cwd=copy)
    return next((copy / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The interpreter of a fresh environment with the wheel and its base dependencies."""
    venv = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", venv, cwd=venv)
    python = venv / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel, cwd=venv)
    return python


def test_the_wheel_holds_every_source_file_and_nothing_else(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if not name.split("/")[0].endswith(".dist-info")}
    wanted = set()
    for folder in SOURCES:
        package = f"caphuman_edge/{folder.removeprefix('caphuman_')}"
        files = [file.relative_to(ROOT / folder) for file in (ROOT / folder).rglob("*") if file.is_file()]
        wanted |= {f"{package}/{file.as_posix()}" for file in files if _shipped(file)}
    compiled = {name for name in held if name.startswith("caphuman_edge/runtime/kernels/_kernels.")}
    assert held - compiled == wanted
    able = sys.platform == "linux" and platform.machine() == "x86_64" and shutil.which("g++")
    assert len(compiled) == (1 if able else 0)


def _shipped(file: Path) -> bool:
    """Notes, training weights and what is compiled stay behind; what lies among the data, licences say, does not."""
    return (not {"__pycache__", "milestone"} & set(file.parts) and file.suffix != ".so"
            and (file.suffix != ".md" or "data" in file.parts))


def test_the_wheel_is_small_enough_to_publish(wheel):
    assert wheel.stat().st_size < MAX_WHEEL


def test_the_wheel_carries_licence_and_notice(wheel):
    names = {Path(name).name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" in name}
    assert {"LICENSE", "NOTICE"} <= names


def test_the_runtime_imports_without_torch(python, tmp_path):
    extras = ("__init__.py", "gl.py", "batch_ray.py")
    modules = [f"caphuman_edge.{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}"
               for path in (ROOT / "runtime").rglob("*.py")
               if path.name not in extras and not path.name.startswith("openvino")]
    run(python, "-c", f"for name in {modules!r}: __import__(name)", cwd=tmp_path)
    missing = "import importlib.util as u; print([n for n in ('torch', 'onnx', 'scipy', 'moderngl') if u.find_spec(n)])"
    assert run(python, "-c", missing, cwd=tmp_path).strip() == "[]"


def test_the_installed_data_files_are_found(python, tmp_path):
    script = "from caphuman_edge.runtime.tokenizer import Tokenizer; print(Tokenizer().tokens('a photo'))"
    assert run(python, "-c", script, cwd=tmp_path).strip() == "[320, 1125]"


def test_the_command_explains_itself(python, tmp_path):
    assert "generate" in run(python.parent / "caphuman", "--help", cwd=tmp_path)
