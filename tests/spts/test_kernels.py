"""The kernels against their references and against float64: on a GPU when there is one, else under Triton's
interpreter (TRITON_INTERPRET, set by tests/conftest.py, which also fills fresh memory with NaN)."""

from __future__ import annotations

import inspect
import math
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from spts.kernels import block_attention, dispatch, reference
from tests.spts.kernel_inputs import DEVICE, DTYPES, PRODUCTS, close, draw, flag

KERNELS = (
    "rms_norm",
    "rotate_in_place",
    "top_rows",
    "add_rows_in_place",
    "gated_product",
    "causal_attention",
    "ragged_attention",
    "sparse_attention",
)
SILU = ACT2FN["silu"]


def test_every_kernel_has_its_references_name_and_signature():
    for name in KERNELS:
        launcher, plain = dispatch.kernel(name), getattr(reference, name)
        assert inspect.signature(launcher) == inspect.signature(plain), name


def test_only_tensors_on_a_gpu_reach_a_kernel(monkeypatch):
    def fail(name: str) -> Any:
        raise AssertionError(f"{name} was looked up")

    monkeypatch.setattr(dispatch, "kernel", fail)
    x_TD = torch.randn(3, 8)
    assert torch.equal(
        dispatch.rms_norm(x_TD, torch.ones(8), 0.0), reference.rms_norm(x_TD, torch.ones(8), 0.0)
    )


@DTYPES
@pytest.mark.parametrize("size", [(1, 8), (63, 48), (5, 500), (3, 4096)], ids=str)
def test_rms_norm(size, dtype):
    x_TD, weight_D = draw(*size, dtype=dtype) * 3, draw(size[1], dtype=dtype)
    exact = F.rms_norm(x_TD.double(), (size[1],), weight_D.double(), 1e-5)
    close(dispatch.kernel("rms_norm")(x_TD, weight_D, 1e-5), exact, dtype)
    own = LlamaRMSNorm(size[1], eps=1e-5).to(device=DEVICE, dtype=dtype)
    own.weight.data.copy_(weight_D)
    torch.testing.assert_close(reference.rms_norm(x_TD, weight_D, 1e-5), own(x_TD), rtol=0, atol=0)


def test_rms_norm_of_rows_with_gaps_between_them():
    whole = draw(7, 100)
    x_TD = whole[:, 3:51]
    exact = F.rms_norm(x_TD.double(), (48,), None, 1e-5)
    close(dispatch.kernel("rms_norm")(x_TD, torch.ones(48, device=DEVICE), 1e-5), exact, torch.float32)


def test_rms_norm_worked_example():
    out = reference.rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), 0.0)
    torch.testing.assert_close(out, torch.tensor([[3 / math.sqrt(12.5), 8 / math.sqrt(12.5)]]))


