"""PAP, partial attention probing: how much the last prompt token attends to each candidate.

Legend: T candidates, H query heads on this rank, K key/value heads on this rank, d head size.
"""

from __future__ import annotations

from torch import Tensor

from spts.collective import Collective
from spts.kernels import dispatch as ops


def attention_scores(
    q_Hd: Tensor, k_TKd: Tensor, *, scale: float, num_heads: int, collective: Collective
) -> Tensor:
    """S_mha of arXiv 2601.13155: the mean over all heads of the last token's attention weights, float32 [T].

    `q_Hd` is the last token's query and `k_TKd` the candidates' keys, both after RoPE and only for the heads
    of this rank; `num_heads` is the model's own count over all ranks. One all-reduce of T floats; the scores
    add up to 1.
    """
    return collective.all_reduce(ops.last_query_probe(q_Hd, k_TKd, scale)).div_(num_heads)
