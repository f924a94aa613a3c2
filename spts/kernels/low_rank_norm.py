"""LTP's score after its first product: second factors, activation, down factor and row norm in one pass.

Legend: T candidates, D width, C channels kept by a proxy, r its rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from spts.kernels import reference
from spts.kernels.checks import HALF_AND_FLOAT, is_silu, require, warn_reference

_HIGHEST_RANK = 256  # both factors of 64 candidates are held by one program


@triton.jit
def _low_rank_norm(
    factors, gate, up, down, norm, T, RANK, CHANNELS,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    rank = tl.arange(0, BLOCK_R)
    there, kept = token < T, rank < RANK
    row = factors + (token * 2 * RANK)[:, None] + rank[None, :]
    inside = there[:, None] & kept[None, :]
    gate_Tr = tl.load(row, mask=inside, other=0.0)
    up_Tr = tl.load(row + RANK, mask=inside, other=0.0)
    out_Tr = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for start in range(0, CHANNELS, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        known = channel < CHANNELS
        second = rank[:, None] * CHANNELS + channel[None, :]
        in_second = kept[:, None] & known[None, :]
        gate_rC = tl.load(gate + second, mask=in_second, other=0.0)
        up_rC = tl.load(up + second, mask=in_second, other=0.0)
        gate_TC = tl.dot(gate_Tr, gate_rC, input_precision=PRECISION)
        up_TC = tl.dot(up_Tr, up_rC, input_precision=PRECISION)
        gated_TC = (gate_TC * tl.sigmoid(gate_TC) * up_TC).to(factors.dtype.element_ty)
        down_Cr = tl.load(
            down + channel[:, None] * RANK + rank[None, :], mask=known[:, None] & kept[None, :], other=0.0
        )
        out_Tr = tl.dot(gated_TC, down_Cr, out_Tr, input_precision=PRECISION)
    tl.store(norm + token, tl.sqrt(tl.sum(out_Tr * out_Tr, axis=1)), mask=there)


def low_rank_norm(
    y_TD: Tensor,
    first_D2r: Tensor,
    gate_rC: Tensor,
    up_rC: Tensor,
    down_Cr: Tensor,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """As `reference.low_rank_norm`; other activations than SiLU and ranks above 256 run the reference.

    Raises ValueError naming an argument of wrong shape, dtype, strides, device.
    """
    num_tokens, width = y_TD.shape
    rank, channels = gate_rC.shape
    require("y_TD", y_TD, shape=(num_tokens, width), like=y_TD, dtypes=HALF_AND_FLOAT, contiguous=False)
    require("first_D2r", first_D2r, shape=(width, 2 * rank), like=y_TD)
    require("gate_rC", gate_rC, shape=(rank, channels), like=y_TD)
    require("up_rC", up_rC, shape=(rank, channels), like=y_TD)
    require("down_Cr", down_Cr, shape=(channels, rank), like=y_TD)
    if not is_silu(activation) or rank > _HIGHEST_RANK:
        reason = f"the activation is {type(activation).__name__}, not SiLU"
        if rank > _HIGHEST_RANK:
            reason = f"a rank of {rank} is above {_HIGHEST_RANK}"
        warn_reference("low_rank_norm", reason)
        return reference.low_rank_norm(y_TD, first_D2r, gate_rC, up_rC, down_Cr, activation)
    norm_T = torch.empty(num_tokens, dtype=torch.float32, device=y_TD.device)
    if num_tokens:
        block_tokens = 64
        _low_rank_norm[(triton.cdiv(num_tokens, block_tokens),)](
            y_TD @ first_D2r, gate_rC, up_rC, down_Cr, norm_T, num_tokens, rank, channels,
            "ieee" if y_TD.dtype == torch.float32 else "tf32", block_tokens,
            max(16, triton.next_power_of_2(rank)), 32, num_warps=4, num_stages=2,
        )  # fmt: skip
    return norm_T
