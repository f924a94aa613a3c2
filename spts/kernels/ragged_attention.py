"""Attention of one new token for each of several requests, whose caches have lengths of their own.

A cache is split among several programs; a second kernel adds up what they found. Where a cache is and how
long it is are read from device memory, so that a captured launch serves every length and every request.

Legend: B requests, H query heads, K key/value heads, G query heads per key head, d head size, N tokens read
at once, S splits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from spts.kernels import reference
from spts.kernels.checks import (
    HALF_AND_FLOAT,
    WIDEST_HEAD,
    power_of_two,
    require,
    require_groups,
    sizes,
    warn_reference,
)

_PROGRAMS = 256  # two for each multiprocessor of an H200
_FEWEST, _MOST = 16, 128  # splits of a cache: a long request among many short ones needs programs of its own
_BLOCK_BYTES = 16384  # of keys read at once


@triton.jit
def _ragged_attention(
    q, k, v, table, found, peaks, totals, scale_log2, q_stride, k_stride, v_stride, token_stride, num_splits,
    D, G, ALIGNED: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    split, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    keys = tl.load(table + row * 3).to(tl.pointer_type(k.dtype.element_ty))
    values = tl.load(table + row * 3 + 1).to(tl.pointer_type(v.dtype.element_ty))
    held = tl.load(table + row * 3 + 2).to(tl.int32)
    group, column, token = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    wide = column < D
    inside_GD = (group < G)[:, None] & wide[None, :]
    head_G = kv_head * G + group
    q_GD = tl.load(q + row * q_stride + head_G[:, None] * D + column[None, :], mask=inside_GD, other=0.0)

    # The first split takes the new token and stores it. Nobody reads that row of the cache in this launch.
    newest = (split == 0) & (held >= 0)
    written_D = column < tl.where(newest, D, 0)
    k_D = tl.load(k + row * k_stride + kv_head * D + column, mask=written_D, other=0.0)
    v_D = tl.load(v + row * v_stride + kv_head * D + column, mask=written_D, other=0.0)
    end = held.to(tl.int64) * token_stride + kv_head * D + column
    tl.store(keys + end, k_D, mask=written_D)
    tl.store(values + end, v_D, mask=written_D)
    score_G = tl.sum(q_GD.to(tl.float32) * k_D.to(tl.float32)[None, :], axis=1) * scale_log2
    peak_G = tl.where(newest, score_G, float("-inf"))
    total_G = tl.where(newest, 1.0, 0.0) + tl.zeros((BLOCK_G,), dtype=tl.float32)
    found_GD = tl.zeros((BLOCK_G, BLOCK_D), dtype=tl.float32) + v_D.to(tl.float32)[None, :]

    share = tl.cdiv(tl.cdiv(held, num_splits), BLOCK_N) * BLOCK_N
    start = split * share
    stop = tl.minimum(start + share, held)
    for first in range(start, stop, BLOCK_N):
        inside_N = first + token < stop
        offset_N = (first + token).to(tl.int64) * token_stride + kv_head * D
        # An address out of a table has no known alignment, without which loads are two bytes wide.
        keys_N = tl.multiple_of(keys + offset_N, ALIGNED)
        values_N = tl.multiple_of(values + offset_N, ALIGNED)
        k_DN = tl.load(keys_N[None, :] + column[:, None], mask=inside_N[None, :] & wide[:, None], other=0.0)
        score_GN = tl.dot(q_GD, k_DN, input_precision="ieee") * scale_log2
        score_GN = tl.where(inside_N[None, :], score_GN, float("-inf"))
        higher_G = tl.maximum(peak_G, tl.max(score_GN, axis=1))
        weight_GN = tl.exp2(score_GN - higher_G[:, None])
        fade_G = tl.exp2(peak_G - higher_G)
        total_G = total_G * fade_G + tl.sum(weight_GN, axis=1)
        v_ND = tl.load(values_N[:, None] + column[None, :], mask=inside_N[:, None] & wide[None, :], other=0.0)
        found_GD = found_GD * fade_G[:, None]
        found_GD += tl.dot(weight_GN.to(v.dtype.element_ty), v_ND, input_precision="ieee")
        peak_G = higher_G

    num_heads = tl.num_programs(1) * G
    place_G = (row * num_heads + head_G) * num_splits + split
    tl.store(peaks + place_G, peak_G, mask=group < G)
    # A split with nothing to read has said so by its peak.
    some_G = group < tl.where(newest | (start < stop), G, 0)
    tl.store(totals + place_G, total_G, mask=some_G)
    tl.store(found + place_G[:, None] * D + column[None, :], found_GD, mask=some_G[:, None] & wide[None, :])


@triton.jit
def _add_splits(
    found, peaks, totals, out, num_splits, D, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    split, column = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    place_S = head * num_splits + split
    peak_S = tl.load(peaks + place_S, mask=split < num_splits, other=float("-inf"))
    some_S = peak_S != float("-inf")  # also where it is NaN, which has to come out
    weight_S = tl.where(some_S, tl.exp2(peak_S - tl.max(peak_S, axis=0)), 0.0)
    total = tl.sum(weight_S * tl.load(totals + place_S, mask=some_S, other=0.0), axis=0)
    wide = column < D
    found_SD = tl.load(
        found + place_S[:, None] * D + column[None, :], mask=some_S[:, None] & wide[None, :], other=0.0
    )
    out_D = tl.sum(weight_S[:, None] * found_SD, axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + head * D + column, out_D.to(out.dtype.element_ty), mask=wide)


def ragged_attention(
    q_BHd: Tensor,
    k_BKd: Tensor,
    v_BKd: Tensor,
    held: Sequence[tuple[Tensor, Tensor]],
    table_B3: Tensor,
    scale: float,
) -> Tensor:
    """As `reference.ragged_attention`, following the addresses in `table_B3`; `held` is not looked at, unless
    heads are wider than 512, which run the reference.

    Raises ValueError naming an argument of wrong shape, dtype, strides, device.
    """
    num_requests, num_heads, head_dim = sizes("q_BHd", q_BHd, 3)
    num_kv_heads = sizes("k_BKd", k_BKd, 3)[1]
    require("q_BHd", q_BHd, shape=tuple(q_BHd.shape), like=q_BHd, dtypes=HALF_AND_FLOAT)
    for name, rows in (("k_BKd", k_BKd), ("v_BKd", v_BKd)):
        require(name, rows, shape=(num_requests, num_kv_heads, head_dim), like=q_BHd)
    require("table_B3", table_B3, shape=(num_requests, 3), like=q_BHd, dtypes=(torch.int64,))
    require_groups("q_BHd", num_heads, "k_BKd", num_kv_heads)
    if head_dim > WIDEST_HEAD:
        warn_reference("ragged_attention", f"heads of {head_dim} are wider than {WIDEST_HEAD}")
        return reference.ragged_attention(q_BHd, k_BKd, v_BKd, held, table_B3, scale)
    out_BHd = torch.empty_like(q_BHd)
    if not num_requests:
        return out_BHd
    splits = power_of_two(min(max(_PROGRAMS // (num_requests * num_kv_heads), _FEWEST), _MOST))
    group, wide = num_heads // num_kv_heads, max(power_of_two(head_dim), 16)
    aligned = math.gcd(head_dim * q_BHd.element_size(), 16)  # of every head's rows: memory starts at 512
    block = max(_BLOCK_BYTES // (wide * q_BHd.element_size()), 16)
    peaks = torch.empty(num_requests * num_heads * splits, dtype=torch.float32, device=q_BHd.device)
    totals = torch.empty_like(peaks)
    found = torch.empty((peaks.shape[0], head_dim), dtype=torch.float32, device=q_BHd.device)
    _ragged_attention[(splits, num_kv_heads, num_requests)](
        q_BHd, k_BKd, v_BKd, table_B3, found, peaks, totals, scale * 1.4426950408889634,
        q_BHd.stride(0), k_BKd.stride(0), v_BKd.stride(0), num_kv_heads * head_dim, splits,
        head_dim, group, aligned, max(power_of_two(group), 16), wide, block, num_warps=4, num_stages=3,
    )  # fmt: skip
    _add_splits[(num_requests * num_heads,)](
        found, peaks, totals, out_BHd, splits, head_dim, splits, wide, num_warps=4
    )
    return out_BHd
