"""A made-up family of as many tasks as a benchmark has, with scores between 0 and 1: for tests of reports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jobs.tasks.base import Meta, Sample, Tokens

NAMES = ("bench", *(f"set_{number:02d}" for number in range(1, 22)))
FAMILY = {"tests.jobs.many_tasks": NAMES}


@dataclass(frozen=True, kw_only=True)
class StatedScore:
    """A task whose answers say what they score."""

    name: str
    version: ClassVar[int] = 1
    max_new_tokens: ClassVar[int] = 4
    stop: ClassVar[tuple[str, ...]] = ()

    @property
    def spec(self) -> Meta:
        return {"name": self.name}

    def content(self) -> Meta:
        return {"data": "a" * 64}

    def samples(self, tokens: Tokens, *, length: int, count: int, seed: int) -> Iterator[Sample]:
        raise AssertionError("reports make no samples")

    def score(self, text: str, references: tuple[str, ...], meta: Meta) -> float:
        return float(text)


def make(name: str, params: Mapping[str, Any]) -> tuple[StatedScore, ...]:
    """The task of that name, or all of them."""
    return tuple(StatedScore(name=one) for one in NAMES[1:] if name in (NAMES[0], one))
