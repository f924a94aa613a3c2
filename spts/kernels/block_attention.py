"""Causal attention by blocks of keys: of all of them, or of those that were chosen for a block of queries.

Blocks before the queries' own are read whole, without a mask. With all of them it is what slices of a prefill
run on: torch has its fastest kernel for as many queries as keys only.

Legend: M queries, L keys, H query heads, K key/value heads, G query heads per key head, d and D head size, R
blocks of queries, S blocks that a block of queries reads at most before its own, N keys read at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from spts.kernels.blocks import ALWAYS, BLOCK_TOKENS, SHARES, share_of

HEAD_SIZES = (16, 32, 64, 128)
LOG2_E = 1.4426950408889634


@triton.jit
def blocks_before(block, share, ALWAYS: tl.constexpr, SHARES: tl.constexpr):
    """`blocks.blocks_read` less the block itself."""
    visible = block + 1
    read = ((visible.to(tl.int64) * share + SHARES - 1) // SHARES).to(tl.int32)
    return tl.minimum(visible, tl.maximum(read, ALWAYS)) - 1


@triton.jit(do_not_specialize=["first", "share", "M", "S", "R", "G"])
def _block_attention(
    q, keys, values, chosen, out, scale_log2, first, share, M, S, R, G,
    D: tl.constexpr, ALWAYS: tl.constexpr, SHARES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Blocks that read most begin first; the query heads of a key head run beside each other.
    row = R - 1 - tl.program_id(0) // G
    kv_head, num_heads = tl.program_id(1), tl.num_programs(1) * G
    head = kv_head * G + tl.program_id(0) % G
    column, query, token = tl.arange(0, D), tl.arange(0, BLOCK), tl.arange(0, BLOCK_N)
    query_M = row * BLOCK + query
    place_M = (query_M.to(tl.int64) * num_heads + head) * D
    q_MD = tl.load(q + place_M[:, None] + column[None, :], mask=(query_M < M)[:, None], other=0.0)
    peak_M = tl.full((BLOCK,), float("-inf"), tl.float32)
    total_M = tl.zeros((BLOCK,), tl.float32)
    out_MD = tl.zeros((BLOCK, D), tl.float32)

    # Its own block: of it a query sees what is not later, so nothing behind the last key (read as 0). First:
    # with this loop after the other one the products of both wait for each other, which takes 15 % longer.
    for start in range(0, BLOCK, BLOCK_N):
        place = (first + row) * BLOCK + start
        k_ND = keys.load([place, kv_head * D])
        score_MN = tl.dot(q_MD, k_ND.T, input_precision="ieee") * scale_log2
        score_MN = tl.where(query[:, None] >= (start + token)[None, :], score_MN, float("-inf"))
        higher_M = tl.maximum(peak_M, tl.max(score_MN, axis=1))
        weight_MN = tl.exp2(score_MN - higher_M[:, None])
        fade_M = tl.exp2(peak_M - higher_M)
        total_M = total_M * fade_M + tl.sum(weight_MN, axis=1)
        v_ND = values.load([place, kv_head * D])
        out_MD = tl.dot(weight_MN.to(v_ND.dtype), v_ND, out_MD * fade_M[:, None], input_precision="ieee")
        peak_M = higher_M

    if chosen is not None:
        chosen += (head.to(tl.int64) * R + row) * S
    parts: tl.constexpr = BLOCK // BLOCK_N
    for step in range(blocks_before(first + row, share, ALWAYS, SHARES) * parts):
        block = step // parts
        if chosen is not None:
            block = tl.load(chosen + block)
        place = block * BLOCK + step % parts * BLOCK_N
        k_ND = keys.load([place, kv_head * D])
        score_MN = tl.dot(q_MD, k_ND.T, input_precision="ieee")
        higher_M = tl.maximum(peak_M, tl.max(score_MN, axis=1) * scale_log2)
        weight_MN = tl.exp2(score_MN * scale_log2 - higher_M[:, None])
        fade_M = tl.exp2(peak_M - higher_M)
        total_M = total_M * fade_M + tl.sum(weight_MN, axis=1)
        v_ND = values.load([place, kv_head * D])
        out_MD = tl.dot(weight_MN.to(v_ND.dtype), v_ND, out_MD * fade_M[:, None], input_precision="ieee")
        peak_M = higher_M
    # Through a descriptor, which clips: addresses of the rows would take registers all the while.
    out.store([row * BLOCK, head * D], (out_MD / total_M[:, None]).to(out.dtype))


def attend_blocks(
    q_MHd: Tensor,
    k_LKd: Tensor,
    v_LKd: Tensor,
    scale: float,
    density: float = 1.0,
    chosen_HRS: Tensor | None = None,
) -> Tensor:
    """Causal attention of the last M of L tokens, [M, H, d]; L - M is a multiple of BLOCK_TOKENS.

    chosen_HRS: int32, what `reference.choose_blocks` gives at `density`; None = all blocks are read. The
    others are contiguous, begin at multiples of 16 bytes, and have heads of one of HEAD_SIZES.
    """
    (num_queries, num_heads, head_dim), (num_keys, num_kv_heads, _) = q_MHd.shape, k_LKd.shape
    rows, group = triton.cdiv(num_queries, BLOCK_TOKENS), num_heads // num_kv_heads
    tiling = Tiling.of(q_MHd)
    out_MHd = torch.empty_like(q_MHd)
    keys, values, out = (
        TensorDescriptor.from_tensor(x.view(x.shape[0], -1), [at_once, head_dim])
        for x, at_once in ((k_LKd, tiling.keys), (v_LKd, tiling.keys), (out_MHd, BLOCK_TOKENS))
    )
    first, most = (num_keys - num_queries) // BLOCK_TOKENS, 0 if chosen_HRS is None else chosen_HRS.shape[2]
    _block_attention[(rows * group, num_kv_heads)](
        q_MHd, keys, values, chosen_HRS, out, scale * LOG2_E, first, share_of(density), num_queries, most,
        rows, group, head_dim, ALWAYS, SHARES, BLOCK_TOKENS, tiling.keys,
        num_warps=tiling.warps, num_stages=2,
    )  # fmt: skip
    return out_MHd


class Tiling(NamedTuple):
    """Keys that a program reads at once, and its warps."""

    keys: int
    warps: int

    @classmethod
    def of(cls, x: Tensor) -> Tiling:
        """For tensors of the dtype and on the device of one."""
        major = torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 9
        return cls.on(x.element_size(), major)

    @classmethod
    def on(cls, element_bytes: int, major: int) -> Tiling:
        """On GPUs of a major compute capability.

        From 9 on, in half precision, two programs of four warps share a multiprocessor, though a few
        registers spill: 500 TFLOP/s on an H100, with eight warps 370; later GPUs were not measured. Before 9
        a descriptor's rows come through registers, which hold few of them.
        """
        return cls(64, 4) if element_bytes == 2 and major >= 9 else cls(16, 8)
