"""Finished bundles as a store of parts: a later build links what did not change instead of making it again.

parts.json of a bundle says which part of its build has which key (`part_keys`), in which files it lies, and what its
maker said about it. bundle.json lists it like any file, so that it is verified with the rest:

    {"onnx/unet": {"key": "...", "facts": {"precision": "f16"}, "files": {"unet/model.onnx": "SHA256", ...}},
     "onnx check/unet": {"key": "...", "facts": {"eps": 71.3}, "files": {"unet/model.onnx": "SHA256", ...}},
     "selftest/unet": {"key": "...", "facts": {}, "files": {"selftest.npz": "SHA256"}}, ...}

Of a check the files are those that it proves. An entry counts only while all of its files are what it was made with.
"""
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from zipfile import BadZipFile

import numpy as np

from caphuman_edge.export.check import Arrays, Case
from caphuman_edge.export.host_configs import FILE as CONFIG
from caphuman_edge.export.part_keys import CHECK, SELFTEST, made_of
from caphuman_edge.export.parts import FACTS, Facts, Part
from caphuman_edge.export.stages import Job, Options
from caphuman_edge.runtime.bundle import Bundle, record_files
from caphuman_edge.runtime.cache import sha256_of
from caphuman_edge.runtime.contract import GraphSpec
from caphuman_edge.runtime.errors import BundleError
from caphuman_edge.runtime.manifest import DATA, Component, FileRecord, Form

RECORD = "parts"  # the component of a bundle
FILE = "parts.json"
MAX_RECORD = 4 << 20  # bytes


@dataclass(frozen=True)
class StoredPart:
    """A part of a finished bundle."""

    bundle: Bundle
    graph: str
    facts: Facts
    files: Mapping[str, FileRecord]  # by path in the bundle

    @property
    def origin(self) -> str:
        """The bundle's folder, for a person."""
        return self.bundle.root.absolute().name


