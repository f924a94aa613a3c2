"""What a request holds on one rank while it is computed, in bytes, known before it runs.

Budgets are counts, so keys and values are known exactly, layer by layer. Beside them a prefill holds the
residual stream, what the layer at work has computed so far, and for a moment the results of single
operations. What one device needs and another does not is counted for all, so that the sum is never too small.
Tests hold it against the memory that a prefill really takes on a CPU, and against what one took on an H200:
4,096 tokens and more of LLaMA-3.1-8B and Qwen2.5-7B, at most 6 % less. Standard library only.

Legend: D hidden size, F FFN inner size, H query heads, K key/value heads on this rank, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence

from spts.cost import LayerWork, ModelShape, ProxyShape, rows_within
from spts.kernels.blocks import BLOCK_TOKENS, CACHED_ELEMENTS, blocks_read

_FLOAT_BYTES = 4
_DOUBLE_BYTES = 8
_INDEX_BYTES = 8
# Queries that attend at once where a mask has to be written out, and what lengths are rounded up to:
# `spts.kernels`.
_MASKED_QUERIES = 1024
_ROUNDED_TO = 256
# Elements of the blocks of rows that `spts.agreement` compares: some 180 MB.
COMPARED_ELEMENTS = 1 << 22


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
    at most 5.8 and 3.0 GiB, without slices 6.3 and 3.6.
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
            kept = after.candidates if cuts and after is not None else 0
            working = sizes.skipping(layer, kept * stream_row)
        most = max(most, held + layer.candidates * stream_row + working)
    return most + 4 * shape.vocab_size * _FLOAT_BYTES


def comparison_bytes(vocab_size: int, num_tokens: int) -> int:
    """The most bytes that `spts.agreement.compare` holds for two distributions over `num_tokens` tokens,
    beside these themselves: of a block of rows one copy in float32, and five in float64."""
    block = max(vocab_size, min(num_tokens * vocab_size, COMPARED_ELEMENTS))
    return block * (_FLOAT_BYTES + 5 * _DOUBLE_BYTES)


class _Sizes:
    """Bytes of a layer's intermediate results, by the number of rows."""

    def __init__(
        self, shape: ModelShape, dtype_bytes: int, world_size: int, proxy: ProxyShape | None
    ) -> None:
        self._width = shape.hidden_size * dtype_bytes
        self._heads = shape.num_heads // world_size
        self._queries = self._heads * shape.head_dim * dtype_bytes
        self._keys = shape.num_kv_heads // world_size * shape.head_dim * dtype_bytes
        self._rotation = 2 * shape.head_dim * dtype_bytes
        self._channels = shape.intermediate_size // world_size * dtype_bytes
        self._hidden_size = shape.hidden_size
        self._proxy = 0 if proxy is None else (3 * proxy.rank + 3 * proxy.channels) * dtype_bytes
        self._dtype_bytes = dtype_bytes

    def dense(self, rows: int, candidates: int, density: float) -> int:
        """Of `rows` of the layer's `candidates` at once."""
        if density < 1:
            beside = self._sparse(rows, candidates, density)
        else:
            beside = min(rows, _MASKED_QUERIES) * candidates * self._dtype_bytes if rows < candidates else 0
        return max(self._attention(rows) + beside, self._feed_forward(rows))

    def skipping(self, work: LayerWork, kept_bytes: int) -> int:
        """Of a layer that chooses: the probe's input and keys stay until its end. kept_bytes: of the stream
        that it leaves behind."""
        candidates = work.candidates
        held = candidates * (
            4 * _INDEX_BYTES + 4 * _FLOAT_BYTES
        )  # scores, and what choosing among them takes
        probing = scoring = 0
        if work.probed:
            held += candidates * (self._width + self._keys)
            probing = candidates * self._keys
            probing += 3 * work.probe_tokens * self._heads * candidates * _FLOAT_BYTES
        if work.proxied:
            scoring = candidates * self._width
        return held + max(
            probing,
            work.attention_tokens * self._rotation + self._attention(work.attention_tokens),
            scoring + max(candidates * self._proxy, self._feed_forward(work.ffn_tokens), kept_bytes),
        )

    def _attention(self, rows: int) -> int:
        """Normed rows, queries, keys; beside them the same for the kernel, lengths rounded up, and its
        output, or that and the layer's."""
        rounded = rows + _ROUNDED_TO
        kernel = rounded * (2 * self._queries + 2 * self._keys)
        return (
            self._normed(rows)
            + rows * (self._queries + self._keys)
            + max(kernel, rounded * self._queries + rows * self._width)
        )

    def _sparse(self, rows: int, candidates: int, density: float) -> int:
        """What sparse attention holds beside: scores of blocks of keys for each block of queries, sorted; of
        one block of queries the logits of its mean, or the keys and values that each head reads and a
        mask."""
        num_blocks = -(-candidates // BLOCK_TOKENS)
        blocks = blocks_read(num_blocks - 1, density)
        choices = self._heads * -(-rows // BLOCK_TOKENS)
        scores = choices * num_blocks * (_FLOAT_BYTES + _INDEX_BYTES)
        scores += choices * max(num_blocks * _FLOAT_BYTES, blocks * 3 * _INDEX_BYTES)
        logits = 3 * self._heads * candidates * _FLOAT_BYTES
        gathered = blocks * BLOCK_TOKENS * 3 * (self._queries + BLOCK_TOKENS * self._dtype_bytes)
        return scores + max(logits, gathered)

    def _feed_forward(self, rows: int) -> int:
        """Normed rows, gate, and up or the output; some activations."""
        some = min(rows * self._channels, CACHED_ELEMENTS * self._dtype_bytes)
        return self._normed(rows) + rows * (self._channels + max(self._channels, self._width)) + some

    def _normed(self, rows: int) -> int:
        """The rows, and of some the squares in float32; in narrower dtypes these rows and the result too."""
        copies = 1 if self._dtype_bytes == _FLOAT_BYTES else 3
        return rows * self._width + copies * _FLOAT_BYTES * min(rows * self._hidden_size, CACHED_ELEMENTS)
