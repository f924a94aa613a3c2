"""RMSNorm by row. Legend: T rows, D width."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spts.kernels import reference
from spts.kernels.checks import HALF_AND_FLOAT, power_of_two, require, sizes, warn_reference

_WIDEST = 32768  # a row is held in the registers of one program


@triton.jit
def _rms_norm(x, weight, out, row_stride, eps, D, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    x_D = tl.load(x + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x_D * x_D, axis=0) / D + eps)
    weight_D = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    # Rounded before the weight comes in, as the models' own norm does.
    normed_D = (x_D * inverse).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * D + column, (normed_D * weight_D).to(out.dtype.element_ty), mask=inside)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """As `reference.rms_norm`; rows wider than 32,768 run the reference.

    Raises ValueError naming an argument of wrong shape, dtype, strides, device.
    """
    num_rows, width = sizes("x_TD", x_TD, 2)
    require("x_TD", x_TD, shape=(num_rows, width), like=x_TD, dtypes=HALF_AND_FLOAT, contiguous=False)
    require("weight_D", weight_D, shape=(width,), like=x_TD)
    if width > _WIDEST:
        warn_reference("rms_norm", f"rows of {width} are wider than {_WIDEST}")
        return reference.rms_norm(x_TD, weight_D, eps)
    out_TD = torch.empty((num_rows, width), dtype=x_TD.dtype, device=x_TD.device)
    if num_rows:
        block = power_of_two(width)
        _rms_norm[(num_rows,)](
            x_TD, weight_D, out_TD, x_TD.stride(0), eps, width, block, num_warps=min(max(block // 512, 1), 16)
        )
    return out_TD
