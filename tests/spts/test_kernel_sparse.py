"""Sparse attention: its kernels against the reference, and the reference against attention pair by pair."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spts.kernels import dispatch, reference
from spts.kernels.blocks import blocks_read
from spts.kernels.sparse_attention import choose_blocks
from tests.spts.kernel_inputs import DEVICE, PRODUCTS, close, draw

# queries, keys, query heads, key heads, head size, density: a slice, a part of a block, groups, one token
SIZES = pytest.mark.parametrize(
    "size",
    [(1, 1, 1, 1, 16, 0.5), (300, 300, 2, 1, 16, 0.1), (500, 884, 4, 2, 32, 0.7), (130, 770, 3, 1, 64, 0.5)],
    ids=lambda size: "M{}-L{}-H{}-K{}-d{}-{}".format(*size),
)


def drawn(size: tuple[int, int, int, int, int, float], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    queries, keys, heads, kv_heads, head_dim, _ = size
    shapes = ((queries, heads, head_dim), (keys, kv_heads, head_dim), (keys, kv_heads, head_dim))
    q_MHd, k_LKd, v_LKd = (draw(*shape, dtype=dtype) for shape in shapes)
    return q_MHd, k_LKd, v_LKd


def pair_by_pair(q_MHd: Tensor, k_LKd: Tensor, v_LKd: Tensor, chosen_HRS: Tensor, scale: float) -> Tensor:
    """In float64, with a mask that has every pair of a query and a key."""
    (num_queries, num_heads, _), (num_keys, num_kv_heads, _) = q_MHd.shape, k_LKd.shape
    place_M = torch.arange(num_keys - num_queries, num_keys)
    seen_HML = torch.zeros(num_heads, num_queries, num_keys, dtype=torch.bool)
    for head in range(num_heads):
        for row, token in enumerate(place_M.tolist()):
            for block in [*chosen_HRS[head, row // 128].tolist(), token // 128]:
                if block >= 0:
                    seen_HML[head, row, block * 128 : min(block * 128 + 128, token + 1)] = True
    k_LHd, v_LHd = (
        each.double().repeat_interleave(num_heads // num_kv_heads, dim=1) for each in (k_LKd, v_LKd)
    )
    logits_HML = torch.einsum("mhd,lhd->hml", q_MHd.double(), k_LHd) * scale
    weights_HML = logits_HML.masked_fill(~seen_HML.to(DEVICE), -torch.inf).softmax(dim=-1)
    return torch.einsum("hml,lhd->mhd", weights_HML, v_LHd)


@PRODUCTS
@SIZES
@pytest.mark.parametrize("name", ["kernel", "reference"])
def test_queries_read_the_blocks_that_were_chosen_and_their_own(name, size, dtype):
    q_MHd, k_LKd, v_LKd = drawn(size, dtype)
    operation = dispatch.kernel("sparse_attention") if name == "kernel" else reference.sparse_attention
    choose = choose_blocks if name == "kernel" else reference.choose_blocks
    chosen_HRS = choose(q_MHd, k_LKd, 0.3, size[-1])
    out_MHd = operation(q_MHd, k_LKd, v_LKd, 0.3, size[-1])
    close(out_MHd, pair_by_pair(q_MHd, k_LKd, v_LKd, chosen_HRS, 0.3), dtype)


@SIZES
def test_the_kernels_choose_as_the_reference(size):
    """In float32: a near tie of halves may fall otherwise."""
    q_MHd, k_LKd, _ = drawn(size, torch.float32)
    chosen_HRS = choose_blocks(q_MHd, k_LKd, 0.3, size[-1])
    expected_HRS = reference.choose_blocks(q_MHd, k_LKd, 0.3, size[-1])
    assert torch.equal(chosen_HRS, expected_HRS)
    assert chosen_HRS.dtype == expected_HRS.dtype == torch.int32
    first = (size[1] - size[0]) // 128
    for row, own in enumerate(range(first, first + chosen_HRS.shape[1])):
        for blocks in chosen_HRS[:, row].tolist():
            read = [block for block in blocks if block >= 0]
            assert len(read) == blocks_read(own, size[-1]) - 1
            assert read == sorted(set(read)) and {0, own - 1} - {-1} <= {*read, own}


def test_equal_blocks_are_chosen_from_the_first():
    q_MHd, k_LKd = torch.ones(128 * 9, 1, 16, device=DEVICE), torch.ones(128 * 9, 1, 16, device=DEVICE)
    for choose in (choose_blocks, reference.choose_blocks):
        assert choose(q_MHd, k_LKd, 0.3, 0.5)[0, 8].tolist() == [0, 1, 2, 7]


@pytest.mark.parametrize("name", ["kernel", "reference"])
def test_where_all_blocks_are_read_it_is_causal_attention(name):
    q_MHd, k_LKd, v_LKd = drawn((300, 556, 2, 1, 16, 1.0), torch.float32)
    operation = dispatch.kernel("sparse_attention") if name == "kernel" else reference.sparse_attention
    exact = reference.causal_attention(q_MHd.double(), k_LKd.double(), v_LKd.double(), 0.3)
    close(operation(q_MHd, k_LKd, v_LKd, 0.3, math.nextafter(1.0, 0.0)), exact, torch.float32)


@pytest.mark.parametrize("where", ["q_MHd", "k_LKd", "v_LKd"])
def test_nan_comes_out_and_stays_with_what_reads_it(where):
    """The last block of three, which no other reads."""
    q_MHd, k_LKd, v_LKd = drawn((384, 384, 2, 2, 16, 0.5), torch.float32)
    {"q_MHd": q_MHd, "k_LKd": k_LKd, "v_LKd": v_LKd}[where][300, 1] = math.nan
    for operation in (dispatch.kernel("sparse_attention"), reference.sparse_attention):
        out_MHd = operation(q_MHd, k_LKd, v_LKd, 0.3, 0.5)
        assert bool(out_MHd[300, 1].isnan().any())
        assert bool(out_MHd[:256].isfinite().all()) and bool(out_MHd[:, 0].isfinite().all())
