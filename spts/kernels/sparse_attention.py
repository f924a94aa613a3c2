"""Causal attention in which each block of queries reads only some blocks of keys, and the choice of them.

Three launches: what the mean of a block of queries gives to each block of keys; which blocks that makes; the
attention over them (`block_attention`). A query head chooses for itself.

Legend: M queries, L keys, H query heads, K key/value heads, G query heads per key head, d head size, R blocks
of queries, C blocks of keys, S blocks that a block of queries reads at most before its own, B tokens of a
block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spts.kernels import reference
from spts.kernels.block_attention import HEAD_SIZES, LOG2_E, attend_blocks, blocks_before
from spts.kernels.blocks import ALWAYS, BLOCK_TOKENS, SHARES, blocks_read, check_blocks, share_of
from spts.kernels.checks import (
    HALF_AND_FLOAT,
    require,
    require_groups,
    sizes,
    warn_reference,
)

_MOST_KEYS = 1 << 21  # one program chooses among all blocks of a row
_BLOCK_R = 64  # means of queries at once


def _widest(num_blocks: int) -> int:
    """A power of four, at least 256, that is no less: prompts up to 32,768 tokens, up to four times as many,
    and so on, each have a kernel of their own. 256, 256, 1024 for 1, 256, 257."""
    wide = 256
    while wide < num_blocks:
        wide *= 4
    return wide


@triton.jit(do_not_specialize=["first", "R", "C", "G"])
def _block_scores(
    q, k, scores, scale_log2, first, R, C, G,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    block, head, num_heads = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    row_R = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    if first + tl.min(row_R, axis=0) + BLOCK_R <= block:
        return  # later than all of them
    token, column = tl.arange(0, BLOCK), tl.arange(0, D)
    q_RD = tl.load(
        q + (row_R[:, None].to(tl.int64) * num_heads + head) * D + column[None, :],
        mask=(row_R < R)[:, None], other=0.0,
    )  # fmt: skip
    place_B = ((block * BLOCK + token).to(tl.int64) * (num_heads // G) + head // G) * D
    k_DB = tl.load(k + place_B[None, :] + column[:, None])
    score_RB = tl.dot(q_RD, k_DB, input_precision="ieee") * scale_log2
    peak_R = tl.max(score_RB, axis=1)
    score_R = peak_R + tl.log2(tl.sum(tl.exp2(score_RB - peak_R[:, None]), axis=1))
    place_R = (head.to(tl.int64) * R + row_R) * C + block
    tl.store(scores + place_R, score_R, mask=row_R < R)


@triton.jit(do_not_specialize=["first", "share", "R", "C", "S"])
def _choose_blocks(
    scores, chosen, first, share, R, C, S,
    ALWAYS: tl.constexpr, SHARES: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    own = first + tl.program_id(0) % R
    room = blocks_before(own, share, ALWAYS, SHARES)
    column = tl.arange(0, BLOCK_C)
    score_C = tl.load(scores + row * C + column, mask=column < own, other=0.0) + 0.0
    bits_C = score_C.to(tl.int32, bitcast=True)
    key_C = tl.where(bits_C < 0, ~bits_C, bits_C ^ -2147483648).to(tl.uint32, bitcast=True)
    always_C = (column == 0) | (column == own - 1)
    key_C = tl.where(always_C, 4294967295, key_C)
    key_C = tl.where(column < own, key_C, 0)

    # The lowest key that is chosen, bit by bit from the highest: as high as `room` keys reach.
    lowest = tl.full((), 0, tl.uint32)
    for step in range(32):
        tried = lowest | (tl.full((), 1, tl.uint32) << (31 - step))
        reach = tl.sum((key_C >= tried).to(tl.int32), axis=0)
        lowest = tl.where(reach >= room, tried, lowest)
    above_C = (key_C > lowest) & (column < own)
    equal_C = (key_C == lowest) & (column < own)
    spare = room - tl.sum(above_C.to(tl.int32), axis=0)
    taken_C = above_C | (equal_C & (tl.cumsum(equal_C.to(tl.int32), axis=0) <= spare))
    place_C = tl.cumsum(taken_C.to(tl.int32), axis=0) - 1
    tl.store(chosen + row * S + place_C, column, mask=taken_C)
    tl.store(chosen + row * S + column, -1, mask=(column >= room) & (column < S))


def sparse_attention(q_MHd: Tensor, k_LKd: Tensor, v_LKd: Tensor, scale: float, density: float) -> Tensor:
    """As `reference.sparse_attention`, which also runs what is not 16 to 128 wide, by powers of two.

    Raises ValueError naming an argument of wrong shape, dtype, strides, device, or a number out of range.
    """
    num_queries, num_heads, head_dim = sizes("q_MHd", q_MHd, 3)
    num_keys, num_kv_heads, _ = sizes("k_LKd", k_LKd, 3)
    require("q_MHd", q_MHd, shape=(num_queries, num_heads, head_dim), like=q_MHd, dtypes=HALF_AND_FLOAT)
    for name, x_LKd in (("k_LKd", k_LKd), ("v_LKd", v_LKd)):
        require(name, x_LKd, shape=(num_keys, num_kv_heads, head_dim), like=q_MHd)
    require_groups("q_MHd", num_heads, "k_LKd", num_kv_heads)
    check_blocks(num_queries, num_keys, density)
    if head_dim not in HEAD_SIZES or num_keys > _MOST_KEYS:
        reason = f"more than {_MOST_KEYS} keys" if head_dim in HEAD_SIZES else f"heads of {head_dim}"
        warn_reference("sparse_attention", reason)
        return reference.sparse_attention(q_MHd, k_LKd, v_LKd, scale, density)
    for name, x in (("k_LKd", k_LKd), ("v_LKd", v_LKd)):
        if x.data_ptr() % 16:
            raise ValueError(
                f"{name} must begin at an address divisible by 16, as a descriptor does, "
                f"got {x.data_ptr() % 16} more; copy it"
            )
    return attend_blocks(q_MHd, k_LKd, v_LKd, scale, density, choose_blocks(q_MHd, k_LKd, scale, density))


def choose_blocks(q_MHd: Tensor, k_LKd: Tensor, scale: float, density: float) -> Tensor:
    """As `reference.choose_blocks`."""
    (num_queries, num_heads, head_dim), num_keys = q_MHd.shape, k_LKd.shape[0]
    first, blocks = (num_keys - num_queries) // BLOCK_TOKENS, num_keys // BLOCK_TOKENS
    q_RHd = reference.mean_queries(q_MHd)
    rows = q_RHd.shape[0]
    # Whatever is last reads most: counts grow with the place.
    most = blocks_read(first + rows - 1, density) - 1
    chosen_HRS = torch.empty((num_heads, rows, most), dtype=torch.int32, device=q_MHd.device)
    scores_HRC = torch.empty((num_heads, rows, blocks), dtype=torch.float32, device=q_MHd.device)
    if blocks:
        _block_scores[(blocks, triton.cdiv(rows, _BLOCK_R), num_heads)](
            q_RHd, k_LKd, scores_HRC, scale * LOG2_E, first, rows, blocks, num_heads // k_LKd.shape[1],
            head_dim, BLOCK_TOKENS, _BLOCK_R, num_warps=4,
        )  # fmt: skip
    wide = _widest(first + rows)
    _choose_blocks[(num_heads * rows,)](
        scores_HRC, chosen_HRS, first, share_of(density), rows, blocks, most, ALWAYS, SHARES, wide,
        num_warps=min(wide // 256, 16),
    )  # fmt: skip
    return chosen_HRS
