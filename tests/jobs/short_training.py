"""A training of the demo model cut short: its own tokenizer, four thousand lines of text, short sequences."""

from __future__ import annotations

from functools import cache
from itertools import islice
from pathlib import Path

import pytest
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from jobs.demo.batches import Batches
from jobs.demo.phases import Phase
from jobs.tasks.haystack import haystack

BUNDLED = Path(__file__).parents[2] / "jobs" / "demo_model"
SHORT = Phase(
    name="short", share=0.5, lengths=(64, 128), weights=(1, 1), windowed=True, peak_lr=1e-3, final_lr=1e-4
)


@cache
def bundled_tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(BUNDLED)


def shorten_text(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("jobs.demo.batches.haystack", lambda part: haystack(part)[:4000])


def batches(
    *, phase: Phase = SHORT, tokens_per_batch: int = 256, seed: int = 0, count: int = 4
) -> list[tuple[Tensor, Tensor]]:
    """The first batches of a stream: (tokens, targets)."""
    with pytest.MonkeyPatch.context() as patch:
        shorten_text(patch)
        data = Batches(bundled_tokenizer(), tokens_per_batch=tokens_per_batch, phase=phase, seed=seed)
    return list(islice(data, count))
