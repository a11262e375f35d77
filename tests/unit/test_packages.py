"""The distribution lists what the checkout holds: setuptools drops what is not listed, without a word."""
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS = SETUPTOOLS["package-dir"]  # package: folder


def dotted(init: Path, package: str, folder: str) -> str:
    return ".".join([package, *init.parent.relative_to(ROOT / folder).parts])


def test_every_folder_with_an_init_is_a_listed_package_and_the_reverse():
    found = {dotted(init, package, folder) for package, folder in FOLDERS.items()
             for init in (ROOT / folder).rglob("__init__.py")}
    assert set(SETUPTOOLS["packages"]) == found


def test_no_module_lies_in_a_folder_without_an_init():
    for folder in FOLDERS.values():
        for module in (ROOT / folder).rglob("*.py"):
            assert (module.parent / "__init__.py").exists(), f"{module} is in no package"


@pytest.mark.parametrize("folder", FOLDERS.values())
def test_every_package_ships_its_types(folder):
    assert (ROOT / folder / "py.typed").exists()


def test_torch_is_pinned_to_the_version_at_hand():
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text().split()


def test_no_constraint_pulls_cuda():
    names = [line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    assert not [name for name in names if name.startswith(("nvidia", "triton", "cuda"))]
