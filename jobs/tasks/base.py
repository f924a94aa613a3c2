"""The narrow waist between tasks and everything that runs them: a task makes samples and scores answers.

A task never sees a model, an engine or Ray; whoever runs it never sees how a sample was made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

CountTokens = Callable[[str], int]
"""Number of tokens of a text, without special tokens."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt and what a right answer contains.

    `id` is unique within (task, length, seed). `meta` holds what a report may group by: JSON values only.
    """

    id: str
    prompt: str
    references: tuple[str, ...]
    meta: Mapping[str, str | int | float] = field(default_factory=dict)


@runtime_checkable
class Task(Protocol):
    """What a sweep needs of a task."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int:
        """Raised whenever samples or scores change, so that old results never mix with new ones."""
        ...

    @property
    def max_new_tokens(self) -> int: ...

    def samples(self, count_tokens: CountTokens, *, length: int, count: int, seed: int) -> list[Sample]:
        """`count` samples whose prompts have at most `length` tokens, the same for the same arguments."""
        ...

    def score(self, text: str, references: tuple[str, ...]) -> float:
        """Share of the references found in the answer, 0 to 1."""
        ...
