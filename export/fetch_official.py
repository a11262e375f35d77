"""The official files that a build starts from: where they are, what they are, under which terms, and fetching them.

Hashes that could be looked up are pinned. Where none could be, the hash that the hub announces (the ETag of a large
file there is its sha256) shows that the transport was sound, and what came is recorded in `official_files.json`.
"""
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from caphuman_edge.export.download import Announced, Unreachable, download
from caphuman_edge.runtime.errors import BadInput, CheckpointError

RECORD = "official_files.json"


@dataclass(frozen=True)
class OfficialFile:
    """One published file."""

    name: str  # how `fetch` calls it
    file: str
    url: str
    page: str  # for people
    bytes: int | None
    sha256: str | None
    licence: str
    non_commercial: bool
    option: str  # of `caphuman build`, that takes the file
    md5: str | None = None  # where the publisher names nothing better

    def notice(self) -> str:
        """One line on what it is and under which terms it comes."""
        size = f"{self.bytes / 1e9:.2f} GB" if self.bytes else "size unknown"
        terms = "; NON-COMMERCIAL use only" if self.non_commercial else ""
        return f"{self.file} ({size}) from {self.page}: {self.licence}{terms}"


FILES = {file.name: file for file in (
    OfficialFile(
        "caphuman", "caphuman.ckpt", "https://huggingface.co/VamosC/CapHuman/resolve/main/caphuman.ckpt",
        "https://huggingface.co/VamosC/CapHuman (code: https://github.com/VamosC/CapHuman)", None, None,
        "CC-BY-NC-4.0", True, "--caphuman", md5="6f0086112db9abc6ce4518a458d4d4b8"),  # of the official tools/setup.sh
    OfficialFile(
        "backbone", "v1-5-pruned-emaonly.safetensors",
        "https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5/resolve/main/v1-5-pruned-emaonly.safetensors",
        "https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5", 4265146304,
        "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa",
        "CreativeML OpenRAIL-M, with use restrictions that pass on to what is made with it", False, "--backbone"),
    OfficialFile(
        "vae", "vae-ft-mse-840000-ema-pruned.safetensors",
        "https://huggingface.co/stabilityai/sd-vae-ft-mse-original/resolve/main/vae-ft-mse-840000-ema-pruned.safetensors",
        "https://huggingface.co/stabilityai/sd-vae-ft-mse-original", 334641190,
        "735e4c3a447a3255760d7f86845f09f937809baa529c17370d83e4c3758f3c75", "MIT", False, "--vae"),
    OfficialFile(
        "facenet", "20180402-114759-vggface2.pt",
        "https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9/20180402-114759-vggface2.pt",
        "https://github.com/timesler/facenet-pytorch", 111898327,
        "281cebca8662831adb987a874bdcb36e73f5b1c6dc5ee5878f305e985625d99b", "MIT; trained on VGGFace2", False,
        "--facenet"))}

Consent = Callable[[OfficialFile], bool]
Progress = Callable[[OfficialFile, int, int | None], None]  # (file, bytes so far, bytes in all if known)
Report = Callable[[str], None]


@dataclass(frozen=True)
class Fetched:
    """A file that is there, and how it is known to be the right one."""

    path: Path
    sha256: str
    bytes: int
    proof: str  # "pinned sha256", "published md5", "sha256 announced by the server", "recorded sha256", "length alone"

    def to_json(self, file: OfficialFile) -> dict[str, Any]:
        """For RECORD."""
        return {"url": file.url, "licence": file.licence, **asdict(self), "path": self.path.name}


def fetch(names: Sequence[str], folder: Path, consent: Consent, progress: Progress = lambda file, done, total: None,
          report: Report = lambda line: None, files: Mapping[str, OfficialFile] = FILES) -> dict[str, Fetched]:
    """Bring official files into a folder, and verify them; those that are there already are verified alone.

    `consent` is asked for each non-commercial file before anything is downloaded; `report` gets the terms of every
    file and how it was verified. Interrupted downloads go on where they broke off. Raises BadInput for a name that is
    none and where consent is not given, CheckpointError where a file cannot be had, is another one or does not fit on
    the disk; where there is no network it names all that has to be brought.
    """
    unknown = [name for name in names if name not in files]
    if unknown:
        raise BadInput(f"{', '.join(unknown)} is no official file, expected some of {', '.join(files)}")
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [files[name] for name in names if not (folder / files[name].file).is_file()]
    _require_consent(wanted, consent, report)
    fetched: dict[str, Fetched] = {}
    for name in names:
        try:
            fetched[name] = _present(files[name], folder) or _download(files[name], folder, progress, report)
        except Unreachable as error:
            raise CheckpointError(_what_to_bring(error, [files[n] for n in names if n not in fetched])) from error
        _record(folder, files[name], fetched[name])
        report(f"{fetched[name].path}: sha256 {fetched[name].sha256} ({fetched[name].proof})")
    return fetched


