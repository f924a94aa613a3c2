"""Decoding of several requests at once, in this process: what a step takes and how many tokens a second.

A step is what a server does: the tokens go in, the step runs, the most likely tokens come back to the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from jobs.timing.cases import Case

if TYPE_CHECKING:
    from spts.cache import RaggedCache
    from spts.model import SptsModel

_WARM_UP = 3


@dataclass(frozen=True, kw_only=True)
class DecodeRow:
    """Steps of one batch size after prompts of one length. kv_bytes: of the batch, before the first step.

    host_median_s: of the step, until the host has queued all of it; what it needs at least.
    """

    method: str
    length_tokens: int
    batch: int
    steps: int
    step_median_s: float
    step_min_s: float
    step_max_s: float
    host_median_s: float
    tokens_per_s: float
    kv_bytes: int


def room_tokens(batches: Sequence[int], steps: int) -> int:
    """Tokens that a cache of `decode_rows` takes after its prompt."""
    return len(batches) * (_WARM_UP + steps)


def decode_rows(
    model: SptsModel, case: Case, prompt: Sequence[int], *, batches: Sequence[int], steps: int
) -> list[DecodeRow]:
    """Times every method at every batch size; each request has a cache of its own."""
    rows = []
    for name, method in case.methods.items():
        room = room_tokens(batches, steps)
        caches = [model.prefill(prompt, method, max_new_tokens=room).cache for _ in range(max(batches))]
        for batch in batches:
            rows.append(_time(model, name, case.length, caches[:batch], steps))
        del caches  # before the next method's
    return rows


def _time(model: SptsModel, name: str, length: int, caches: list[RaggedCache], steps: int) -> DecodeRow:
    import torch

    from jobs.timing.contestants import clock

    spans: list[float] = []
    queued: list[float] = []
    token_ids = torch.arange(1, len(caches) + 1)
    kv_bytes = sum(cache.num_bytes for cache in caches)
    for _ in range(_WARM_UP + steps):
        start = clock(model.device)
        logits_BV = model.decode_step(token_ids, caches)
        queued.append(clock(torch.device("cpu")) - start)
        token_ids = logits_BV.argmax(dim=-1).cpu()
        spans.append(clock(model.device) - start)
    timed = spans[_WARM_UP:]
    return DecodeRow(
        method=name,
        length_tokens=length,
        batch=len(caches),
        steps=steps,
        step_median_s=median(timed),
        step_min_s=min(timed),
        step_max_s=max(timed),
        host_median_s=median(queued[_WARM_UP:]),
        tokens_per_s=len(caches) / median(timed),
        kv_bytes=kv_bytes,
    )


def decode_table(rows: Sequence[DecodeRow]) -> str:
    """The rows, aligned."""
    lines = [["tokens", "method", "batch", "step ms", "min - max", "host ms", "tokens/s", "KV MiB"]]
    for row in rows:
        lines.append(
            [
                str(row.length_tokens),
                row.method,
                str(row.batch),
                f"{row.step_median_s * 1e3:.2f}",
                f"{row.step_min_s * 1e3:.2f} - {row.step_max_s * 1e3:.2f}",
                f"{row.host_median_s * 1e3:.2f}",
                f"{row.tokens_per_s:.0f}",
                f"{row.kv_bytes / 2**20:.0f}",
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    )
