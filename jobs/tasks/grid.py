"""Needle grids: one needle in a long text of any script, asked for at every depth.

The text comes first in the prompt and the question last, so that several questions about one text share it.
Our own default needle is worded as those of `jobs.tasks.needle`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from jobs.tasks.base import Meta, Sample, Tokens
from jobs.tasks.document import document, place, put
from jobs.tasks.fill import fill, no_room
from jobs.tasks.needle import ask
from spts.errors import check_keys, config_error, require_int


@dataclass(frozen=True, kw_only=True)
class Question:
    """A needle to hide, the question about it, and what a right answer contains."""

    needle: str
    question: str
    answers: tuple[str, ...]


DEFAULT = Question(
    needle="The code of lantern is walnut.", question="What is the code of lantern?", answers=("walnut",)
)


@dataclass(frozen=True, kw_only=True)
class GridTask:
    """A length-by-depth grid of needles.

    Sample i asks question i % Q of text i // Q, where Q is the number of questions. All needles stand in
    every text. Text t has the needle of question q at depth number (t + q * step) % D of the D depths, where
    step = max(1, D // Q): over D texts each needle stands once at every depth. So with one question sample i
    takes depth i % D, and a full grid has D * Q samples or a multiple of it. Every text starts at a place of
    its own of the haystack, so that texts are independent of one another.

    Attributes:
        name: tells several grids of a sweep apart.
        depths: where needles stand, percent of the text's characters, 0 = first.
        haystack: a folder of .txt files or a JSON file with a "text"; None = our shipped text.
    """

    name: str = "grid"
    depths: tuple[float, ...]
    questions: tuple[Question, ...]
    haystack: str | None = None
    version: ClassVar[int] = 2
    stop: ClassVar[tuple[str, ...]] = ()

    @property
    def spec(self) -> Meta:
        return {
            "name": "grid",
            "label": self.name,
            "depths": list(self.depths),
            "questions": [{**asdict(each), "answers": list(each.answers)} for each in self.questions],
            **({} if self.haystack is None else {"haystack": self.haystack}),
        }

    @property
    def max_new_tokens(self) -> int:
        """No token holds less than a byte, and some words may lead up to the answer."""
        return 32 + max(len(", ".join(each.answers).encode()) for each in self.questions)

    def content(self) -> Meta:
        return {
            "depths": list(self.depths),
            "questions": [asdict(each) for each in self.questions],
            "haystack": dict(document(self.haystack).content()),
        }

    def _depth(self, text: int, question: int) -> float:
        step = max(1, len(self.depths) // len(self.questions))
        return self.depths[(text + question * step) % len(self.depths)] / 100

    def _context(self, text: int, units: int, start: int) -> str:
        """The text with all needles, those at one depth in the order of their questions."""
        taken = document(self.haystack).take(units, start)
        needles: dict[int, list[str]] = {}
        for number, each in enumerate(self.questions):
            needles.setdefault(place(taken, self._depth(text, number)), []).append(each.needle)
        return put(taken, needles).strip()

    def _fewest(self, start: int) -> int:
        """Units of haystack, from unit `start` on, that have a place of its own for each depth."""
        for units in itertools.count(len(self.depths) - 1):
            taken = document(self.haystack).take(units, start)
            if len({place(taken, depth / 100) for depth in self.depths}) == len(self.depths):
                return units
        raise AssertionError("enough units have enough places")

    def _start(self, length: int, seed: int, text: int) -> int:
        rng = random.Random(f"{self.name}/{self.version}/{length}/{seed}/{text}")
        return rng.randrange(len(document(self.haystack).units))

    def _enough(self, tokens: Tokens, length: int, seed: int, text: int, suffix: str) -> int:
        """A length that has room, above one that has none; at another length a text begins elsewhere."""
        while True:
            start = self._start(length, seed, text)
            needed = len(tokens.encode(self._context(text, self._fewest(start), start) + suffix))
            if needed <= length:
                return length
            length = needed

    def samples(self, tokens: Tokens, *, length: int, count: int, seed: int) -> Iterator[Sample]:
        """`count` samples of at most `length` tokens, sample i the same for any `count`.

        Raises:
            ConfigError: `length` leaves no room for the needles, a question, and so much of the haystack that
                each depth is a place of its own; or as `content` does.
        """
        suffixes = [ask(each.question) for each in self.questions]
        longest = max(suffixes, key=lambda suffix: len(tokens.encode(suffix)))
        units = 0
        for text in range(-(-count // len(self.questions))):
            start = self._start(length, seed, text)

            def context(units: int, text: int = text, start: int = start) -> str:
                return self._context(text, units, start)

            def prompt(units: int, context: Callable[[int], str] = context) -> str:
                return context(units) + longest

            fewest = self._fewest(start)
            most = fill(prompt, tokens=tokens, room=length, fewest=fewest, guess=units)
            if most is None:
                raise no_room(self.name, length, self._enough(tokens, length, seed, text, longest))
            units = most
            # Where a text's end and a question meet, a shorter question can have more tokens.
            while units > fewest and any(
                len(tokens.encode(context(units) + each)) > length for each in suffixes
            ):
                units -= 1
            filled = context(units)
            for number in range(min(len(suffixes), count - text * len(suffixes))):
                yield Sample(
                    id=f"{self.name}-{length}-{seed}-{text * len(suffixes) + number}",
                    prompt=filled + suffixes[number],
                    references=self.questions[number].answers,
                    meta={"depth": round(self._depth(text, number), 4), "question": number},
                    context=f"{self.name}-{length}-{seed}-{text}" if len(suffixes) > 1 else None,
                )

    def score(self, text: str, references: tuple[str, ...], meta: Meta) -> float:
        """Share of the references that the answer contains, whatever their case: words may have no spaces."""
        said = text.casefold()
        return sum(reference.casefold() in said for reference in references) / len(references)


def make(name: str, params: Mapping[str, Any]) -> tuple[GridTask, ...]:
    """A grid with the parameters `label`, `depths`, `haystack`, and one question or `questions`.

    `depths` is a list of percentages, or the number of equally spaced ones from 0 to 100 (11 by default). One
    question is given as `needle`, `question` and `answers`. Raises ConfigError.
    """
    where = "tasks.grid"
    single = ("needle", "question", "answers")
    check_keys(where, params, required=(), optional=("label", "depths", "haystack", *single, "questions"))
    for key in ("label", "haystack"):
        if key in params:
            _text(f"{where}.{key}", params[key])
    given = [key for key in single if key in params]
    if "questions" in params:
        if given:
            raise config_error(
                f"{where}.questions", "stand alone", f"{', '.join(given)} beside it", "give one of the two"
            )
        listed = params["questions"]
        if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed:
            raise config_error(f"{where}.questions", "be a list of questions", repr(listed), "correct it")
        questions = tuple(_question(f"{where}.questions[{i}]", each) for i, each in enumerate(listed))
    else:
        questions = (_question(where, {key: params[key] for key in given}) if given else DEFAULT,)
    return (
        GridTask(
            name=params.get("label", "grid"),
            depths=_depths(f"{where}.depths", params.get("depths", 11)),
            questions=questions,
            haystack=params.get("haystack"),
        ),
    )


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise config_error(where, "be a text that is not empty", repr(value), "correct or quote it")
    return value


def _question(where: str, data: Any) -> Question:
    check_keys(where, data, required=("needle", "question", "answers"))
    answers = data["answers"]
    if not isinstance(answers, Sequence) or isinstance(answers, str) or not answers:
        raise config_error(f"{where}.answers", "be a list of texts", repr(answers), "correct it")
    return Question(
        needle=_text(f"{where}.needle", data["needle"]),
        question=_text(f"{where}.question", data["question"]),
        answers=tuple(_text(f"{where}.answers[{i}]", answer) for i, answer in enumerate(answers)),
    )


def _depths(where: str, value: Any) -> tuple[float, ...]:
    if not isinstance(value, Sequence):
        require_int(where, value, minimum=2)
        return tuple(round(100 * i / (value - 1), 4) for i in range(value))
    valid = value and all(type(depth) in (int, float) and 0 <= depth <= 100 for depth in value)
    if not valid or len(set(value)) < len(value):
        rule = "be a number of depths or a list of different percentages, 0 to 100"
        raise config_error(where, rule, repr(value), "correct it")
    return tuple(float(depth) for depth in value)
