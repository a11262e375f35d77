"""`caphuman head`: bring your own FLAME head, and see which heads there are."""
import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import BundleError
from ..head.flame import LICENCE, FlameFiles, convert_flame
from ..head.library import add_head, describe_head, list_heads, new_head_file
from .report import add_json_flag, show

WHERE = """\
FLAME is the head model that CapHuman was trained with. It may not be passed on, so everybody fetches it anew:

  generic_model.pkl       register at https://flame.is.tue.mpg.de, accept the licence, and download FLAME 2020,
                          2023 or 2023 Open (there the file may be named flame2023.pkl or the like)
  FLAME_texture.npz       the same site: "FLAME texture space"; without it the head is grey-skinned all over
  head_template.obj       the folder data/ of DECA, https://github.com/yfeng95/DECA
  landmark_embedding.npy  the same folder

  caphuman head add generic_model.pkl --template head_template.obj --landmarks landmark_embedding.npy \\
                    --texture FLAME_texture.npz

The files are read without running what is in them, checked, and converted to one file in your own folder of heads
(the environment variable CAPHUMAN_HEADS names another). The files you downloaded are not needed afterwards."""


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("head", help="add your FLAME head, list heads",
                                   description="Adds a FLAME head to yours, or lists the heads there are.")
    actions = parser.add_subparsers(dest="action", metavar="add|list", required=True)
    _add_adding(actions.add_parser("add", help="convert FLAME's files", epilog=WHERE,
                                   description="Converts FLAME's files once to a head that needs no other software.",
                                   formatter_class=argparse.RawDescriptionHelpFormatter))
    listing = actions.add_parser("list", help="the heads there are", description=(
        "Lists the open head and those that were added, with what they hold, their licences and where they come from."))
    add_json_flag(listing)
    listing.set_defaults(run=run_list)


def run_add(args: argparse.Namespace) -> int:
    """Convert, and say what came out of it."""
    new_head_file(args.name, args.replace)  # refuses the name before the work
    files = FlameFiles(args.model, args.template, args.landmarks, args.texture)
    path = add_head(args.name, convert_flame(files, args.licence, _progress()), args.replace)
    if args.texture is None:
        print("caphuman: without --texture the head is grey-skinned all over", file=sys.stderr)
    print(_text_of(args.name, describe_head(path)), flush=True)
    return 0


def run_list(args: argparse.Namespace) -> int:
    """Report on every head; a damaged one is named with what is wrong, and hides no other."""
    heads = {}
    for name, path in list_heads().items():
        try:
            heads[name] = describe_head(path)
        except BundleError as error:
            heads[name] = {"file": str(path), "error": str(error)}
    show(heads, args.json, lambda report: "\n\n".join(_text_of(*item) for item in report.items()))
    return 0


def _add_adding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL.pkl", help="FLAME's generic_model.pkl")
    parser.add_argument("--template", type=Path, required=True, metavar="FILE", help="DECA's head_template.obj")
    parser.add_argument("--landmarks", type=Path, required=True, metavar="FILE", help="DECA's landmark_embedding.npy")
    parser.add_argument("--texture", type=Path, metavar="FILE", help="FLAME_texture.npz (default: grey skin)")
    parser.add_argument("--name", default="flame", help="what to call the head (default: flame)")
    parser.add_argument("--licence", default=LICENCE, metavar="TEXT", help=(
        "the licence under which you have the files, kept with the head; for FLAME 2023 Open, for instance, CC-BY-4.0 "
        f"(default: {LICENCE})"))
    parser.add_argument("--replace", action="store_true", help="overwrite a head of that name")
    parser.set_defaults(run=run_add)


def _progress() -> Callable[[float], None]:
    """Draws how much of the texture is read, where somebody watches; it has up to a gigabyte."""
    def draw(share: float) -> None:
        if sys.stderr.isatty():
            print(f"\rreading the texture {share:4.0%} ", end="\n" if share == 1 else "", file=sys.stderr, flush=True)
    return draw


def _text_of(name: str, head: dict[str, Any]) -> str:
    if "error" in head:
        return f"{name}\n  {head['error']}"
    return "\n".join([
        f"{name}: {head['vertices']} vertices; {head['identity']} identity, {head['expression']} expression and "
        f"{head['texture']} texture components",
        f"  file     {head['file']}", f"  sha256   {head['sha256']}", f"  licence  {head['licence']}",
        *(f"  from     {source}, sha256 {digest}" for source, digest in head["sources"].items()),
    ])
