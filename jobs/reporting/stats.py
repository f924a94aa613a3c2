"""How sure a score is: intervals of means, paired differences against a baseline on the same samples, tests.

A failed sample counts as a score of 0, so callers pass a score for every sample that was tried. Samples that
share a context (one document, many questions) are not independent: what is resampled is contexts.

Legend: n samples, C clusters (contexts), k columns, B resamples.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95
_BATCH = 100_000  # numbers drawn at a time: few enough for a processor's cache

Clusters = Sequence[Any] | np.ndarray


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean (or a difference of means) with its interval.

    Attributes:
        value: the mean.
        low, high: ends of the interval.
        count: samples (or pairs) behind it.
        clusters: independent contexts that they come from; as many as `count` where none is shared.
        interval: how the interval was made: "wilson", "agresti-min", "bootstrap" or "mover".
    """

    value: float
    low: float
    high: float
    count: int
    clusters: int
    interval: str


@dataclass(frozen=True, eq=False)
class Column:
    """Scores, or paired differences, to be averaged, summed up by cluster.

    Attributes:
        values: [n] scores in 0..1, or differences in -1..1.
        sums, sizes: [C] sum of the values, and their number, in each cluster.
        difference: the values are differences.
    """

    values: np.ndarray
    sums: np.ndarray
    sizes: np.ndarray
    difference: bool

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray, clusters: Clusters | None = None, *,
           difference: bool = False) -> Column:  # fmt: skip
        """The column of `values`; `clusters[i]` names the context of value i, None = each has its own.

        Raises:
            ValueError: no values, or not as many clusters.
        """
        numbers = np.asarray(values, dtype=np.float64)
        if not len(numbers):
            raise ValueError("scores must hold at least one score, got none; leave empty cells out")
        if clusters is None:
            return cls(numbers, numbers, np.ones(len(numbers)), difference)
        if len(clusters) != len(numbers):
            raise ValueError(
                f"contexts must name one context per score, got {len(clusters)} for {len(numbers)}; "
                "pass as many"
            )
        codes = np.unique(np.asarray(clusters), return_inverse=True)[1]
        return cls(numbers, np.bincount(codes, weights=numbers), np.bincount(codes).astype(float), difference)

    @property
    def mean(self) -> float:
        """Mean of the values."""
        return float(self.values.mean())

    @property
    def clustered(self) -> bool:
        """Whether some values share a cluster."""
        return len(self.sums) < len(self.values)

    def closed_form(self, confidence: float) -> Estimate | None:
        """The interval where a formula gives a better one than resampling does; None = resample.

        Equal values are no certainty, but leave nothing to resample: they have Wilson's interval as if each
        cluster were one right or wrong answer (no score in 0..1 varies more), on the scale of the values.
        """
        alone = not self.clustered
        means = self.sums / self.sizes
        equal = bool(np.ptp(means) < 1e-12)
        if self.difference:
            if (alone or equal) and np.isin(means, (-1.0, 0.0, 1.0)).all():
                better, worse = int((means == 1).sum()), int((means == -1).sum())
                return self._estimate(_agresti_min(better, worse, len(means), confidence), "agresti-min")
            if equal:
                low, high = _wilson((self.mean + 1) / 2, len(means), confidence)
                return self._estimate((2 * low - 1, 2 * high - 1), "wilson")
        elif equal or (alone and np.isin(self.values, (0.0, 1.0)).all()):
            return self._estimate(_wilson(self.mean, len(means), confidence), "wilson")
        return None

    def _estimate(self, ends: tuple[float, float], interval: str) -> Estimate:
        return Estimate(value=self.mean, low=ends[0], high=ends[1], count=len(self.values),
                        clusters=len(self.sums), interval=interval)  # fmt: skip


def estimates(columns: Sequence[Column], *, confidence: float = CONFIDENCE, seed: int = 0) -> list[Estimate]:
    """The mean of each column with its interval.

    Scores that are all 0 or 1 of samples that share no context have Wilson's interval (1927); differences
    that are all -1, 0 or 1 have Agresti and Min's (Statistics in Medicine 24, 2005): Wald's after half a pair
    was added to each of the four outcomes. Everything else has the percentile bootstrap over clusters (Field
    and Welsh, JRSS B 69, 2007). A column's result depends on it and the seed alone.
    """
    found = [column.closed_form(confidence) for column in columns]
    open_ones = [column for column, done in zip(columns, found, strict=True) if done is None]
    resampled = iter(zip(open_ones, _distributions(open_ones, seed), strict=True))
    for index, done in enumerate(found):
        if done is None:
            column, means = next(resampled)
            found[index] = column._estimate(_percentiles(means, confidence), "bootstrap")
    return [one for one in found if one is not None]


