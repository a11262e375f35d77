"""The settings of the picture as flags, and what they stand for."""
import argparse
import dataclasses
import secrets
from pathlib import Path

from ..errors import BadInput
from ..pipeline import Pipeline
from ..request import DECODERS, Settings
from ..schedule import LEADING, SCHEDULES, TRAILING
from .styles import apply_style
from .values import size, strengths

RANDOM = -1  # as a seed


def add_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags for prompt, sampler and strengths."""
    unset = Settings()
    group.add_argument("--prompt", default=unset.prompt, metavar="TEXT", help="what the portrait should show; "
                       "(words:1.3) weigh more, (words:0.7) less")
    group.add_argument("--added", default="", metavar="TEXT", help="more of it, joined with a comma, as the official "
                       "tool's added prompt")
    group.add_argument("--negative", default=unset.negative, metavar="TEXT", help="what it should not show")
    group.add_argument("--style", metavar="NAME", help="words for a look around the prompt; an unknown name is "
                       "answered with all known ones")
    group.add_argument("--styles", type=Path, metavar="FILE", help="styles of your own: JSON, name: {prompt, negative}")
    group.add_argument("--steps", type=int, metavar="N", help="denoising steps (default: the bundle's)")
    group.add_argument("--schedule", choices=SCHEDULES, help="sampler (default: the bundle's); lcm and tcd are "
                       "for models that were distilled for them, in 1 to 50 steps")
    group.add_argument("--timesteps", choices=(LEADING, TRAILING), help="leading, as the official tool's, or trailing, "
                       "which begin in pure noise, as Hyper-SD's; lcm and tcd are trailing (default: the bundle's, and "
                       "for another --schedule leading for ddim, else trailing)")
    group.add_argument("--guidance", type=float, metavar="G",
                       help="pull of the prompt, 1 is off (default: the bundle's)")
    group.add_argument("--identity-guidance", type=float, metavar="G", help="pull of the person's face in the same "
                       "way, 1 is off, as in the official tool (default: the bundle's)")
    group.add_argument("--strength", type=strengths, default=unset.strength, metavar="S", help="pull of the person "
                       "and the head, 0 to 2, or 13 numbers with commas between, one a residual (default: 1)")
    group.add_argument("--enhancement", type=float, default=unset.enhancement, metavar="A", help="stronger hold of "
                       "the head, without the person, 0 to 2 (default: 0)")
    group.add_argument("--tau", type=int, default=unset.tau, metavar="T",
                       help="leave the person out at timesteps above it; 0 never does (default)")
    group.add_argument("--eta", type=float, metavar="E", help="fresh noise a step, 0 to 1: of ddim (default: 0), and "
                       "of tcd, whose gamma it is (default: 0.3); lcm's is fixed, dpm++ takes none")
    group.add_argument("--decoder", choices=DECODERS, help="what makes the picture of the last latent: kl, the "
                       "autoencoder's own (default), or tiny, which takes a fraction of the time and is a little worse")
    group.add_argument("--seed", type=int, default=unset.seed, metavar="N", help="of the noise; -1 for a random one, "
                       "which the recipe tells (default: %(default)d)")
    group.add_argument("--size", type=size, metavar="WxH", help="px; a bundle has the one that it was built for")


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that the flags stand for; the pipeline checks their ranges."""
    given = {field.name: vars(args)[field.name] for field in dataclasses.fields(Settings)}
    if args.seed == RANDOM:
        given["seed"] = secrets.randbelow(2**31)
    prompt, negative = ", ".join(filter(None, (args.prompt, args.added))), args.negative
    if args.style is not None:
        prompt, negative = apply_style(args.style, prompt, negative, args.styles)
    elif args.styles is not None:
        raise BadInput(f"--styles {args.styles} holds styles to choose from; add --style NAME, or leave it out")
    return Settings(**{**given, "prompt": prompt, "negative": negative})


def check(pipe: Pipeline, args: argparse.Namespace) -> None:
    """Raise BadInput for a size that the bundle does not have."""
    config = pipe.bundle.config
    if args.size not in (None, (config.width, config.height)):
        width, height = args.size
        raise BadInput(f"--size {width}x{height}, but the bundle was built for {config.width}x{config.height}; build "
                       f"one with 'caphuman build --size {width}x{height} --like {pipe.bundle.root}', or leave it out")
