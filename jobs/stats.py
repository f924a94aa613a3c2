"""How sure a score is: intervals of means, and paired differences against a baseline on the same samples.

A failed sample counts as a score of 0, so callers pass a score for every sample that was tried.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

NUM_RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean (or a difference of means) with its interval.

    Attributes:
        value: the mean.
        low, high: ends of the interval.
        count: samples (or pairs) behind it.
        interval: how the interval was made: "wilson", "agresti-min" or "bootstrap".
    """

    value: float
    low: float
    high: float
    count: int
    interval: str


def mean_interval(scores: Sequence[float], *, confidence: float = 0.95, seed: int = 0) -> Estimate:
    """Mean of scores in 0..1: Wilson's interval if every score is 0 or 1, else the percentile bootstrap.

    Wilson keeps a width where all scores are equal: 20 right answers of 20 give 0.839 to 1. Other equal
    scores have it too, as if their mean were a share of right answers: no score in 0..1 varies more.

    Raises:
        ValueError: no scores.
    """
    if not scores:
        raise ValueError("scores must hold at least one score, got none; leave empty cells out")
    values = np.asarray(scores, dtype=np.float64)
    mean, count = float(values.mean()), len(values)
    if np.isin(values, (0.0, 1.0)).all():
        interval = stats.binomtest(int(values.sum()), count).proportion_ci(confidence, method="wilson")
        return Estimate(
            value=mean, low=float(interval.low), high=float(interval.high), count=count, interval="wilson"
        )
    if np.ptp(values) == 0:  # nothing to resample, which is no certainty
        low, high = _bounded(mean, count, confidence)
        return Estimate(value=mean, low=low, high=high, count=count, interval="wilson")
    low, high = _bootstrap(values, confidence, seed)
    return Estimate(value=mean, low=low, high=high, count=count, interval="bootstrap")


def paired_difference(
    scores: Sequence[float], baseline: Sequence[float], *, confidence: float = 0.95, seed: int = 0
) -> Estimate:
    """Mean of `scores[i] - baseline[i]`, the two taken on the same sample i.

    If every difference is -1, 0 or 1, the interval is Agresti and Min's (Statistics in Medicine 24, 2005):
    Wald's after adding half a pair to each of the four outcomes, so that it keeps a width where the two
    always agree. Else the percentile bootstrap over pairs; or, where all differences are equal, Wilson's
    on the scale from -1 to 1.

    Raises:
        ValueError: no pairs, or not as many scores as baselines.
    """
    if not scores or len(scores) != len(baseline):
        raise ValueError(
            f"scores and baseline must pair up, got {len(scores)} and {len(baseline)}; pass samples both have"
        )
    differences = np.asarray(scores, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    mean, count = float(differences.mean()), len(differences)
    if np.isin(differences, (-1.0, 0.0, 1.0)).all():
        better, worse = int((differences == 1).sum()), int((differences == -1).sum())
        low, high = _agresti_min(better, worse, count, confidence)
        return Estimate(value=mean, low=low, high=high, count=count, interval="agresti-min")
    if np.ptp(differences) == 0:
        low, high = (2 * end - 1 for end in _bounded((mean + 1) / 2, count, confidence))
        return Estimate(value=mean, low=low, high=high, count=count, interval="wilson")
    low, high = _bootstrap(differences, confidence, seed)
    return Estimate(value=mean, low=low, high=high, count=count, interval="bootstrap")


def _bounded(mean: float, count: int, confidence: float) -> tuple[float, float]:
    """Wilson's interval for a mean in 0..1 that need not be a whole number of successes."""
    z2 = float(stats.norm.ppf(0.5 + confidence / 2)) ** 2
    centre = (mean + z2 / (2 * count)) / (1 + z2 / count)
    margin = math.sqrt(z2 * (mean * (1 - mean) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return centre - margin, centre + margin


def _agresti_min(better: int, worse: int, count: int, confidence: float) -> tuple[float, float]:
    total = count + 2
    centre = (better - worse) / total
    variance = ((better + worse + 1) - (better - worse) ** 2 / total) / total**2
    margin = float(stats.norm.ppf(0.5 + confidence / 2)) * math.sqrt(variance)
    return max(-1.0, centre - margin), min(1.0, centre + margin)


def _bootstrap(values: np.ndarray, confidence: float, seed: int) -> tuple[float, float]:
    result = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=NUM_RESAMPLES,
        batch=max(1, 4_000_000 // len(values)),
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
