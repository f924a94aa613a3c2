"""Scores to kept indices: budget, forced last tokens, tie rule and order, the same for every method.

Shape suffixes: T candidates, M active (kept) tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spts.collective import Collective
from spts.errors import ModelError
from spts.kernels import dispatch as ops


def select(
    scores_T: Tensor, budget: int, collective: Collective, *, has_nan: Tensor, recent: int = 1
) -> Tensor:
    """Indices of the `budget` highest scores, ascending, always with the last `recent` candidates among them.

    The last candidate is the last token of the prompt, whose output is the answer; it and the recent ones
    take places of the budget whatever their scores. Of equal scores the lower index wins (`torch.topk`
    promises no order on ties). Rank 0 decides for the whole group: were two ranks to choose different rows,
    their row-parallel sums would mix them silently.

    scores_T: [T] floating point, higher = keep; infinities are numbers, NaN is not. budget: M >= recent,
    tokens. recent: at least 1, tokens. has_nan: bool of no dimension, set on every rank when a score of rank
    0 is NaN and never cleared; the indices are then valid ones without a meaning. Nobody waits for it here:
    `refuse_nan` asks once, after all choices of a prompt.
    Returns kept_M: [min(budget, T)] int64 on the device of scores_T.

    Worked example: T = 6, budget = 3.

        index   0    1    2    3    4    5
        score  0.2  0.5  0.1  0.5  0.5  0.0

    5 is forced; of the three at 0.5 the lower two win: [1, 3, 5].
    """
    assert scores_T.ndim == 1, scores_T.shape
    assert scores_T.is_floating_point(), scores_T.dtype
    assert 1 <= recent <= budget, (recent, budget)
    num_candidates = scores_T.shape[0]
    num_kept, num_recent = min(budget, num_candidates), min(recent, num_candidates)
    if collective.rank == 0:
        kept_M = ops.top_rows(scores_T, num_kept, num_recent, has_nan)
    else:
        kept_M = torch.empty(num_kept, dtype=torch.int64, device=scores_T.device)
    if collective.world_size == 1:
        return kept_M
    if collective.rank == 0:
        # The flag travels with the indices, as their complement: all below zero.
        kept_M = torch.where(has_nan, ~kept_M, kept_M)
    kept_M = collective.broadcast(kept_M)
    has_nan.logical_or_(kept_M[0] < 0)
    return torch.where(kept_M < 0, ~kept_M, kept_M)


def refuse_nan(has_nan: Tensor) -> None:
    """Raises ModelError, on every rank alike, if a choice met a score that is NaN; waits for the device."""
    if bool(has_nan):
        raise ModelError(
            "scores_T must be numbers, got NaN; the activations overflowed, "
            "load the model in float32 or bfloat16",
            field="scores_T",
        )
