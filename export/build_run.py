"""What `caphuman build` does: check what can be checked at once, read, write, check, publish."""
import argparse
import dataclasses
import importlib.util
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from caphuman_edge.export.build_inputs import config_of, gather, random_folder
from caphuman_edge.export.builder import build
from caphuman_edge.export.coreml_writer import MAC, PHONE
from caphuman_edge.export.mobile_writer import LARGEST
from caphuman_edge.export.preview import preview_of
from caphuman_edge.export.random_weights import official_shapes
from caphuman_edge.export.stages import Options
from caphuman_edge.runtime.backends import EXTRAS
from caphuman_edge.runtime.bundle import Bundle, check_target
from caphuman_edge.runtime.cli.inspect import facts, text
from caphuman_edge.runtime.cli.report import show
from caphuman_edge.runtime.contract import Config
from caphuman_edge.runtime.errors import BadInput, MissingExtra
from caphuman_edge.runtime.schedule import Schedule, timesteps

PARAMETER_BYTES = {"onnx": 2, "openvino": 2, "coreml": 2, "ort": 4}  # on disk, with weights in halves
RANDOM_BYTES = 8  # of random checkpoints in 32 bits, twice since backbone and autoencoder are files of their own, too
DENOISER = ("model.diffusion_model.", "control_model.")
SPARE_BYTES = 1 << 30  # for what is written beside the weights


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    started, options, schedule = time.monotonic(), _options(args), _schedule(args)
    _check_extras(args.formats)
    check_target(args.out, args.overwrite)
    config = config_of(args)
    _check_mobile(options, config)
    _check_space(args.out, options, config, bool(args.random_weights))
    with _stoppable():
        model, sources = gather(args, config, schedule, _say)
        build(model, preview_of(model.first_stage_model), sources, args.out, options, _say, consume=True)
    shutil.rmtree(random_folder(args.out), ignore_errors=True)
    _say(f"built in {(time.monotonic() - started) / 60:.1f} minutes{_memory()}")
    show(facts(Bundle.open(args.out)), args.json, text)
    return 0


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


def _check_mobile(options: Options, config: Config) -> None:
    """Raises BadInput where the denoiser's weights in 32 bits are more than the format takes."""
    widest = 4 * sum(math.prod(shape) for name, shape in official_shapes(config).items() if name.startswith(DENOISER))
    if "ort" in options.formats and widest > LARGEST:
        raise BadInput(f"format ort takes graphs of less than {LARGEST / 1e9:.1f} GB, this model's denoiser would have "
                       f"{widest / 1e9:.1f} GB; leave ort out of --format")


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
