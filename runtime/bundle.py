"""Bundles: folders of graphs and data that bundle.json describes. Opening one verifies all that it says.

Nothing here runs a network: a backend does, and is imported when the first graph is asked for.
"""
import dataclasses
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .backends import Graph, open_backend
from .cache import sha256_of
from .contract import Config, graphs
from .errors import BundleError
from .manifest import DATA, Component, FileRecord, Form, Manifest, check_graph, parse
from .schedule import Schedule

EMBEDDED = Path(__file__).parent / "data" / "nano"
MANIFEST = "bundle.json"
MAX_MANIFEST = 16 << 20  # bytes; a larger one is no manifest


@dataclass(frozen=True)
class Bundle:
    """A verified bundle; make one with `Bundle.open`."""

    root: Path
    manifest: Manifest
    digest: str  # sha256 of bundle.json, and so of all that it lists

    @classmethod
    def open(cls, path: str | Path | None = None) -> "Bundle":
        """Open and verify the bundle in this folder; None is the embedded miniature.

        Verifies format, file sizes and sha256 (remembered between runs), names, shapes and dtypes. Any mismatch raises
        BundleError or ShapeMismatch, one line that names the file.
        """
        root = EMBEDDED if path is None else Path(path)
        text = _read_manifest(root)
        manifest = parse(text)
        _verify_files(root, _all_files(manifest))
        return cls(root, manifest, hashlib.sha256(text.encode()).hexdigest())

    @property
    def config(self) -> Config:
        """The sizes of the model."""
        return self.manifest.config

    @property
    def schedule(self) -> Schedule:
        """The noise schedule, and the sampling defaults it was trained for."""
        return self.manifest.schedule

    def __contains__(self, component: object) -> bool:
        return component in self.manifest.components

    def component(self, name: str) -> Component:
        """One graph's or data's entry. Raises BundleError where the bundle has none of that name."""
        if name not in self:
            held = ", ".join(sorted(self.manifest.components)) or "none"
            raise BundleError(f"bundle {self.root} has no component {name}, it has {held}; rebuild it with {name}")
        return self.manifest.components[name]

    def stored(self, name: str, formats: Iterable[str]) -> bool:
        """Whether a component is there in one of these formats."""
        return name in self and not self.component(name).forms.keys().isdisjoint(formats)

    def form(self, name: str, formats: Iterable[str]) -> Form:
        """How a component is stored in the first of these formats that it has; raises BundleError where in none."""
        forms, formats = self.component(name).forms, tuple(formats)
        for format in formats:
            if format in forms:
                return forms[format]
        raise BundleError(f"{name} of {self.root} is stored as {' and '.join(forms)}, expected {' or '.join(formats)}; "
                          "choose another backend, or build a bundle that has it")

    def file(self, name: str, form: str | None = None) -> Path:
        """Where a component's file or folder lies: of data, or with `form` of a graph in that format."""
        return self.root / self.form(name, [form or DATA]).path

    def graph(
        self, name: str, backend: str = "ort", *, device: str | None = None, threads: int | None = None,
        cache_dir: Path | None = None, precision: str | None = None, by_shape: bool = False,
        in_halves: bool = False,
    ) -> Graph:
        """Load one graph and check it against the contract. Each call loads anew: who wants to keep it, keeps it.

        Settings as in `backends.Backend.load`. Raises BundleError, ShapeMismatch, BadInput, MissingExtra.
        """
        component, contract, loader = self.component(name), graphs(self.config), open_backend(backend)
        if DATA in component.forms:
            raise BundleError(f"component {name} of {self.root} is data, not a graph; read it with Bundle.file")
        path = self.root / self.form(name, loader.FORMATS).path
        graph = loader.load(path, device=device, threads=threads, cache_dir=cache_dir, precision=precision,
                            by_shape=contract[name] if by_shape else None, in_halves=in_halves)
        spec = check_graph(str(path), graph.inputs, graph.outputs, contract[name])
        return dataclasses.replace(graph, inputs=spec.inputs, outputs=spec.outputs)


