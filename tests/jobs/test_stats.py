"""Intervals against formulas written out by hand and against resampling done with NumPy alone."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import scipy.stats
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jobs.reporting.stats import (
    Column,
    estimates,
    holm,
    mean_interval,
    means_of_means,
    paired_difference,
    paired_p_value,
)

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


def clustered_scores(
    rng: np.random.Generator, contexts: int, questions: int
) -> tuple[list[float], list[str]]:
    """0/1 scores whose chance of being right is the context's own: 0.3 to 0.9, 0.6 on average."""
    chances = np.repeat(rng.uniform(0.3, 0.9, contexts), questions)
    names = [f"document {number}" for number in np.repeat(np.arange(contexts), questions)]
    return (rng.random(contexts * questions) < chances).astype(float).tolist(), names


def test_scores_that_share_contexts_are_resampled_by_context():
    rng = np.random.default_rng(11)
    scores, names = clustered_scores(rng, contexts=40, questions=10)
    estimate = mean_interval(scores, names)
    assert (estimate.interval, estimate.count, estimate.clusters) == ("bootstrap", 400, 40)
    by_context = np.asarray(scores).reshape(40, 10)

    oracle = scipy.stats.bootstrap(
        (np.arange(40),), lambda drawn: by_context[drawn].mean(), vectorized=False, n_resamples=10_000,
        method="percentile", rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    assert (estimate.low, estimate.high) == pytest.approx((oracle.low, oracle.high), abs=0.008)


def test_contexts_of_unequal_size_weigh_by_their_samples():
    # Context a has 30 samples at 0.9, b has 10 at 0.1: the mean is 0.7, and the four draws of two contexts
    # give 0.9, 0.7, 0.7, 0.1.
    estimate = mean_interval([0.9] * 30 + [0.1] * 10, ["a"] * 30 + ["b"] * 10)
    assert estimate.value == pytest.approx(0.7)
    assert (estimate.low, estimate.high) == pytest.approx((0.1, 0.9))
    narrower = mean_interval([0.9] * 30 + [0.1] * 10, ["a"] * 30 + ["b"] * 10, confidence=0.4)
    assert (narrower.low, narrower.high) == pytest.approx((0.7, 0.7))


def test_questions_of_one_document_are_not_so_many_samples():
    """Ten questions about each of 30 documents: intervals over documents cover the truth, Wilson's do not."""
    rng = np.random.default_rng(12)
    by_context = alone = 0
    for _ in range(150):
        chance = np.repeat((rng.random(30) < 0.6).astype(float) * 0.9 + 0.05, 10)  # 0.95 or 0.05: mean 0.59
        scores = (rng.random(300) < chance).astype(float).tolist()
        clustered, naive = mean_interval(scores, list(np.repeat(np.arange(30), 10))), mean_interval(scores)
        by_context += clustered.low <= 0.59 <= clustered.high
        alone += naive.low <= 0.59 <= naive.high
    assert by_context / 150 > 0.89
    assert alone / 150 < 0.7


def test_a_context_of_its_own_is_no_context():
    scores = [1.0, 0.0, 1.0, 1.0]
    assert mean_interval(scores, ["a", "b", "c", "d"]) == mean_interval(scores)


def test_equal_scores_in_shared_contexts_count_as_contexts():
    estimate = mean_interval([1.0] * 40, list(np.repeat(np.arange(8), 5)))
    assert (estimate.low, estimate.high) == pytest.approx(wilson(8, 8))
    none = paired_difference([1.0] * 40, [1.0] * 40, list(np.repeat(np.arange(8), 5)))
    eight = paired_difference([1.0] * 8, [1.0] * 8)
    assert (none.low, none.high, none.clusters) == (eight.low, eight.high, 8)


def test_a_column_has_the_same_interval_in_any_company():
    rng = np.random.default_rng(13)
    columns = [Column.of(rng.random(60)), Column.of(rng.random(60)), Column.of(rng.random(25))]
    alone = [estimates([column])[0] for column in columns]
    for together in (estimates(columns), estimates(columns[::-1])[::-1]):
        for one, other in zip(together, alone, strict=True):
            assert (one.low, one.high) == pytest.approx((other.low, other.high), rel=1e-12)


def test_mcnemars_test_is_the_binomial_one_over_pairs_that_differ():
    # 9 worse, 3 better: P(at most 3 of 12 heads) twice = 2 * (1 + 12 + 66 + 220) / 4096.
    column = Column.of([1.0] * 3 + [-1.0] * 9 + [0.0] * 18, difference=True)
    assert paired_p_value(column) == pytest.approx(2 * 299 / 4096)
    assert paired_p_value(Column.of([0.0] * 9, difference=True)) == 1.0


def test_other_differences_have_the_sign_flip_test():
    rng = np.random.default_rng(14)
    differences = rng.normal(0.03, 0.1, 40)
    oracle = scipy.stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=20_000, rng=np.random.default_rng(1)
    )
    assert paired_p_value(Column.of(differences, difference=True)) == pytest.approx(oracle.pvalue, abs=0.012)


