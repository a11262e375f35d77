"""What fidelity compares: a column is a bundle on a backend with a schedule, the reference is one of them."""
import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from caphuman_edge.runtime.backends import BACKENDS, EXTRAS, open_backend
from caphuman_edge.runtime.bundle import MANIFEST, Bundle
from caphuman_edge.runtime.contract import Config
from caphuman_edge.runtime.errors import BadInput
from caphuman_edge.runtime.machine import EACH_STEP, Machine
from caphuman_edge.runtime.manifest import FORMATS
from caphuman_edge.runtime.request import Settings, complete
from caphuman_edge.runtime.schedule import SPACINGS

OWN = "own"  # the schedule that a bundle draws with unless told
INT8, FROM = "int8", "from_bundle"  # in the provenance of an int8 bundle: the digest of the bundle it was made from
FLOATS = ("f32", "f16", "mixed", "data")  # precisions of weights that count as the float reference's
SAMPLING = ("schedule", "timesteps", "steps", "guidance", "identity_guidance", "eta")
_WRITTEN = re.compile(r"([a-z+]+)(?:-([a-z]+))?:(\d{1,4})@(\d{1,2}(?:\.\d+)?)")


@dataclass(frozen=True)
class Column:
    """One way to draw the same portraits."""

    bundle: Bundle
    machine: Machine
    settings: Settings  # complete, but for prompt and seed
    label: str  # of the bundle, unlike that of any other bundle of the comparison

    @property
    def title(self) -> str:
        """Bundle, backend and schedule."""
        return f"{self.place} {written(self.settings)}"

    @property
    def place(self) -> str:
        """Bundle and backend."""
        return f"{self.label} {told(self.machine)}"

    @property
    def sampling(self) -> dict[str, Any]:
        """How it draws."""
        return {name: getattr(self.settings, name) for name in SAMPLING}

    @property
    def key(self) -> dict[str, Any]:
        """All of the column that decides its portraits' pixels."""
        return {**self.computing, **self.sampling}

    @property
    def computing(self) -> dict[str, Any]:
        """What predicts: a model and all that changes its numbers."""
        m = self.machine
        return {"bundle": self.bundle.digest, "backend": m.backend, "library": _library(m.backend), "device": m.device,
                "precision": m.precision}


def _sizes(config: Config) -> Config:
    """The config without what two forms of one model may differ in: pooled keys, and how latents are decoded."""
    unet = dataclasses.replace(config.unet, key_pooling=1)
    return dataclasses.replace(config, unet=unet, tiny_channels=Config.tiny_channels,
                               decoder_tile=Config.decoder_tile)


def columns(bundle: Bundle, reference: Bundle, backends: Sequence[str], schedules: Sequence[str],
            threads: int | None = None) -> list[Column]:
    """The reference first, on ONNX Runtime in float32 with its own schedule; then backends times schedules.

    A candidate that is the reference itself is left out. Raises BadInput where nothing is left, for what is written
    wrongly, and where the bundles are of different sizes.
    """
    if _sizes(bundle.config) != _sizes(reference.config):
        raise BadInput(f"{bundle.root} and {reference.root} are of different sizes, expected two forms of one model; "
                       "name another bundle with --against")
    labels = _labels(bundle, reference)
    first = column_of(reference, Machine(threads=threads), OWN, labels[1])
    found = [column_of(bundle, machine_of(backend, threads), schedule, labels[0])
             for backend in backends for schedule in schedules]
    different = {digest_of(column.key): column for column in (first, *found)}
    if len(different) == 1:
        raise BadInput(f"{bundle.root} is its own reference, so there is nothing to compare; name another bundle with "
                       "--against, or other --backends or --schedules")
    return list(different.values())


def column_of(bundle: Bundle, machine: Machine, schedule: str = OWN, label: str = "") -> Column:
    """One column; its label is the bundle's name unless given."""
    settings = complete(settings_of(schedule), bundle.schedule)
    return Column(bundle, machine, settings, label or bundle.manifest.name)


def reference_of(bundle: Bundle, against: Path | None) -> Bundle:
    """The bundle to compare with: the one given, the one that it was made from, or itself where it is float.

    What it was made from is looked for among the embedded bundle and the folders beside it. Raises BundleError for one
    that does not open, BadInput where there is none.
    """
    if against is not None:
        return Bundle.open(against)
    facts = bundle.manifest.provenance.get(INT8)
    if origin := facts.get(FROM) if isinstance(facts, dict) else None:
        for folder in (None, *sorted(file.parent for file in bundle.root.absolute().parent.glob(f"*/{MANIFEST}"))):
            if _digest(folder) == origin:
                return Bundle.open(folder)
        raise BadInput(f"{bundle.root} was made from bundle {origin!s:.12}…, which is neither the embedded one nor "
                       "beside it; name its folder with --against")
    forms = [form for part in bundle.manifest.components.values() for form in part.forms.values()]
    if coarse := sorted({form.precision for form in forms} - {*FLOATS}):
        raise BadInput(f"{bundle.root} has {', '.join(coarse)} weights and does not say what it was made from; name "
                       "the float bundle with --against")
    return bundle


