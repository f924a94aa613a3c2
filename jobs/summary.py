"""From the files of a results folder to the numbers of a report: scores, intervals, differences, shares."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs import provenance
from jobs.record import CellRecord, Plan, PlannedSample, Row, read_plan, read_rows
from jobs.stats import Estimate, mean_interval, paired_difference
from jobs.tasks import get_task
from spts.errors import ConfigError

BASELINE_METHOD = "dense"
DEPTH_BINS = 5


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One sample that was tried, with its score in 0..1; a failed one scores 0."""

    cell: CellRecord
    planned: PlannedSample
    row: Row
    score: float

    @property
    def question(self) -> tuple[Any, ...]:
        """What was asked, whichever method answered: paired differences match on it."""
        return (self.cell.task, self.cell.length, self.cell.content["seed"], self.planned.sample,
                self.planned.prompt_sha256)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Line:
    """One method over some of the samples of one model; None = all tasks, all lengths.

    Attributes:
        score: mean score with its interval.
        delta: paired difference against the baseline on the same samples; None for the baseline itself.
        failed: samples that ended in an error. They count in `score` as 0.
        flop_share, kv_share: sum over the samples divided by the same sum for a dense prefill.
        ttft_s: median seconds to the first token.
        speedup: median over samples of the baseline's time to first token divided by this method's, both
            from one start of the sweep; None when no sample has both.
        answer_tokens: mean length of the answers.
    """

    label: str
    method: str
    task: str | None = None
    length: int | None = None
    score: Estimate
    delta: Estimate | None
    failed: int
    flop_share: float | None
    kv_share: float | None
    ttft_s: float | None
    speedup: float | None
    answer_tokens: float | None


@dataclass(frozen=True, kw_only=True)
class ModelSummary:
    """All tables of one model. `labels` are its methods in the configuration's order, the baseline first."""

    model: str
    labels: tuple[str, ...]
    methods: dict[str, str]
    baseline: str | None
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    overall: dict[str, Line]
    by_length: dict[tuple[str, int], Line]
    by_task: dict[tuple[str, str], Line]
    cells: dict[tuple[str, str, int], Line]
    depth: dict[tuple[str, int, int], float]
    scored: tuple[Scored, ...]


@dataclass(frozen=True, kw_only=True)
class Results:
    """A results folder, read and scored."""

    folder: Path
    plan: Plan
    starts: list[dict[str, Any]]
    models: tuple[ModelSummary, ...]
    planned: int
    done: int
    failed: tuple[Scored, ...] = field(repr=False)


def load(folder: Path) -> Results:
    """Reads and scores a results folder. Needs no cluster and no model.

    Raises:
        ConfigError: not a results folder, a damaged one, or one made with another version of a task.
    """
    plan, rows = read_plan(folder), read_rows(folder)
    cells = {cell.id: cell for cell in plan.cells}
    scored = [_score(cells[s.cell], s, rows[s.key]) for s in plan.samples if s.key in rows]
    models = dict.fromkeys(cell.model for cell in plan.cells)
    return Results(
        folder=folder,
        plan=plan,
        starts=provenance.read(folder),
        models=tuple(summarise(model, plan.cells, scored) for model in models),
        planned=len(plan.samples),
        done=len(scored),
        failed=tuple(one for one in scored if one.row.error is not None),
    )


def _score(cell: CellRecord, planned: PlannedSample, row: Row) -> Scored:
    task = get_task(cell.task_spec)
    if cell.content["task_version"] != task.version:
        raise ConfigError(
            f"version of task {cell.task!r} must be {task.version} to be scored by this package, "
            f"got {cell.content['task_version']} in the results; run the sweep again",
            field="task_version",
        )
    answer = row.text if row.error is None else None
    return Scored(
        cell=cell,
        planned=planned,
        row=row,
        score=0.0 if answer is None else task.score(answer, planned.references, planned.meta),
    )


def summarise(model: str, all_cells: Sequence[CellRecord], all_scored: Sequence[Scored]) -> ModelSummary:
    """All tables of one model; methods, tasks and lengths stand in the order of the cells."""
    cells = [cell for cell in all_cells if cell.model == model]
    scored = [one for one in all_scored if one.cell.model == model]
    methods = {cell.label: cell.method for cell in cells}
    baseline = next((label for label, method in methods.items() if method == BASELINE_METHOD), None)
    reference = {one.question: one for one in scored if one.cell.label == baseline}

    def grouped(key: Callable[[Scored], Any], **names: int) -> dict[Any, Line]:
        groups: dict[Any, list[Scored]] = defaultdict(list)
        for one in scored:
            groups[key(one)].append(one)
        return {k: _line(g, reference, **{n: k[i] for n, i in names.items()}) for k, g in groups.items()}

    return ModelSummary(
        model=model,
        labels=tuple(sorted(methods, key=lambda label: label != baseline)),
        methods=methods,
        baseline=baseline,
        tasks=tuple(dict.fromkeys(cell.task for cell in cells)),
        lengths=tuple(sorted({cell.length for cell in cells})),
        overall={key[0]: line for key, line in grouped(lambda one: (one.cell.label,)).items()},
        by_length=grouped(lambda one: (one.cell.label, one.cell.length), length=1),
        by_task=grouped(lambda one: (one.cell.label, one.cell.task), task=1),
        cells=grouped(lambda one: (one.cell.label, one.cell.task, one.cell.length), task=1, length=2),
        depth=_by_depth(scored),
        scored=tuple(scored),
    )


def _line(group: list[Scored], reference: dict[Any, Scored], **where: Any) -> Line:
    label, method = group[0].cell.label, group[0].cell.method
    pairs = [(one, reference[one.question]) for one in group if one.question in reference]
    is_baseline = all(one is base for one, base in pairs)
    answered = [one.row for one in group if one.row.error is None]
    return Line(
        label=label,
        method=method,
        score=mean_interval([one.score for one in group]),
        delta=None
        if is_baseline
        else paired_difference(*zip(*((o.score, b.score) for o, b in pairs), strict=True)),
        failed=len(group) - len(answered),
        flop_share=_share((row.flops, row.dense_flops) for row in answered),
        kv_share=_share((row.kv_bytes, row.dense_kv_bytes) for row in answered),
        ttft_s=_median(row.ttft_s for row in answered),
        speedup=_median(
            base.row.ttft_s / one.row.ttft_s
            for one, base in pairs
            if one.row.ttft_s and base.row.ttft_s and one.row.run == base.row.run
        ),
        answer_tokens=_mean(len(row.token_ids) for row in answered if row.token_ids is not None),
        **where,
    )


def _by_depth(scored: Sequence[Scored]) -> dict[tuple[str, int, int], float]:
    """Mean score by (label, length, bin of `meta["depth"]`), for samples that say how deep it lies."""
    groups: dict[tuple[str, int, int], list[float]] = defaultdict(list)
    for one in scored:
        depth = one.planned.meta.get("depth")
        if isinstance(depth, int | float):
            index = min(int(depth * DEPTH_BINS), DEPTH_BINS - 1)
            groups[one.cell.label, one.cell.length, index].append(one.score)
    return {key: statistics.fmean(scores) for key, scores in groups.items()}


def _share(parts: Iterable[tuple[float | None, float | None]]) -> float | None:
    known = [(part, whole) for part, whole in parts if part is not None and whole]
    return sum(part for part, _ in known) / sum(whole for _, whole in known) if known else None


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return statistics.fmean(known) if known else None
