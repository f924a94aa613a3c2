"""Agreement with the dense model on any text: needs no labels, so it fits any model.

A sample is a window of a document and the tokens that really follow it. The model is made to follow those,
and each of its next-token distributions is compared with the dense model's at the same place. A task here
only cuts the text; whoever runs the model measures (`cluster.protocol.Agreement`).
"""

from __future__ import annotations

import hashlib
import os
import random
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

from jobs.tasks.base import Meta, Sample, Tokens
from jobs.tasks.haystack import haystack, haystack_hash
from spts.errors import ConfigError, check_keys, config_error, require_int

FOLLOW_TOKENS = 32

# A line of up to 200 characters stays whole. A longer one is cut before white space, so that the text after a
# cut begins as words do in the middle of a line; where there is none, after 200 characters.
_PIECE = re.compile(r".{1,200}(?=\s|\Z)|.{1,200}", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text and how it is called in a sample's meta."""

    name: str
    text: str


@dataclass(frozen=True, kw_only=True)
class AgreementTask:
    """Windows of text, each with the `follow_tokens` tokens that come next.

    texts: files, and folders for all files in them; empty = the shipped text that the demo model was not
    trained on. `samples` explains how windows are cut.
    """

    name: str
    texts: tuple[str, ...] = ()
    follow_tokens: int = FOLLOW_TOKENS
    version: ClassVar[int] = 1
    stop: ClassVar[tuple[str, ...]] = ()

    @property
    def spec(self) -> Meta:
        spec: dict[str, Any] = {"name": "agreement", "follow_tokens": self.follow_tokens}
        if self.texts:
            spec["texts"] = list(self.texts)
        if self.name != "agreement":
            spec["label"] = self.name
        return spec

    @property
    def max_new_tokens(self) -> int:
        return self.follow_tokens

    def content(self) -> Meta:
        texts = [_sha256(document.text) for document in self._documents()] if self.texts else None
        return {"follow_tokens": self.follow_tokens, "texts": texts or haystack_hash("held_out")}

    def samples(self, tokens: Tokens, *, length: int, count: int, seed: int) -> Iterator[Sample]:
        """Up to `count` windows of at most `length` tokens; sample i is the same for any `count`.

        Each document is cut into windows one after the other: as many whole lines as have room (parts of
        lines longer than 200 characters), then the tokens to follow. No text is in two of them. The seed says
        in which order they are taken: a first window of every document, then a second of each, and so on. A
        document that is too short for one gives none.

        Raises:
            ConfigError: a text cannot be read, or none has `length` + `follow_tokens` tokens.
        """
        require_int("length", length, minimum=1)
        rng = random.Random(f"agreement/{self.version}/{length}/{seed}")
        documents = self._documents()
        windows: list[tuple[int, float, Sample]] = []
        longest = max(documents, key=lambda document: len(document.text))
        for index, document in enumerate(documents):
            cut = list(self._windows(tokens, document, length, f"{self.name}-{length}-{seed}-{index}"))
            ranks = rng.sample(range(len(cut)), k=len(cut))
            windows += [(rank, rng.random(), sample) for rank, sample in zip(ranks, cut, strict=True)]
        if not windows and (most := tokens.count(longest.text)) > length + self.follow_tokens:
            raise ConfigError(
                f"length must hold a line of the text, or 200 characters of a longer one, got {length} "
                f"tokens, and {most} in {longest.name} of which no window can be cut; use a larger length",
                field="length",
            )
        if not windows:
            raise ConfigError(
                f"texts must have a document of more than {length} + {self.follow_tokens} tokens, got at "
                f"most {tokens.count(longest.text)} in {longest.name}; give longer texts or a smaller length",
                field="texts",
            )
        windows.sort(key=lambda window: window[:2])
        return (sample for _, _, sample in windows[:count])

    def score(self, text: str, references: tuple[str, ...], meta: Meta) -> float:
        """Never asked: there is no answer to score, the rows hold what was measured."""
        raise AssertionError(f"task {self.name!r} has no answers to score; read `agreement` of its rows")

    def _windows(self, tokens: Tokens, document: Document, length: int, prefix: str) -> Iterator[Sample]:
        pieces = [piece for line in document.text.splitlines(keepends=True) for piece in _PIECE.findall(line)]
        ends = list(accumulate((tokens.count(piece) for piece in pieces), initial=0))
        start = 0
        while (followed := self._follow(tokens, pieces, stop := _last(ends, start, length))) is not None:
            # Pieces joined can have other tokens than each alone: the whole prompt's count has the last word.
            while tokens.count("".join(pieces[start:stop])) > length:
                start += 1
            follow, end = followed
            if start < stop:
                yield Sample(
                    id=f"{prefix}-{start}",
                    prompt="".join(pieces[start:stop]),
                    references=(),
                    meta={"document": document.name},
                    follow=follow,
                )
            start = end

    def _follow(
        self, tokens: Tokens, pieces: Sequence[str], start: int
    ) -> tuple[tuple[int, ...], int] | None:
        """The first tokens of the text from piece `start` on, and the piece after them; None = too few."""
        text = ""
        for index in range(start, len(pieces)):
            text += pieces[index]
            if len(token_ids := tokens.encode(text)) >= self.follow_tokens:
                return tuple(token_ids[: self.follow_tokens]), index + 1
        return None

    def _documents(self) -> list[Document]:
        if not self.texts:
            return [Document(name="shipped", text="\n".join(haystack("held_out")))]
        found = [document for text in self.texts for document in _read(Path(os.path.expanduser(text)))]
        for index, one in enumerate(found):
            same = next((other for other in found[:index] if other.text == one.text), None)
            if same is not None:
                raise config_error(
                    "texts", "hold each text once", f"{same.name} and {one.name} alike", "remove one"
                )
        return found


def _last(ends: Sequence[int], start: int, length: int) -> int:
    """The piece before which a window from piece `start` on ends. ends[i]: tokens before piece i."""
    return max(start, bisect_right(ends, ends[start] + length) - 1)


def _read(path: Path) -> list[Document]:
    """The text of a file, or of every file below a folder that is not hidden, by name. Raises ConfigError."""
    if os.path.isdir(path):  # Path's own raises for a name that is too long
        files = [
            file
            for file in sorted(path.rglob("*"))
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        if not files:
            raise ConfigError(
                f"texts must be folders with files in them, got none in {path}; correct the path",
                field="texts",
            )
        names = [file.relative_to(path).as_posix() for file in files]
    else:
        files, names = [path], [path.name]
    return [Document(name=name, text=_text(file)) for name, file in zip(names, files, strict=True)]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"texts must be readable UTF-8 files, got {file} ({error}); correct the path or the file",
            field="texts",
        ) from None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def make(name: str, params: Mapping[str, Any]) -> tuple[AgreementTask, ...]:
    """The task of an entry {name: agreement, texts, follow_tokens, label}. Raises ConfigError."""
    where = f"tasks.{name}"
    check_keys(where, params, required=(), optional=("texts", "follow_tokens", "label"))
    texts, label = params.get("texts", []), params.get("label", name)
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text for text in texts):
        raise ConfigError(
            f"{where}.texts must be a list of files or folders, got {texts!r}; correct it",
            field=f"{where}.texts",
        )
    if "texts" in params and not texts:
        raise ConfigError(
            f"{where}.texts must list a file or folder, got []; leave it out for the shipped text",
            field=f"{where}.texts",
        )
    if not isinstance(label, str) or not label:
        raise ConfigError(f"{where}.label must be a name, got {label!r}; correct it", field=f"{where}.label")
    follow_tokens = params.get("follow_tokens", FOLLOW_TOKENS)
    require_int(f"{where}.follow_tokens", follow_tokens, minimum=1)
    return (AgreementTask(name=label, texts=tuple(texts), follow_tokens=follow_tokens),)
