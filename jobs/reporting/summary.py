"""From the files of a results folder to the numbers of a report: scores, intervals, differences, costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jobs.disk import provenance
from jobs.disk.record import CellRecord, Plan, read_plan, read_rows
from jobs.reporting.depths import DepthGrid, depth_grids
from jobs.reporting.measures import Costs, Measures
from jobs.reporting.scoring import Scored, family_of, score_rows
from jobs.reporting.stats import Column, Estimate, estimates, holm, means_of_means, paired_p_value
from spts.errors import ConfigError

BASELINE_METHOD = "dense"
SIGNIFICANT = 0.05


@dataclass(frozen=True, kw_only=True)
class Line:
    """One method over some of the samples of one model; task, length None = all of them.

    Attributes:
        score: mean score with its interval.
        delta: paired difference against the baseline on the same samples; None for the baseline itself.
        failed: samples that ended in an error. They count in `score` as 0.
        costs: what it took.
    """

    label: str
    method: str
    task: str | None = None
    length: int | None = None
    score: Estimate
    delta: Estimate | None
    failed: int
    costs: Costs


@dataclass(frozen=True, kw_only=True)
class Family:
    """A method over the tasks of one family, every task counting the same: a benchmark's own average."""

    tasks: int
    score: Estimate
    delta: Estimate | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The test of one method against the baseline over all samples. holm: p adjusted for all methods."""

    p: float
    holm: float


@dataclass(frozen=True, kw_only=True)
class ModelSummary:
    """All tables of one model. `labels` are its methods in the configuration's order, the baseline first.

    families: by (label, family), of those with several tasks. comparisons: by label.
    """

    model: str
    labels: tuple[str, ...]
    methods: Mapping[str, str]
    baseline: str | None
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    overall: Mapping[str, Line]
    by_length: Mapping[tuple[str, int], Line]
    by_task: Mapping[tuple[str, str], Line]
    cells: Mapping[tuple[str, str, int], Line]
    families: Mapping[tuple[str, str], Family]
    comparisons: Mapping[str, Comparison]
    depths: tuple[DepthGrid, ...]
    scored: tuple[Scored, ...]

    def lines(self) -> Iterable[Line]:
        """Totals first, then by length, by task, and the cells."""
        for group in (self.overall, self.by_length, self.by_task, self.cells):
            yield from group.values()


@dataclass(frozen=True, kw_only=True)
class Results:
    """A results folder, read and scored.

    scored_by: the code and packages of this process. done: samples with a row. unscored: tasks that cannot be
    scored here, and why; their samples are in no number.
    """

    folder: Path
    plan: Plan
    starts: list[dict[str, Any]]
    scored_by: Mapping[str, Any]
    models: tuple[ModelSummary, ...]
    planned: int
    done: int
    unscored: Mapping[str, str]
    failed: tuple[Scored, ...] = field(repr=False)


def load(folder: Path) -> Results:
    """Reads and scores a results folder. Needs no cluster and no model.

    Raises:
        ConfigError: not a results folder, a damaged one, one made with another version of a task, or one of
            which no task can be scored.
    """
    plan, rows = read_plan(folder), read_rows(folder)
    try:
        scores = score_rows(plan, rows)
        if scores.unscored and not scores.scored:
            raise next(iter(scores.unscored.values()))
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}", field=error.field) from None
    scored = scores.scored
    models = dict.fromkeys(cell.model for cell in plan.cells)
    return Results(
        folder=folder,
        plan=plan,
        starts=provenance.read(folder),
        scored_by=provenance.software(),
        models=tuple(summarise(model, plan.cells, scored) for model in models),
        planned=len(plan.samples),
        done=sum(planned.key in rows for planned in plan.samples),
        unscored={task: str(error) for task, error in scores.unscored.items()},
        failed=tuple(one for one in scored if one.row.error is not None),
    )


def summarise(model: str, all_cells: Sequence[CellRecord], all_scored: Sequence[Scored]) -> ModelSummary:
    """All tables of one model; methods, tasks and lengths stand in the order of the cells."""
    cells = [cell for cell in all_cells if cell.model == model]
    scored = [one for one in all_scored if one.cell.model == model]
    methods = {cell.label: cell.method for cell in cells}
    baseline = next((label for label, method in methods.items() if method == BASELINE_METHOD), None)
    measures = Measures.of(scored, baseline)
    tables: list[tuple[tuple[str, ...], Callable[[Scored], tuple[Any, ...]]]] = [
        ((), lambda one: (one.cell.label,)),
        (("length",), lambda one: (one.cell.label, one.cell.length)),
        (("task",), lambda one: (one.cell.label, one.cell.task)),
        (("task", "length"), lambda one: (one.cell.label, one.cell.task, one.cell.length)),
    ]
    groups = {
        (names, key): indices for names, key_of in tables for key, indices in _grouped(scored, key_of).items()
    }
    lines = _lines(measures, groups, methods)
    overall, by_length, by_task, by_cell = (
        {key: line for (table, key), line in lines.items() if table == names} for names, _ in tables
    )
    return ModelSummary(
        model=model,
        labels=tuple(sorted(methods, key=lambda label: label != baseline)),
        methods=methods,
        baseline=baseline,
        tasks=tuple(dict.fromkeys(cell.task for cell in cells)),
        lengths=tuple(sorted({cell.length for cell in cells})),
        overall={label: line for (label,), line in overall.items()},
        by_length=by_length,
        by_task=by_task,
        cells=by_cell,
        families=_families(measures, groups, {cell.task: family_of(cell) for cell in cells}),
        comparisons=_comparisons(measures, groups),
        depths=depth_grids(scored),
        scored=tuple(scored),
    )


_Groups = Mapping[tuple[tuple[str, ...], tuple[Any, ...]], np.ndarray]


def _grouped(scored: Sequence[Scored], key_of: Callable[[Scored], Any]) -> dict[Any, np.ndarray]:
    """Indices of the samples by key, in the order in which the keys first come."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for index, one in enumerate(scored):
        groups[key_of(one)].append(index)
    return {key: np.asarray(indices) for key, indices in groups.items()}