def test_the_sign_flip_test_flips_contexts():
    # Three contexts of ten equal differences: of the 8 sign patterns only the two equal ones are as extreme.
    column = Column.of(
        [0.2] * 10 + [0.3] * 10 + [0.1] * 10, ["a"] * 10 + ["b"] * 10 + ["c"] * 10, difference=True
    )
    assert paired_p_value(column) == pytest.approx(0.25, abs=0.02)


def test_without_a_difference_five_in_a_hundred_tests_reject():
    rng = np.random.default_rng(15)
    rejected = 0
    for _ in range(200):
        effect = np.repeat(rng.normal(0, 0.2, 20), 5) + rng.normal(0, 0.05, 100)
        rejected += (
            paired_p_value(Column.of(effect, list(np.repeat(np.arange(20), 5)), difference=True)) < 0.05
        )
    assert rejected / 200 < 0.1


def test_holm_by_worked_examples():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    # R: p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm")
    assert holm([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])
    assert holm([0.9, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_mean_of_means_counts_every_task_the_same():
    rng = np.random.default_rng(16)
    large, small = rng.normal(0.8, 0.1, 400), rng.normal(0.4, 0.1, 50)
    (estimate,) = means_of_means([[Column.of(large), Column.of(small)]])
    assert estimate.value == pytest.approx((large.mean() + small.mean()) / 2)
    assert (estimate.count, estimate.clusters) == (450, 450)
    error = math.sqrt(large.var() / 400 + small.var() / 50) / 2
    assert estimate.high - estimate.low == pytest.approx(2 * Z * error, rel=0.05)


def test_a_task_that_is_always_right_is_no_certainty_in_a_mean():
    (estimate,) = means_of_means([[Column.of([1.0] * 3), Column.of([1.0, 1.0, 0.0])]])
    below = math.hypot(1 - wilson(3, 3)[0], 2 / 3 - wilson(2, 3)[0]) / 2
    above = (wilson(2, 3)[1] - 2 / 3) / 2
    assert estimate.value == pytest.approx(5 / 6)
    assert (estimate.low, estimate.high) == pytest.approx((5 / 6 - below, 5 / 6 + above))
    (alone,) = means_of_means([[Column.of([1.0] * 3)]])
    assert (alone.low, alone.high) == pytest.approx(wilson(3, 3))


def test_a_mean_over_sure_and_unsure_tasks_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(18)
    chances = (0.97, 0.97, 0.97, 0.5)  # the first three are often right every time
    drawn = [[Column.of((rng.random(20) < chance).astype(float)) for chance in chances] for _ in range(400)]
    covered = sum(one.low <= np.mean(chances) <= one.high for one in means_of_means(drawn))
    assert covered / 400 > 0.93


_VALUES = st.one_of(
    st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 1.0]), st.floats(0, 1, width=32)
)
_PAIRS = st.lists(st.tuples(_VALUES, _VALUES, st.integers(0, 4)), min_size=1, max_size=12)


def holds_its_value(estimate):
    low, value, high = estimate.low - 1e-9, estimate.value, estimate.high + 1e-9
    return -1 - 1e-9 <= low <= value <= high <= 1 + 2e-9


@settings(max_examples=60, deadline=None)
@given(_PAIRS)
@example([(1.0, 0.0, 0), (0.0, 0.0, 0), (1.0, 0.0, 1), (0.0, 0.0, 1)])
def test_an_interval_holds_its_own_mean(pairs):
    scores, baseline, contexts = (list(column) for column in zip(*pairs, strict=True))
    for clusters in (None, contexts):
        assert holds_its_value(mean_interval(scores, clusters))
        assert holds_its_value(paired_difference(scores, baseline, clusters))
        column = Column.of(scores, clusters)
        for one in means_of_means([[column, Column.of(baseline)], [column]]):
            assert holds_its_value(one)


def test_ten_thousand_samples_of_four_methods_take_seconds():
    rng = np.random.default_rng(17)
    columns = [Column.of(rng.random(10_000)) for _ in range(4)]
    columns += [Column.of(rng.uniform(-1, 1, 10_000), difference=True) for _ in range(3)]
    started = time.process_time()
    estimates(columns)
    assert time.process_time() - started < 5


def test_contexts_must_pair_up_with_scores():
    with pytest.raises(ValueError, match="one context per score, got 1 for 2"):
        mean_interval([1.0, 0.0], ["a"])
