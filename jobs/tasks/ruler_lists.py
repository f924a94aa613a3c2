"""RULER's tasks beyond one lookup: follow a chain of variables, and count the words of a list or a text."""

from __future__ import annotations

import math
import random
import string
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from jobs.tasks.base import Tokens
from jobs.tasks.ruler_kind import Draft, Sources, joined

_EXAMPLE_TOKENS = 500
_EXAMPLE_STEP = 5
_SHORT = 4096  # below this length RULER counts on smaller scales


@dataclass(frozen=True, kw_only=True)
class VariableTracking:
    """A chain: a variable gets a value, each of the next `num_hops` the one before; all are asked for.

    An example with its answer comes first, of at most 500 tokens, with names of three letters in place of
    five. The units of haystack are the noise sentences.
    """

    num_hops: int = 4
    max_new_tokens: ClassVar[int] = 30
    any_reference: ClassVar[bool] = False
    texts: ClassVar[tuple[str, ...]] = ("vt", "vt_answer", "noise")
    sources: ClassVar[tuple[str, ...]] = ()

    def num_samples(self, sources: Sources) -> int | None:
        return None

    def fewest(self, sources: Sources, index: int) -> int:
        return self.num_hops + 1

    def draw(
        self, rng: random.Random, sources: Sources, tokens: Tokens, *, index: int, units: int, length: int
    ) -> Draft:
        values = rng.sample(range(10_000, 99_999), 2)
        names, example_names = self._names(rng, 5), self._names(rng, 3)
        example_seed = rng.getrandbits(64)

        def example(noises: int) -> str:
            prompt = self._prompt(random.Random(example_seed), sources, noises, values[1], example_names)
            return f"{prompt} {' '.join(example_names)}\n"

        noises = _EXAMPLE_STEP
        while len(tokens.encode(example(noises + _EXAMPLE_STEP))) <= _EXAMPLE_TOKENS:
            noises += _EXAMPLE_STEP
        prompt = self._prompt(rng, sources, units, values[0], names)
        return Draft(prompt=f"{example(noises)}\n{prompt}", references=tuple(names))

    def _names(self, rng: random.Random, letters: int) -> list[str]:
        names: dict[str, None] = {}
        while len(names) <= self.num_hops:
            names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
        return list(names)

    def _prompt(self, rng: random.Random, sources: Sources, noises: int, value: int, names: list[str]) -> str:
        lines = [sources.texts["noise"]] * noises
        # RULER's notation of an assignment, the space at its end included.
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {new} = VAR {old} " for old, new in pairwise(names)]
        for earlier, place in enumerate(sorted(rng.sample(range(noises), len(chain)))):
            lines.insert(place + earlier, chain[earlier])
        return joined(sources.texts["vt"], sources.texts["vt_answer"]).format(
            context="\n".join(lines), query=value, num_v=len(names)
        )


@dataclass(frozen=True, kw_only=True)
class CommonWords:
    """A numbered list of words: `num_common` of them come often, the others seldom.

    A shorter list with its answer comes first, as an example. The units of haystack are different words.
    """

    num_common: int = 10
    repeats: int = 30
    other_repeats: int = 3
    max_new_tokens: ClassVar[int] = 120
    any_reference: ClassVar[bool] = False
    texts: ClassVar[tuple[str, ...]] = ("cwe", "cwe_answer")
    sources: ClassVar[tuple[str, ...]] = ("words",)

    def num_samples(self, sources: Sources) -> int | None:
        return None

    def fewest(self, sources: Sources, index: int) -> int:
        return self.num_common + 1

    def draw(
        self, rng: random.Random, sources: Sources, tokens: Tokens, *, index: int, units: int, length: int
    ) -> Draft:
        if length < _SHORT:
            example = self._list(rng, sources, num_words=20, repeats=3, other_repeats=1)
            asked = self._list(rng, sources, num_words=units, repeats=6, other_repeats=1)
        else:
            example = self._list(rng, sources, num_words=40, repeats=10, other_repeats=3)
            asked = self._list(
                rng, sources, num_words=units, repeats=self.repeats, other_repeats=self.other_repeats
            )
        template = joined(sources.texts["cwe"], sources.texts["cwe_answer"])
        shown, wanted = (
            template.format(context=text, query="", num_cw=self.num_common) for text, _ in (example, asked)
        )
        return Draft(prompt=f"{shown} {_numbered(example[1])}\n{wanted}", references=tuple(asked[1]))

    def _list(
        self, rng: random.Random, sources: Sources, *, num_words: int, repeats: int, other_repeats: int
    ) -> tuple[str, list[str]]:
        """The list, and the words that are common in it."""
        assert sources.words is not None
        words = rng.sample(sources.words.single, min(num_words, len(sources.words.single)))
        # RULER goes on to a larger list of words where this one ends; ours goes on with pairs.
        words += sources.words.pairs(rng, num_words - len(words))
        rng.shuffle(words)
        common, others = words[: self.num_common], words[self.num_common :]
        items = common * repeats + others * other_repeats
        rng.shuffle(items)
        return _numbered(items), common


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


@dataclass(frozen=True, kw_only=True)
class FrequentWords:
    """Coded words of six letters whose frequency falls with their rank k as int(n / (zeta(alpha) k^alpha)).

    The first is noise, spelled as dots; the next three are asked for. The units of haystack are n. There are
    as many words as a fiftieth of the length.
    """

    alpha: float = 2.0
    num_letters: int = 6
    max_new_tokens: ClassVar[int] = 50
    any_reference: ClassVar[bool] = False
    texts: ClassVar[tuple[str, ...]] = ("fwe", "fwe_answer")
    sources: ClassVar[tuple[str, ...]] = ()

    def num_samples(self, sources: Sources) -> int | None:
        return None

    def fewest(self, sources: Sources, index: int) -> int:
        # From here on rank 4, the last that is asked for, comes more often than rank 5.
        return math.ceil(_zeta(self.alpha) / (4**-self.alpha - 5**-self.alpha))

    def draw(
        self, rng: random.Random, sources: Sources, tokens: Tokens, *, index: int, units: int, length: int
    ) -> Draft:
        vocabulary: dict[str, None] = {"...": None}
        while len(vocabulary) < max(length // 50, 5):
            vocabulary["".join(rng.choices(string.ascii_lowercase, k=self.num_letters))] = None
        zeta = _zeta(self.alpha)
        text = [
            word
            for rank, word in enumerate(vocabulary, start=1)
            for _ in range(int(units * rank**-self.alpha / zeta))
        ]
        rng.shuffle(text)
        template = joined(sources.texts["fwe"], sources.texts["fwe_answer"])
        return Draft(
            prompt=template.format(context=" ".join(text), query=""), references=tuple(vocabulary)[1:4]
        )


def _zeta(alpha: float) -> float:
    from scipy.special import zeta

    return float(zeta(alpha))
