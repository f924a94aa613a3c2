"""What a run comes to: percentiles by prompt length and method, throughput, outcomes, growth of memory."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import get_args

import numpy as np

from jobs.load.answer import Outcome
from jobs.load.record import Moment, Record, Run

OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Percentiles of `count` values, seconds; with linear interpolation between the two nearest."""

    count: int
    p50: float
    p90: float
    p99: float
    most: float


@dataclass(frozen=True, kw_only=True)
class Line:
    """Complete requests of one length (None = all) and one method (None = all, or unknown).

    ttft: sent to first text. itl: between two chunks of text. e2e: sent to the end. tokens: of an answer,
    mean. score: mean, 0 to 1. cached: requests of whose prompt the endpoint knew a part.
    """

    length: int | None
    method: str | None
    count: int
    ttft: Spread | None
    itl: Spread | None
    e2e: Spread | None
    prompt_tokens: float
    tokens: float
    score: float
    cached: int


@dataclass(frozen=True, kw_only=True)
class WhileLong:
    """The shortest prompts while one of the longest waits for its first token: what slicing is for.

    ttft: of those short requests whose own wait overlaps. itl: of those gaps in short streams that overlap.
    """

    short: int
    long: int
    ttft: Spread | None
    itl: Spread | None


@dataclass(frozen=True, kw_only=True)
class Memory:
    """All processes of the server, private bytes. growth: median of the last third of the load less that of
    the third before. growth_less_documents: the same of what is not kept documents; None where the server
    does not say how many bytes those are. Documents in a GPU's memory are in none of its processes'."""

    first: int
    most: int
    last: int
    growth: int
    growth_less_documents: int | None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """See `summarise`. outcomes: how many requests ended how. requests_per_s, tokens_per_s (answers),
    prompt_tokens_per_s: of complete ones, over the whole run. late: requests that found no free stream when
    they were due. kv_left_bytes: reserved when all was over; held: requests whose caches the engines had
    then; None where the server does not say. messages: of errors and faults, and how often."""

    outcomes: dict[str, int]
    requests_per_s: float
    tokens_per_s: float
    prompt_tokens_per_s: float
    total: Line
    lines: tuple[Line, ...]
    while_long: WhileLong | None
    memory: Memory | None
    kv_left_bytes: float | None
    held: float | None
    late: int
    messages: tuple[tuple[str, int], ...]

    @property
    def clean(self) -> bool:
        """Some request was answered to its end, every other one too or refused in form, and none of them has
        memory of the server's any more."""
        wrong = self.outcomes["error"] or self.outcomes["fault"] or self.kv_left_bytes or self.held
        return self.outcomes["complete"] > 0 and not wrong


def spread(values: Iterable[float]) -> Spread | None:
    """Percentiles of values; None of none."""
    data = np.fromiter(values, dtype=float)
    if not data.size:
        return None
    p50, p90, p99 = (float(value) for value in np.percentile(data, (50, 90, 99)))
    return Spread(count=int(data.size), p50=p50, p90=p90, p99=p99, most=float(data.max()))


def summarise(run: Run) -> Summary:
    """All figures of a run."""
    complete = [record for record in run.records if record.outcome == "complete"]
    after = run.moments[-1].gauges if run.moments else {}
    keys = sorted({(record.length, record.method or "") for record in complete})
    outcomes = Counter(record.outcome for record in run.records)
    wrong = Counter(
        f"{record.outcome}: {record.message}"
        for record in run.records
        if record.outcome in ("error", "fault")
    )
    return Summary(
        outcomes={outcome: outcomes[outcome] for outcome in OUTCOMES},
        requests_per_s=len(complete) / run.wall_s,
        tokens_per_s=sum(record.completion_tokens for record in complete) / run.wall_s,
        prompt_tokens_per_s=sum(record.prompt_tokens for record in complete) / run.wall_s,
        total=_line(None, None, complete),
        lines=tuple(
            _line(
                length,
                method or None,
                [r for r in complete if (r.length, r.method or "") == (length, method)],
            )
            for length, method in keys
        ),
        while_long=_while_long(run, complete),
        memory=_memory(run.moments),
        kv_left_bytes=after.get("kv_reserved_bytes"),
        held=after.get("num_requests_held"),
        late=sum(record.late_s > 0.01 for record in run.records),
        messages=tuple(wrong.most_common(10)),
    )


def gaps(record: Record) -> list[float]:
    """Seconds between the chunks of an answer."""
    return [later - earlier for earlier, later in pairwise(record.times_s)]


def _line(length: int | None, method: str | None, records: Sequence[Record]) -> Line:
    def mean(values: Iterable[float]) -> float:
        return sum(values) / len(records) if records else 0.0

    return Line(
        length=length,
        method=method,
        count=len(records),
        ttft=spread(record.times_s[0] for record in records),
        itl=spread(gap for record in records for gap in gaps(record)),
        e2e=spread(record.end_s for record in records),
        prompt_tokens=mean(record.prompt_tokens for record in records),
        tokens=mean(record.completion_tokens for record in records),
        score=mean(record.score or 0.0 for record in records),
        cached=sum(record.cached_tokens > 0 for record in records),
    )


def _while_long(run: Run, complete: Sequence[Record]) -> WhileLong | None:
    lengths = sorted(length for length, _ in run.settings.lengths)
    if len(lengths) < 2:
        return None
    waits = merged(_wait(record) for record in complete if record.length == lengths[-1])
    short = [record for record in complete if record.length == lengths[0]]
    return WhileLong(
        short=lengths[0],
        long=lengths[-1],
        ttft=spread(record.times_s[0] for record in short if overlaps(waits, _wait(record))),
        itl=spread(
            later - earlier
            for record in short
            for earlier, later in pairwise(record.times_s)
            if overlaps(waits, (record.sent_s + earlier, record.sent_s + later))
        ),
    )


def _wait(record: Record) -> Interval:
    return (record.sent_s, record.sent_s + record.times_s[0])


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """Intervals as disjoint ones in their order: (0, 2), (5, 6), (1, 3) -> [(0, 3), (5, 6)]."""
    found: list[Interval] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


def overlaps(disjoint: Sequence[Interval], interval: Interval) -> bool:
    """Whether an interval has a time in common with one of `disjoint`, which are in their order."""
    place = bisect_left(disjoint, interval[0], key=lambda each: each[1])  # the first that ends no earlier
    return place < len(disjoint) and disjoint[place][0] <= interval[1]


def _memory(moments: Sequence[Moment]) -> Memory | None:
    totals = [sum(moment.memory.values()) for moment in moments if moment.memory]
    growth = _growth(totals)
    if growth is None:
        return None
    return Memory(
        first=totals[0],
        most=max(totals),
        last=totals[-1],
        growth=growth,
        growth_less_documents=_growth(
            [
                sum(moment.memory.values()) - moment.gauges["kv_document_bytes"]
                for moment in moments
                if moment.memory and "kv_document_bytes" in moment.gauges
            ]
        ),
    )


def _growth(sizes: Sequence[float]) -> int | None:
    """Median of the last third less that of the third before."""
    if len(sizes) < 3:
        return None
    third = len(sizes) // 3
    return round(float(np.median(sizes[-third:]) - np.median(sizes[-2 * third : -third])))
