"""What the kinds of RULER's tasks share: what they draw from, and what they draw."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from jobs.tasks.base import Tokens
from jobs.tasks.document import Document
from jobs.tasks.ruler_qa_data import Questions
from jobs.tasks.ruler_words import Words


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What prompts are made of; None = this kind of task uses none.

    Attributes:
        texts: the wording, by the names of `ruler_texts.FIELDS`.
    """

    texts: Mapping[str, str]
    haystack: Document | None = None
    words: Words | None = None
    questions: Questions | None = None


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A prompt with its answer prefix, what a right answer contains, and where that stands.

    Attributes:
        depth: place of the one answer in the context, 0 = first character to 1 = last; None = several places.
    """

    prompt: str
    references: tuple[str, ...]
    depth: float | None = None


class Kind(Protocol):
    """A way to make prompts; its fields are RULER's settings."""

    @property
    def max_new_tokens(self) -> int:
        """RULER's tokens_to_generate."""
        ...

    @property
    def any_reference(self) -> bool:
        """One reference found is a full score (string_match_part); otherwise the share that is found."""
        ...

    @property
    def texts(self) -> tuple[str, ...]:
        """The names of the texts that it needs."""
        ...

    @property
    def sources(self) -> tuple[str, ...]:
        """The parameters that say what it draws from."""
        ...

    def num_samples(self, sources: Sources) -> int | None:
        """How many samples there are at most; None = any number."""
        ...

    def fewest(self, sources: Sources, index: int) -> int:
        """The units of haystack that sample `index` cannot do without."""
        ...

    def draw(
        self, rng: random.Random, sources: Sources, tokens: Tokens, *, index: int, units: int, length: int
    ) -> Draft:
        """Sample `index` with so many units of haystack."""
        ...


def joined(prompt: str, answer_prefix: str) -> str:
    """A prompt and the words that its answer begins with; lm-eval keeps those without the space before."""
    space = "" if answer_prefix[:1].isspace() else " "
    return f"{prompt}{space}{answer_prefix}" if answer_prefix else prompt