@contextmanager
def new_bundle(target: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A scratch folder to build a bundle in; it becomes `target` once the block ends and the bundle verifies.

    A failed build leaves `target` as it was. A killed one may leave `.NAME.building-*` beside it, to be deleted; one
    killed while it replaces `target` leaves the former bundle as `.NAME.old`, which the next build puts back first.
    Raises BundleError where `target` exists and `overwrite` is false, or where it is a folder that is no bundle.
    """
    target = Path(target)
    with _writing(target):
        _restore(target)
    check_target(target, overwrite)
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.building-", dir=target.parent))
        folder = scratch / target.name  # within, since mkdtemp's own folder is closed to other users
        folder.mkdir()
    try:
        yield folder
        Bundle.open(folder)
        with _writing(target):
            _publish(folder, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write bundle.json into a bundle under construction, the last thing to be written."""
    (folder / MANIFEST).write_text(manifest.to_text(), encoding="utf-8", newline="\n")


def record_files(folder: Path, paths: Iterable[Path]) -> dict[str, FileRecord]:
    """The manifest's record of these files, by path relative to the bundle; a folder stands for its files."""
    listed = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    files = [file for file in listed if file.is_file()]
    return {file.relative_to(folder).as_posix(): FileRecord(digest, file.stat().st_size)
            for file, digest in sha256_of(files).items()}


def _read_manifest(root: Path) -> str:
    path = root / MANIFEST
    try:
        if path.stat().st_size > MAX_MANIFEST:
            raise BundleError(f"{path} is over {MAX_MANIFEST >> 20} MiB, so no bundle's manifest; check the path")
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise BundleError(f"{root} is not a bundle: no readable {MANIFEST} in it ({error.strerror}); check the path, "
                          "or leave it out for the embedded bundle") from error
    except UnicodeDecodeError as error:
        raise BundleError(f"{path} is not UTF-8 text; fetch or build the bundle again") from error


def _all_files(manifest: Manifest) -> dict[str, FileRecord]:
    """Every file once. Raises BundleError where two forms disagree about one that they share."""
    files: dict[str, FileRecord] = {}
    for form in (form for component in manifest.components.values() for form in component.forms.values()):
        for path, record in form.files.items():
            if files.setdefault(path, record) != record:
                raise BundleError(f"bundle.json gives {path} two different hashes; rebuild the bundle")
    return files


def _verify_files(root: Path, files: Mapping[str, FileRecord]) -> None:
    """Sizes first, since they cost nothing, then hashes."""
    for path, record in files.items():
        _verify_size(root / path, record.size)
    hashes = sha256_of(root / path for path in files)
    for path, record in files.items():
        if hashes[root / path] != record.sha256:
            raise BundleError(f"{root / path} has sha256 {hashes[root / path][:12]}…, expected {record.sha256[:12]}…: "
                              "it was altered; fetch or build the bundle again")


def _verify_size(path: Path, size: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise BundleError(f"{path} is missing from the bundle ({error.strerror}); fetch or build it again") from error
    if not path.is_file() or found != size:
        raise BundleError(f"{path} has {found} bytes, expected {size}: it was cut short or altered; "
                          "fetch or build the bundle again")


def check_target(target: Path, overwrite: bool) -> None:
    if target.exists() and not overwrite:
        raise BundleError(f"{target} exists; choose another place or allow overwriting")
    if target.exists() and not (target / MANIFEST).is_file():
        raise BundleError(f"{target} exists and is no bundle, so it is not overwritten; choose another place")


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BundleError(f"cannot write bundle {target} ({error}); mend that or choose another place") from error


def _publish(folder: Path, target: Path) -> None:
    """Put the finished folder in place with renames, which no kill can halve."""
    if target.exists():
        shutil.rmtree(_old(target), ignore_errors=True)
        os.replace(target, _old(target))
        os.replace(folder, target)
        shutil.rmtree(_old(target), ignore_errors=True)
    else:
        os.replace(folder, target)


def _restore(target: Path) -> None:
    """Put back what a build had moved away when it was killed between the two renames of `_publish`."""
    if not target.exists() and _old(target).exists():
        os.replace(_old(target), target)


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")
