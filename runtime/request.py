"""What is asked for: who is to be seen, and the settings of the picture."""
import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32

from .denoise import scales_of
from .errors import BadInput
from .head import HeadCode
from .perceive import Subject
from .samplers import ETAS, lay_out
from .schedule import SPACINGS, Schedule

REPAINT = 0.75  # how much of a canvas is drawn anew unless told
KL, TINY = "kl", "tiny"
DECODERS = {KL: "vae_decoder", TINY: "tiny_decoder"}  # by name: the graph that makes the picture
RANGES = {"guidance": (0, 30), "identity_guidance": (0, 30), "tau": (0, 1000), "eta": (0, 1), "enhancement": (0, 2),
          "denoise": (0, 1), "seed": (0, 2**63 - 1)}


@dataclass(frozen=True, eq=False)
class Person:
    """One of the people in a portrait."""

    subject: Subject
    head: HeadCode | None = None  # None for the subject's own
    mask: Float32[np.ndarray, "h w"] | None = None  # of the frame, 0..1: where it may appear; None where its head is


@dataclass(frozen=True)
class Settings:
    """Everything about one portrait but people, canvas and control. None takes the bundle's default."""

    prompt: str = ""
    negative: str = ""
    seed: int = 12345
    steps: int | None = None
    guidance: float | None = None  # pull of the prompt; 1 switches it off
    identity_guidance: float | None = None  # pull of the person in the same way; 1, the official tool's, is off
    strength: float | tuple[float, ...] = 1.0  # of the 13 CapFace residuals: one for all, or each one's, middle last
    tau: int = 0  # face tokens are dropped at timesteps above it; 0 never drops them
    eta: float | None = None  # ddim: 0 deterministic (its default), 1 ancestral; tcd: its gamma, 0.3 by default
    enhancement: float = 0.0  # the paper's alpha: how much of CapFace without the person is added
    control_strength: float | tuple[float, ...] = 1.0  # of the second ControlNet's 13 residuals
    denoise: float | None = None  # how much of a canvas is drawn anew, 0 to 1; None is 0.75, or 1 without a canvas
    schedule: str | None = None  # sampler: one of schedule.SCHEDULES
    timesteps: str | None = None  # leading or trailing; None is the bundle's, or for another schedule its usual one
    decoder: str | None = None  # one of DECODERS: "kl", the autoencoder's own and the default, or the fast "tiny"


def complete(settings: Settings, schedule: Schedule, canvas: bool = False) -> Settings:
    """The settings with the bundle's defaults filled in, checked. Raises BadInput for one out of range."""
    kind = schedule.kind if settings.schedule is None else settings.schedule
    if kind not in SPACINGS:
        raise BadInput(f"schedule is {kind!r:.40}, expected one of {', '.join(SPACINGS)}; choose one of them")
    defaults = {"steps": schedule.steps, "guidance": schedule.guidance,
                "identity_guidance": schedule.identity_guidance, "denoise": REPAINT if canvas else 1.0,
                "schedule": kind, "eta": ETAS.get(kind, 0.0), "decoder": KL,
                "timesteps": schedule.timesteps if kind == schedule.kind else SPACINGS[kind][0]}
    unset: dict[str, Any] = {name: value for name, value in defaults.items() if getattr(settings, name) is None}
    chosen = dataclasses.replace(settings, **unset)
    if chosen.decoder not in DECODERS:
        raise BadInput(f"decoder is {chosen.decoder!r:.40}, expected one of {', '.join(DECODERS)}; choose one of them")
    for name, (low, high) in RANGES.items():
        value = getattr(chosen, name)
        if not low <= value <= high:  # also refuses NaN
            raise BadInput(f"{name} is {value}, expected {low} to {high}")
    if chosen.denoise != 1 and not canvas:
        raise BadInput(f"denoise is {chosen.denoise}, but there is no canvas to keep anything of; add one, or leave "
                       "denoise out")
    scales_of(chosen.strength)
    scales_of(chosen.control_strength, "control_strength")
    lay_out(sampling(chosen, schedule), chosen.steps or 0, chosen.eta or 0.0)  # refuses what cannot be laid out
    return chosen


def decoder_of(settings: Settings) -> str:
    """The graph that makes the picture of a latent."""
    return DECODERS[settings.decoder or KL]


def sampling(settings: Settings, schedule: Schedule) -> Schedule:
    """The model's noise schedule with the sampler and the timesteps that are asked for."""
    return dataclasses.replace(schedule, kind=settings.schedule or schedule.kind,
                               timesteps=settings.timesteps or schedule.timesteps)
