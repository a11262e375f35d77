"""Figures of the score, on numbers whose answer is known."""
import numpy as np
import pytest

from caphuman_edge.quant.estimates import correlation, estimate, mean, mean_error, slope

RNG = np.random.default_rng(1)
WANTED = RNG.uniform(-40, 40, 300)


def test_slope_and_correlation_of_a_line_are_exact():
    assert estimate(slope, WANTED, 0.5 * WANTED + 7).value == pytest.approx(0.5)
    assert estimate(correlation, WANTED, -3 * WANTED).value == pytest.approx(-1)


def test_error_is_the_mean_absolute_difference():
    assert estimate(mean_error, np.array([0.0, 0.0]), np.array([-1.0, 3.0])).value == 2


def test_interval_holds_the_true_mean_and_shrinks_with_the_sample():
    sample = RNG.normal(5, 2, 400)
    large, small = estimate(mean, sample), estimate(mean, sample[:25])
    assert large.low < 5 < large.high
    assert large.high - large.low == pytest.approx(2 * 1.96 * sample.std() / 20, rel=0.15)
    assert small.high - small.low > 2 * (large.high - large.low)


def test_interval_is_the_same_every_time():
    assert estimate(slope, WANTED, WANTED**2) == estimate(slope, WANTED, WANTED**2)


def test_rows_are_resampled_together():
    found = estimate(slope, WANTED, 2 * WANTED)
    assert (found.low, found.high) == pytest.approx((2, 2))


@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_rows_have_no_figure(rows):
    assert np.isnan(estimate(mean, np.ones(rows)).value)


def test_a_constant_answer_has_a_slope_but_no_correlation():
    constant = np.zeros(300)
    assert estimate(slope, WANTED, constant).value == 0
    assert np.isnan(estimate(correlation, WANTED, constant).value)
