"""One decode step of several requests: where their ragged caches are, and the step as a CUDA graph.

A step launches 700 kernels of a few microseconds each; launched one by one the host takes twice as long as
an H200. A graph is one launch. Nothing in it depends on the requests: what differs from step to step, the
tokens, positions, addresses and lengths, lies in memory that the host fills before each replay.

Captured is a step on a CUDA device; on a CPU there is nothing to capture. With several ranks it holds NCCL's
sums over them, so all ranks capture and replay in the same steps: they make the same calls in the same order.

Legend: B requests, S their number rounded up to a power of two, N layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spts.cache import RaggedCache

Held = Sequence[tuple[Tensor, Tensor]]
"""Keys and values of each request in one layer."""

Walk = Callable[[Tensor, Tensor, Sequence[Held]], Tensor]
"""A step on its device: token ids [B], table, held by layer -> logits [B, V]."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The requests of a step and, on the host, where their next token goes: int64 [1 + N, B, 3].

    By request twice 0 and the position; then by layer the addresses of the keys and of the values, and how
    many tokens are held there.
    """

    caches: Sequence[RaggedCache]
    table: Tensor

    @classmethod
    def claim(cls, caches: Sequence[RaggedCache]) -> Batch:
        """Takes room for one more token in every layer of every cache.

        Raises ValueError when one has none left; then all are as they were.
        """
        for cache in caches:
            cache.check_room()
        table = torch.stack([cache.table for cache in caches], dim=1)
        table[:, :, 2] += torch.tensor([cache.new_tokens for cache in caches])
        for cache in caches:
            cache.claim()
        return cls(caches=caches, table=table)

    def held(self) -> list[Held]:
        """The keys and values that the table has the addresses of."""
        layers = zip(*(cache.layers for cache in self.caches), strict=True)
        return [[cache.buffers for cache in layer] for layer in layers]


def captured(run: Callable[[], Tensor], pool: Any) -> Callable[[], Tensor]:
    """A CUDA graph of what `run` does: a function that does it again and returns the same tensor."""
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on using the device.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


class DecodeGraphs:
    """The decode step of a model or of a rank's part of one, on one GPU, captured once for 1, 2, 4, 8, …
    requests.

    The first step of a size runs as it is, then is captured, then replayed: thrice the same values are
    written to the same rows. All sizes share their memory, since only one runs at a time.
    """

    def __init__(
        self,
        walk: Walk,
        *,
        device: torch.device,
        capture: Callable[[Callable[[], Tensor], Any], Callable[[], Tensor]] = captured,
    ) -> None:
        self._walk = walk
        self._device = device
        self._capture = capture
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._sizes: dict[int, _Size] = {}

    def run(self, token_ids: Tensor, batch: Batch) -> Tensor:
        """The logits after one more token of each request, float32 [B, V], the caller's own."""
        num_requests = token_ids.shape[0]
        rounded = 1 << (num_requests - 1).bit_length()
        if rounded not in self._sizes:
            self._sizes[rounded] = _Size(rounded, batch, self._device)
        size = self._sizes[rounded]
        size.fill(token_ids, batch)
        if size.replay is None:
            nothing_held: list[Held] = [()] * (batch.table.shape[0] - 1)  # the kernel follows the addresses

            def step() -> Tensor:
                return self._walk(size.ids_S, size.table, nothing_held)

            step()  # compiles kernels, which a capture must not
            size.replay = self._capture(step, self._pool)
        return size.replay()[:num_requests].clone()


class _Size:
    """The memory that a captured step of S requests reads, and the step."""

    def __init__(self, size: int, batch: Batch, device: torch.device) -> None:
        self.replay: Callable[[], Tensor] | None = None
        self.ids_S = torch.zeros(size, dtype=torch.int64, device=device)
        self._nobody = torch.tensor((0, 0, -1)).repeat(batch.table.shape[0], size, 1)
        self.table = self._nobody.to(device)

    def fill(self, token_ids: Tensor, batch: Batch) -> None:
        """Sets the requests of the next replay; the rows left over are nobody's."""
        num_requests = token_ids.shape[0]
        table = self._nobody.clone()
        table[:, :num_requests] = batch.table
        self.ids_S[:num_requests].copy_(token_ids, non_blocking=True)
        self.table.copy_(table, non_blocking=True)
