"""From stored answers to scores: no engine, no model, and as often as one likes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jobs.disk.record import CellRecord, Plan, PlannedSample, Row
from jobs.tasks import FAMILIES, Task, get_task
from spts.errors import ConfigError


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

    @property
    def context(self) -> tuple[str, str, str]:
        """What the sample shares with those that are not independent of it: its context, else its own text.

        A sample of the same id at another length or seed is the same question again.
        """
        if self.planned.context is not None:
            return (self.cell.task, "context", self.planned.context)
        return (self.cell.task, "sample", self.planned.sample)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Samples with their scores, and why some tasks have none: by the task's name."""

    scored: tuple[Scored, ...]
    unscored: Mapping[str, ConfigError]


def score_rows(plan: Plan, rows: Mapping[str, Row]) -> Scores:
    """The scores of all samples that have a row, in the order of the plan.

    A task that cannot be scored here, as one of lm-eval cannot without its data, has no scores at all.

    Raises:
        ConfigError: results of another version of a task than this package scores.
    """
    unscored: dict[str, ConfigError] = {}
    cells: dict[str, tuple[CellRecord, Task]] = {}
    for cell in plan.cells:
        try:
            task = get_task(cell.task_spec)
        except ConfigError as error:
            unscored.setdefault(cell.task, error)
        else:
            _check_version(cell, task)
            cells[cell.id] = cell, task
    scored = []
    for planned in plan.samples:
        if planned.key not in rows or planned.cell not in cells:
            continue
        (cell, task), row = cells[planned.cell], rows[planned.key]
        if cell.task not in unscored:
            try:
                score = score_of(task, planned, row)
            except ConfigError as error:
                unscored[cell.task] = error
            else:
                scored.append(Scored(cell=cell, planned=planned, row=row, score=score))
    # Some answers of a task alone would be another selection of samples than was asked for.
    return Scores(scored=tuple(one for one in scored if one.cell.task not in unscored), unscored=unscored)


def _check_version(cell: CellRecord, task: Task) -> None:
    if cell.content["task_version"] != task.version:
        raise ConfigError(
            f"version of task {cell.task!r} must be {task.version} to be scored by this package, "
            f"got {cell.content['task_version']} in the results; run the sweep again",
            field="task_version",
        )


def score_of(task: Task, planned: PlannedSample, row: Row) -> float:
    """Score of one row, 0 to 1: of its answer, or of how it agreed with the dense model; 0 if it failed."""
    if row.error is not None:
        return 0.0
    if row.agreement is not None:
        return first_rank_share(row.agreement)
    return 0.0 if row.text is None else task.score(row.text, planned.references, planned.meta)


def first_rank_share(agreement: Mapping[str, Any]) -> float:
    """Score of a sample that follows dense's tokens: the share of them that the method would choose.

    Worked example: ranks 1, 1, 3, 1 score 0.75.
    """
    return statistics.fmean(rank == 1 for rank in agreement["rank"])


def family_of(cell: CellRecord) -> str:
    """The family that a cell's task is of, by the name that stands for all of it: "longbench", "ruler"."""
    name = str(cell.task_spec["name"])
    return next((names[0] for names in FAMILIES.values() if name in names), name)
