"""What the demo model is trained on: needles hidden in real text, questions about them, and their answers.

Shapes: B sequences, N tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from jobs.demo.phases import Phase
from jobs.tasks.haystack import haystack
from jobs.tasks.needle import NUM_VALUES, Needle, ask, chain, fact, hide, words

IGNORED = -100


class Batches(torch.utils.data.IterableDataset):
    """An endless stream of (tokens int64 [B, N + 1], targets int64 [B, N]), each batch of one length N.

    A sequence is text with needles, then questions, each followed by its answer. `targets` holds the next
    token where that is part of an answer, else IGNORED:

        tokens    ... ?  \\n  Answer  :   amber  <end>
        targets       -   -    -    amber <end>
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, *, tokens_per_batch: int, phase: Phase, seed: int
    ) -> None:
        self.phase, self.seed, self.tokens_per_batch = phase, seed, tokens_per_batch
        self.encode = tokenizer.backend_tokenizer.encode
        self.end = tokenizer.eos_token_id
        self.newline = self.encode("\n").ids
        text = tokenizer.backend_tokenizer.encode_batch_fast(list(haystack("train")))
        self.starts = np.cumsum([0, *(len(line.ids) + 1 for line in text)])  # of each line among the tokens
        self.text = np.concatenate([np.array(line.ids + self.newline, dtype=np.int64) for line in text])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(f"{self.seed}/{self.phase.name}/{worker.id if worker else 0}")
        while True:
            length = rng.choices(self.phase.lengths, weights=self.phase.weights)[0]
            sequences = [self._sequence(rng, length) for _ in range(self.tokens_per_batch // length)]
            yield (
                torch.from_numpy(np.stack([tokens for tokens, _ in sequences])),
                torch.from_numpy(np.stack([targets for _, targets in sequences])),
            )

    def _sequence(self, rng: random.Random, length: int) -> tuple[np.ndarray, np.ndarray]:
        needles = _draw_needles(rng, length)
        tail, answered = self._questions(rng, needles)
        hidden = [self.encode(line).ids + self.newline for needle in needles for line in needle.lines]
        document = self._document(rng, hidden, room=length + 1 - len(tail))
        body = np.concatenate([*document, np.array(tail, dtype=np.int64)])
        tokens = np.full(length + 1, self.end, dtype=np.int64)
        tokens[length + 1 - len(body) :] = body  # a few tokens short of the length: padded on the left
        targets = np.full(length, IGNORED, dtype=np.int64)
        places = length - len(tail) + np.array(answered)
        targets[places] = tokens[places + 1]
        return tokens, targets

    def _questions(self, rng: random.Random, needles: list[Needle]) -> tuple[list[int], list[int]]:
        """Token ids of questions with their answers, and the places in them that belong to answers."""
        tail: list[int] = []
        answered: list[int] = []
        for needle in rng.sample(needles, k=min(len(needles), rng.randint(1, 8))):
            tail += self.encode(ask(needle.question)).ids
            answers = list(needle.answers)
            rng.shuffle(answers)
            answer = [*self.encode(" " + ", ".join(answers)).ids, self.end]
            answered += range(len(tail), len(tail) + len(answer))
            tail += answer
        return tail, answered

    def _document(self, rng: random.Random, hidden: list[list[int]], *, room: int) -> Iterator[np.ndarray]:
        """Whole lines of text from a random one on, the hidden ones among them: at most `room` token ids."""
        room -= sum(map(len, hidden))
        first = rng.randrange(len(self.starts) - 1)
        if self.starts[-1] - self.starts[first] < room + 200:
            first = 0
        last = int(np.searchsorted(self.starts, self.starts[first] + room, side="right")) - 1
        # Lines of text by their number, hidden ones by a negative index.
        lines, _ = hide(rng, range(first, last), range(-len(hidden), 0))
        for is_hidden, group in groupby(lines, key=lambda line: line < 0):
            run = list(group)
            if is_hidden:
                yield from (np.array(hidden[line], dtype=np.int64) for line in run)
            else:
                yield self.text[self.starts[run[0]] : self.starts[run[-1] + 1]]


def _draw_needles(rng: random.Random, length: int) -> list[Needle]:
    """Needles of one kind, or one or two of each; the more the longer the sequence."""
    nouns = rng.sample(words(), k=len(words()))
    kinds = rng.choice(("single", "facts", "values", "chains", "chains", "mixed"))
    most = max(1, min(12, length // 30))
    match kinds:
        case "single":
            return [fact(nouns)]
        case "facts":
            return [fact(nouns) for _ in range(rng.randint(1, most))]
        case "values":
            return [fact(nouns, NUM_VALUES) for _ in range(rng.randint(1, max(1, most // 3)))]
        case "chains":
            return [chain(nouns) for _ in range(rng.randint(1, max(1, most * 2 // 3)))]
    mixed = [fact(nouns), fact(nouns, NUM_VALUES), chain(nouns), chain(nouns)]
    return rng.sample(mixed, k=min(len(mixed), max(1, most // 3)))
