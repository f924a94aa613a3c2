"""The narrow waist between tasks and everything that runs them: a task makes samples and scores answers.

A task never sees a model, an engine or Ray; whoever runs it never sees how a sample was made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Meta = Mapping[str, Any]
"""JSON values by name."""


class Tokens(Protocol):
    """What a task may ask of the tokenizer of the model that it makes samples for."""

    def count(self, text: str) -> int:
        """Number of tokens of a text, without special tokens."""
        ...

    def encode(self, text: str) -> Sequence[int]:
        """Token ids of a text, without special tokens."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        ...


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt and what a right answer contains.

    Attributes:
        id: unique within (task, length, seed).
        prompt: the whole prompt, as text.
        references: what an answer is scored against; never empty unless the task scores without any.
        meta: what a report may group by, and what `Task.score` needs besides the references.
        context: names the text that several samples of a task begin with, so that it is computed once;
            None = a text of its own.
        chat: the prompt is a user's message and goes through the model's chat template, if it has one.
        follow: token ids that the model is made to follow in place of its own choice, to compare its
            distributions with the dense model's; empty = it answers freely.
    """

    id: str
    prompt: str
    references: tuple[str, ...]
    meta: Meta = field(default_factory=dict)
    context: str | None = None
    chat: bool = False
    follow: tuple[int, ...] = ()


class Task(Protocol):
    """What a sweep needs of a task. Making one reads no data: `content` and `samples` may."""

    @property
    def name(self) -> str:
        """Its name in results; unique in a sweep."""
        ...

    @property
    def version(self) -> int:
        """Raised whenever samples or scores change, so that old results never mix with new ones."""
        ...

    @property
    def spec(self) -> Meta:
        """The configuration entry that makes this task alone: `make_tasks(task.spec) == (task,)`."""
        ...

    @property
    def max_new_tokens(self) -> int:
        """Longest answer, tokens."""
        ...

    @property
    def stop(self) -> tuple[str, ...]:
        """An answer ends before the first of these strings."""
        ...

    def content(self) -> Meta:
        """All parameters and hashes of outside data that can change a sample or a score; no paths.

        Raises ConfigError when the data is missing or malformed, naming file and line.
        """
        ...

    def samples(self, tokens: Tokens, *, length: int, count: int, seed: int) -> Iterator[Sample]:
        """Up to `count` samples whose prompts have at most `length` tokens, the same for the same arguments.

        A task over a data set gives fewer when it holds fewer. Raises ConfigError as `content` does, and when
        `length` has no room for a prompt.
        """
        ...

    def score(self, text: str, references: tuple[str, ...], meta: Meta) -> float:
        """How good an answer is, 0 to 1. Needs only the answer and what its sample carried, no network.

        A task whose scorer looks at more loads its data again, and raises ConfigError if that has changed.
        """
        ...
