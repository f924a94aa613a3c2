"""RULER's needles in a haystack: keys with values among noise, prose, or needles of the same form."""

from __future__ import annotations

import random
import uuid
from dataclasses import dataclass
from typing import ClassVar, Literal

from jobs.tasks.base import Tokens
from jobs.tasks.document import put
from jobs.tasks.ruler_kind import Draft, Sources, joined

# Where needles may stand in prose: percentages of its units.
DEPTHS = tuple(round(100 * step / 39) for step in range(40))
_DIGITS = 7


@dataclass(frozen=True, kw_only=True)
class Niah:
    """RULER's task "niah" with the arguments of its synthetic.yaml; `num_keys` is at least `num_queries`.

    Attributes:
        haystack: "noise" repeats a few sentences; "essay" is prose; "needle" is needles about other keys.
        keys, values: what they look like. Numbers have seven digits; words are "adjective-noun".
    """

    haystack: Literal["noise", "essay", "needle"]
    keys: Literal["words", "uuids"] = "words"
    values: Literal["numbers", "uuids"] = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1
    max_new_tokens: ClassVar[int] = 128
    any_reference: ClassVar[bool] = False

    @property
    def texts(self) -> tuple[str, ...]:
        noise = ("noise",) if self.haystack == "noise" else ()
        return ("niah", "niah_answer", "needle", *noise)

    @property
    def sources(self) -> tuple[str, ...]:
        haystack = ("haystack",) if self.haystack == "essay" else ()
        return (*haystack, *(("words",) if self.keys == "words" else ()))

    def num_samples(self, sources: Sources) -> int | None:
        return None

    def fewest(self, sources: Sources, index: int) -> int:
        return self.num_keys * self.num_values

    def draw(
        self, rng: random.Random, sources: Sources, tokens: Tokens, *, index: int, units: int, length: int
    ) -> Draft:
        num_others = units if self.haystack == "needle" else 0
        keys = _names(rng, self.keys, self.num_keys + num_others, sources)
        values = _names(rng, self.values, self.num_keys * self.num_values + num_others, sources)

        def needle(key: str, value: str) -> str:
            return sources.texts["needle"].format(type_needle_v=self.values, key=key, value=value)

        asked = {
            key: values[i * self.num_values : (i + 1) * self.num_values]
            for i, key in enumerate(keys[: self.num_keys])
        }
        needles = [needle(key, value) for key, own in asked.items() for value in own]
        others = [needle(*pair) for pair in zip(keys[len(asked) :], values[len(needles) :], strict=True)]
        queries = rng.sample(list(asked), self.num_queries)
        references = tuple(value for key in queries for value in asked[key])
        rng.shuffle(needles)
        context = self._context(rng, sources, units, needles, others)
        depth = context.index(references[0]) / len(context) if len(references) == 1 else None
        return Draft(prompt=self._prompt(sources, context, queries), references=references, depth=depth)

    def _context(
        self, rng: random.Random, sources: Sources, units: int, needles: list[str], others: list[str]
    ) -> str:
        if self.haystack == "essay":
            assert sources.haystack is not None
            gaps = sorted(units * depth // 100 for depth in rng.sample(DEPTHS, len(needles)))
            standing: dict[int, list[str]] = {}
            for gap, needle in zip(gaps, needles, strict=True):
                standing.setdefault(gap, []).append(needle)
            return put(sources.haystack.take(units), standing).strip()
        sentences = others if self.haystack == "needle" else [sources.texts["noise"]] * units
        places = sorted(rng.sample(range(units), len(needles)), reverse=True)
        for place, needle in zip(places, needles, strict=True):
            sentences.insert(place, needle)
        return "\n".join(sentences)

    def _prompt(self, sources: Sources, context: str, queries: list[str]) -> str:
        template = joined(sources.texts["niah"], sources.texts["niah_answer"])
        values: str = self.values
        if self.num_queries * self.num_values == 1:  # RULER's own way from the plural to the singular
            template = template.replace("Some", "A").replace("are all", "is").replace("are", "is")
            values = values.removesuffix("s")
        query = queries[0] if len(queries) == 1 else f"{', '.join(queries[:-1])}, and {queries[-1]}"
        return template.format(type_needle_v=values, context=context, query=query)


def _names(rng: random.Random, kind: str, count: int, sources: Sources) -> list[str]:
    """`count` different words, numbers or UUIDs."""
    if kind == "numbers":
        return [str(number) for number in rng.sample(range(10 ** (_DIGITS - 1), 10**_DIGITS), count)]
    if kind == "uuids":
        return [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(count)]
    assert sources.words is not None
    return sources.words.pairs(rng, count)
