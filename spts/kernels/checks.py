"""What a launcher asks of its arguments before it does arithmetic with their addresses.

Decoding launches a hundred kernels a token: what is checked here costs a microsecond.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

HALF_AND_FLOAT = (torch.bfloat16, torch.float16, torch.float32)
WIDEST_HEAD = 512  # of ragged attention: what is read at once of a wider one does not fit on a multiprocessor


def require(
    name: str,
    tensor: Tensor,
    *,
    shape: tuple[int, ...],
    like: Tensor,
    dtypes: tuple[torch.dtype, ...] | None = None,
    contiguous: bool = True,
) -> None:
    """Raises ValueError, naming the argument, unless it has this shape, the device of `like`, one of `dtypes`
    (None: that of `like`), and no gaps (contiguous=False: none within its last dimension).
    """
    allowed = (like.dtype,) if dtypes is None else dtypes
    dense = tensor.is_contiguous() if contiguous else tensor.stride(-1) == 1
    if tensor.shape == shape and tensor.dtype in allowed and tensor.device == like.device and dense:
        return  # what is wrong is found out below
    if tensor.shape != shape:
        _refuse(name, f"have the shape {shape}", str(tuple(tensor.shape)))
    if tensor.dtype not in allowed:
        _refuse(name, f"be of {' or '.join(str(dtype) for dtype in allowed)}", str(tensor.dtype))
    if tensor.device != like.device:
        _refuse(name, f"be on {like.device}", str(tensor.device))
    if contiguous:
        _refuse(name, "be contiguous", f"strides {tensor.stride()}")
    if shape[-1] > 1:
        _refuse(name, "have a last dimension without gaps", f"strides {tensor.stride()}")


def sizes(name: str, tensor: Tensor, count: int) -> torch.Size:
    """The shape of a tensor. Raises ValueError, naming the argument, unless it has `count` dimensions."""
    if tensor.ndim != count:
        _refuse(name, f"have {count} dimensions", f"the shape {tuple(tensor.shape)}")
    return tensor.shape


def require_groups(query_name: str, num_heads: int, key_name: str, num_kv_heads: int) -> None:
    """Raises ValueError, naming both arguments, unless the query heads share the key heads evenly."""
    if not num_kv_heads or num_heads % num_kv_heads:
        _refuse(query_name, f"have a multiple of {key_name}'s {num_kv_heads} heads", str(num_heads))


def power_of_two(number: int) -> int:
    """The lowest power of two that is at least `number`, which is at least 1: 1, 2, 4, 4 for 1, 2, 3, 4."""
    return 1 << (number - 1).bit_length()


def is_silu(activation: Callable[[Tensor], Tensor]) -> bool:
    """Whether an activation is SiLU, torch's own or the module of transformers."""
    return activation is torch.nn.functional.silu or type(activation).__name__ in ("SiLU", "SiLUActivation")


@cache
def warn_reference(operation: str, reason: str) -> None:
    """Says once that an operation runs in plain torch on this device, and why."""
    warnings.warn(
        f"{operation} runs without its kernel: {reason}; the result is the same, it takes longer",
        stacklevel=3,
    )


def _refuse(name: str, rule: str, got: str) -> None:
    raise ValueError(f"{name} must {rule}, got {got}; correct the call")
