"""The figures of a load: percentiles, overlaps and totals, against other ways to get them."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.load.record import Moment, Record, Run
from jobs.load.report import warnings
from jobs.load.settings import Settings
from jobs.load.summary import merged, overlaps, spread, summarise

SETTINGS = Settings(url="http://x", tokenizer="x", lengths=((100, 0.5), (1000, 0.5)), requests=1)


def record(index: int = 0, length: int = 100, sent_s: float = 0.0, times_s=(1.0,), **fields) -> Record:
    return Record(
        index=index,
        length=length,
        task="single",
        sent_s=sent_s,
        late_s=fields.pop("late_s", 0.0),
        end_s=fields.pop("end_s", max(times_s, default=0.0)),
        outcome=fields.pop("outcome", "complete"),
        times_s=tuple(times_s),
        **fields,
    )


def run(*records: Record, wall_s: float = 10.0, **fields) -> Run:
    return Run(settings=SETTINGS, wall_s=wall_s, lag_s=0.0, records=records, **fields)


@given(st.lists(st.floats(0, 1e3), min_size=2, max_size=300))
def test_percentiles_are_those_of_the_standard_library(values):
    found: Any = spread(values)
    hundredths = statistics.quantiles(values, n=100, method="inclusive")
    assert [found.p50, found.p90, found.p99] == pytest.approx([hundredths[i - 1] for i in (50, 90, 99)])
    assert (found.count, found.most) == (len(values), max(values))


def test_percentiles_of_one_value_and_of_none():
    one: Any = spread([3.0])
    assert (one.p50, one.p99, one.most, one.count) == (3.0, 3.0, 3.0, 1)
    assert spread([]) is None


halves = st.integers(0, 40).map(lambda n: n / 2)
intervals = st.tuples(halves, halves).map(lambda pair: (min(pair), max(pair)))


@given(st.lists(intervals, max_size=8), intervals)
def test_overlap_with_any_of_many_intervals(many, one):
    expected = any(begin <= one[1] and one[0] <= end for begin, end in many)
    joined = merged(many)
    assert overlaps(joined, one) == expected
    assert all(a[1] < b[0] for a, b in itertools.pairwise(joined))


def test_lines_are_by_length_and_method_and_count_complete_requests_only():
    summary = summarise(
        run(
            record(
                0, times_s=(1.0, 1.5, 3.0), method="dense", completion_tokens=3, prompt_tokens=90, score=1.0
            ),
            record(1, times_s=(2.0, 2.1), method="dense", completion_tokens=2, prompt_tokens=92, score=0.0),
            record(2, 1000, times_s=(4.0,), method="spts", completion_tokens=1, prompt_tokens=990, score=1.0),
            record(3, outcome="refused", times_s=(), message="full"),
            record(4, outcome="fault", times_s=(0.5,), message="cut"),
            record(5, outcome="fault", times_s=(0.5,), message="cut"),
        )
    )
    assert summary.outcomes == {"complete": 3, "refused": 1, "error": 0, "fault": 2}
    assert not summary.clean
    assert summary.messages == (("fault: cut", 2),)
    lines: Any = summary.lines
    short, long = lines
    assert (short.length, short.method, short.count, short.score) == (100, "dense", 2, 0.5)
    assert short.ttft.p50 == 1.5
    assert (short.itl.count, short.itl.most) == (3, 1.5)
    assert (long.length, long.method, long.count, long.itl) == (1000, "spts", 1, None)
    assert summary.total.count == 3
    assert (summary.requests_per_s, summary.tokens_per_s, summary.prompt_tokens_per_s) == (0.3, 0.6, 117.2)


def test_short_prompts_while_a_long_one_waits():
    """The long prompt waits from 10 to 14."""
    summary = summarise(
        run(
            record(0, 1000, sent_s=10.0, times_s=(4.0, 9.0)),
            record(1, sent_s=8.0, times_s=(1.0, 1.5, 3.0, 5.0, 9.0)),  # chunks at 9, 9.5, 11, 13, 17
            record(2, sent_s=13.5, times_s=(2.0,)),
            record(3, sent_s=14.5, times_s=(0.1, 6.0)),
        )
    )
    both: Any = summary.while_long
    assert (both.short, both.long) == (100, 1000)
    assert (both.ttft.count, both.ttft.most) == (1, 2.0), "request 2: the first began before, the last after"
    assert (both.itl.count, both.itl.most) == (3, 4.0)


def test_growth_of_memory_is_from_the_second_third_to_the_last():
    sizes = [50, 80, 100, 100, 103, 100, 101, 99, 110]
    moments = tuple(
        Moment(
            at_s=float(i),
            memory={"a": size, "b": 1},
            gauges={"kv_document_bytes": 10.0 * i} if i != 4 else {},
        )
        for i, size in enumerate(sizes)
    )
    summary = summarise(run(record(), moments=moments))
    memory: Any = summary.memory
    assert (memory.first, memory.most, memory.last, memory.growth) == (51, 111, 111, 1)
    # Of eight, as one has no gauges: 101 − 50 and 102 − 60 in the second third, 30 and 31 in the last.
    assert memory.growth_less_documents == round(30.5 - 46.5)
    assert (summary.kv_left_bytes, summary.held) == (None, None)
    assert summary.clean


@pytest.mark.parametrize("gauge", ["kv_reserved_bytes", "num_requests_held"])
def test_a_server_that_has_memory_of_requests_afterwards_is_not_clean(gauge):
    usual = {"kv_cache_bytes": 0.0, "kv_reserved_bytes": 0.0, "num_requests_held": 0.0}
    busy = Moment(at_s=0.0, gauges=dict.fromkeys(usual, 5.0))
    assert summarise(run(record(), moments=(busy, Moment(at_s=1.0, gauges=usual)))).clean
    left = summarise(run(record(), moments=(busy, Moment(at_s=1.0, gauges=usual | {gauge: 1.0}))))
    assert not left.clean
    assert any("a leak" in warning for warning in warnings(run(), left))


def test_a_run_in_which_nothing_was_answered_has_a_summary():
    summary = summarise(run(record(outcome="refused", times_s=(), late_s=2.0)))
    assert not summary.clean
    assert (summary.total.count, summary.total.ttft, summary.lines, summary.late) == (0, None, (), 1)
    assert summary.while_long is not None and summary.while_long.ttft is None
    assert summary.memory is None
