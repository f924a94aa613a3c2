"""A tokenizer as tasks see it: plain text to plain tokens and back, nothing added."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any


class PlainTokens:
    """`jobs.tasks.Tokens` of a `tokenizers.Tokenizer`; counts are remembered, since lines come again."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.count = lru_cache(maxsize=200_000)(self._count)

    def _count(self, text: str) -> int:
        return len(self.encode(text))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))
