"""Attention of one new token through torch, without the backend that builds a plan for every length.

A cache is one token longer at every step, and differently long in the layers of a method that skips: where
torch would choose cuDNN, each of these lengths is new to it and costs 40 ms on an H200.

Legend: H query heads, K key/value heads, d head size, L tokens in a cache.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from spts.kernels import reference

_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def single_query_attention(q_Hd: Tensor, k_LKd: Tensor, v_LKd: Tensor, scale: float) -> Tensor:
    """As `reference.single_query_attention`."""
    with sdpa_kernel(_BACKENDS):
        return reference.single_query_attention(q_Hd, k_LKd, v_LKd, scale)
