"""From stored answers to scores: no engine, no model, and as often as one likes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jobs.record import CellRecord, Plan, PlannedSample, Row
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


def score_rows(plan: Plan, rows: Mapping[str, Row]) -> list[Scored]:
    """The scores of all samples that have a row, in the order of the plan.

    Raises:
        ConfigError: results of another version of a task than this package scores.
    """
    cells = {cell.id: (cell, _task_of(cell)) for cell in plan.cells}
    scored = []
    for planned in plan.samples:
        if planned.key in rows:
            (cell, task), row = cells[planned.cell], rows[planned.key]
            score = score_of(task, planned, row)
            scored.append(Scored(cell=cell, planned=planned, row=row, score=score))
    return scored


def _task_of(cell: CellRecord) -> Task:
    task = get_task(cell.task_spec)
    if cell.content["task_version"] != task.version:
        raise ConfigError(
            f"version of task {cell.task!r} must be {task.version} to be scored by this package, "
            f"got {cell.content['task_version']} in the results; run the sweep again",
            field="task_version",
        )
    return task


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
