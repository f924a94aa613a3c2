"""Needles in long real text: single, multi-key, multi-value and two-hop questions, at any length, offline.

A needle is a line of its own among the lines of the haystack:

    The code of falcon is amber.     a fact: one lookup finds it
    The twin of heron is falcon.     a link: "the code of the twin of heron" takes two lookups, one by one

The kinds are those of RULER (arXiv 2404.06654: niah_single, niah_multikey, niah_multivalue, variable
tracking), in our own words. Keys and values are common nouns, so that no tokenizer is at a loss.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, ClassVar, TypeVar

from jobs.tasks.base import Meta, Sample, Tokens
from jobs.tasks.haystack import haystack, haystack_hash
from spts.errors import ConfigError, check_keys

NUM_VALUES = 3

T = TypeVar("T")


@cache
def words() -> tuple[str, ...]:
    """The nouns that serve as keys and values, sorted."""
    return tuple(resources.files("jobs.tasks").joinpath("words.txt").read_text(encoding="ascii").split())


@dataclass(frozen=True, kw_only=True)
class Needle:
    """The lines to hide, in order of their dependence, and the question about them with its answers."""

    lines: tuple[str, ...]
    question: str
    answers: tuple[str, ...]


def fact(nouns: list[str], num_values: int = 1) -> Needle:
    """A key with one or several values; takes its nouns off the end of `nouns`."""
    key, answers = nouns.pop(), tuple(nouns.pop() for _ in range(num_values))
    asked = "What is the code" if num_values == 1 else f"What are the {num_values} codes"
    return Needle(
        lines=tuple(f"The code of {key} is {answer}." for answer in answers),
        question=f"{asked} of {key}?",
        answers=answers,
    )


def chain(nouns: list[str]) -> Needle:
    """A link to a key and that key's fact: the answer is two lookups away."""
    alias, key, answer = nouns.pop(), nouns.pop(), nouns.pop()
    return Needle(
        lines=(f"The twin of {alias} is {key}.", f"The code of {key} is {answer}."),
        question=f"What is the code of the twin of {alias}?",
        answers=(answer,),
    )


def ask(question: str) -> str:
    """How a question follows its document; the answer comes next."""
    return f"\n\nQuestion: {question}\nAnswer:"


def hide(rng: random.Random, document: Sequence[T], needles: Sequence[T]) -> tuple[list[T], list[int]]:
    """Puts each needle at a random place of its own between the document's lines.

    Returns the lines, and for each needle the index that its line has among them.
    """
    gaps = [rng.randint(0, len(document)) for _ in needles]
    order = sorted(range(len(needles)), key=lambda i: (gaps[i], i))
    lines: list[T] = []
    places = [0] * len(needles)
    start = 0
    for i in order:
        lines.extend(document[start : gaps[i]])
        start = gaps[i]
        places[i] = len(lines)
        lines.append(needles[i])
    lines.extend(document[start:])
    return lines, places


@dataclass(frozen=True, kw_only=True)
class NeedleTask:
    """One kind of needle question.

    Attributes:
        name: the task's name in a sweep.
        num_values: values of the key that is asked for; all must be named.
        two_hop: the question goes through a link.
        num_distractors: needles of the same kind about other keys.
    """

    name: str
    num_values: int = 1
    two_hop: bool = False
    num_distractors: int = 0
    version: ClassVar[int] = 1
    stop: ClassVar[tuple[str, ...]] = ()

    @property
    def spec(self) -> Meta:
        return {"name": self.name}

    @property
    def max_new_tokens(self) -> int:
        return 8 * self.num_values

    def content(self) -> Meta:
        return {"haystack": haystack_hash("held_out")}

    def _needles(self, rng: random.Random) -> list[Needle]:
        nouns = rng.sample(words(), k=4 * (1 + self.num_distractors))
        if self.two_hop:
            return [chain(nouns) for _ in range(1 + self.num_distractors)]
        return [fact(nouns, self.num_values) for _ in range(1 + self.num_distractors)]

    def _sample(self, tokens: Tokens, text: Sequence[str], length: int, seed: int, index: int) -> Sample:
        rng = random.Random(f"{self.name}/{self.version}/{length}/{seed}/{index}")
        needles = self._needles(rng)
        asked = needles[0]
        hidden = [line for needle in needles for line in needle.lines]
        room = length - tokens.count("\n".join(hidden) + ask(asked.question)) - 1
        start = rng.randrange(len(text))
        document: list[str] = []
        while room > 0:
            line = text[(start + len(document)) % len(text)]
            room -= tokens.count(line + "\n")
            document.append(line)
        # Joined lines can have other tokens than the lines alone: the whole prompt's count has the last word.
        while True:
            placed = random.Random(f"{self.name}/{length}/{seed}/{index}/places")
            lines, places = hide(placed, document, hidden)
            prompt = "\n".join(lines) + ask(asked.question)
            if (excess := tokens.count(prompt) - length) <= 0:
                break
            if not document:
                raise ConfigError(
                    f"length must leave room for the needles of task {self.name!r}, got {length} tokens; "
                    f"use at least {length + excess}",
                    field="length",
                )
            del document[-max(1, excess // 20) :]
        return Sample(
            id=f"{self.name}-{length}-{seed}-{index}",
            prompt=prompt,
            references=asked.answers,
            meta={"depth": round(places[len(asked.lines) - 1] / len(lines), 4)},
        )

    def samples(self, tokens: Tokens, *, length: int, count: int, seed: int) -> Iterator[Sample]:
        """`count` samples of at most `length` tokens over held-out text, sample i the same for any `count`.

        Raises:
            ConfigError: `length` leaves no room for the needles and the question.
        """
        text = haystack("held_out")
        for index in range(count):
            yield self._sample(tokens, text, length, seed, index)

    def score(self, text: str, references: tuple[str, ...], meta: Meta) -> float:
        """Share of the references that the answer names as whole words, whatever their case."""
        said = set(re.findall(r"[a-z]+", text.lower()))
        return sum(reference.lower() in said for reference in references) / len(references)


NEEDLE_TASKS = (
    NeedleTask(name="single"),
    NeedleTask(name="multikey", num_distractors=11),
    NeedleTask(name="multivalue", num_values=NUM_VALUES, num_distractors=2),
    NeedleTask(name="twohop", two_hop=True, num_distractors=5),
)


def make(name: str, params: Mapping[str, Any]) -> tuple[NeedleTask, ...]:
    """The task of that name, or all four for "needle". They have no parameters. Raises ConfigError."""
    check_keys(f"tasks.{name}", params, required=())
    return tuple(task for task in NEEDLE_TASKS if name in ("needle", task.name))
