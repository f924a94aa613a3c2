"""What a launcher refuses, by the argument's name, and what it leaves to the reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spts.kernels import checks, dispatch, reference
from tests.spts.kernel_inputs import DEVICE, close, draw, flag


def ragged(num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, Any]:
    """One request that holds three tokens."""
    held = [tuple(draw(4, num_kv_heads, head_dim) for _ in "kv")]
    table = [[*(rows.data_ptr() for rows in held[0]), 3]]
    return {
        "q_BHd": draw(1, num_heads, head_dim),
        "k_BKd": draw(1, num_kv_heads, head_dim),
        "v_BKd": draw(1, num_kv_heads, head_dim),
        "held": held,
        "table_B3": torch.tensor(table, device=DEVICE),
        "scale": 0.3,
    }


def attention(
    num_queries: int, num_keys: int, *, heads: tuple[int, int] = (2, 1), head_dim: int = 16, **more: Any
) -> dict[str, Any]:
    return {
        "q_MHd": draw(num_queries, heads[0], head_dim),
        "k_LKd": draw(num_keys, heads[1], head_dim),
        "v_LKd": draw(num_keys, heads[1], head_dim),
        "scale": 0.3,
        **more,
    }


CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "rms_norm": lambda: {"x_TD": draw(5, 8), "weight_D": draw(8), "eps": 1e-5},
    "rotate_in_place": lambda: {"x_THd": draw(3, 2, 4), "cos_Td": draw(3, 4), "sin_Td": draw(3, 4)},
    "top_rows": lambda: {"scores_T": draw(5), "num_kept": 3, "num_recent": 1, "has_nan": flag()},
    "add_rows_in_place": lambda: {
        "x_TD": draw(5, 4),
        "index_M": torch.tensor([0, 3], device=DEVICE),
        "delta_MD": draw(2, 4),
    },
    "gated_product": lambda: {"gate_MF": draw(4, 6), "up_MF": draw(4, 6), "activation": F.silu},
    "causal_attention": lambda: attention(3, 5),
    "ragged_attention": lambda: ragged(2, 1, 16),
    "sparse_attention": lambda: attention(3, 131, density=0.5),
}
FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dimensions": lambda x: x.unsqueeze(0),
    "shape": lambda x: torch.cat((x, x), dim=-1) if x.ndim else x.unsqueeze(0),
    "dtype": lambda x: x.double() if x.is_floating_point() else x.to(torch.int16),
    "device": lambda x: x.to("meta"),
    "strides": lambda x: torch.stack((x, x), dim=-1)[..., 0] if x.ndim else x.unsqueeze(0),
}


def test_every_kernel_has_a_call_here():
    folder = Path(dispatch.__file__).parent
    launchers = {path.stem for path in folder.glob("*.py") if f"def {path.stem}(" in path.read_text()}
    assert set(CALLS) == launchers


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", CALLS)
def test_a_tensor_that_does_not_fit_is_refused_by_its_name(name, fault):
    dispatch.kernel(name)(**CALLS[name]())
    tensors = [each for each, value in CALLS[name]().items() if isinstance(value, Tensor)]
    # The first says where the others have to be and how large.
    for argument in tensors[1:] if fault in ("shape", "device") else tensors:
        arguments = CALLS[name]()
        arguments[argument] = FAULTS[fault](arguments[argument])
        named = "|".join(tensors) if fault == "shape" else argument  # where two differ, either may be wrong
        with pytest.raises(ValueError, match=rf"^({named}) must .*, got "):
            dispatch.kernel(name)(**arguments)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "integers": (
        "rms_norm",
        {"x_TD": torch.ones(5, 8, dtype=torch.int32, device=DEVICE)},
        "x_TD must be of torch.bfloat16 or .* got torch.int32",
    ),
    "message": ("rms_norm", {"weight_D": draw(9)}, r"weight_D must have the shape \(8,\), got \(9,\)"),
    "odd head": (
        "rotate_in_place",
        {"x_THd": draw(2, 1, 3)},
        "x_THd must have heads of even size, got 3",
    ),
    "too many rows": (
        "add_rows_in_place",
        {"x_TD": draw(1, 4)},
        "index_M must choose at most the 1 rows there are, got 2",
    ),
    "M > T": (
        "top_rows",
        {"num_kept": 6},
        "num_recent, num_kept and the candidates must ascend from 1 .* got 1, 6 and 5",
    ),
    "no candidates": ("top_rows", {"scores_T": draw(0), "num_kept": 0}, "must ascend from 1"),
    "half scores": (
        "top_rows",
        {"scores_T": draw(5).bfloat16()},
        "scores_T must be of torch.float32, got torch.bfloat16",
    ),
    "heads, ragged": ("ragged_attention", ragged(5, 2, 8), "q_BHd must have a multiple of k_BKd's 2 heads"),
    "no heads": ("ragged_attention", ragged(5, 0, 8), "q_BHd must have a multiple of k_BKd's 0 heads, got 5"),
    "heads, causal": (
        "causal_attention",
        attention(3, 5, heads=(5, 2)),
        "q_MHd must have a multiple of k_LKd's 2 heads, got 5",
    ),
    "more queries than keys": (
        "causal_attention",
        attention(6, 5),
        "q_MHd must be the last of the 5 tokens of k_LKd, got 6",
    ),
    "heads, sparse": (
        "sparse_attention",
        attention(3, 131, heads=(5, 2)),
        "q_MHd must have a multiple of k_LKd's 2 heads, got 5",
    ),
    "within a block": (
        "sparse_attention",
        attention(3, 130),
        "q_MHd must be the last .* got 3 of 130",
    ),
    "M > L": ("sparse_attention", attention(131, 3), "q_MHd must be the last tokens .* got 131 of 3"),
    "no queries": ("sparse_attention", attention(0, 128), "q_MHd must be the last tokens .* got 0 of 128"),
    "nothing read": ("sparse_attention", {"density": 0.0}, "density must be above 0 and at most 1, got 0.0"),
    "density": ("sparse_attention", {"density": 1.5}, "density must be above 0 and at most 1, got 1.5"),
    "address": (
        "sparse_attention",
        {"v_LKd": draw(131 * 16 + 1)[1:].view(131, 1, 16)},
        "v_LKd must begin at an address divisible by 16, .* got 4 more; copy it",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_do_not_fit_are_refused_by_name(name):
    kernel, other, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        dispatch.kernel(kernel)(**{**CALLS[kernel](), **other})


def test_what_a_kernel_does_not_know_runs_the_reference_and_says_so_once():
    checks.warn_reference.cache_clear()
    gate_MF, up_MF = draw(4, 6), draw(4, 6)
    expected = reference.gated_product(gate_MF.clone(), up_MF, F.gelu)
    out = []
    with pytest.warns(UserWarning, match="gated_product runs without its kernel") as warned:
        out += [dispatch.kernel("gated_product")(gate_MF.clone(), up_MF, F.gelu) for _ in range(2)]
    assert len(warned) == 1
    assert all(torch.equal(each, expected) for each in out)
    x_TD = draw(2, 40_000)
    with pytest.warns(UserWarning, match="rms_norm runs without its kernel: rows of 40000"):
        wide = dispatch.kernel("rms_norm")(x_TD, torch.ones(40_000, device=DEVICE), 1e-5)
    close(wide, F.rms_norm(x_TD.double(), (40_000,), None, 1e-5), torch.float32)


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("sparse_attention", attention(3, 259, head_dim=48, density=0.5), "heads of 48"),
        ("sparse_attention", attention(3, 259, head_dim=256, density=0.5), "heads of 256"),
        ("ragged_attention", ragged(2, 1, 520), "heads of 520 are wider than 512"),
    ],
    ids=["no power of two", "wide", "wide, ragged"],
)
def test_head_sizes_that_a_kernel_does_not_know_run_the_reference_with_one_warning(name, arguments, reason):
    checks.warn_reference.cache_clear()
    with pytest.warns(UserWarning, match=f"{name} runs without its kernel: {reason}; ") as warned:
        out = [dispatch.kernel(name)(**arguments) for _ in range(2)]
    assert len(warned) == 1
    expected = getattr(reference, name)(**arguments)
    assert all(torch.equal(each, expected) for each in out)


def test_more_keys_than_one_program_chooses_among_run_the_reference_with_one_warning(monkeypatch):
    checks.warn_reference.cache_clear()
    monkeypatch.setattr("spts.kernels.sparse_attention._MOST_KEYS", 130)
    calls = [attention(3, num_keys, density=0.5) for num_keys in (131, 259)]
    with pytest.warns(UserWarning, match="sparse_attention .* kernel: more than 130 keys; ") as warned:
        out = [dispatch.kernel("sparse_attention")(**each) for each in calls]
    assert len(warned) == 1
    expected = [reference.sparse_attention(**each) for each in calls]
    assert all(torch.equal(*both) for both in zip(out, expected, strict=True))