def _lines(measures: Measures, groups: _Groups, methods: Mapping[str, str]) -> dict[Any, Line]:
    deltas = {key: measures.differences(indices) for key, indices in groups.items()}
    columns = [measures.scores(indices) for indices in groups.values()]
    columns += [delta for delta in deltas.values() if delta is not None]
    found = iter(estimates(columns))  # all at once: columns of equal size share their resampling
    means = {key: next(found) for key in groups}
    differences = {key: None if delta is None else next(found) for key, delta in deltas.items()}
    return {
        (names, key): Line(
            label=key[0],
            method=methods[key[0]],
            score=means[names, key],
            delta=differences[names, key],
            failed=measures.failed(indices),
            costs=measures.costs(indices),
            **dict(zip(names, key[1:], strict=True)),
        )
        for (names, key), indices in groups.items()
    }


def _families(
    measures: Measures, groups: _Groups, families: Mapping[str, str]
) -> dict[tuple[str, str], Family]:
    members: dict[tuple[str, str], list[np.ndarray]] = defaultdict(list)
    for (names, key), indices in groups.items():
        if names == ("task",):
            members[key[0], families[key[1]]].append(indices)
    members = {key: tasks for key, tasks in members.items() if len(tasks) > 1}
    scores = [[measures.scores(one) for one in tasks] for tasks in members.values()]
    differences = {
        key: [column for one in tasks if (column := measures.differences(one)) is not None]
        for key, tasks in members.items()
    }
    paired = {key: columns for key, columns in differences.items() if columns}
    found = iter(means_of_means([*scores, *paired.values()]))  # all at once, as above
    means = [next(found) for _ in members]
    deltas = {key: next(found) for key in paired}
    return {
        key: Family(tasks=len(tasks), score=mean, delta=deltas.get(key))
        for (key, tasks), mean in zip(members.items(), means, strict=True)
    }


def _comparisons(measures: Measures, groups: _Groups) -> dict[str, Comparison]:
    columns: dict[str, Column] = {}
    for (names, key), indices in groups.items():
        column = measures.differences(indices)
        if not names and column is not None:
            columns[key[0]] = column
    values = [paired_p_value(column) for column in columns.values()]
    adjusted = holm(values)
    return {label: Comparison(p=p, holm=h) for label, p, h in zip(columns, values, adjusted, strict=True)}
