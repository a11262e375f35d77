"""What may import what: read off the source of every file, so that an import inside a function counts as well."""
import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from jaxtyping import TypeCheckError

ROOT = Path(__file__).parents[2]
FOLDERS = {"ref": "caphuman_ref", "export": "export", "quant": "quant", "runtime": "runtime", "shaders": "shaders"}
OURS = {
    "runtime": ("runtime", "shaders"),
    "shaders": ("shaders",),
    "ref": ("ref", "runtime.contract", "runtime.errors"),
    "export": ("export", "ref", "runtime", "shaders"),
    "quant": ("quant", "export", "ref", "runtime", "shaders"),
}
BASE = {"numpy", "PIL", "jaxtyping"}
OPENVINO = (ROOT / "runtime" / "backends").glob("openvino*.py")
LAZY = {**{path.relative_to(ROOT).as_posix(): {"openvino"} for path in OPENVINO},
        "runtime/backends/ort.py": {"onnxruntime"}, "runtime/backends/coreml.py": {"coremltools"},
        "runtime/render/gl.py": {"moderngl"}, "runtime/perception/insight.py": {"insightface"},
        "runtime/cli/batch_ray.py": {"ray"}}
HEAVY = ("torch", "onnx", "onnxruntime", "openvino", "coremltools", "moderngl", "scipy", "skimage", "cv2", "ray")


def sources(package: str) -> list[Path]:
    return sorted((ROOT / FOLDERS[package]).rglob("*.py"))


def imported(path: Path, root: Path = ROOT) -> Iterator[str]:
    """Full dotted names of what a file imports, relative imports resolved."""
    package, folder = next((p, f) for p, f in FOLDERS.items() if (root / f) in path.parents)
    parts = ["caphuman_edge", package, *path.relative_to(root / folder).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = parts[:len(parts) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def third_party(path: Path) -> set[str]:
    tops = {name.split(".")[0] for name in imported(path)}
    return tops - sys.stdlib_module_names - {"caphuman_edge"}


@pytest.mark.parametrize("package", FOLDERS)
def test_a_package_imports_only_those_of_ours_that_it_may(package):
    allowed = [f"caphuman_edge.{name}" for name in OURS[package]]
    for path in sources(package):
        for name in imported(path):
            if name.startswith("caphuman_edge."):
                assert any(f"{name}.".startswith(f"{prefix}.") for prefix in allowed), f"{path} imports {name}"


def test_the_runtime_needs_only_the_base_installation():
    for path in sources("runtime"):
        allowed = BASE | LAZY.get(path.relative_to(ROOT).as_posix(), set())
        assert third_party(path) <= allowed, f"{path} imports {third_party(path) - allowed}"


def test_importing_the_runtime_loads_nothing_heavy():
    modules = [f"caphuman_edge.{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}" for path in sources("runtime")
               if path.name not in ("__init__.py", "__main__.py") and path.relative_to(ROOT).as_posix() not in LAZY]
    script = f"import sys\nfor name in {modules!r}: __import__(name)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not loaded.intersection(HEAVY), f"the runtime loads {loaded.intersection(HEAVY)} on import"


def test_the_import_hook_checks_shapes_while_the_tests_run():
    from caphuman_edge.runtime.image import resize

    with pytest.raises(TypeCheckError):
        resize(np.zeros((4, 4, 3), np.float32), 2, 2)


def test_the_import_rule_sees_relative_and_lazy_imports(tmp_path):
    file = tmp_path / "runtime" / "backends" / "x.py"
    file.parent.mkdir(parents=True)
    file.write_text("from ..contract import Config\nfrom . import Graph\ndef f():\n    import torch.nn\n")
    runtime = "caphuman_edge.runtime"
    assert set(imported(file, tmp_path)) == {f"{runtime}.contract.Config", f"{runtime}.backends.Graph", "torch.nn"}
