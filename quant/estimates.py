"""Estimates with bootstrap confidence intervals (Efron 1979, percentile method), with a fixed seed."""
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 95  # percent
SEED = 0
Statistic = Callable[..., np.ndarray]  # arrays (..., n) to (...)


@dataclass(frozen=True)
class Estimate:
    """A figure and its confidence interval; NaN where it has no value."""

    value: float
    low: float
    high: float


def estimate(statistic: Statistic, *columns: np.ndarray) -> Estimate:
    """The statistic of columns of equal length n; rows are resampled together. NaN for fewer than two rows."""
    count = len(columns[0])
    if count < 2:
        return Estimate(np.nan, np.nan, np.nan)
    rows = np.random.default_rng(SEED).integers(count, size=(RESAMPLES, count))
    with np.errstate(invalid="ignore", divide="ignore"):  # a constant column has no slope and no correlation
        value = float(statistic(*columns))
        resampled = statistic(*(column[rows] for column in columns))
    if not np.isfinite(value):
        return Estimate(np.nan, np.nan, np.nan)
    low, high = np.nanpercentile(resampled, [(100 - CONFIDENCE) / 2, (100 + CONFIDENCE) / 2])
    return Estimate(value, float(low), float(high))


def mean(values: np.ndarray) -> np.ndarray:
    """The arithmetic mean."""
    return values.mean(axis=-1)


def mean_error(wanted: np.ndarray, found: np.ndarray) -> np.ndarray:
    """The mean absolute difference."""
    return np.abs(found - wanted).mean(axis=-1)


def slope(wanted: np.ndarray, found: np.ndarray) -> np.ndarray:
    """How much `found` moves as `wanted` moves by 1: the least-squares line's slope."""
    x, y = _centred(wanted), _centred(found)
    return (x * y).sum(axis=-1) / (x * x).sum(axis=-1)


def correlation(wanted: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Pearson's r."""
    x, y = _centred(wanted), _centred(found)
    return (x * y).sum(axis=-1) / np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))


def _centred(values: np.ndarray) -> np.ndarray:
    return values - values.mean(axis=-1, keepdims=True)
