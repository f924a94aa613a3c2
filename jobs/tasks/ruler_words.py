"""Words for RULER's keys and lists, in place of the word lists of the package wonderwords."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from jobs.tasks.needle import words as shipped_nouns
from spts.errors import config_error

_FILES = {"nouns": "nounlist.txt", "adjectives": "adjectivelist.txt", "verbs": "verblist.txt"}


@dataclass(frozen=True, kw_only=True)
class Words:
    """Three lists of words, each in a fixed order and without doubles.

    Attributes:
        source: where they come from, in words; no path.
        single: all of them together, sorted: what a list of words is drawn from.
    """

    source: str
    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]
    verbs: tuple[str, ...] = ()

    @cached_property
    def single(self) -> tuple[str, ...]:
        return tuple(sorted({*self.nouns, *self.adjectives, *self.verbs}))

    def pairs(self, rng: random.Random, count: int) -> list[str]:
        """`count` different pairs "adjective-noun" at random: RULER's keys.

        Raises ConfigError when the lists make fewer.
        """
        total = len(self.adjectives) * len(self.nouns)
        if count > total:
            raise config_error(
                "words", f"make {count} pairs of an adjective and a noun", str(total), "name longer lists"
            )
        return [
            f"{self.adjectives[i // len(self.nouns)]}-{self.nouns[i % len(self.nouns)]}"
            for i in rng.sample(range(total), count)
        ]

    def content(self) -> Mapping[str, Any]:
        """What a record says of them."""
        lists = "\n\n".join("\n".join(words) for words in (self.nouns, self.adjectives, self.verbs))
        return {"source": self.source, "sha256": hashlib.sha256(lists.encode()).hexdigest()}


@cache
def ruler_words(folder: str | None) -> Words:
    """Our shipped lists (None), or a folder with nounlist.txt, adjectivelist.txt and verblist.txt.

    Such a folder is the `assets` of the package wonderwords, which RULER draws from. One word a line.

    Raises:
        ConfigError: a file is missing or not UTF-8, or the lists hold less than 100 nouns or adjectives.
    """
    if folder is None:
        text = resources.files("jobs.tasks").joinpath("adjectives.txt").read_text(encoding="ascii")
        return Words(source="shipped", nouns=shipped_nouns(), adjectives=tuple(text.split()))
    lists: dict[str, tuple[str, ...]] = {}
    for kind, name in _FILES.items():
        path = Path(folder) / name
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise config_error(
                "words",
                f"be a folder with {', '.join(_FILES.values())}",
                f"{folder} ({error!r})",
                "name such a folder, one word a line",
            ) from error
        lists[kind] = tuple(dict.fromkeys(word for line in lines if (word := line.strip())))
        if kind != "verbs" and len(lists[kind]) < 100:
            raise config_error(
                "words", f"have at least 100 {kind}", f"{len(lists[kind])} in {path}", "name longer lists"
            )
    return Words(source="given lists", **lists)