class PartStore:
    """The parts of finished bundles, by key; of equal ones the first bundle's."""

    def __init__(self, bundles: Iterable[Path] = ()):
        """Opens and verifies them; errors as `Bundle.open`, and BundleError where parts.json is not what it should
        be. A bundle without one has nothing to give."""
        self.parts: dict[str, StoredPart] = {}
        self.origins: list[str] = []
        for path in bundles:
            parts = _read(Bundle.open(path))
            self.origins.append(path.absolute().name)
            self.parts = parts | self.parts

    def find(self, key: str) -> StoredPart | None:
        """The part of this key."""
        return self.parts.get(key)

    def take(self, part: StoredPart, folder: Path) -> Facts:
        """Put a part's files into a folder, as hard links where the disk has them; returns the facts.

        Raises BundleError where a file is no longer what its bundle says, OSError where `folder` cannot be written.
        """
        for path, record in part.files.items():
            source, target = (part.bundle.root / path).resolve(), folder / _inner(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            _verify(source, record)
            if not _linked(source, target):
                shutil.copyfile(source, target)
                _verify(target, record)
        return dict(part.facts)

    def answers(self, part: StoredPart, spec: GraphSpec) -> Case:
        """The inputs and the reference's outputs that a bundle's self-test holds of a graph, floats in halves.

        Raises BundleError where they are not the graph's.
        """
        path = part.bundle.file(SELFTEST)
        try:
            with np.load(path, allow_pickle=False) as rows:
                inputs, outputs = (_rows(rows, f"{part.graph}/{side}/") for side in ("in", "out"))
        except (OSError, ValueError, EOFError, BadZipFile) as error:
            raise BundleError(f"{path} is not a self-test ({error}); build without --like {part.origin}") from error
        if [*inputs, *outputs] != [tensor.name for tensor in (*spec.inputs, *spec.outputs)]:
            raise BundleError(f"{path} holds {', '.join([*inputs, *outputs]) or 'nothing'} of {part.graph}, expected "
                              f"its inputs and outputs; build without --like {part.origin}")
        return Case(inputs, outputs)


def write_record(folder: Path, components: Mapping[str, Component], done: Mapping[Job, Part], keys: Mapping[Job, str],
                 options: Options) -> Component:
    """Write parts.json into a bundle whose other components are these."""
    hashes = {path: record.sha256 for component in components.values() for form in component.forms.values()
              for path, record in form.files.items()}
    entries = {}
    for job in keys:
        kind = job[0].removesuffix(CHECK)
        if job in done and kind in options.formats:
            proven = made_of(job, options)[0] if job[0].endswith(CHECK) else job
            paths = [f"{proven[1]}/{inner}" for inner in _files(done[proven].folder)]
            entries["/".join(job)] = {"key": keys[job], "facts": done[job].facts,
                                      "files": {path: hashes[path] for path in paths}}
        elif kind == SELFTEST:
            (path,) = components[SELFTEST].forms[DATA].files
            entries["/".join(job)] = {"key": keys[job], "facts": {}, "files": {path: hashes[path]}}
    (folder / FILE).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8", newline="\n")
    return Component({DATA: Form(FILE, record_files(folder, [folder / FILE]), DATA)})


def _files(folder: Path) -> list[str]:
    """The files of a part, without what the build noted about it."""
    return [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*"))
            if file.is_file() and file != folder / FACTS]


def _read(bundle: Bundle) -> dict[str, StoredPart]:
    """A bundle's parts, by key. Those of which a file was rewritten since, by whoever it was, are left out."""
    if RECORD not in bundle:
        return {}
    files = {path: record for component in bundle.manifest.components.values() for form in component.forms.values()
             for path, record in form.files.items()}
    parts = {}
    for name, entry in _entries(bundle.file(RECORD)).items():
        key, facts, hashes = (entry[field] for field in ("key", "facts", "files"))
        stage, _, graph = name.partition("/")
        if all(path in files and files[path].sha256 == digest for path, digest in hashes.items()):
            linked = {} if stage.endswith(CHECK) or stage == SELFTEST else {path: files[path] for path in hashes}
            parts[key] = StoredPart(bundle, graph, facts, linked)
    return parts


def _entries(path: Path) -> dict[str, Any]:
    """parts.json, once its types are right."""
    entries: dict[str, Any] = {}
    if path.stat().st_size <= MAX_RECORD:
        try:
            entries = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            entries = {}
    if not entries or not isinstance(entries, dict) or not all(map(_is_entry, entries.values())):
        raise BundleError(f"{path} is no record of a build's parts; build without --like {path.parent}")
    return entries


def _is_entry(entry: Any) -> bool:
    return (isinstance(entry, dict) and entry.keys() == {"key", "facts", "files"} and isinstance(entry["key"], str)
            and isinstance(entry["facts"], dict) and isinstance(entry["files"], dict)
            and all(isinstance(fact, str | int | float) for fact in entry["facts"].values())
            and all(_is_inner(path) for path in entry["files"]))


def _is_inner(path: str) -> bool:
    """Whether a path is one that a part may have: not of a file that every build writes anew."""
    return path == f"{SELFTEST}.npz" or _inner(path) not in ("", ".", FACTS, CONFIG)


def _inner(path: str) -> str:
    """A file's path within its part: without the bundle's folder for it."""
    return "/".join(PurePosixPath(path).parts[1:])


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without hard links
        return False
    return True


def _verify(path: Path, record: FileRecord) -> None:
    """Sizes first; hashes are remembered."""
    try:
        size = path.stat().st_size
        good = size == record.size and sha256_of([path])[path] == record.sha256
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}); build the bundle that holds it again") from error
    if not good:
        raise BundleError(f"{path} is not what its bundle says: it was altered; build that bundle again")


def _rows(rows: Mapping[str, np.ndarray], prefix: str) -> Arrays:
    return {name.removeprefix(prefix): rows[name] for name in rows if name.startswith(prefix)}
