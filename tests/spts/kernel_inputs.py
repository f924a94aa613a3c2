"""What the tests of kernels share: the device they run on, random inputs and the tolerance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Relative error by dtype, ‖out - exact‖ / ‖exact‖: the one table for all kernels.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
PRODUCTS = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16], ids=["fp32", "half"]
)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(device=DEVICE, dtype=dtype)


def flag() -> Tensor:
    return torch.zeros((), dtype=torch.bool, device=DEVICE)


def close(out: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert out.shape == exact.shape
    exact = exact.double()
    error = float(torch.linalg.vector_norm(out.double() - exact) / torch.linalg.vector_norm(exact))
    assert error <= TOLERANCE[dtype], error
