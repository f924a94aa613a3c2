"""The highest scores by index, ascending, without asking the host. Legend: T candidates, M kept.

One program finds the lowest score that is kept, eight bits at a time from the highest, by counting; then it
writes the indices of what is above it and of as many of its equals, the first ones, as there is room for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spts.kernels import reference
from spts.kernels.blocks import MANY_ROWS
from spts.kernels.checks import require, sizes

_BLOCK_T = 8192


@triton.jit
def _ordered(scores, index, inside):
    """Scores as unsigned integers of the same order; both zeros are one."""
    score = tl.load(scores + index, mask=inside, other=0.0) + 0.0
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)


@triton.jit(do_not_specialize=["T", "num_ranked", "num_wanted"])
def _top_rows(scores, kept, has_nan, T, num_ranked, num_wanted, BLOCK_T: tl.constexpr):
    offset = tl.arange(0, BLOCK_T)
    nan_T = tl.zeros((BLOCK_T,), dtype=tl.int32)
    for start in range(0, T, BLOCK_T):
        score_T = tl.load(scores + start + offset, mask=start + offset < T, other=0.0)
        nan_T += (score_T != score_T).to(tl.int32)
    if tl.sum(nan_T, axis=0) > 0:
        tl.store(has_nan, 1)

    # `room`: how many are still wanted of the scores that have the bits of `lowest` found so far.
    lowest = tl.full((), 0, tl.uint32)
    found = tl.full((), 0, tl.uint32)
    room = num_wanted
    each = tl.arange(0, 256)
    for step in range(4):
        shift = 24 - 8 * step
        count_256 = tl.zeros((256,), dtype=tl.int32)
        for start in range(0, num_ranked, BLOCK_T):
            index = start + offset
            inside = index < num_ranked
            key_T = _ordered(scores, index, inside)
            alike_T = inside & (((key_T ^ lowest) & found) == 0)
            count_256 += tl.histogram(((key_T >> shift) & 255).to(tl.int32), 256, mask=alike_T)
        at_least_256 = tl.cumsum(count_256, axis=0, reverse=True)
        digit = tl.max(tl.where(at_least_256 >= room, each, 0), axis=0)
        room -= tl.sum(tl.where(each > digit, count_256, 0), axis=0)
        lowest |= digit.to(tl.uint32) << shift
        found |= tl.full((), 255, tl.uint32) << shift

    above = 0
    equal = 0
    for start in range(0, num_ranked, BLOCK_T):
        index = start + offset
        inside = index < num_ranked
        key_T = _ordered(scores, index, inside)
        above_T = (key_T > lowest) & inside
        equal_T = (key_T == lowest) & inside
        # Two counts in one sum: a block has fewer than 2^16 of either.
        both_T = above_T.to(tl.int32) + (equal_T.to(tl.int32) << 16)
        so_far_T = tl.cumsum(both_T, axis=0)
        equal_so_far_T = equal + (so_far_T >> 16)
        place_T = above + (so_far_T & 0xFFFF) + tl.minimum(equal_so_far_T, room) - 1
        tl.store(kept + place_T, index.to(tl.int64), mask=above_T | (equal_T & (equal_so_far_T <= room)))
        total = tl.sum(both_T, axis=0)
        above += total & 0xFFFF
        equal += total >> 16

    for start in range(0, T - num_ranked, BLOCK_T):
        last = start + offset
        tl.store(kept + num_wanted + last, (num_ranked + last).to(tl.int64), mask=last < T - num_ranked)


def top_rows(scores_T: Tensor, num_kept: int, num_recent: int, has_nan: Tensor) -> Tensor:
    """As `reference.top_rows`, for float32 scores; more than MANY_ROWS candidates run there:
    one program reads all of them five times.

    Raises ValueError naming an argument of wrong shape, dtype, strides, device, or a number out of range.
    """
    (num_candidates,) = sizes("scores_T", scores_T, 1)
    require("scores_T", scores_T, shape=(num_candidates,), like=scores_T, dtypes=(torch.float32,))
    require("has_nan", has_nan, shape=(), like=scores_T, dtypes=(torch.bool,))
    if not 1 <= num_recent <= num_kept <= num_candidates < 2**31:
        raise ValueError(
            "num_recent, num_kept and the candidates must ascend from 1 and stay below 2^31, "
            f"got {num_recent}, {num_kept} and {num_candidates}; correct the call"
        )
    if num_candidates > MANY_ROWS:
        return reference.top_rows(scores_T, num_kept, num_recent, has_nan)
    kept_M = torch.empty(num_kept, dtype=torch.int64, device=scores_T.device)
    _top_rows[(1,)](
        scores_T, kept_M, has_nan.view(torch.uint8), num_candidates, num_candidates - num_recent,
        num_kept - num_recent, _BLOCK_T, num_warps=16,
    )  # fmt: skip
    return kept_M
