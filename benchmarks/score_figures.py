"""From the records of all pairs to figures: one estimate per measure and column, attributes with chance, and the goals.

A record is {"pair", "reference", "target", "prompt", "wanted", "answers"}; `wanted` and each of `answers` (by column)
are as score_pair wrote them. Angles, landmarks and units count portraits with a face; elsewhere no face is a miss.
"""
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from caphuman_edge.quant.estimates import Estimate, correlation, estimate, mean, mean_error, slope

ANSWER = "portrait"  # the column that is scored; the others are dummies
FRONTAL = "frontal"
COLUMNS: Mapping[str, str] = {
    ANSWER: "portrait", FRONTAL: "always frontal", "reference": "reference photo", "pasted": "map on grey",
    "target": "target photo"}
FOUND, OWN, RANDOM, NEARER, LANDMARKS = "face found", "cosine to own", "cosine to random", "nearer own", "landmarks"
FITS = {"slope": slope, "r": correlation, "error": mean_error}
ATTRIBUTES = ("hair", "background", "clothes", "length", "glasses", "light", "smile")
GOAL_ATTRIBUTES = 4  # that must be right
Record = Mapping[str, Any]


@dataclass(frozen=True)
class AttributeFigures:
    """How often one column shows what the prompts named."""

    named: int  # prompts that name it
    right: Estimate  # share; what cannot be told counts as wrong
    right_if_told: Estimate  # share of those that can be told
    shuffled: float  # share expected with the prompts dealt out at random among the same pictures
    commonest: float  # share of the commonest wish: what always showing that would score


@dataclass(frozen=True)
class Goal:
    """One line of the miniature's acceptance."""

    text: str
    found: float
    met: bool


def figures(records: Sequence[Record], column: str) -> dict[str, Estimate]:
    """Every measure of one column, by name; shares are 0..1, angles degrees, landmarks percent."""
    answers = [record["answers"][column] for record in records]
    seen = [(record["wanted"], answer) for record, answer in zip(records, answers, strict=True) if answer["found"]]
    found = {FOUND: _mean([answer["found"] for answer in answers])}
    for group in ("angles", "units"):
        for name in records[0]["wanted"][group]:
            columns = np.array([(wanted[group][name], answer[group][name]) for wanted, answer in seen]).reshape(-1, 2).T
            found |= {f"{name} {fit}": estimate(statistic, *columns) for fit, statistic in FITS.items()}
    return found | {
        LANDMARKS: _mean([answer["landmarks"] for _, answer in seen]),
        OWN: _mean([answer["own"] for _, answer in seen]),
        RANDOM: _mean([float(np.mean(answer["others"])) for _, answer in seen]),
        NEARER: _mean([_nearer(answer) for answer in answers]),
    }


def attribute_figures(records: Sequence[Record], column: str) -> dict[str, AttributeFigures]:
    """By attribute, over the pairs whose prompt names it; attributes that no prompt names are left out."""
    named = {name for record in records for name in record["wanted"]["attributes"]}
    return {name: _attribute(records, column, name) for name in ATTRIBUTES if name in named}


def goals(records: Sequence[Record]) -> list[Goal]:
    """What the miniature must reach, and whether it does; the second needs the frontal dummy."""
    found = {name: number.value for name, number in figures(records, ANSWER).items()}
    right = {name: prompts.right.value for name, prompts in attribute_figures(records, ANSWER).items()}
    best = sorted(right, key=right.__getitem__, reverse=True)[:GOAL_ATTRIBUTES]
    worst = right[best[-1]] if best else math.nan
    result = [
        Goal("a face is found in >= 95 % of portraits", found[FOUND], found[FOUND] >= 0.95),
        Goal("yaw slope is 0.8 to 1.2", found["yaw slope"], 0.8 <= found["yaw slope"] <= 1.2),
        Goal("nearer its own reference than a random other in >= 85 % of pairs", found[NEARER], found[NEARER] >= 0.85),
        Goal(f"prompts: {GOAL_ATTRIBUTES} attributes right in >= 75 %; the worst of {', '.join(best)}", worst,
             worst >= 0.75),
    ]
    if FRONTAL in records[0]["answers"]:
        ratio = found["yaw error"] / figures(records, FRONTAL)["yaw error"].value
        result.insert(2, Goal("yaw error at most half of the frontal dummy's", ratio, ratio <= 0.5))
    return result


def _attribute(records: Sequence[Record], column: str, name: str) -> AttributeFigures:
    asked = [(record["wanted"]["attributes"][name], record["answers"][column].get("attributes", {}).get(name))
             for record in records if name in record["wanted"]["attributes"]]
    told = [(wanted, found) for wanted, found in asked if found is not None]
    wishes, shown = (Counter(values) for values in zip(*asked, strict=True))
    return AttributeFigures(
        named=len(asked), right=_mean([wanted == found for wanted, found in asked]),
        right_if_told=_mean([wanted == found for wanted, found in told]),
        shuffled=sum(wishes[value] * shown[value] for value in wishes) / len(asked)**2,
        commonest=max(wishes.values()) / len(asked))


def _nearer(answer: Mapping[str, Any]) -> float:
    """The share of random others that the answer is less like than its own reference; 0 without a face."""
    return float(np.mean(answer["own"] > np.array(answer["others"]))) if answer["found"] else 0.0


def _mean(values: Sequence[float]) -> Estimate:
    return estimate(mean, np.array(values, float))
