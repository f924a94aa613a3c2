"""Intervals against formulas written out by hand and against resampling done with NumPy alone."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jobs.stats import mean_interval, paired_difference

Z = 1.959963984540054


def wilson(right: int, count: int) -> tuple[float, float]:
    """Wilson (1927), as printed in any textbook."""
    share = right / count
    centre = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    margin = Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return centre - margin, centre + margin


@pytest.mark.parametrize(("right", "count"), [(0, 1), (8, 10), (20, 20), (0, 20), (317, 500)])
def test_zero_one_scores_have_wilsons_interval(right, count):
    estimate = mean_interval([1.0] * right + [0.0] * (count - right))
    assert estimate.interval == "wilson"
    assert estimate.count == count
    assert estimate.value == pytest.approx(right / count)
    assert (estimate.low, estimate.high) == pytest.approx(wilson(right, count), abs=1e-9)


def test_eight_of_ten_by_a_published_value():
    estimate = mean_interval([1] * 8 + [0] * 2)
    assert (round(estimate.low, 4), round(estimate.high, 4)) == (0.4902, 0.9433)


def test_other_scores_have_the_percentile_bootstrap():
    rng = np.random.default_rng(3)
    scores = rng.choice([0, 1 / 3, 2 / 3, 1], size=60)
    means = rng.choice(scores, size=(40_000, 60)).mean(axis=1)
    estimate = mean_interval(scores.tolist())
    assert estimate.interval == "bootstrap"
    assert estimate.value == pytest.approx(scores.mean())
    assert (estimate.low, estimate.high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.006)


def test_the_bootstrap_is_the_same_every_time():
    scores = np.random.default_rng(9).random(50).tolist()
    assert mean_interval(scores) == mean_interval(scores)
    assert mean_interval(scores) != mean_interval(scores, seed=1)


def test_equal_scores_are_no_certainty():
    estimate = mean_interval([0.5] * 8)
    assert (estimate.low, estimate.high) == pytest.approx(wilson(4, 8))
    third = mean_interval([1 / 3] * 12)
    assert (third.low, third.high) == pytest.approx(wilson(4, 12))
    assert third.interval == "wilson"
    lost = paired_difference([1 / 3] * 12, [1.0] * 12)
    assert lost.value == pytest.approx(-2 / 3)
    assert (lost.low, lost.high) == pytest.approx([2 * end - 1 for end in wilson(2, 12)])


def test_wider_confidence_is_a_wider_interval():
    for scores in ([1, 1, 0, 1, 0], [0.2, 0.9, 0.4, 0.7, 0.1]):
        narrow, wide = mean_interval(scores, confidence=0.8), mean_interval(scores, confidence=0.99)
        assert wide.low < narrow.low <= narrow.high < wide.high


def test_paired_zero_one_scores_have_agresti_and_mins_interval():
    # 30 pairs: 3 better, 9 worse, 18 equal. Half a pair more in each outcome: 3.5, 9.5 of 32.
    scores = [1] * 3 + [0] * 9 + [1] * 18
    baseline = [0] * 3 + [1] * 9 + [1] * 18
    estimate = paired_difference(scores, baseline)
    better, worse = 3.5 / 32, 9.5 / 32
    margin = Z * math.sqrt((better + worse - (better - worse) ** 2) / 32)
    assert estimate.value == pytest.approx(-6 / 30)
    assert estimate.interval == "agresti-min"
    assert estimate.low == pytest.approx(better - worse - margin)
    assert estimate.high == pytest.approx(better - worse + margin)


def test_perfect_agreement_still_has_a_width():
    estimate = paired_difference([1.0] * 30, [1.0] * 30)
    assert estimate.value == 0
    assert estimate.low == pytest.approx(-estimate.high)
    assert 0.03 < estimate.high < 0.1


def test_pairing_removes_what_is_common():
    rng = np.random.default_rng(5)
    hardness = rng.random(200)
    better = np.clip(hardness + 0.05 + rng.normal(0, 0.01, 200), 0, 2)
    estimate = paired_difference(better.tolist(), hardness.tolist())
    assert estimate.interval == "bootstrap"
    assert 0.04 < estimate.low < estimate.value < estimate.high < 0.06


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(300):
        draw = (rng.random(40) < 0.85).astype(float).tolist()
        estimate = mean_interval(draw)
        covered += estimate.low <= 0.85 <= estimate.high
    assert 0.91 < covered / 300 < 0.99


def test_nothing_to_average_is_refused():
    with pytest.raises(ValueError, match="at least one score, got none"):
        mean_interval([])
    with pytest.raises(ValueError, match="must pair up, got 2 and 1"):
        paired_difference([1, 0], [1])
