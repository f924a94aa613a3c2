"""A haystack as units that a needle can stand between: our shipped text, or given texts in any script."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from jobs.tasks.haystack import haystack
from spts.errors import config_error

SHIPPED = "the Python standard library's sources, held-out part"
_MAX_UNIT_CHARS = 400
# A sentence ends at a mark of its script and the quotes or brackets that close with it, then any space.
_SENTENCE = re.compile(r".+?(?:[.!?…؟۔।॥]+[\"'”’»)\]]* +|[。！？｡．]+[”’」』）》]* *|$)")
# What is longer has no marks: it gets many places for a needle, so that short prompts have some too.
_PIECE_CHARS = 40
_PIECE = re.compile(rf".{{1,{_PIECE_CHARS}}}$|.{{1,{_PIECE_CHARS - 1}}} |.{{1,{_PIECE_CHARS}}}")


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text in order, cut into units, each with the space that follows it: joined, they are the text.

    Attributes:
        source: where it comes from, in words; no path.
        units: lines of shipped text, sentences of a folder's (pieces of 40 characters of what is longer than
            400).
        sha256: hash of the text.
    """

    source: str
    units: tuple[str, ...]
    sha256: str

    def take(self, count: int, start: int = 0) -> list[str]:
        """`count` units from unit `start` on; after the last comes the first again."""
        return [self.units[i % len(self.units)] for i in range(start, start + count)]

    def content(self) -> Mapping[str, Any]:
        """What a record says of it."""
        return {"source": self.source, "sha256": self.sha256}


def place(units: list[str], depth: float) -> int:
    """Index of the gap between units that is nearest to `depth` (0 to 1) of their characters.

    Worked example: units of 10, 10, 20 and 10 characters end at 10, 20, 40 and 50. Depth 0.5 is character 25,
    so the gap is 2, at 20.
    """
    ends = [0, *accumulate(map(len, units))]
    return min(range(len(ends)), key=lambda gap: abs(ends[gap] - depth * ends[-1]))


def put(units: list[str], needles: Mapping[int, list[str]]) -> str:
    """The text with needles in its gaps: `needles[i]` stand before unit i, and end as the unit before them.

    Worked example: put(["One. ", "Two. "], {1: ["Needle."]}) == "One. Needle. Two. "
    """
    parts: list[str] = []
    for gap in range(len(units) + 1):
        neighbour = units[max(gap - 1, 0)] if units else " "
        space = neighbour[len(neighbour.rstrip()) :]
        parts.extend(needle + space for needle in needles.get(gap, ()))
        parts.extend(units[gap : gap + 1])
    return "".join(parts)


@cache
def document(path: str | None) -> Document:
    """The shipped text (None), all .txt files of a folder in order of name, or the "text" of a JSON file.

    White space of a given text becomes single spaces, as RULER does with its essays; RULER's own
    PaulGrahamEssays.json is such a JSON file.

    Raises:
        ConfigError: there is no such folder or file, it holds no text, or the text is not UTF-8.
    """
    if path is None:
        units = tuple(line + "\n" for line in haystack("held_out"))
        return Document(source=SHIPPED, units=units, sha256=_sha256("".join(units)))
    text = re.sub(r"\s+", " ", _read(Path(path))).strip()
    if not text:
        raise config_error("haystack", "hold text", f"{path} without any", "name a folder of .txt files")
    units = tuple(unit for sentence in _SENTENCE.findall(text + " ") for unit in _units(sentence))
    return Document(source="given text", units=units, sha256=_sha256(text))


def _units(sentence: str) -> list[str]:
    return [sentence] if len(sentence) <= _MAX_UNIT_CHARS else _PIECE.findall(sentence)


def _read(path: Path) -> str:
    try:
        if path.is_dir():
            files = sorted(path.glob("*.txt"))
            return " ".join(file.read_text(encoding="utf-8") for file in files)
        if path.suffix == ".json":
            text = json.loads(path.read_text(encoding="utf-8"))["text"]
            if isinstance(text, str):
                return text
            raise TypeError("its text is not a string")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise config_error(
            "haystack", "be readable UTF-8 text", f"{path} ({error!r})", "correct it"
        ) from error
    raise config_error(
        "haystack",
        'be a folder of .txt files or a .json file with a "text"',
        str(path),
        "name one that is there",
    )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
