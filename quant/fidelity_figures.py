"""From records to figures: each measure of the reference, of a candidate, and of their difference triple by triple.

A record is as `fidelity_record` wrote it. A measure is a number a triple, NaN where it cannot be told, such as the
angles of a portrait without a face; differences are of the triples where both can be told.
"""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from caphuman_edge.quant.estimates import Estimate, estimate, mean
from caphuman_edge.quant.fidelity_record import CONDITIONING, INDEPENDENT
from caphuman_edge.quant.measures import ANGLES, UNITS
from caphuman_edge.quant.records import Record
from caphuman_edge.quant.tables import DEGREES, PERCENT, PERCENT_GIVEN, Style
from caphuman_edge.quant.tasks import DEALT, OF_THE_HEAD
from caphuman_edge.runtime.perception import rotation_from

FOUND, POSE, LANDMARKS, LIGHT, TEXT = "face found", "pose error", "landmark distance, of the eyes'", "light", "text"
OWN = {CONDITIONING: "cosine to the photo, conditioning network", INDEPENDENT: "cosine to the photo, independent one"}
TO_REFERENCE = {CONDITIONING: "cosine to the reference's portrait, conditioning network",
                INDEPENDENT: "cosine to the reference's portrait, independent one"}
PSNR, SSIM = "PSNR, dB", "SSIM"
THREE: Style = (1, 3, "")
Measure = Callable[[Record], float]


@dataclass(frozen=True)
class Compared:
    """One measure of a candidate beside the reference's."""

    reference: Estimate
    candidate: Estimate
    difference: Estimate  # candidate minus reference, paired
    triples: int  # where both can be told


@dataclass(frozen=True)
class StepError:
    """How far eps is off at one step of the reference's trajectories."""

    timestep: int
    relative: Estimate  # the error's size as a share of the prediction's
    psnr_db: float


def measures(independent: bool, parser: bool) -> dict[str, tuple[Measure, Style]]:
    """Every measure by name, with how it is written; without judge or parser fewer."""
    networks = (CONDITIONING, INDEPENDENT) if independent else (CONDITIONING,)
    told = (*DEALT, *OF_THE_HEAD) if parser else OF_THE_HEAD
    found: dict[str, tuple[Measure, Style]] = {FOUND: (_found, PERCENT)}
    found |= {OWN[name]: (partial(_own, name), THREE) for name in networks}
    found |= {POSE: (_pose_error, DEGREES)}
    found |= {f"{angle} error": (partial(_error, "angles", angle), DEGREES) for angle in ANGLES}
    found |= {LANDMARKS: (partial(_number, "landmarks"), PERCENT_GIVEN)}
    found |= {f"{unit} error": (partial(_error, "units", unit), THREE) for unit in UNITS}
    found |= {f"{LIGHT}, direction's error": (partial(_number, "light"), DEGREES)}
    found |= {f"{TEXT}: all that it names": (partial(_text, told), PERCENT)}
    return found | {f"{TEXT}: {name}": (partial(_text, (name,)), PERCENT) for name in told}


def compared(measure: Measure, reference: Sequence[Record], candidate: Sequence[Record]) -> Compared:
    """One measure over the same triples in the same order."""
    one, other = (np.array([measure(record) for record in records], float) for records in (reference, candidate))
    both = ~(np.isnan(one) | np.isnan(other))
    return Compared(_mean(one[~np.isnan(one)]), _mean(other[~np.isnan(other)]), _mean((other - one)[both]),
                    int(both.sum()))


def likeness(reference: Sequence[Record], candidate: Sequence[Record], pixels: Sequence[Record],
             independent: bool) -> dict[str, tuple[Estimate, Style]]:
    """How near a candidate's portraits are to the reference's: pixels, and faces by both networks."""
    found = {PSNR: (_mean(np.array([record["psnr"] for record in pixels], float)), (1.0, 1, "")),
             SSIM: (_mean(np.array([record["ssim"] for record in pixels], float)), THREE)}
    for name in (CONDITIONING, INDEPENDENT) if independent else (CONDITIONING,):
        pairs = [(one["answer"]["vectors"][name], other["answer"]["vectors"][name])
                 for one, other in zip(reference, candidate, strict=True)
                 if one["answer"]["found"] and other["answer"]["found"]]
        found[TO_REFERENCE[name]] = (_mean(np.array([np.dot(*pair) for pair in pairs], float)), THREE)
    return found


def step_errors(records: Sequence[Record]) -> list[StepError]:
    """Means over trajectories, by step."""
    if not records:
        return []
    relative, psnr = (np.array([record[name] for record in records]) for name in ("relative", "psnr"))
    return [StepError(timestep, _mean(relative[:, k]), float(psnr[:, k].mean()))
            for k, timestep in enumerate(records[0]["timesteps"])]


def _found(record: Record) -> float:
    return float(record["answer"]["found"])


def _number(name: str, record: Record) -> float:
    return float(record["answer"].get(name, np.nan))


def _own(network: str, record: Record) -> float:
    return float(record["answer"].get("own", {}).get(network, np.nan))


def _error(group: str, name: str, record: Record) -> float:
    """The absolute difference from what is asked for."""
    found: Mapping[str, float] = record["answer"].get(group, {})
    return abs(found.get(name, np.nan) - record["wanted"][group][name])


def _pose_error(record: Record) -> float:
    """Degrees between the head that is asked for and the one that is seen: one rotation's angle, not three."""
    if not record["answer"]["found"]:
        return float("nan")
    one, other = (rotation_from(*(float(side["angles"][angle]) for angle in ANGLES))
                  for side in (record["wanted"], record["answer"]))
    return float(np.degrees(np.arccos(np.clip((np.trace(one.T @ other) - 1) / 2, -1, 1))))


def _text(names: Sequence[str], record: Record) -> float:
    """The share of these attributes that is as the prompt says, of those it names; what cannot be told is wrong."""
    wanted, found = record["wanted"]["attributes"], record["answer"].get("attributes", {})
    right = [found.get(name) == wanted[name] for name in names if name in wanted]
    return float(np.mean(right)) if right else float("nan")


def _mean(values: np.ndarray) -> Estimate:
    """Of one triple without an interval, of none without a value."""
    return Estimate(float(values[0]), np.nan, np.nan) if len(values) == 1 else estimate(mean, values)
