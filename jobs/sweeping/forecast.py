"""What a sweep will cost, before anything runs: counts, FLOP and KV from the cost model, time from a matrix
product that is measured here."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from jobs.aligned import aligned
from jobs.reporting.wording import bytes_text, short_length
from jobs.sweeping.progress import clock_time
from jobs.sweeping.spec import EngineSpec
from jobs.sweeping.work import Cost, Prepared

if TYPE_CHECKING:
    from torch import Tensor

_SIZE = 1024
_MEASURE_S = 0.5
_HEADS = (
    "method",
    "tokens",
    "cells",
    "contexts",
    "samples",
    "prefill FLOP",
    "% of dense",
    "reused",
    "KV/prompt",
    "KV %",
)


def table(prepared: Prepared, *, flops_per_s: float | None) -> list[str]:
    """Lines of an aligned table: a row per method and length, and one per method over all lengths.

    flops_per_s: of all engines together; None = no column for the time. FLOP are as if no context were
    shared; `reused` is the share of them that is not done because one is, and the time is that of the rest.
    """
    labels = dict.fromkeys(label for label, _ in prepared.costs)
    rows = [[*_HEADS, *(["prefill time"] if flops_per_s else [])]]
    for label in labels:
        lengths = sorted(length for other, length in prepared.costs if other == label)
        parts = [(short_length(length), prepared.costs[label, length]) for length in lengths]
        if len(parts) > 1:
            parts.append(("all", _sum(cost for _, cost in parts)))
        rows += [[label, length, *_numbers(cost, flops_per_s)] for length, cost in parts]
    return aligned(rows)


def _numbers(cost: Cost, flops_per_s: float | None) -> list[str]:
    numbers = [
        str(cost.cells),
        str(cost.groups),
        str(cost.samples),
        f"{cost.flops:.2e}",
        f"{100 * cost.flops / cost.dense_flops:.1f}%",
        f"{100 * cost.reused_flops / cost.flops:.1f}%",
        bytes_text(cost.kv_bytes / cost.samples),
        f"{100 * cost.kv_bytes / cost.dense_kv_bytes:.1f}%",
    ]
    return [*numbers, *([_prefill_time(cost, flops_per_s)] if flops_per_s else [])]


def total(prepared: Iterable[Prepared], *, flops_per_s: float | None) -> str:
    """What all methods of all models take together, in a sentence."""
    cost = _sum(each for one in prepared for each in one.costs.values())
    text = f"in all {cost.samples} samples, {cost.flops - cost.reused_flops:.2e} prefill FLOP"
    return text + (f", {_prefill_time(cost, flops_per_s)} of prefill" if flops_per_s else "")


def _prefill_time(cost: Cost, flops_per_s: float) -> str:
    """Of what is really done: prompts of a context share their beginning."""
    return clock_time((cost.flops - cost.reused_flops) / flops_per_s)


def _sum(costs: Iterable[Cost]) -> Cost:
    total = Cost()
    for cost in costs:
        for name, value in vars(cost).items():
            setattr(total, name, getattr(total, name) + value)
    return total


def measured_flops(engine: EngineSpec) -> tuple[float | None, str]:
    """FLOP per second of all engines of a sweep together, and the sentence that says where it is from.

    One square matrix product is timed with the threads, the dtype and the device of one rank: more than a
    prefill reaches. None without the device.
    """
    import torch

    ranks = engine.count * engine.tensor_parallel_size
    if engine.device == "cuda" and not torch.cuda.is_available():
        return None, "time is not predicted: the engines want a GPU, and this machine has none to measure"
    dtype = getattr(torch, engine.dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(engine.num_threads)
    try:
        rate = _rate(torch.ones(_SIZE, _SIZE, dtype=dtype, device=engine.device))
    finally:
        torch.set_num_threads(threads)
    where = f"a {_SIZE} x {_SIZE} {engine.dtype} matrix product on this machine's {engine.device}"
    text = f"time from {where}: {rate / 1e9:.1f} GFLOP/s per rank with {engine.num_threads} thread(s)"
    cores = len(os.sched_getaffinity(0))
    usable = min(ranks, max(1, cores // engine.num_threads)) if engine.device == "cpu" else ranks
    text += f", {usable} rank(s) at a time; prefill only, a prefill reaches less"
    return rate * usable, text


def _rate(matrix: Tensor) -> float:
    import torch

    out = matrix @ matrix  # the first product pays for set-up
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < _MEASURE_S:
        torch.matmul(matrix, matrix, out=out)
        if matrix.is_cuda:
            torch.cuda.synchronize()
        count += 1
    return 2.0 * _SIZE**3 * count / (time.perf_counter() - started)
