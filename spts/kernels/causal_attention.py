"""Causal attention through torch, at lengths that its fastest backend has seen before; slices of a prefill,
for which that one is not made, by blocks (`block_attention`).

cuDNN builds a plan for every new shape; on an H200 that takes 40 ms, more than a layer of 32,768 tokens. With
lengths rounded up a server meets few of them. Rows added at the end are later than every real one: none sees
them.

Legend: M queries, L keys, H query heads, K key/value heads, d head size.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from spts.kernels import reference
from spts.kernels.block_attention import HEAD_SIZES, Tiling, attend_blocks
from spts.kernels.blocks import BLOCK_TOKENS, MANY_QUERIES
from spts.kernels.checks import HALF_AND_FLOAT, require, require_groups, sizes

_MULTIPLE = 256


def causal_attention(q_MHd: Tensor, k_LKd: Tensor, v_LKd: Tensor, scale: float) -> Tensor:
    """As `reference.causal_attention`.

    Raises ValueError naming an argument of wrong shape, dtype, strides, device.
    """
    num_queries, num_heads, head_dim = sizes("q_MHd", q_MHd, 3)
    num_keys, num_kv_heads, _ = sizes("k_LKd", k_LKd, 3)
    require("q_MHd", q_MHd, shape=tuple(q_MHd.shape), like=q_MHd, dtypes=HALF_AND_FLOAT, contiguous=False)
    for name, x_LKd in (("k_LKd", k_LKd), ("v_LKd", v_LKd)):
        require(name, x_LKd, shape=(num_keys, num_kv_heads, head_dim), like=q_MHd, contiguous=False)
    require_groups("q_MHd", num_heads, "k_LKd", num_kv_heads)
    if num_queries > num_keys:
        raise ValueError(
            f"q_MHd must be the last of the {num_keys} tokens of k_LKd, got {num_queries}; correct the call"
        )
    if num_queries < num_keys and _by_blocks(q_MHd, k_LKd, v_LKd):
        return attend_blocks(q_MHd, k_LKd, v_LKd, scale)
    added = -num_queries % _MULTIPLE
    if not added or num_queries != num_keys:
        return reference.causal_attention(q_MHd, k_LKd, v_LKd, scale)
    q_MHd, k_LKd, v_LKd = (F.pad(each, (0, 0, 0, 0, 0, added)) for each in (q_MHd, k_LKd, v_LKd))
    return reference.causal_attention(q_MHd, k_LKd, v_LKd, scale)[:num_queries]


def _by_blocks(q_MHd: Tensor, k_LKd: Tensor, v_LKd: Tensor) -> bool:
    """Whether a slice of a prefill is faster with our own kernel: torch's for fewer queries than keys is
    FlashAttention-2, which reaches 340 TFLOP/s where ours reaches 500 (H100)."""
    num_queries, _, head_dim = q_MHd.shape
    return (
        num_queries >= MANY_QUERIES
        and (k_LKd.shape[0] - num_queries) % BLOCK_TOKENS == 0
        and head_dim in HEAD_SIZES
        and Tiling.of(q_MHd).keys == 64
        and all(x.is_contiguous() and x.data_ptr() % 16 == 0 for x in (q_MHd, k_LKd, v_LKd))
    )
