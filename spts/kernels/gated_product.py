"""SiLU(gate) * up, in place. Legend: M rows, F FFN inner size."""

from __future__ import annotations

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from spts.kernels import reference
from spts.kernels.checks import HALF_AND_FLOAT, is_silu, power_of_two, require, sizes, warn_reference


@triton.jit
def _gated_product(gate, up, gate_stride, up_stride, F, num_blocks, BLOCK_F: tl.constexpr):
    # Neighbours in a row are neighbours in time: the other order moves fewer bytes per second.
    program = tl.program_id(0)
    row = (program // num_blocks).to(tl.int64)
    column = (program % num_blocks) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = column < F
    gate_F = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up_F = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    # Rounded between the two, as the models' own FFN does.
    active_F = (gate_F * tl.sigmoid(gate_F)).to(gate.dtype.element_ty).to(tl.float32)
    tl.store(gate + row * gate_stride + column, (active_F * up_F).to(gate.dtype.element_ty), mask=inside)


def gated_product(gate_MF: Tensor, up_MF: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """As `reference.gated_product`, written over `gate_MF`; other activations than SiLU run the reference.

    Raises ValueError naming an argument of wrong shape, dtype, strides, device.
    """
    num_rows, inner = sizes("gate_MF", gate_MF, 2)
    require(
        "gate_MF", gate_MF, shape=(num_rows, inner), like=gate_MF, dtypes=HALF_AND_FLOAT, contiguous=False
    )
    require("up_MF", up_MF, shape=(num_rows, inner), like=gate_MF, contiguous=False)
    if not is_silu(activation):
        warn_reference("gated_product", f"the activation is {type(activation).__name__}, not SiLU")
        return reference.gated_product(gate_MF, up_MF, activation)
    if num_rows:
        block = min(power_of_two(inner), 2048)
        num_blocks = -(-inner // block)
        _gated_product[(num_rows * num_blocks,)](
            gate_MF, up_MF, gate_MF.stride(0), up_MF.stride(0), inner, num_blocks, block, num_warps=8
        )  # fmt: skip
    return gate_MF
