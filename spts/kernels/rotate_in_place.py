"""Rotary position embedding, in place. Legend: T tokens, H heads, d head size."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from spts.kernels.checks import HALF_AND_FLOAT, power_of_two, require, sizes


@triton.jit(do_not_specialize=["num_rows"])
def _rotate(
    x, cos, sin, num_rows, token_stride, head_stride, angle_stride, H, HALF,
    BLOCK_R: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    token, head = row // H, row % H
    column = tl.arange(0, BLOCK_HALF)
    inside = (row < num_rows)[:, None] & (column < HALF)[None, :]
    first = x + (token * token_stride + head * head_stride)[:, None] + column[None, :]
    angle = (token * angle_stride)[:, None] + column[None, :]
    a = tl.load(first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(first + HALF, mask=inside, other=0.0).to(tl.float32)
    cos_a = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    sin_a = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    cos_b = tl.load(cos + angle + HALF, mask=inside, other=0.0).to(tl.float32)
    sin_b = tl.load(sin + angle + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(first, (a * cos_a - b * sin_a).to(x.dtype.element_ty), mask=inside)
    tl.store(first + HALF, (b * cos_b + a * sin_b).to(x.dtype.element_ty), mask=inside)


def rotate_in_place(x_THd: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
    """As `reference.rotate_in_place`. Raises ValueError naming an argument of wrong shape, dtype, strides,
    device.
    """
    num_tokens, num_heads, head_dim = sizes("x_THd", x_THd, 3)
    if head_dim % 2:
        raise ValueError(f"x_THd must have heads of even size, got {head_dim}; correct the call")
    require("x_THd", x_THd, shape=tuple(x_THd.shape), like=x_THd, dtypes=HALF_AND_FLOAT, contiguous=False)
    for name, angle_Td in (("cos_Td", cos_Td), ("sin_Td", sin_Td)):
        require(name, angle_Td, shape=(num_tokens, head_dim), like=x_THd)
    num_rows = num_tokens * num_heads
    if num_rows:
        block_rows = 32
        _rotate[(-(-num_rows // block_rows),)](
            x_THd, cos_Td, sin_Td, num_rows, x_THd.stride(0), x_THd.stride(1), head_dim, num_heads,
            head_dim // 2, block_rows, power_of_two(head_dim // 2), num_warps=4,
        )  # fmt: skip
    return x_THd
