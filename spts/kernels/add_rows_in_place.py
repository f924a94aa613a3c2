"""Rows added to chosen rows, in place. Legend: T rows, M of them, D width."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spts.kernels.checks import HALF_AND_FLOAT, power_of_two, require, sizes


@triton.jit
def _add_rows(x, index, delta, x_stride, delta_stride, D, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < D
    target = x + tl.load(index + row) * x_stride + column
    delta_D = tl.load(delta + row * delta_stride + column, mask=inside, other=0.0).to(tl.float32)
    sum_D = tl.load(target, mask=inside, other=0.0).to(tl.float32) + delta_D
    tl.store(target, sum_D.to(x.dtype.element_ty), mask=inside)


def add_rows_in_place(x_TD: Tensor, index_M: Tensor, delta_MD: Tensor) -> Tensor:
    """As `reference.add_rows_in_place`. Raises ValueError naming an argument of wrong shape, dtype, strides,
    device.
    """
    num_rows, width = sizes("x_TD", x_TD, 2)
    (num_chosen,) = sizes("index_M", index_M, 1)
    require("x_TD", x_TD, shape=(num_rows, width), like=x_TD, dtypes=HALF_AND_FLOAT, contiguous=False)
    require("index_M", index_M, shape=(num_chosen,), like=x_TD, dtypes=(torch.int64,))
    require("delta_MD", delta_MD, shape=(num_chosen, width), like=x_TD, contiguous=False)
    if num_chosen > num_rows:
        raise ValueError(
            f"index_M must choose at most the {num_rows} rows there are, got {num_chosen}; correct the call"
        )
    if num_chosen:
        block = min(power_of_two(width), 4096)
        _add_rows[(num_chosen, -(-width // block))](
            x_TD, index_M, delta_MD, x_TD.stride(0), delta_MD.stride(0), width, block,
            num_warps=min(max(block // 512, 1), 8),
        )  # fmt: skip
    return x_TD
