"""`caphuman build`, its flags. What it does is imported when it is called: that takes seconds, and --help need not."""
import argparse
import importlib.util
from pathlib import Path
from typing import Any

from caphuman_edge.runtime.cli.report import add_json_flag
from caphuman_edge.runtime.cli.values import number, size, whole
from caphuman_edge.runtime.head.library import OPEN
from caphuman_edge.runtime.manifest import FORMATS
from caphuman_edge.runtime.schedule import LEADING, SCHEDULES, TRAILING, Schedule

NEEDED = ("torch", "onnx_ir", "onnxscript", "safetensors")  # the export extra
if missing := [package for package in NEEDED if importlib.util.find_spec(package) is None]:
    raise ImportError(f"No module named {missing[0]!r}")  # the command line then leaves the command out


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("build", help="official checkpoints to a bundle for this device", description=(
        "Turns caphuman.ckpt, a Stable Diffusion 1.5 checkpoint and more into one bundle, and proves that each graph "
        "computes what the PyTorch reference computes. Stop it at any time: the same command goes on from there."))
    _add_sources(parser.add_argument_group("what it is made from"))
    _add_output(parser.add_argument_group("what is made"))
    add_json_flag(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from caphuman_edge.export.build_run import run

    return run(args)


def _add_sources(group: argparse._ArgumentGroup) -> None:
    """The flags that name what a bundle is made from."""
    group.add_argument("--caphuman", type=Path, metavar="FILE", help="caphuman.ckpt")
    group.add_argument("--backbone", type=Path, metavar="FILE", help="a Stable Diffusion 1.5 checkpoint of any style, "
                       "or a diffusers folder; its UNet, text encoder and autoencoder take the place of caphuman's")
    group.add_argument("--vae", type=Path, metavar="FILE", help="an autoencoder that takes the place of the backbone's")
    group.add_argument("--tiny-decoder", type=Path, metavar="FILE", help="the decoder of TAESD, a tiny autoencoder for "
                       "Stable Diffusion 1.x, or diffusers' AutoencoderTiny of it: for `generate --decoder tiny`")
    group.add_argument("--controlnet", metavar="FILE", help="a ControlNet for Stable Diffusion 1.5, such as OpenPose, "
                       "to act beside CapFace; or a diffusers folder, or, with --random-weights, `random`")
    group.add_argument("--lora", type=_lora, action="append", default=[], metavar="FILE[:SCALE]",
                       help="a LoRA to fuse, kohya's or diffusers' format; may be given several times")
    group.add_argument("--facenet", type=Path, metavar="FILE", help="FaceNet: 20180402-114759-vggface2.pt, or "
                       "facenet_512.tflite")
    group.add_argument("--deca", type=Path, metavar="FILE", help="deca_model.tar: heads as the official "
                       "tool reads them")
    group.add_argument("--parser", type=Path, metavar="FILE", help="BiSeNet: 79999_iter.pth")
    group.add_argument("--mtcnn", type=Path, metavar="DIR", help="folder with pnet.pt, rnet.pt and onet.pt")
    group.add_argument("--head", default=OPEN, metavar="NAME", help="a head that you added with `caphuman head add` "
                       "(default: the open head)")
    group.add_argument("--fetch", action="store_true", help="get what is not given from its official source, all but "
                       "DECA and FLAME, which need a registration of your own")
    group.add_argument("--accept-licences", action="store_true", help="of what --fetch gets; they are shown first")
    group.add_argument("--downloads", type=Path, metavar="DIR", help="where --fetch keeps files (default: the cache)")
    group.add_argument("--random-weights", choices=("full", "nano"), help="weights of the official names and shapes, "
                       "drawn at random: for tests and benchmarks, such bundles draw noise")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of --random-weights")


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the bundle to write")
    group.add_argument("--overwrite", action="store_true", help="replace a bundle that is there, once the new one is "
                       "whole")
    group.add_argument("--like", type=Path, action="append", default=[], metavar="BUNDLE", help="a bundle of yours "
                       "whose graphs are kept where they would be made again as they are, such as all but the UNet's "
                       "for another backbone; files are shared by hard links; may be given several times")
    group.add_argument("--format", type=listed_formats, default=("onnx",), metavar="F,..", dest="formats",
                       help=f"one or several of {', '.join(FORMATS)}; ort is ONNX Runtime Mobile's (default: onnx)")
    group.add_argument("--precision", choices=("f16", "f32", "int8"), default="f16",
                       help="of the stored weights; for Core ML of its arithmetic, too. int8 is for all but ort: "
                       "what 'caphuman quantize' makes of an f16 bundle (default: f16)")
    group.add_argument("--photos", type=Path, nargs="+", default=[], metavar="PATH", help="photos of faces, or folders "
                       "of them, to calibrate int8 with (default: portraits that the embedded miniature draws)")
    group.add_argument("--denoiser", choices=("fused", "split", "both"), default="fused",
                       help="one graph, which is fast (default), or CapFace and UNet apart, for less memory; Core ML "
                       "takes them apart always, and a ControlNet needs them apart, too")
    group.add_argument("--size", type=size, default=None, metavar="WxH",
                       help="of the portraits, px, 256 to 1024 in steps of 64 (default: 512x512)")
    group.add_argument("--pool-keys", type=int, choices=(1, 2, 4), default=1, metavar="N", help="an approximation for "
                       "speed: the mean of N x N cells is one key of the finest self-attention, 2 or 4; compare with "
                       "'caphuman fidelity' (default: 1, exact)")
    group.add_argument("--decode-tiles", type=tile_edge, default=0, metavar="EDGE", help="an approximation for memory: "
                       "the portrait is decoded in tiles of EDGE x EDGE px, which overlap by a quarter or more; 128 "
                       "and more in steps of 64, not for the tiny decoder (default: all at once, exact)")
    group.add_argument("--phone", action="store_true", help="Core ML packages for phones: the Neural Engine's form of "
                       "attention, weights of 6 bits, the UNet in two chunks")
    group.add_argument("--name", type=_name, help="of the bundle (default: that of its folder)")
    group.add_argument("--steps", type=whole(1, 1000), default=Schedule().steps, metavar="N",
                       help="default of the bundle (default: %(default)s)")
    group.add_argument("--guidance", type=number(0.0, 30.0), default=Schedule().guidance, metavar="G",
                       help="default of the bundle (default: %(default)g)")
    group.add_argument("--schedule", choices=SCHEDULES, default=Schedule().kind, help="sampler that the bundle draws "
                       "with, such as the one that a LoRA was distilled for (default: %(default)s)")
    group.add_argument("--timesteps", choices=(LEADING, TRAILING), help="its timesteps: trailing for Hyper-SD with "
                       "ddim (default: leading for ddim, trailing for all others)")


def _lora(value: str) -> tuple[Path, float]:
    """`FILE` or `FILE:SCALE`."""
    name, colon, scale = value.rpartition(":")
    try:
        return (Path(name), float(scale)) if colon else (Path(value), 1.0)
    except ValueError:  # a colon of the path, such as Windows has
        return Path(value), 1.0


def listed_formats(value: str) -> tuple[str, ...]:
    """The value of --format."""
    names = tuple(dict.fromkeys(value.split(",")))
    if unknown := [name for name in names if name not in FORMATS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown) or repr(value)} is no format, expected some of "
                                         f"{', '.join(FORMATS)}, with commas between")
    return names


def tile_edge(value: str) -> int:
    """The value of --decode-tiles."""
    if not value.isdecimal() or int(value) < 128 or int(value) % 64:
        raise argparse.ArgumentTypeError(f"{value!r:.80} is no edge of tiles, expected such as 320: 128 px or more in "
                                         "steps of 64")
    return int(value)


def _name(value: str) -> str:
    if not value.isprintable() or not 1 <= len(value) <= 64:
        raise argparse.ArgumentTypeError(f"{value!r:.80} is no name, expected 1 to 64 printable characters")
    return value
