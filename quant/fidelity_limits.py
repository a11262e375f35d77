"""What a candidate may lose, and whether it does not lose more.

limits.json holds the limits of every bundle that does not carry its own under "fidelity_limits" in its provenance:
for candidates with the reference's schedule, and for those with another, such as four steps against twenty.
"""
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from caphuman_edge.quant.estimates import Estimate
from caphuman_edge.quant.fidelity_columns import Column
from caphuman_edge.quant.fidelity_figures import OWN, POSE, SSIM, Compared
from caphuman_edge.runtime.errors import BundleError

OF_BUNDLE = "fidelity_limits"  # in a bundle's provenance: the form of limits.json
EQUAL, OTHER = "equal_schedule", "other_schedule"
IDENTITY, POSE_LOSS, LEAST_SSIM = "identity_loss", "pose_loss_degrees", "ssim"
NAMES = (IDENTITY, POSE_LOSS, LEAST_SSIM)  # each kind may lack some


@dataclass(frozen=True)
class Verdict:
    """One limit of one candidate."""

    candidate: str
    measure: str
    limit: float
    found: Estimate  # what is lost, or what there is
    met: bool  # by the estimate itself, whatever its interval
    refuted: bool  # not even met at the better end of the interval


def limits_of(column: Column, reference: Column) -> dict[str, float]:
    """The limits of a candidate. Raises BundleError where the bundle's own are none."""
    kind = EQUAL if column.sampling == reference.sampling else OTHER
    text = files("caphuman_edge.quant").joinpath("limits.json").read_text()
    own = column.bundle.manifest.provenance.get(OF_BUNDLE)
    return _checked(json.loads(text) if own is None else own, column)[kind]


def verdicts(column: Column, reference: Column, measures: Mapping[str, Compared],
             likeness: Mapping[str, Estimate]) -> list[Verdict]:
    """Every limit of the candidate; a figure without a value does not meet it."""
    return list(_verdicts(column.title, limits_of(column, reference), measures, likeness))


def _verdicts(title: str, limits: Mapping[str, float], measures: Mapping[str, Compared],
              likeness: Mapping[str, Estimate]) -> Iterator[Verdict]:
    if IDENTITY in limits:
        for name in (name for name in OWN.values() if name in measures):
            lost = _negative(measures[name].difference)
            yield Verdict(title, f"loss of {name}", limits[IDENTITY], lost, lost.value <= limits[IDENTITY],
                          lost.low > limits[IDENTITY])
    if POSE_LOSS in limits:
        lost = measures[POSE].difference
        yield Verdict(title, f"growth of {POSE}, degrees", limits[POSE_LOSS], lost,
                      lost.value <= limits[POSE_LOSS], lost.low > limits[POSE_LOSS])
    if LEAST_SSIM in limits:
        alike = likeness[SSIM]
        yield Verdict(title, f"{SSIM} at least", limits[LEAST_SSIM], alike, alike.value >= limits[LEAST_SSIM],
                      alike.high < limits[LEAST_SSIM])


def _negative(number: Estimate) -> Estimate:
    return Estimate(-number.value, -number.high, -number.low)


def _checked(limits: Any, column: Column) -> dict[str, dict[str, float]]:
    for kind in (EQUAL, OTHER):
        found = limits.get(kind) if isinstance(limits, dict) else None
        if not isinstance(found, dict) or not {*found} <= {*NAMES} or not all(
                isinstance(value, int | float) for value in found.values()):
            raise BundleError(f"{column.bundle.root}: {OF_BUNDLE} in its provenance lacks {kind}, or that is not "
                              f"numbers of {', '.join(NAMES)}; take the form of quant/limits.json, and build it again")
    return limits
