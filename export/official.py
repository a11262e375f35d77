"""Export what the official tool measures photos with: DECA, BiSeNet, FaceNet and MTCNN, as the contract's graphs.

    python -m caphuman_edge.export.official --out DIR --deca deca_model.tar --fetch

Each graph is checked against its reference network before it is kept. DECA's weights come with a registration of the
user's own; the others can be fetched from package registries.
"""
import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from caphuman_edge.export import assets
from caphuman_edge.export.check import check_graph
from caphuman_edge.export.facenet_tflite import read_facenet
from caphuman_edge.export.onnx_writer import WEIGHTS, save, trace
from caphuman_edge.ref import deca, identity, parser
from caphuman_edge.ref.checkpoints import load_network
from caphuman_edge.ref.mtcnn import OutputNet, ProposalNet, RefineNet
from caphuman_edge.runtime.backends import open_backend
from caphuman_edge.runtime.cache import cache_dir, sha256_of
from caphuman_edge.runtime.cli import guarded
from caphuman_edge.runtime.contract import FULL, OFFICIAL_GRAPHS, graphs
from caphuman_edge.runtime.errors import CheckpointError

GRAPHS = (*OFFICIAL_GRAPHS, "id_encoder")
MTCNN_FILES = {"mtcnn_pnet": "pnet.pt", "mtcnn_rnet": "rnet.pt", "mtcnn_onet": "onet.pt"}
PINNED = {"parser": assets.FACE_PARSER, "id_encoder": assets.FACENET,
          **dict(zip(MTCNN_FILES, assets.MTCNN, strict=True))}
LICENCES = {"head_encoder": "DECA: non-commercial scientific research; not to be passed on",
            **{graph: source.licence for graph, source in PINNED.items()}}


class ParserGraph(nn.Module):
    """An image, RGB 0..1, to its parts."""

    def __init__(self, network: parser.FaceParser):
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        return self.network(parser.normalise(image))


class IdentityGraph(nn.Module):
    """A face, RGB 0..255, to its identity."""

    def __init__(self, network: identity.FaceNet):
        super().__init__()
        self.network = network

    def forward(self, face: Tensor) -> Tensor:
        return self.network((face - 127.5) / 128)


def export_official(files: Mapping[str, Path], out: Path,
                    report: Callable[[str], None] = lambda line: None) -> list[dict[str, object]]:
    """Write `out`/<graph>/model.onnx for each graph's checkpoint, and `sources.json`; returns the sources.

    `report` gets a line a graph. Raises CheckpointError for a file that does not fit, BundleError for a graph that
    does not compute what its network computes; graphs that were there before stay as they were then.
    """
    sources = []
    for graph, path in files.items():
        sources.append(_export(graph, path, out, report))
        others = [source for source in _read_sources(out) if source["graph"] != graph]
        assets.write(out / "sources.json", json.dumps([*others, sources[-1]], indent=1).encode())
    return sources


def load(graph: str, path: Path) -> nn.Module:
    """A graph's reference network, filled from its checkpoint, in the contract's form."""
    if graph == "id_encoder":
        network = (read_facenet(path) if path.suffix == ".tflite"
                   else load_network(identity.FaceNet(), path, ignored=(identity.CLASSIFIER,)))
        return IdentityGraph(network)
    if graph == "parser":
        return ParserGraph(load_network(parser.FaceParser(), path))
    if graph == "head_encoder":
        return load_network(deca.HeadEncoder(), path, part=deca.PART)
    stages: dict[str, type[nn.Module]] = {"mtcnn_pnet": ProposalNet, "mtcnn_rnet": RefineNet, "mtcnn_onet": OutputNet}
    return load_network(stages[graph](), path)


def export_graph(graph: str, module: nn.Module, out: Path) -> tuple[str, dict[str, float]]:
    """Write `out`/<graph>/ once the graph computes what the module computes; returns its precision and PSNR in dB."""
    spec = graphs(FULL)[graph]
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".exporting-") as scratch:
        folder = Path(scratch) / graph
        precision = save({"model.onnx": trace(module, spec)}, folder)
        parity = check_graph(folder / "model.onnx", spec, module, open_backend("ort"))
        if (out / graph).exists():
            shutil.rmtree(out / graph)
        folder.rename(out / graph)
    return precision, parity


def _export(graph: str, path: Path, out: Path, report: Callable[[str], None]) -> dict[str, object]:
    with torch.no_grad():
        precision, parity = export_graph(graph, load(graph, path), out)
    report(f"{graph}: {', '.join(f'{name} {decibels:.1f} dB' for name, decibels in parity.items())}")
    origin = {"file": path.name, "file_sha256": sha256_of([path])[path], "licence": LICENCES[graph]}
    pinned = PINNED.get(graph)
    if pinned and pinned.member_sha256 == origin["file_sha256"]:
        origin |= {"package": pinned.package, "package_sha256": pinned.package_sha256}
    written = sha256_of([file for file in (out / graph / "model.onnx", out / graph / WEIGHTS) if file.is_file()])
    return {"graph": graph, **origin, "precision": precision, "psnr_db": parity,
            "files": {file.name: {"sha256": digest, "bytes": file.stat().st_size} for file, digest in written.items()}}


def _read_sources(out: Path) -> list[dict[str, object]]:
    path = out / "sources.json"
    try:
        return json.loads(path.read_text()) if path.is_file() else []
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete it, and export its graphs again") from error


def _files(options: argparse.Namespace) -> dict[str, Path]:
    """Checkpoint by graph: the user's own, then what is fetched."""
    given = {"head_encoder": options.deca, "parser": options.parser, "id_encoder": options.facenet}
    files = {graph: path for graph, path in given.items() if path}
    if options.mtcnn:
        files |= {graph: options.mtcnn / name for graph, name in MTCNN_FILES.items()}
    for graph, path in files.items():  # before anything is fetched
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist, expected the checkpoint of {graph}; check the path")
    if options.fetch:
        downloads = options.downloads or cache_dir()
        files |= {graph: assets.fetch(source, downloads) for graph, source in PINNED.items() if graph not in files}
    return files


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    command = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    command.add_argument("--out", type=Path, required=True, help="folder to write")
    command.add_argument("--deca", type=Path, help="deca_model.tar")
    command.add_argument("--parser", type=Path, help="79999_iter.pth")
    command.add_argument("--facenet", type=Path, help="20180402-114759-vggface2.pt, or facenet_512.tflite")
    command.add_argument("--mtcnn", type=Path, help="folder with pnet.pt, rnet.pt and onet.pt")
    command.add_argument("--fetch", action="store_true",
                         help="get what is not given from package registries, all but DECA")
    command.add_argument("--downloads", type=Path, help="folder where --fetch keeps files; default: the cache")
    options = command.parse_args(arguments)
    files = _files(options)
    if not files:
        command.error("nothing to export: give a checkpoint, or --fetch")
    export_official(files, options.out, print)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
