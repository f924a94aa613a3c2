"""The prompts of a load: needle questions, so that answers can be checked, and no prompt sent twice."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.load.settings import Settings
from jobs.tasks import Sample
from jobs.tasks.base import Tokens
from jobs.tasks.needle import NEEDLE_TASKS, NeedleTask
from jobs.tasks.tokens import PlainTokens
from spts.errors import ConfigError

SAMPLES_OF_A_TASK = 4


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One prompt to send and how to score its answer. length: the class that it is of, in tokens."""

    index: int
    length: int
    task: NeedleTask
    sample: Sample
    prompt: str

    def score(self, text: str) -> float:
        """See `Task.score`."""
        return self.task.score(text, self.sample.references, self.sample.meta)

    def body(self, settings: Settings, model: str) -> dict[str, Any]:
        """The request in OpenAI's terms."""
        body: dict[str, Any] = {
            "model": model,
            "max_tokens": settings.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if settings.chat:
            body["messages"] = [{"role": "user", "content": self.prompt}]
        else:
            body["prompt"] = self.prompt
        # Extensions of vLLM's and ours: other endpoints may refuse them, so only where asked for.
        if settings.ignore_eos:
            body["ignore_eos"] = True
        if settings.method is not None:
            body["spts"] = {"method": settings.method}
        return body


class Asks:
    """The requests of a load, by index: which length and which question follow from seed and index alone.

    mark: begins every prompt, with the index, so that a server that keeps beginnings of prompts finds none of
    an earlier one, of this load or another. Raises ConfigError when a length has no room for a question.
    """

    def __init__(self, settings: Settings, tokens: Tokens, *, mark: str) -> None:
        self._settings = settings
        self._mark = mark
        room = (
            tokens.count(self._beginning(888_888)) + 8
        )  # digits of an index may be cut into tokens otherwise
        self._samples: dict[int, list[tuple[NeedleTask, Sample]]] = {}
        for length, _ in settings.lengths:
            self._samples[length] = [
                (task, sample)
                for task in NEEDLE_TASKS
                for sample in task.samples(
                    tokens, length=max(1, length - room), count=SAMPLES_OF_A_TASK, seed=settings.seed
                )
            ]

    def ask(self, index: int) -> Ask:
        """Request number `index`."""
        rng = random.Random(f"{self._settings.seed}/{index}")
        lengths, shares = zip(*self._settings.lengths, strict=True)
        [length] = rng.choices(lengths, shares)
        return self._made(index, length, rng)

    def of_length(self, length: int) -> Ask:
        """A request to try the endpoint with, none of the load's own."""
        return self._made(-1 - length, length, random.Random(length))

    def _made(self, index: int, length: int, rng: random.Random) -> Ask:
        task, sample = rng.choice(self._samples[length])
        prompt = self._beginning(index) + sample.prompt
        return Ask(index=index, length=length, task=task, sample=sample, prompt=prompt)

    def _beginning(self, index: int) -> str:
        return f"# {self._mark} {index:06d}\n"


def read_tokens(folder: str) -> PlainTokens:
    """The tokenizer of a model folder. Raises ConfigError."""
    from tokenizers import Tokenizer

    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(
            f"tokenizer must be a folder with the served model's tokenizer.json, got {folder}; prompts are "
            "made to length with it",
            field="tokenizer",
        )
    return PlainTokens(Tokenizer.from_file(str(path)))