def consent_of(accepted: bool) -> Consent:
    """Consent as a command line gives it: by its option, else by an answer on the terminal, else not at all."""

    def ask(file: OfficialFile) -> bool:
        if accepted or not (sys.stdin.isatty() and sys.stderr.isatty()):
            return accepted
        sys.stderr.write(f"{file.notice()}\nUse it under these terms? [y/N] ")
        sys.stderr.flush()
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    return ask


def _require_consent(wanted: Sequence[OfficialFile], consent: Consent, report: Report) -> None:
    for file in wanted:
        report(file.notice())
    for file in wanted:
        if file.non_commercial and not consent(file):
            raise BadInput(f"{file.file} is for non-commercial use ({file.licence}, {file.page}) and these terms are "
                           "not accepted; pass --accept-licences if you do")


def _present(file: OfficialFile, folder: Path) -> Fetched | None:
    """The file that is there already, verified; None where there is none."""
    path = folder / file.file
    if not path.is_file():
        return None
    recorded = _read_record(folder).get(file.name, {}).get("sha256")
    return _verified(file, path, path, None if file.sha256 or file.md5 else recorded, "recorded sha256")


def _download(file: OfficialFile, folder: Path, progress: Progress, report: Report) -> Fetched:
    part = folder / f"{file.file}.part"
    if part.is_file():
        report(f"{file.file}: going on from {part.stat().st_size} bytes")

    def check(announced: Announced) -> None:
        for what, said, known in (("sha256", announced.sha256, file.sha256), ("bytes", announced.bytes, file.bytes)):
            if said is not None and known is not None and said != known:
                raise CheckpointError(f"{file.url} announces {what} {said}, expected {known}: the file was replaced "
                                      f"there; look at {file.page}, and pass the file you trust with {file.option}")

    announced = download(file.url, part, check, lambda done, total: progress(file, done, total))
    fetched = _verified(file, part, folder / file.file, announced.sha256, "sha256 announced by the server")
    os.replace(part, fetched.path)
    return fetched


def _verified(file: OfficialFile, path: Path, place: Path, other: str | None, other_proof: str) -> Fetched:
    """Compare with what is pinned; with `other`, a sha256 from elsewhere, only where nothing is."""
    size, sha256, md5 = path.stat().st_size, _digest(path, "sha256"), _digest(path, "md5") if file.md5 else None
    checks = (("bytes", size, file.bytes, "length alone"), ("sha256", sha256, other, other_proof),
              ("md5", md5, file.md5, "published md5"), ("sha256", sha256, file.sha256, "pinned sha256"))
    proof = "nothing to compare with"
    for what, found, expected, name in checks:
        if expected is None:
            continue
        if found != expected:
            raise _other_file(file, path, place, f"{what} {found}, expected {expected}")
        proof = name
    return Fetched(place, sha256, size, proof)


def _other_file(file: OfficialFile, path: Path, place: Path, difference: str) -> CheckpointError:
    """The error for a file that is not the official one; a download is put aside as .bad, a user's file stays."""
    if path == place:
        return CheckpointError(f"{path} has {difference}: it is another file; move it away to fetch the official one, "
                               f"or pass it with {file.option} if you mean it")
    kept = path.replace(path.with_suffix(".bad"))
    return CheckpointError(f"{file.url} gave {difference}: the download is damaged or was altered; it is kept as "
                           f"{kept}, fetch again")


def _what_to_bring(error: CheckpointError, missing: Sequence[OfficialFile]) -> str:
    files = ", ".join(f"{file.file} from {file.page} (pass it with {file.option})" for file in missing)
    return f"{error}. To build without a network, bring: {files}"


def _digest(path: Path, algorithm: str) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, algorithm).hexdigest()


def _record(folder: Path, file: OfficialFile, fetched: Fetched) -> None:
    records = _read_record(folder) | {file.name: fetched.to_json(file)}
    scratch = folder / f"{RECORD}.{os.getpid()}"
    scratch.write_text(json.dumps(records, indent=1))
    os.replace(scratch, folder / RECORD)


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    try:
        records = json.loads(path.read_text()) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete it") from error
    if not isinstance(records, dict) or not all(isinstance(record, dict) for record in records.values()):
        raise CheckpointError(f"{path} is no table of files; delete it")
    return records
