"""How far a method's next-token distribution is from the dense model's.

Legend: N predictions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from spts.memory import COMPARED_ELEMENTS


def compare(dense_NV: Tensor, other_NV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(dense || other) in nats, float64 [N], and the rank of dense's most likely token, int64 [N].

    Both arguments are logits; dense's may be on another device. They are compared a block of rows at a time,
    so that what is held beside them is bounded (`spts.memory.comparison_bytes`). The rank is 1 + the number
    of tokens that `other` finds strictly likelier than dense's most likely one (the lowest id of equals): 1 =
    they agree, and equal logits always do. KL is over the whole vocabulary; equal logits give exactly 0.

    Worked example, V = 2: logits [2, 0] are the probabilities (0.881, 0.119), and

        dense [0, 1], other [0, 1]     KL 0                                       rank 1
        dense [2, 0], other [0, 2]     KL (0.881 - 0.119) * 2 = 2 tanh 1 = 1.523   rank 2
    """
    rows = max(1, COMPARED_ELEMENTS // dense_NV.shape[-1])
    blocks = zip(dense_NV.split(rows), other_NV.split(rows), strict=True)
    pairs = (_compare(dense_NV.to(other_NV.device), other_NV) for dense_NV, other_NV in blocks)
    kl, rank = zip(*pairs, strict=True)
    return torch.cat(kl), torch.cat(rank)


def _compare(dense_NV: Tensor, other_NV: Tensor) -> tuple[Tensor, Tensor]:
    best_N1 = dense_NV.argmax(dim=-1, keepdim=True)
    rank_N = 1 + (other_NV > other_NV.gather(-1, best_N1)).sum(dim=-1)
    dense_NV, other_NV = dense_NV.double().log_softmax(dim=-1), other_NV.double().log_softmax(dim=-1)
    kl_N = F.kl_div(other_NV, dense_NV, reduction="none", log_target=True).sum(dim=-1)
    return kl_N.clamp_min(0.0), rank_N  # rounding can take the sum a hair below 0
