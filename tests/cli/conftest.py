"""The command line as a person meets it: through `main`, with what it prints and leaves behind."""
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import skimage
from PIL import Image

from caphuman_edge.runtime.bundle import Bundle
from caphuman_edge.runtime.cli import main


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working directory; hashes and compiled models go to a cache of the test session."""
    monkeypatch.setenv("CAPHUMAN_CACHE", str(tmp_path.parent / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def caphuman(capfd) -> Callable[..., Outcome]:
    """`caphuman("preview", "--photo", path)` runs the command in this process."""

    def run(*argv: object) -> Outcome:
        capfd.readouterr()
        return Outcome(main([str(argument) for argument in argv]), *capfd.readouterr())

    return run


@pytest.fixture
def refusal(caphuman, folder) -> Callable[..., str]:
    """Runs a command that must be refused: exit code 2, one line on stderr, nothing else left. Gives the line."""

    def run(*argv: object) -> str:
        before = sorted(folder.rglob("*"))
        outcome = caphuman(*argv)
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err.startswith("caphuman: ") and outcome.err.count("\n") == 1
        assert sorted(folder.rglob("*")) == before
        return outcome.err

    return run


@pytest.fixture(scope="session")
def astronaut_file() -> Path:
    """A photo of one face, 512 x 512 px, where it is installed."""
    return Path(skimage.__file__).parent / "data" / "astronaut.png"


@pytest.fixture
def astronaut(astronaut_file) -> Image.Image:
    """Its picture."""
    with Image.open(astronaut_file) as photo:
        return photo.convert("RGB")


@pytest.fixture
def photo(astronaut_file, tmp_path) -> Path:
    """A copy of it outside the working directory."""
    return Path(shutil.copy(astronaut_file, tmp_path / "photo.png"))


@pytest.fixture
def bundle_copy(tmp_path) -> Path:
    """The embedded bundle's files under another roof: links, so replace a file before writing to it."""
    return Path(shutil.copytree(Bundle.open().root, tmp_path / "bundle", copy_function=os.link))
