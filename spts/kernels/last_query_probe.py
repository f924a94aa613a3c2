"""Attention weights of one query, summed over the heads: softmax in two passes over the keys.

The first pass writes the logits of a block of keys and their maximum and sum by head; the second reads those
few numbers of all blocks and adds up the weights.

Legend: T keys, H query heads, K key/value heads, G = H / K, d head size, B blocks of keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spts.kernels.checks import HALF_AND_FLOAT, require

_BLOCK_T = 128


@triton.jit
def _block_logits(
    q, k, logits, block_max, block_sum, scale, T, num_blocks, token_stride, head_stride, d,
    G: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_d: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    token = block * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_d)
    there = token < T
    k_Td = tl.load(
        k + (token * token_stride)[:, None] + kv_head * head_stride + column[None, :],
        mask=there[:, None] & (column < d)[None, :],
        other=0.0,
    ).to(tl.float32)
    for member in range(G):
        head = kv_head * G + member
        q_d = tl.load(q + head * d + column, mask=column < d, other=0.0).to(tl.float32)
        logit_T = tl.sum(k_Td * q_d[None, :], axis=1) * scale
        tl.store(logits + head * T + token, logit_T, mask=there)
        logit_T = tl.where(there, logit_T, -float("inf"))
        highest = tl.max(logit_T, axis=0)
        tl.store(block_max + head * num_blocks + block, highest)
        tl.store(block_sum + head * num_blocks + block, tl.sum(tl.exp(logit_T - highest), axis=0))


@triton.jit
def _sum_weights(
    logits, block_max, block_sum, out, T, num_blocks, H, BLOCK_T: tl.constexpr, BLOCK_B: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    there = token < T
    each = tl.arange(0, BLOCK_B)
    known = each < num_blocks
    weight_T = tl.zeros((BLOCK_T,), dtype=tl.float32)
    max_row, sum_row, logit_row = block_max + each, block_sum + each, logits + token
    for _ in range(H):
        max_B = tl.load(max_row, mask=known, other=-float("inf"))
        sum_B = tl.load(sum_row, mask=known, other=0.0)
        highest = tl.max(max_B, axis=0)
        total = tl.sum(sum_B * tl.exp(max_B - highest), axis=0)
        weight_T += tl.exp(tl.load(logit_row, mask=there, other=0.0) - highest) / total
        max_row, sum_row, logit_row = max_row + num_blocks, sum_row + num_blocks, logit_row + T
    tl.store(out + token, weight_T, mask=there)


def last_query_probe(q_Hd: Tensor, k_TKd: Tensor, scale: float) -> Tensor:
    """As `reference.last_query_probe`, with logits in float32. Raises ValueError naming an argument of wrong
    shape, dtype, strides, device.
    """
    num_heads, head_dim = q_Hd.shape
    num_tokens, num_kv_heads = k_TKd.shape[:2]
    require("q_Hd", q_Hd, shape=(num_heads, head_dim), like=q_Hd, dtypes=HALF_AND_FLOAT)
    require("k_TKd", k_TKd, shape=(num_tokens, num_kv_heads, head_dim), like=q_Hd, contiguous=False)
    if num_tokens == 0 or num_heads % num_kv_heads:
        raise ValueError(
            f"k_TKd must have at least one key, and heads that {num_heads} query heads share evenly, "
            f"got {tuple(k_TKd.shape)}; correct the call"
        )
    num_blocks = triton.cdiv(num_tokens, _BLOCK_T)
    logits_HT = torch.empty((num_heads, num_tokens), dtype=torch.float32, device=q_Hd.device)
    max_HB, sum_HB = (
        torch.empty((num_heads, num_blocks), dtype=torch.float32, device=q_Hd.device) for _ in range(2)
    )
    out_T = torch.empty(num_tokens, dtype=torch.float32, device=q_Hd.device)
    _block_logits[(num_blocks, num_kv_heads)](
        q_Hd, k_TKd, logits_HT, max_HB, sum_HB, scale, num_tokens, num_blocks, k_TKd.stride(0),
        k_TKd.stride(1), head_dim, num_heads // num_kv_heads, _BLOCK_T, triton.next_power_of_2(head_dim),
        num_warps=8,
    )  # fmt: skip
    _sum_weights[(num_blocks,)](
        logits_HT, max_HB, sum_HB, out_T, num_tokens, num_blocks, num_heads, _BLOCK_T,
        triton.next_power_of_2(num_blocks), num_warps=4,
    )  # fmt: skip
    return out_T
