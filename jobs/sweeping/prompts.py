"""Prompts of a sweep: rendered with the model's own tokenizer, kept on disk as token ids, not in memory."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Self

from cluster.tokenizer import TextStream, TextTokenizer
from jobs.disk.lines import append, writing
from jobs.tasks import Sample
from jobs.tasks.tokens import PlainTokens
from spts.sampling import Sampling

_FILE = "prompts.bin"
# Some chat templates print the day's date. A sweep that is resumed tomorrow must have the same prompts; this
# is the date that Llama 3.1's template falls back to.
_DATE = datetime(2024, 7, 26)


class Prompts:
    """A model folder's tokenizer, the one that also serves it, so that a swept prompt is a served prompt."""

    def __init__(self, folder: Path) -> None:
        self.text = TextTokenizer(folder, now=lambda: _DATE)
        self.tokens = PlainTokens(self.text.tokenizer)

    def encode(self, sample: Sample) -> tuple[int, ...]:
        """Token ids of a sample's prompt: through the chat template if it wants that and the model has one,
        else with whatever the tokenizer adds to a text."""
        if sample.chat and self.text.has_chat_template:
            return self.text.encode_chat([{"role": "user", "content": sample.prompt}])
        return self.text.encode(sample.prompt)

    def sampling(self, stop: Sequence[str]) -> Sampling:
        """Greedy. A stop string that is a special token has no text in an answer: it ends it as a token."""
        return Sampling(stop_token_ids=self.text.special_ids(stop))

    def answer(self, token_ids: Iterable[int], stop: Sequence[str]) -> str:
        """The text of an answer, without special tokens, up to the first stop string in it."""
        text = self.tokens.decode(list(token_ids))
        found = [place for each in stop if (place := text.find(each)) >= 0]
        return text[: min(found)] if found else text

    def stopping(self, stop: Sequence[str]) -> Callable[[int], bool]:
        """A function that is given an answer's tokens one by one and says when a stop string is complete."""
        stream = TextStream(self.text, stop)

        def stopped(token_id: int) -> bool:
            stream.push(token_id)
            return stream.stopped

        return stopped


class PromptFile:
    """Token ids of many prompts in one file of a results folder, int32, while this object is open."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _FILE
        with writing(self._path):
            self._file = self._path.open("w+b", buffering=0)
        self._end = 0

    def add(self, token_ids: Iterable[int]) -> int:
        """Appends token ids and returns their place. Raises DiskError."""
        data = array("i", token_ids)
        with writing(self._path):
            append(self._file, data.tobytes())
        place, self._end = self._end, self._end + len(data)
        return place

    def read(self, place: int, count: int) -> array[int]:
        """`count` token ids from a place that `add` returned."""
        ids = array("i")
        ids.frombytes(os.pread(self._file.fileno(), count * ids.itemsize, place * ids.itemsize))
        assert len(ids) == count, "only what was written is read"
        return ids

    def close(self) -> None:
        """Removes the file."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
