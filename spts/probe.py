"""PAP, partial attention probing: how much the end of the prompt attends to each candidate.

Legend: T candidates, Q probing queries, H query heads on this rank, K key/value heads on this rank, d head
size.
"""

from __future__ import annotations

from torch import Tensor

from spts.collective import Collective
from spts.kernels import dispatch as ops


def attention_scores(
    q_QHd: Tensor, k_TKd: Tensor, *, scale: float, num_heads: int, collective: Collective
) -> Tensor:
    """S_mha of arXiv 2601.13155: mean attention of the last Q candidates over all heads, float32 [T].

    `q_QHd` are the queries of the last Q candidates, the paper's Q being 1, and `k_TKd` the keys of all, both
    after RoPE and only for the heads of this rank; `num_heads` is the model's own count over all ranks. One
    all-reduce of T floats; the scores add up to 1.
    """
    num_queries = q_QHd.shape[0]
    if num_queries == 1:
        scores_T = ops.last_query_probe(q_QHd[0], k_TKd, scale)
    else:
        scores_T = ops.last_queries_probe(q_QHd, k_TKd, scale)
    return collective.all_reduce(scores_T).div_(num_heads * num_queries)
