"""The highest scores by index, ascending, without asking the host. Legend: T candidates, M kept.

One program looks for the lowest score that is kept, bit by bit from the highest, and then writes the indices
of what is above it and of as many of its equals, the first ones, as there is room for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spts.kernels.checks import require

_BLOCK_T = 8192


@triton.jit
def _ordered(scores, index, inside):
    """Scores as unsigned integers of the same order; both zeros are one, what is outside is lowest of all."""
    score = tl.load(scores + index, mask=inside, other=-float("inf")) + 0.0
    bits = score.to(tl.int32, bitcast=True)
    flipped = tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)
    return tl.where(inside, flipped, 0)


@triton.jit
def _count_from(scores, lowest, num_ranked, BLOCK_T: tl.constexpr):
    """How many of the first `num_ranked` scores are at least `lowest`."""
    count_T = tl.zeros((BLOCK_T,), dtype=tl.int32)
    for start in range(0, num_ranked, BLOCK_T):
        index = start + tl.arange(0, BLOCK_T)
        inside = index < num_ranked
        count_T += ((_ordered(scores, index, inside) >= lowest) & inside).to(tl.int32)
    return tl.sum(count_T, axis=0)


@triton.jit
def _top_rows(scores, kept, has_nan, T, num_ranked, num_wanted, BLOCK_T: tl.constexpr):
    offset = tl.arange(0, BLOCK_T)
    nan_T = tl.zeros((BLOCK_T,), dtype=tl.int32)
    for start in range(0, T, BLOCK_T):
        score_T = tl.load(scores + start + offset, mask=start + offset < T, other=0.0)
        nan_T += (score_T != score_T).to(tl.int32)
    if tl.sum(nan_T, axis=0) > 0:
        tl.store(has_nan, 1)

    lowest = tl.full((), 0, tl.uint32)
    for step in range(32):
        trial = lowest | (tl.full((), 1, tl.uint32) << (31 - step))
        lowest = tl.where(_count_from(scores, trial, num_ranked, BLOCK_T) >= num_wanted, trial, lowest)
    # Nothing is above the highest key there is; one more than it would be none.
    is_highest = lowest == tl.full((), 0xFFFFFFFF, tl.uint32)
    above = tl.where(is_highest, 0, _count_from(scores, lowest + 1, num_ranked, BLOCK_T))
    room = num_wanted - above

    written = 0
    equals = 0
    for start in range(0, num_ranked, BLOCK_T):
        index = start + offset
        inside = index < num_ranked
        key_T = _ordered(scores, index, inside)
        equal_T = (key_T == lowest) & inside
        equal_so_far_T = equals + tl.cumsum(equal_T.to(tl.int32), axis=0)
        keep_T = ((key_T > lowest) & inside) | (equal_T & (equal_so_far_T <= room))
        place_T = written + tl.cumsum(keep_T.to(tl.int32), axis=0) - 1
        tl.store(kept + place_T, index.to(tl.int64), mask=keep_T)
        equals += tl.sum(equal_T.to(tl.int32), axis=0)
        written += tl.sum(keep_T.to(tl.int32), axis=0)

    for start in range(0, T - num_ranked, BLOCK_T):
        last = start + offset
        tl.store(kept + num_wanted + last, (num_ranked + last).to(tl.int64), mask=last < T - num_ranked)


def top_rows(scores_T: Tensor, num_kept: int, num_recent: int, has_nan: Tensor) -> Tensor:
    """As `reference.top_rows`, for float32 scores. Raises ValueError naming an argument of wrong shape, dtype,
    strides, device, or a number out of range.
    """
    num_candidates = scores_T.shape[0]
    require("scores_T", scores_T, shape=(num_candidates,), like=scores_T, dtypes=(torch.float32,))
    require("has_nan", has_nan, shape=(), like=scores_T, dtypes=(torch.bool,))
    if not 1 <= num_recent <= num_kept <= num_candidates < 2**31:
        raise ValueError(
            "num_recent, num_kept and the candidates must ascend from 1 and stay below 2^31, "
            f"got {num_recent}, {num_kept} and {num_candidates}; correct the call"
        )
    kept_M = torch.empty(num_kept, dtype=torch.int64, device=scores_T.device)
    block = min(_BLOCK_T, triton.next_power_of_2(num_candidates))
    _top_rows[(1,)](
        scores_T, kept_M, has_nan.view(torch.uint8), num_candidates, num_candidates - num_recent,
        num_kept - num_recent, block, num_warps=min(max(block // 256, 1), 32),
    )  # fmt: skip
    return kept_M
