"""Causal attention through torch, at lengths that its fastest backend has seen before.

cuDNN builds a plan for every new shape; on an H200 that takes 40 ms, more than a layer of 32,768 tokens. With
lengths rounded up a server meets few of them. Rows added at the end are later than every real one: none sees
them.

Legend: M queries, L keys, H query heads, K key/value heads, d head size.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from spts.kernels import reference

_MULTIPLE = 256


def causal_attention(q_MHd: Tensor, k_LKd: Tensor, v_LKd: Tensor, scale: float) -> Tensor:
    """As `reference.causal_attention`."""
    num_queries = q_MHd.shape[0]
    added = -num_queries % _MULTIPLE
    if not added or num_queries != k_LKd.shape[0]:
        return reference.causal_attention(q_MHd, k_LKd, v_LKd, scale)
    q_MHd, k_LKd, v_LKd = (F.pad(each, (0, 0, 0, 0, 0, added)) for each in (q_MHd, k_LKd, v_LKd))
    return reference.causal_attention(q_MHd, k_LKd, v_LKd, scale)[:num_queries]
