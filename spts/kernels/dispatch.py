"""The operations of a layer, each run where its tensors are: a kernel on a CUDA device, the reference
elsewhere.

The one place that decides. Triton is imported when the first tensor on a CUDA device comes by, and by nobody
else; an operation without a kernel is the reference on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

from spts.kernels import reference

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


@cache
def kernel(name: str) -> Callable[..., Any]:
    """The launcher of an operation: the function `name` in the module of that name."""
    launcher: Callable[..., Any] = getattr(import_module(f"spts.kernels.{name}"), name)
    return launcher


def _by_device(plain: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    name = plain.__name__

    @wraps(plain)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        first = args[0]
        assert isinstance(first, Tensor), "an operation's first argument is the tensor that says where"
        if first.is_cuda:
            result: _Result = kernel(name)(*args, **kwargs)
            return result
        return plain(*args, **kwargs)

    return run


def attention(device: str) -> str:
    """What computes attention on a device, "cpu" or "cuda", for records."""
    if device == "cpu":
        return reference.ATTENTION
    return f"{reference.ATTENTION}; kernels of spts for slices, chosen blocks and decode steps"


rms_norm = _by_device(reference.rms_norm)
rotate_in_place = _by_device(reference.rotate_in_place)
top_rows = _by_device(reference.top_rows)
add_rows_in_place = _by_device(reference.add_rows_in_place)
gated_product = _by_device(reference.gated_product)
causal_attention = _by_device(reference.causal_attention)
sparse_attention = _by_device(reference.sparse_attention)
ragged_attention = _by_device(reference.ragged_attention)

last_query_probe = reference.last_query_probe
last_queries_probe = reference.last_queries_probe
low_rank_norm = reference.low_rank_norm
gather_rows = reference.gather_rows
