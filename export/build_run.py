"""What `caphuman build` does: check what can be checked at once, read, write, check, publish."""
import argparse
import dataclasses
import importlib.util
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from types import FrameType

from caphuman_edge.export.build_inputs import RANDOM_CONTROLNET, config_of, gather, random_folder
from caphuman_edge.export.builder import build
from caphuman_edge.export.coreml_writer import MAC, PHONE
from caphuman_edge.export.mobile_writer import LARGEST
from caphuman_edge.export.part_store import PartStore
from caphuman_edge.export.preview import preview_of
from caphuman_edge.export.random_weights import official_shapes
from caphuman_edge.export.stages import CONVERTED, Options
from caphuman_edge.runtime.backends import EXTRAS
from caphuman_edge.runtime.bundle import MANIFEST, Bundle, check_target
from caphuman_edge.runtime.cli.inspect import facts, text
from caphuman_edge.runtime.cli.report import show
from caphuman_edge.runtime.contract import Config
from caphuman_edge.runtime.errors import BadInput, MissingExtra
from caphuman_edge.runtime.machine import FUSED, SPLIT
from caphuman_edge.runtime.samplers import lay_out
from caphuman_edge.runtime.schedule import SPACINGS, Schedule

INT8, PRECISIONS = "int8", "caphuman.precisions"  # made by what is registered in that group of entry points
PARAMETER_BYTES = {"onnx": 2, "openvino": 2, "coreml": 2, "ort": 4}  # on disk, with weights in halves
RANDOM_BYTES = 8  # of random checkpoints in 32 bits, twice since backbone and autoencoder are files of their own, too
DENOISER = ("model.diffusion_model.", "control_model.")
SPARE_BYTES = 1 << 30  # for what is written beside the weights


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    if args.photos and args.precision != INT8:
        raise BadInput(f"--photos is what int8 is calibrated with, but --precision is {args.precision}; leave it out")
    (_build_int8 if args.precision == INT8 else _build)(args)
    show(facts(Bundle.open(args.out)), args.json, text)
    return 0


def _build_int8(args: argparse.Namespace) -> None:
    """A float bundle, and what is registered for int8 makes of it. Either goes on where it was stopped."""
    if "ort" in args.formats:
        raise BadInput("--precision int8 is for onnx, openvino and coreml, but --format has ort; leave that out, or "
                       "build it on its own")
    if args.phone:
        raise BadInput("--phone stores weights as palettes of 6 bits, --precision int8 as int8; choose one of the two")
    (quantizer,) = entry_points(group=PRECISIONS, name=INT8)
    check_target(args.out, args.overwrite)
    home = args.out.with_name(f".{args.out.name}.float")
    kept = [home] if (home / MANIFEST).is_file() else []  # of a build that was stopped
    _build(argparse.Namespace(**{
        **vars(args), "precision": "f16", "out": home, "overwrite": True, "like": [*args.like, *kept],
        "name": args.name or args.out.absolute().name, "formats": tuple(dict.fromkeys(("onnx", *args.formats)))}))
    with _stoppable():
        quantizer.load()(home, args.out, args.photos, _say)
    shutil.rmtree(home)


def _build(args: argparse.Namespace) -> None:
    started, options, schedule = time.monotonic(), _options(args), _schedule(args)
    _check_extras(args.formats)
    check_target(args.out, args.overwrite)
    config = config_of(args)
    _check_mobile(options, config)
    _check_space(args.out, options, config, bool(args.random_weights))
    store = PartStore(args.like)
    with _stoppable():
        model, tiny, sources = gather(args, config, schedule, _say)
        build(model, preview_of(model.first_stage_model), sources, args.out, options, _say, consume=True,
              store=store, tiny=tiny)
    shutil.rmtree(random_folder(args.out), ignore_errors=True)
    _say(f"built in {(time.monotonic() - started) / 60:.1f} minutes{_memory()}")


def _options(args: argparse.Namespace) -> Options:
    if args.phone and "coreml" not in args.formats:
        raise BadInput(f"--phone is about Core ML, but --format is {','.join(args.formats)}; add coreml to it")
    if args.controlnet is not None and (args.controlnet == RANDOM_CONTROLNET) != bool(args.random_weights):
        raise BadInput(f"--controlnet is {args.controlnet}, expected {RANDOM_CONTROLNET} with --random-weights and a "
                       "file or a folder without; change one of the two")
    if args.tiny_decoder and args.random_weights:
        raise BadInput(f"--tiny-decoder is {args.tiny_decoder}, but --random-weights draws the tiny decoder's, too; "
                       "leave one of the two out")
    coreml = dataclasses.replace(PHONE if args.phone else MAC, precision=args.precision)
    return Options(args.formats, args.precision, args.denoiser != "split", args.denoiser != "fused", coreml,
                   control=args.controlnet is not None, tiny=bool(args.tiny_decoder or args.random_weights))


def _check_extras(formats: tuple[str, ...]) -> None:
    for kind, package in EXTRAS.items():
        if kind in formats and importlib.util.find_spec(package) is None:
            raise MissingExtra(package, kind, f"format {kind}")


def _schedule(args: argparse.Namespace) -> Schedule:
    spacing = args.timesteps or SPACINGS[args.schedule][0]
    schedule = Schedule(kind=args.schedule, steps=args.steps, guidance=args.guidance, timesteps=spacing)
    lay_out(schedule, args.steps)  # refuses what cannot be laid out
    return schedule


def _check_mobile(options: Options, config: Config) -> None:
    """Raises BadInput where the denoiser's weights in 32 bits are more than the format takes."""
    widest = 4 * _count(official_shapes(config), DENOISER)
    if "ort" in options.formats and widest > LARGEST:
        raise BadInput(f"format ort takes graphs of less than {LARGEST / 1e9:.1f} GB, this model's denoiser would have "
                       f"{widest / 1e9:.1f} GB; leave ort out of --format")


def _check_space(out: Path, options: Options, config: Config, random: bool) -> None:
    """Raises BadInput where the disk is too full for the bundle; its parts become the bundle, so they count once."""
    shapes, wide = official_shapes(config, options.control), 2 if options.storage == "f32" else 1
    again = _count(shapes, DENOISER) if {*FUSED, *SPLIT} <= {*options.graphs_in("onnx")} else 0
    copies = {kind: _count(shapes) + (again if kind in CONVERTED else 0)  # in ONNX its forms share their weights
              for kind in {*options.formats, "onnx"}}  # which the others are made of
    held = wide * sum(PARAMETER_BYTES[kind] * count for kind, count in copies.items())
    needed = held + (RANDOM_BYTES * _count(shapes) if random else 0) + SPARE_BYTES
    place = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise BadInput(f"{place} has {free / 1e9:.1f} GB free, a build of {', '.join(options.formats)} takes about "
                       f"{needed / 1e9:.1f} GB; free some or build elsewhere")


def _count(shapes: Mapping[str, tuple[int, ...]], beginnings: tuple[str, ...] = ("",)) -> int:
    """How many numbers the weights are whose names begin so."""
    return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(beginnings))


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


def _memory() -> str:
    """The most memory that this process held, mapped files included, where the system tells."""
    try:
        import resource  # not on Windows
    except ImportError:
        return ""
    unit = 1 if sys.platform == "darwin" else 1024
    return f", {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.1f} GB of memory at most"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
