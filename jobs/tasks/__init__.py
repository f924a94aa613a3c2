"""The tasks a sweep can name."""

from __future__ import annotations

from jobs.tasks.base import Sample, Task
from jobs.tasks.needle import NEEDLE_TASKS
from spts.errors import ConfigError

TASKS: dict[str, Task] = {task.name: task for task in NEEDLE_TASKS}


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ConfigError: no task has that name.
    """
    if name not in TASKS:
        raise ConfigError(
            f"task must be one of {', '.join(sorted(TASKS))}, got {name!r}; fix the name", field="task"
        )
    return TASKS[name]


__all__ = ["TASKS", "Sample", "Task", "get_task"]
