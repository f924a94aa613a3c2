"""What a request holds on one rank while it is computed, in bytes, known before it runs.

Budgets are counts, so keys and values are known exactly, layer by layer. Beside them a prefill holds the
residual stream, what the layer at work has computed so far, and for a moment the results of single
operations. The latter are counted as if none were reused: the sum is never too small, and tests hold it
against the memory that a prefill really takes. Standard library only.

Legend: D hidden size, F FFN inner size, H query heads, K key/value heads on this rank, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence

from spts.cost import LayerWork, ModelShape, ProxyShape, rows_within
from spts.kernels.blocks import BLOCK_TOKENS, blocks_read

_FLOAT_BYTES = 4
_INDEX_BYTES = 8
# Queries that attend at once where a mask has to be written out, and what lengths are rounded up to:
# `spts.kernels`.
_MASKED_QUERIES = 1024
_ROUNDED_TO = 256


def request_bytes(
    shape: ModelShape,
    work: Sequence[LayerWork],
    *,
    max_new_tokens: int,
    dtype_bytes: int,
    world_size: int = 1,
    proxy: ProxyShape | None = None,
    slice_flops: int | None = None,
) -> int:
    """The most bytes that each of `world_size` ranks holds for a request at any time, from the start of a
    prefill that does `work` to its last new token.

    slice_flops: what is computed at once (`SptsModel.advance`), which bounds the rows in work; None = a whole
    layer. Keys and values have room for all new tokens as soon as a layer has begun.

    Worked example: LLaMA-3.1-8B in bfloat16, 32,768 tokens and 256 new ones, slices of 1,024 tokens' FLOP
    (1.5e13). Keys and values take 4.03 GiB dense and 1.69 GiB under the published schedule; the whole request
    at most 6.5 and 4.4 GiB.
    """
    kv_row = 2 * (shape.num_kv_heads // world_size) * shape.head_dim * dtype_bytes
    stream_row = (shape.hidden_size + 2 * shape.head_dim) * dtype_bytes + _INDEX_BYTES
    sizes = _Sizes(shape, dtype_bytes, world_size, proxy)
    most = held = 0
    for layer, after in zip(work, [*work[1:], None], strict=True):
        held += (layer.attention_tokens + max_new_tokens) * kv_row
        cuts = after is not None and after.candidates < layer.candidates
        if layer.attention_tokens == layer.ffn_tokens == layer.candidates and not cuts and not layer.probed:
            rows, density = layer.candidates, layer.attention_density
            if slice_flops is not None:
                least = 1 if density == 1 else min(BLOCK_TOKENS, rows)
                rows = max(least, rows_within(shape, 0, rows, slice_flops, density))
            working = sizes.dense(rows, layer.candidates, density)
        else:
            working = sizes.skipping(layer)
            if cuts and after is not None:
                working += after.candidates * stream_row
        most = max(most, held + layer.candidates * stream_row + working)
    return most + 4 * shape.vocab_size * _FLOAT_BYTES


class _Sizes:
    """Bytes of a layer's intermediate results, by the number of rows."""

    def __init__(
        self, shape: ModelShape, dtype_bytes: int, world_size: int, proxy: ProxyShape | None
    ) -> None:
        self._width = shape.hidden_size * dtype_bytes
        self._heads = shape.num_heads // world_size
        self._queries = self._heads * shape.head_dim * dtype_bytes
        self._keys = shape.num_kv_heads // world_size * shape.head_dim * dtype_bytes
        self._channels = shape.intermediate_size // world_size * dtype_bytes
        self._normed = 2 * shape.hidden_size * _FLOAT_BYTES + self._width  # two float32 copies and one more
        self._proxy = 0 if proxy is None else (3 * proxy.rank + 3 * proxy.channels) * dtype_bytes
        self._dtype_bytes = dtype_bytes

    def dense(self, rows: int, candidates: int, density: float) -> int:
        """Of `rows` of the layer's `candidates` at once."""
        if density < 1:
            beside = self._sparse(rows, candidates, density)
        else:
            beside = min(rows, _MASKED_QUERIES) * candidates * self._dtype_bytes if rows < candidates else 0
        return max(self._attention(rows) + beside, self._feed_forward(rows))

    def skipping(self, work: LayerWork) -> int:
        """Of a layer that chooses: the probe's input and keys stay until its end."""
        scores = work.candidates * (4 * _INDEX_BYTES + 4 * _FLOAT_BYTES)
        held = scores + (work.candidates * (self._width + self._keys) if work.probed else 0)
        probed = work.candidates * (self._normed + self._keys) if work.probed else 0
        probed += 3 * work.probe_tokens * self._heads * work.candidates * _FLOAT_BYTES
        scored = work.candidates * (self._width + max(self._normed, self._proxy)) if work.proxied else 0
        return held + max(
            probed,
            self._attention(work.attention_tokens),
            scored + self._feed_forward(work.ffn_tokens),
        )

    def _attention(self, rows: int) -> int:
        """Normed rows, queries, keys and values with a copy for rotation, the same rounded up for the kernel,
        its output and the layer's."""
        rounded = rows + _ROUNDED_TO
        own = rows * (2 * self._width + 2 * self._queries + 3 * self._keys)
        return max(rows * self._normed, own + rounded * (2 * self._queries + 2 * self._keys))

    def _sparse(self, rows: int, candidates: int, density: float) -> int:
        """What sparse attention holds beside: scores of blocks of keys for each block of queries, sorted; of
        one block of queries the logits of its mean, or the keys and values that each head reads and a
        mask."""
        num_blocks = -(-candidates // BLOCK_TOKENS)
        read = BLOCK_TOKENS * blocks_read(num_blocks - 1, density)
        scores = self._heads * -(-rows // BLOCK_TOKENS) * num_blocks * (3 * _FLOAT_BYTES + 3 * _INDEX_BYTES)
        logits = 3 * self._heads * candidates * _FLOAT_BYTES
        gathered = read * 3 * (self._queries + BLOCK_TOKENS * self._dtype_bytes)
        return scores + max(logits, gathered)

    def _feed_forward(self, rows: int) -> int:
        """Normed rows, gate, up and one more for the activation, and the output."""
        return max(rows * self._normed, rows * (2 * self._width + 3 * self._channels))