def mean_interval(
    scores: Sequence[float],
    contexts: Clusters | None = None,
    *,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Estimate:
    """Mean of scores in 0..1, by the rules of `estimates`. Raises ValueError: no scores."""
    return estimates([Column.of(scores, contexts)], confidence=confidence, seed=seed)[0]


def paired_difference(
    scores: Sequence[float],
    baseline: Sequence[float],
    contexts: Clusters | None = None,
    *,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Estimate:
    """Mean of `scores[i] - baseline[i]`, the two taken on the same sample i, by the rules of `estimates`.

    Raises:
        ValueError: no pairs, or not as many scores as baselines.
    """
    if not len(scores) or len(scores) != len(baseline):
        raise ValueError(
            f"scores and baseline must pair up, got {len(scores)} and {len(baseline)}; pass samples both have"
        )
    differences = np.asarray(scores, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    column = Column.of(differences, contexts, difference=True)
    return estimates([column], confidence=confidence, seed=seed)[0]


def means_of_means(
    rows: Sequence[Sequence[Column]], *, confidence: float = CONFIDENCE, seed: int = 0
) -> list[Estimate]:
    """For each row, the mean of its columns' means, each counting the same: benchmarks average tasks so.

    The interval is made of the columns' own, by the rules of `estimates`: each end is as far from the mean as
    the root of the sum of squares of the columns' ends from their means (Zou and Donner, Statistics in
    Medicine 27, 2008: MOVER). A column of equal values thus adds its doubt too.

    Worked example: two columns with 0.8 [0.6, 0.9] and 0.6 [0.5, 0.7] give 0.7, down to
    0.7 - sqrt(0.2^2 + 0.1^2) / 2 = 0.588 and up to 0.7 + sqrt(0.1^2 + 0.1^2) / 2 = 0.771.
    """
    found = iter(estimates([column for row in rows for column in row], confidence=confidence, seed=seed))
    return [_mean_of_means([next(found) for _ in row]) for row in rows]


def _mean_of_means(parts: Sequence[Estimate]) -> Estimate:
    value = sum(part.value for part in parts) / len(parts)
    below = math.hypot(*(part.value - part.low for part in parts)) / len(parts)
    above = math.hypot(*(part.high - part.value for part in parts)) / len(parts)
    return Estimate(
        value=value,
        low=value - below,
        high=value + above,
        count=sum(part.count for part in parts),
        clusters=sum(part.clusters for part in parts),
        interval="mover",
    )


def paired_p_value(column: Column, *, seed: int = 0) -> float:
    """Two-sided p-value of "the differences have mean 0".

    McNemar's exact test (Psychometrika 12, 1947: the binomial one over the pairs that differ) where all are
    -1, 0 or 1 and no context is shared. Else the sign-flip permutation test over clusters: under that
    hypothesis a cluster's sum could as well have had the other sign. Its p counts the observed signs as one
    of the permutations (Phipson and Smyth, 2010), so it is never 0.
    """
    if not column.clustered and np.isin(column.values, (-1.0, 0.0, 1.0)).all():
        better, worse = int((column.values == 1).sum()), int((column.values == -1).sum())
        return 1.0 if better == worse else float(stats.binomtest(better, better + worse, 0.5).pvalue)
    sums = column.sums[column.sums != 0]  # a zero has no sign to flip
    rng = np.random.default_rng(seed)
    observed = abs(float(sums.sum())) * (1 - 1e-12)
    extreme = 0
    for size in _batches(len(sums)):
        bits = rng.integers(0, 256, size=(size, -(-len(sums) // 8)), dtype=np.uint8)
        signs = np.unpackbits(bits, axis=1, count=len(sums)).astype(float)  # 1 keeps a sign, 0 flips it
        extreme += int((np.abs(2 * (signs @ sums) - sums.sum()) >= observed).sum())
    return (extreme + 1) / (NUM_RESAMPLES + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (Scandinavian Journal of Statistics 6, 1979): as many hypotheses as are given.

    One of at most 0.05 stays significant when the chance of any false one among all is to be at most 0.05.
    Worked example: 0.01, 0.04, 0.03 become 0.03, 0.06, 0.06.
    """
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def _distributions(columns: Sequence[Column], seed: int) -> list[np.ndarray]:
    """[B] bootstrap means of each column. Columns of as many clusters share their draws: that saves time, and
    each still has the draws that it would have alone (last bits apart: BLAS)."""
    result: list[np.ndarray] = [np.empty(0)] * len(columns)
    alike: dict[int, list[int]] = defaultdict(list)
    for index, column in enumerate(columns):
        alike[len(column.sums)].append(index)
    for clusters, indices in alike.items():
        rng = np.random.default_rng(seed)
        sums_Ck = np.stack([columns[index].sums for index in indices], axis=1)
        sizes_Ck = np.stack([columns[index].sizes for index in indices], axis=1)
        means_Bk = np.concatenate(
            [
                times_C @ sums_Ck / (times_C @ sizes_Ck)
                for times_C in (_times_drawn(rng, size, clusters) for size in _batches(clusters))
            ]
        )
        for place, index in enumerate(indices):
            result[index] = means_Bk[:, place]
    return result


def _times_drawn(rng: np.random.Generator, size: int, clusters: int) -> np.ndarray:
    """[size, C] how often each cluster is among C draws with replacement."""
    drawn = rng.integers(0, clusters, size=(size, clusters))
    drawn += clusters * np.arange(size)[:, None]
    return np.bincount(drawn.ravel(), minlength=size * clusters).reshape(size, clusters).astype(float)


def _batches(width: int) -> Iterable[int]:
    """NUM_RESAMPLES in parts of about _BATCH numbers."""
    size = max(1, min(NUM_RESAMPLES, _BATCH // max(1, width)))
    left = NUM_RESAMPLES
    while left:
        yield min(size, left)
        left -= min(size, left)


def _percentiles(means: np.ndarray, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _wilson(mean: float, count: int, confidence: float) -> tuple[float, float]:
    """Wilson's interval for a mean in 0..1, which need not be a whole number of right answers."""
    z2 = float(stats.norm.ppf(0.5 + confidence / 2)) ** 2
    centre = (mean + z2 / (2 * count)) / (1 + z2 / count)
    margin = math.sqrt(z2 * (mean * (1 - mean) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return max(0.0, centre - margin), min(1.0, centre + margin)


def _agresti_min(better: int, worse: int, count: int, confidence: float) -> tuple[float, float]:
    total = count + 2
    centre = (better - worse) / total
    variance = ((better + worse + 1) - (better - worse) ** 2 / total) / total**2
    margin = float(stats.norm.ppf(0.5 + confidence / 2)) * math.sqrt(variance)
    return max(-1.0, centre - margin), min(1.0, centre + margin)