@DTYPES
@pytest.mark.parametrize("size", [(1, 1, 2), (63, 3, 16), (50, 8, 80), (33, 32, 128)], ids=str)
def test_rotate_in_place(size, dtype):
    tokens, _, head_dim = size
    x_THd, angles = draw(*size, dtype=dtype), draw(tokens, head_dim // 2) * 100
    angles = torch.cat((angles, angles), dim=-1)
    cos_Td, sin_Td = angles.cos().to(dtype), angles.sin().to(dtype)
    exact, _ = apply_rotary_pos_emb(
        x_THd.double()[None],
        x_THd.double()[None],
        cos_Td.double()[None],
        sin_Td.double()[None],
        unsqueeze_dim=2,
    )
    turned = dispatch.kernel("rotate_in_place")(x_THd, cos_Td, sin_Td)
    assert turned is x_THd
    close(turned, exact[0], dtype)


def test_rotate_in_place_leaves_the_gaps_between_heads_alone():
    whole = draw(9, 4, 40)
    before = whole.clone()
    angles = draw(9, 16)
    dispatch.kernel("rotate_in_place")(whole[:, 1:3, 8:24], angles.cos(), angles.sin())
    expected = reference.rotate_in_place(before[:, 1:3, 8:24].clone(), angles.cos(), angles.sin())
    torch.testing.assert_close(whole[:, 1:3, 8:24], expected)
    whole[:, 1:3, 8:24] = before[:, 1:3, 8:24]
    assert torch.equal(whole, before)


@DTYPES
@pytest.mark.parametrize("size", [(1, 1), (63, 80), (5, 5000)], ids=str)
def test_gated_product(size, dtype):
    gate_MF, up_MF = draw(*size, dtype=dtype), draw(*size, dtype=dtype)
    exact = F.silu(gate_MF.double()) * up_MF.double()
    out = dispatch.kernel("gated_product")(gate_MF, up_MF, SILU)
    assert out is gate_MF
    close(out, exact, dtype)


@DTYPES
@pytest.mark.parametrize("size", [(1, 1, 1), (500, 63, 48), (100, 100, 5000)], ids=str)
def test_add_rows_in_place(size, dtype):
    rows, chosen, width = size
    x_TD, delta_MD = draw(rows, width, dtype=dtype), draw(chosen, width, dtype=dtype)
    index_M = torch.randperm(rows)[:chosen].sort().values.to(DEVICE)
    expected = reference.add_rows_in_place(x_TD.cpu(), index_M.cpu(), delta_MD.cpu())
    out = dispatch.kernel("add_rows_in_place")(x_TD, index_M, delta_MD)
    assert out is x_TD
    assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize("tokens", [1, 2, 63, 500])
@pytest.mark.parametrize("values", ["spread", "tied", "softmax"])
def test_top_rows(tokens, values):
    scores_T = {
        "spread": torch.randn(tokens),
        "tied": torch.tensor([-math.inf, -1.0, -0.0, 0.0, 0.25, 0.5, math.inf])[torch.randint(7, (tokens,))],
        "softmax": (4 * torch.randn(tokens)).softmax(0),
    }[values].to(DEVICE)
    some = tokens // 3 or 1
    for num_kept, num_recent in {(1, 1), (some, 1), (some, some // 2 or 1), (some, some), (tokens, 1)}:
        has_nan = flag()
        kept_M = dispatch.kernel("top_rows")(scores_T, num_kept, num_recent, has_nan)
        expected = reference.top_rows(scores_T, num_kept, num_recent, flag())
        assert kept_M.tolist() == expected.tolist()
        assert kept_M.dtype == torch.int64
        assert not has_nan


def test_top_rows_over_several_blocks(monkeypatch):
    monkeypatch.setattr("spts.kernels.top_rows._BLOCK_T", 64)
    scores_T = torch.randint(0, 30, (300,), device=DEVICE) / 7.0
    for num_kept, num_recent in ((90, 1), (150, 100), (300, 70)):
        kept_M = dispatch.kernel("top_rows")(scores_T, num_kept, num_recent, flag())
        assert torch.equal(kept_M, reference.top_rows(scores_T, num_kept, num_recent, flag()))


def test_top_rows_of_more_than_one_program_is_fast_for(monkeypatch):
    scores_T, expected = torch.randn(70, device=DEVICE), []

    def sort(*args: Any) -> Tensor:
        expected.append(scores_T)
        return scores_T

    monkeypatch.setattr("spts.kernels.top_rows.MANY_ROWS", 69)
    monkeypatch.setattr(reference, "top_rows", sort)
    assert dispatch.kernel("top_rows")(scores_T, 7, 2, flag()) is scores_T
    assert len(expected) == 1


@pytest.mark.parametrize("where", [0, 31, 62])
@pytest.mark.parametrize("nan", [math.nan, -math.nan])
def test_top_rows_notices_nan_and_never_forgets_it(where, nan):
    scores_T, has_nan = torch.rand(63, device=DEVICE), flag()
    scores_T[where] = nan
    kept_M = dispatch.kernel("top_rows")(scores_T, 7, 2, has_nan)
    assert bool(has_nan)
    assert len(set(kept_M.tolist())) == 7
    assert int(kept_M.min()) >= 0 and int(kept_M.max()) < 63
    dispatch.kernel("top_rows")(torch.rand(63, device=DEVICE), 7, 2, has_nan)
    assert bool(has_nan)


@PRODUCTS
@pytest.mark.parametrize(("queries", "keys"), [(1024, 1152), (1100, 1356), (1024, 1100), (40, 168)])
def test_a_slice_of_a_prefill_attends_to_all_before_it(queries, keys, dtype, monkeypatch):
    """Many queries after whole blocks in half precision: by blocks. Others: as torch does."""
    by_blocks = Mock(wraps=block_attention.attend_blocks)
    monkeypatch.setattr("spts.kernels.causal_attention.attend_blocks", by_blocks)
    q_MHd, k_LKd, v_LKd = (
        draw(rows, heads, 16, dtype=dtype) for rows, heads in ((queries, 2), (keys, 1), (keys, 1))
    )
    out_MHd = dispatch.kernel("causal_attention")(q_MHd, k_LKd, v_LKd, 0.3)
    exact = reference.causal_attention(q_MHd.double(), k_LKd.double(), v_LKd.double(), 0.3)
    close(out_MHd, exact, dtype)
    if torch.device(DEVICE).type == "cpu" or torch.cuda.get_device_capability()[0] >= 9:
        half = dtype != torch.float32
        assert by_blocks.called == (half and queries >= 1024 and (keys - queries) % 128 == 0)


@pytest.mark.parametrize("tokens", [1, 63, 256, 300])
def test_causal_attention_at_lengths_that_are_rounded_up(tokens):
    q_MHd, k_MKd, v_MKd = draw(tokens, 6, 16), draw(tokens, 2, 16), draw(tokens, 2, 16)
    out = dispatch.kernel("causal_attention")(q_MHd, k_MKd, v_MKd, 0.3)
    exact = reference.causal_attention(q_MHd.double(), k_MKd.double(), v_MKd.double(), 0.3)
    close(out, exact, torch.float32)


def test_causal_attention_meets_few_lengths(monkeypatch):
    seen = set()

    def attend(q_MHd: Tensor, k_MKd: Tensor, v_MKd: Tensor, scale: float) -> Tensor:
        seen.add((q_MHd.shape[0], k_MKd.shape[0], v_MKd.shape[0]))
        return q_MHd

    monkeypatch.setattr(reference, "causal_attention", attend)
    for tokens in (1, 200, 256, 257, 511, 512):
        heads = draw(tokens, 1, 2)
        assert dispatch.kernel("causal_attention")(heads, heads, heads, 1.0).shape == heads.shape
    assert seen == {(256, 256, 256), (512, 512, 512)}


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four splits: the interpreter runs programs one by one."""
    for name in ("_PROGRAMS", "_FEWEST"):
        monkeypatch.setattr(f"spts.kernels.ragged_attention.{name}", 4)


def caches(lengths: list[int], num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> Any:
    """Caches that hold so many tokens, with room for two more that nobody wrote yet; and their table."""
    held, table = [], []
    for length in lengths:
        rows = tuple(torch.full((length + 2, num_kv_heads, head_dim), math.nan, dtype=dtype) for _ in "kv")
        keys_CKd, values_CKd = (each.to(DEVICE) for each in rows)
        keys_CKd[:length] = draw(length, num_kv_heads, head_dim, dtype=dtype)
        values_CKd[:length] = draw(length, num_kv_heads, head_dim, dtype=dtype)
        held.append((keys_CKd, values_CKd))
        table.append((keys_CKd.data_ptr(), values_CKd.data_ptr(), length))
    return held, torch.tensor(table, device=DEVICE)


def exact_attention(q_Hd: Tensor, k_LKd: Tensor, v_LKd: Tensor, scale: float) -> Tensor:
    group = q_Hd.shape[0] // k_LKd.shape[1]
    keys_LHd, values_LHd = (each.double().repeat_interleave(group, dim=1) for each in (k_LKd, v_LKd))
    weights_HL = torch.einsum("hd,lhd->hl", q_Hd.double(), keys_LHd).mul(scale).softmax(-1)
    return torch.einsum("hl,lhd->hd", weights_HL, values_LHd)


@PRODUCTS
@pytest.mark.parametrize(
    ("lengths", "heads", "head_dim"),
    [([0], (1, 1), 16), ([1, 700, 63, 0, 256], (6, 2), 16), ([500, 129], (7, 1), 80), ([64], (8, 8), 128)],
    ids=str,
)
@pytest.mark.parametrize("name", ["kernel", "reference"])
def test_ragged_attention_appends_and_attends_over_each_requests_own_tokens(
    few_programs, name, lengths, heads, head_dim, dtype
):
    num_heads, num_kv_heads = heads
    held, table_B3 = caches(lengths, num_kv_heads, head_dim, dtype)
    before = [(keys.clone(), values.clone()) for keys, values in held]
    q_BHd = draw(len(lengths), num_heads, head_dim, dtype=dtype)
    k_BKd, v_BKd = (draw(len(lengths), num_kv_heads, head_dim, dtype=dtype) for _ in "kv")
    operation = dispatch.kernel("ragged_attention") if name == "kernel" else reference.ragged_attention
    out_BHd = operation(q_BHd, k_BKd, v_BKd, held, table_B3, 0.3)
    for row, length in enumerate(lengths):
        for new, old, added in zip(held[row], before[row], (k_BKd[row], v_BKd[row]), strict=True):
            assert torch.equal(new[:length], old[:length])
            assert torch.equal(new[length], added)
            assert bool(new[length + 1].isnan().all()), "the rest of the room is left alone"
        keys_LKd, values_LKd = (each[: length + 1] for each in held[row])
        close(out_BHd[row], exact_attention(q_BHd[row], keys_LKd, values_LKd, 0.3), dtype)


@pytest.mark.parametrize("name", ["kernel", "reference"])
def test_rows_that_are_no_request_change_nothing(few_programs, name):
    held, table_B3 = caches([40, 3], 2, 16, torch.float32)
    q_BHd, k_BKd, v_BKd = draw(4, 4, 16), draw(4, 2, 16), draw(4, 2, 16)
    nobody = torch.tensor([[0, 0, -1]] * 2, device=DEVICE)
    operation = dispatch.kernel("ragged_attention") if name == "kernel" else reference.ragged_attention
    out_BHd = operation(q_BHd, k_BKd, v_BKd, held, torch.cat((table_B3, nobody)), 0.3)
    expected = reference.ragged_attention(q_BHd[:2], k_BKd[:2], v_BKd[:2], held, table_B3, 0.3)
    torch.testing.assert_close(out_BHd[:2], expected)
    assert not out_BHd[2:].any()


@pytest.mark.parametrize("name", ["kernel", "reference"])
def test_ragged_attention_worked_example(few_programs, name):
    keys, values = torch.tensor([[[0.0]], [[9.0]]]), torch.tensor([[[1.0]], [[9.0]]])
    keys, values = keys.to(DEVICE), values.to(DEVICE)
    table_B3 = torch.tensor([[keys.data_ptr(), values.data_ptr(), 1]], device=DEVICE)
    query, key, value = (torch.full((1, 1, 1), number, device=DEVICE) for number in (1.0, math.log(3), 5.0))
    operation = dispatch.kernel("ragged_attention") if name == "kernel" else reference.ragged_attention
    out_BHd = operation(query, key, value, [(keys, values)], table_B3, 1.0)
    torch.testing.assert_close(out_BHd.cpu(), torch.tensor([[[4.0]]]))
    torch.testing.assert_close(keys.flatten().cpu(), torch.tensor([0.0, math.log(3)]))
    torch.testing.assert_close(values.flatten().cpu(), torch.tensor([1.0, 5.0]))


@pytest.mark.parametrize("where", ["cache", "query"])
def test_ragged_attention_passes_nan_on_to_that_request_alone(few_programs, where):
    held, table_B3 = caches([300, 300], 1, 16, torch.float32)
    q_BHd, k_BKd, v_BKd = draw(2, 2, 16), draw(2, 1, 16), draw(2, 1, 16)
    if where == "cache":
        held[0][0][200] = math.nan
    else:
        q_BHd[0] = math.nan
    out_BHd = dispatch.kernel("ragged_attention")(q_BHd, k_BKd, v_BKd, held, table_B3, 0.3)
    assert bool(out_BHd[0].isnan().all())
    assert bool(out_BHd[1].isfinite().all())
