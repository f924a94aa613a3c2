"""Scores by the place of the answer in the prompt: needle grids, and tasks that tell where a needle lies."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jobs.reporting.scoring import Scored

DEPTH_BINS = 5
MAX_EXACT_DEPTHS = 25


@dataclass(frozen=True, kw_only=True)
class DepthGrid:
    """Mean scores of some tasks by method, prompt length and depth.

    Attributes:
        tasks: which tasks.
        rows: the depths, in % of the prompt, from its beginning: "40", or "40-60" where they are binned.
        lengths: prompt lengths, tokens.
        scores: by (label, length, row index).
    """

    tasks: tuple[str, ...]
    rows: tuple[str, ...]
    lengths: tuple[int, ...]
    scores: Mapping[tuple[str, int, int], float]


def depth_grids(scored: Sequence[Scored]) -> tuple[DepthGrid, ...]:
    """One grid for the tasks that share a set of exact depths, one in bins for those that draw them freely.

    `meta["depth"]` is 0..1 from the prompt's beginning. Depths are exact where there are at most 25 of them
    and each was asked for more than once.
    """
    by_task: dict[str, list[tuple[Scored, float]]] = defaultdict(list)
    for one in scored:
        depth = one.planned.meta.get("depth")
        if isinstance(depth, int | float):
            by_task[one.cell.task].append((one, float(depth)))
    groups: dict[tuple[float, ...], list[str]] = defaultdict(list)
    for task, found in by_task.items():
        depths = {depth for _, depth in found}
        questions = len({one.question for one, _ in found})
        exact = len(depths) <= MAX_EXACT_DEPTHS and 2 * len(depths) <= questions
        groups[tuple(sorted(depths)) if exact else ()].append(task)
    return tuple(
        _grid(tuple(tasks), depths, [pair for task in tasks for pair in by_task[task]])
        for depths, tasks in groups.items()
    )


def _grid(
    tasks: tuple[str, ...], depths: tuple[float, ...], found: Sequence[tuple[Scored, float]]
) -> DepthGrid:
    scores: dict[tuple[str, int, int], list[float]] = defaultdict(list)
    for one, depth in found:
        row = depths.index(depth) if depths else min(int(depth * DEPTH_BINS), DEPTH_BINS - 1)
        scores[one.cell.label, one.cell.length, row].append(one.score)
    step = 100 // DEPTH_BINS
    return DepthGrid(
        tasks=tasks,
        rows=tuple(f"{100 * depth:g}" for depth in depths)
        or tuple(f"{step * row}–{step * (row + 1)}" for row in range(DEPTH_BINS)),
        lengths=tuple(sorted({one.cell.length for one, _ in found})),
        scores={key: statistics.fmean(values) for key, values in scores.items()},
    )
