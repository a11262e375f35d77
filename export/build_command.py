"""`caphuman build`: official checkpoints to one verified bundle."""
import argparse
import dataclasses
import importlib.util
import math
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from caphuman_edge.export.build_inputs import add_sources, config_of, gather, random_folder
from caphuman_edge.export.builder import build
from caphuman_edge.export.coreml_writer import MAC, PHONE
from caphuman_edge.export.preview import preview_of
from caphuman_edge.export.random_weights import official_shapes
from caphuman_edge.export.stages import Options
from caphuman_edge.runtime.backends import EXTRAS
from caphuman_edge.runtime.bundle import Bundle, check_target
from caphuman_edge.runtime.cli.inspect import facts, text
from caphuman_edge.runtime.cli.report import add_json_flag, show
from caphuman_edge.runtime.cli.values import number, whole
from caphuman_edge.runtime.contract import Config
from caphuman_edge.runtime.errors import BadInput, MissingExtra
from caphuman_edge.runtime.manifest import FORMATS
from caphuman_edge.runtime.schedule import Schedule, timesteps

SIZES = range(256, 1025, 64)  # px
PARAMETER_BYTES = {"onnx": 2, "openvino": 2, "coreml": 2, "ort": 4}  # on disk, with weights in halves
RANDOM_BYTES = 8  # of random checkpoints in 32 bits, twice since backbone and autoencoder are files of their own, too
SPARE_BYTES = 1 << 30  # for what is written beside the weights


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("build", help="official checkpoints to a bundle for this device", description=(
        "Turns caphuman.ckpt, a Stable Diffusion 1.5 checkpoint and more into one bundle, and proves that each graph "
        "computes what the PyTorch reference computes. Stop it at any time: the same command goes on from there."))
    add_sources(parser.add_argument_group("what it is made from"))
    _add_output(parser.add_argument_group("what is made"))
    add_json_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check what can be checked at once, then read, write, check and publish."""
    options, schedule = _options(args), _schedule(args)
    _check_extras(args.formats)
    check_target(args.out, args.overwrite)
    config = config_of(args)
    _check_space(args.out, options, config, args.random_weights)
    with _stoppable():
        model, sources = gather(args, config, schedule, _say)
        build(model, preview_of(model.first_stage_model), sources, args.out, options, _say)
    shutil.rmtree(random_folder(args.out), ignore_errors=True)
    show(facts(Bundle.open(args.out)), args.json, text)
    return 0


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the bundle to write")
    group.add_argument("--overwrite", action="store_true", help="replace a bundle that is there, once the new one is "
                       "whole")
    group.add_argument("--format", type=_formats, default=("onnx",), metavar="F,..", dest="formats",
                       help=f"one or several of {', '.join(FORMATS)}; ort is ONNX Runtime Mobile's (default: onnx)")
    group.add_argument("--precision", choices=("f16", "f32"), default="f16",
                       help="of the stored weights; for Core ML of its arithmetic, too (default: f16)")
    group.add_argument("--denoiser", choices=("fused", "split", "both"), default="fused",
                       help="one graph, which is fast (default), or CapFace and UNet apart, for less memory; Core ML "
                       "takes them apart always")
    group.add_argument("--size", type=_size, default=None, metavar="WxH",
                       help="of the portraits, px, 256 to 1024 in steps of 64 (default: 512x512)")
    group.add_argument("--phone", action="store_true", help="Core ML packages for phones: the Neural Engine's form of "
                       "attention, weights of 6 bits, the UNet in two chunks")
    group.add_argument("--name", type=_name, help="of the bundle (default: that of its folder)")
    group.add_argument("--steps", type=whole(1, 1000), default=Schedule().steps, metavar="N",
                       help="default of the bundle (default: %(default)s)")
    group.add_argument("--guidance", type=number(0.0, 30.0), default=Schedule().guidance, metavar="G",
                       help="default of the bundle (default: %(default)g)")


def _options(args: argparse.Namespace) -> Options:
    if args.phone and "coreml" not in args.formats:
        raise BadInput(f"--phone is about Core ML, but --format is {','.join(args.formats)}; add coreml to it")
    coreml = dataclasses.replace(PHONE if args.phone else MAC, precision=args.precision)
    return Options(args.formats, args.precision, args.denoiser != "split", args.denoiser != "fused", coreml)


def _check_extras(formats: tuple[str, ...]) -> None:
    for kind, package in EXTRAS.items():
        if kind in formats and importlib.util.find_spec(package) is None:
            raise MissingExtra(package, kind, f"format {kind}")


def _schedule(args: argparse.Namespace) -> Schedule:
    timesteps(args.steps)  # refuses what cannot be laid out
    return Schedule(steps=args.steps, guidance=args.guidance)


def _check_space(out: Path, options: Options, config: Config, random: bool) -> None:
    """Raises BadInput where the disk is too full for the bundle; its parts become the bundle, so they count once."""
    parameters = sum(math.prod(shape) for shape in official_shapes(config).values())
    wide = 2 if options.storage == "f32" else 1
    held = sum(PARAMETER_BYTES[kind] for kind in {*options.formats, "onnx"})  # which the others are made of
    needed = parameters * (held * wide + (RANDOM_BYTES if random else 0)) + SPARE_BYTES
    place = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise BadInput(f"{place} has {free / 1e9:.1f} GB free, a build of {', '.join(options.formats)} takes about "
                       f"{needed / 1e9:.1f} GB; free some or build elsewhere")


@contextmanager
def _stoppable() -> Iterator[None]:
    """A polite kill is like Ctrl-C: scratch files go, finished parts stay."""
    def stop(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        _say("stopped; the same command goes on from here")
        raise
    finally:
        signal.signal(signal.SIGTERM, former)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _formats(value: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(value.split(",")))
    if unknown := [name for name in names if name not in FORMATS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown) or value!r} is no format, expected some of "
                                         f"{', '.join(FORMATS)}, with commas between")
    return names


def _size(value: str) -> tuple[int, int]:
    width, _, height = value.partition("x")
    try:
        edges = int(width), int(height or width)
    except ValueError:
        edges = 0, 0
    if not all(edge in SIZES for edge in edges):
        raise argparse.ArgumentTypeError(f"{value!r} is no size, expected such as 512x768: 256 to 1024 px in steps of "
                                         "64")
    return edges


def _name(value: str) -> str:
    if not value.isprintable() or not 1 <= len(value) <= 64:
        raise argparse.ArgumentTypeError(f"{value!r:.80} is no name, expected 1 to 64 printable characters")
    return value
