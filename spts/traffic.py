"""Bytes that the ranks of a tensor-parallel group hand to collectives in a prefill, counted from what each
layer did. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spts.cost import LayerWork, ModelShape, check_depth
from spts.errors import require_int

_SCORE_BYTES = 4  # scores are float32
_INDEX_BYTES = 8  # selected indices are int64


@dataclass(frozen=True, kw_only=True)
class CollectiveBytes:
    """Bytes that a rank hands to collectives in a prefill (payload; what crosses a link depends on the
    algorithm).

    hidden: all-reduce of the outputs of attention and FFN, two per layer, as in any tensor-parallel model.
    scores: all-reduce of float32 scores, one for every probe and every proxy. selection: broadcast of int64
    indices, one for every choice of tokens. The last two are what token skipping adds.
    """

    hidden: int
    scores: int
    selection: int

    @property
    def total(self) -> int:
        """Bytes of all collectives."""
        return self.hidden + self.scores + self.selection


def collective_bytes(
    shape: ModelShape, work: Sequence[LayerWork], *, dtype_bytes: int, world_size: int
) -> CollectiveBytes:
    """What each of `world_size` ranks hands to collectives in the layers; nothing when there is one rank.

    A cut is read off the next layer's candidates, so one after the last layer is not counted.
    """
    check_depth(shape, work)
    require_int("world_size", world_size, minimum=1)
    if world_size == 1:
        return CollectiveBytes(hidden=0, scores=0, selection=0)
    selected = 0
    for layer, after in zip(work, [*work[1:], work[-1]], strict=True):
        for chosen in (layer.attention_tokens, layer.ffn_tokens, after.candidates):
            selected += chosen if chosen < layer.candidates else 0
    return CollectiveBytes(
        hidden=sum(layer.attention_tokens + layer.ffn_tokens for layer in work)
        * shape.hidden_size
        * dtype_bytes,
        scores=sum((layer.probed + layer.proxied) * layer.candidates for layer in work) * _SCORE_BYTES,
        selection=selected * _INDEX_BYTES,
    )
