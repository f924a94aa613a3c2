"""Scores to kept indices: budget, forced last tokens, tie rule and order, the same for every method.

Shape suffixes: T candidates, M active (kept) tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spts.collective import Collective
from spts.errors import ModelError

_REFUSED = -1


def select(scores_T: Tensor, budget: int, collective: Collective, *, recent: int = 1) -> Tensor:
    """Indices of the `budget` highest scores, ascending, always with the last `recent` candidates among them.

    The last candidate is the last token of the prompt, whose output is the answer; it and the recent ones
    take places of the budget whatever their scores. Of equal scores the lower index wins (`torch.topk`
    promises no order on ties). Rank 0 decides for the whole group: were two ranks to choose different rows,
    their row-parallel sums would mix them silently.

    scores_T: [T] floating point, higher = keep; infinities are numbers, NaN is not. budget: M >= recent,
    tokens. recent: at least 1, tokens.
    Returns kept_M: [min(budget, T)] int64 on the device of scores_T.
    Raises ModelError on every rank when a score of rank 0 is NaN.

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
        earlier_T = scores_T[: num_candidates - num_recent]
        ranked = torch.sort(earlier_T, descending=True, stable=True).indices[: num_kept - num_recent]
        last = torch.arange(num_candidates - num_recent, num_candidates, device=ranked.device)
        kept_M = torch.cat((ranked.sort().values, last))
        # Refused through the broadcast itself: an error on rank 0 alone would leave the others waiting.
        kept_M = torch.where(scores_T.isnan().any(), _REFUSED, kept_M)
    else:
        kept_M = torch.empty(num_kept, dtype=torch.int64, device=scores_T.device)
    if collective.world_size > 1:
        kept_M = collective.broadcast(kept_M)
    if int(kept_M[0]) == _REFUSED:
        raise ModelError(
            f"scores_T must be numbers, got NaN among {num_candidates}; the activations overflowed, "
            "load the model in float32 or bfloat16",
            field="scores_T",
        )
    return kept_M
