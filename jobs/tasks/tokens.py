"""A tokenizer as tasks see it: plain text to plain tokens and back, nothing added."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

_LINE_CHARS = 400


class PlainTokens:
    """`jobs.tasks.Tokens` of a `tokenizers.Tokenizer`."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._remembered = lru_cache(maxsize=200_000)(self._count)

    def count(self, text: str) -> int:
        """Number of tokens of a text, without special tokens. Lines come again, so theirs are remembered."""
        return self._remembered(text) if len(text) <= _LINE_CHARS else self._count(text)

    def _count(self, text: str) -> int:
        return len(self.encode(text))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))