def settings_of(schedule: str) -> Settings:
    """`kind:steps@guidance`, such as ddim:20@4 or ddim-trailing:4@1; `own` is the bundle's. Raises BadInput."""
    if schedule == OWN:
        return Settings()
    if not (found := _WRITTEN.fullmatch(schedule)) or found[1] not in SPACINGS:
        raise BadInput(f"--schedules names {schedule!r:.40}, expected kind:steps@guidance such as ddim:20@4, lcm:4@1 "
                       f"or ddim-trailing:8@1, or {OWN}; kinds are {', '.join(SPACINGS)}")
    kind, timesteps, steps, guidance = found.groups()
    return Settings(schedule=kind, timesteps=timesteps, steps=int(steps), guidance=float(guidance))


def written(settings: Settings) -> str:
    """Complete settings as `settings_of` reads them."""
    kind = settings.schedule or ""
    spacing = "" if settings.timesteps == SPACINGS[kind][0] else f"-{settings.timesteps}"
    return f"{kind}{spacing}:{settings.steps}@{settings.guidance:g}"


def machine_of(backend: str, threads: int | None = None) -> Machine:
    """`ort`, `openvino` or `coreml`, with `:f16` or `:bf16` for other arithmetic. Raises BadInput."""
    name, colon, precision = backend.partition(":")
    if name not in BACKENDS or (colon and precision not in ("f32", "f16", "bf16")):
        raise BadInput(f"--backends names {backend!r:.40}, expected some of {', '.join(BACKENDS)}, each with :f16 or "
                       ":bf16 for that arithmetic")
    return Machine(name, threads=threads, precision=precision or None)


def told(machine: Machine) -> str:
    """A machine as `machine_of` reads it."""
    return machine.backend + (f":{machine.precision}" if machine.precision else "")


def disk_bytes(column: Column) -> dict[str, int]:
    """Bytes on disk of what the column reads: all of the bundle's files for its backend, and of the denoiser's."""
    parts, formats = column.bundle.manifest.components, open_backend(column.machine.backend).FORMATS
    sizes: dict[str, dict[str, int]] = {"all": {}, "denoiser": {}}
    for name, part in parts.items():
        kinds = [kind for kind in (*formats, "onnx", "data") if kind in part.forms]
        files = {path: record.size for path, record in part.forms[kinds[0]].files.items()} if kinds else {}
        sizes["all"] |= files
        if name in EACH_STEP:
            sizes["denoiser"] |= files
    return {name: sum(files.values()) for name, files in sizes.items()}


def weights(column: Column) -> str:
    """The precision of the denoiser's weights that the column reads."""
    return _weights(column.bundle, open_backend(column.machine.backend).FORMATS)


def digest_of(facts: Any) -> str:
    """Twelve characters that differ for other facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def _labels(bundle: Bundle, reference: Bundle) -> tuple[str, str]:
    """The bundles' names; where those are equal, with what else tells the bundles apart: weights, or the hash."""
    both = (bundle, reference)
    names = bundle.manifest.name, reference.manifest.name
    if names[0] != names[1] or bundle.digest == reference.digest:
        return names
    weights = [_weights(which) for which in both]
    marks = weights if weights[0] != weights[1] else [which.digest[:6] for which in both]
    return f"{names[0]} {marks[0]}", f"{names[1]} {marks[1]}"


def _weights(bundle: Bundle, formats: Sequence[str] = FORMATS) -> str:
    """The precision of the denoiser's stored weights, in the first of these formats that there is."""
    parts = [bundle.component(name) for name in EACH_STEP if name in bundle]
    found = [part.forms[format].precision for part in parts for format in formats if format in part.forms]
    return found[0] if found else "-"


def _digest(folder: Path | None) -> str | None:
    """A bundle's, without verifying it; None is the embedded one."""
    if folder is None:
        return Bundle.open().digest
    try:
        return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return None


def _library(backend: str) -> str | None:
    """The version of a backend's library; None where it goes by another name, such as onnxruntime-gpu."""
    try:
        return version(EXTRAS.get(backend, "onnxruntime"))
    except PackageNotFoundError:
        return None
