"""The tasks a sweep can name: each family is a module of its own, imported when one of its names is used.

Imports no other jobs.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from jobs.tasks.base import Meta, Sample, Task, Tokens
from spts.errors import ConfigError

# Each module has make(name, params) -> tuple[Task, ...], which raises ConfigError for a bad parameter. The
# first name of a family stands for all of its tasks.
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "jobs.tasks.needle": ("needle", "single", "multikey", "multivalue", "twohop"),
    "jobs.tasks.grid": ("grid",),
    "jobs.tasks.ruler": (
        "ruler",
        "niah_single_1",
        "niah_single_2",
        "niah_single_3",
        "niah_multikey_1",
        "niah_multikey_2",
        "niah_multikey_3",
        "niah_multivalue",
        "niah_multiquery",
        "vt",
        "cwe",
        "fwe",
        "qa_1",
        "qa_2",
    ),
    "jobs.tasks.longbench": (
        "longbench",
        "narrativeqa",
        "qasper",
        "multifieldqa_en",
        "multifieldqa_zh",
        "hotpotqa",
        "2wikimqa",
        "musique",
        "dureader",
        "gov_report",
        "qmsum",
        "multi_news",
        "vcsum",
        "trec",
        "triviaqa",
        "samsum",
        "lsht",
        "passage_count",
        "passage_retrieval_en",
        "passage_retrieval_zh",
        "lcc",
        "repobench-p",
    ),
    "jobs.tasks.agreement": ("agreement",),
    "jobs.tasks.lm_eval": ("lm_eval",),
}


def make_tasks(entry: str | Mapping[str, Any]) -> tuple[Task, ...]:
    """The tasks that an entry of a sweep's `tasks` means: a name, or {name, parameters of its family}.

    Raises:
        ConfigError: no task or family has that name, or a parameter is at fault.
    """
    params = {"name": entry} if isinstance(entry, str) else dict(entry)
    name = params.pop("name", None)
    for module, names in FAMILIES.items():
        if name in names:
            made: tuple[Task, ...] = importlib.import_module(module).make(name, params)
            return made
    known = ", ".join(name for names in FAMILIES.values() for name in names)
    raise ConfigError(f"task must be one of {known}, got {name!r}; fix the name", field="task")


def get_task(entry: str | Mapping[str, Any]) -> Task:
    """The one task that `entry` means; a `Task.spec` gives its task back. Raises ConfigError."""
    tasks = make_tasks(entry)
    if len(tasks) != 1:
        raise ConfigError(
            f"task must be a single one, got {entry!r} which stands for {len(tasks)}; name one of them",
            field="task",
        )
    return tasks[0]


__all__ = ["FAMILIES", "Meta", "Sample", "Task", "Tokens", "get_task", "make_tasks"]
