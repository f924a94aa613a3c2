"""What each layer of a prefill computed, small enough to send: per layer and part of the prompt, one share.

Shape suffix: B bins.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cluster.protocol import Activity
from spts.layer import LayerTrace


def summed_up(trace: Sequence[LayerTrace], num_tokens: int, bins: int) -> Activity:
    """The share of each bin's tokens that ran each block of each layer, rounded to whole per cent.

    Token p is in bin p * bins // num_tokens. Worked example: 4 tokens, 2 bins, a layer whose attention ran
    tokens 0, 2 and 3: (50, 100).
    """
    bins = min(bins, num_tokens)
    size_B = torch.bincount(torch.arange(num_tokens) * bins // num_tokens, minlength=bins)

    def shares(positions: Tensor) -> tuple[int, ...]:
        ran_B = torch.bincount(positions * bins // num_tokens, minlength=bins)
        return tuple((100 * ran_B / size_B).round().int().tolist())

    return Activity(
        attention=tuple(shares(layer.attention_tokens) for layer in trace),
        ffn=tuple(shares(layer.ffn_tokens) for layer in trace),
    )
