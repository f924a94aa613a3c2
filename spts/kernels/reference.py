"""Every operation of a layer in plain torch: what a kernel must equal, and what runs where there is none.

Legend: T candidates, M active, Q probing queries, D width, H query heads on this rank, K key/value heads on
this rank, d head size, F FFN inner size, C channels kept by a proxy (or rows of a cache), r its rank, B
requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from spts.kernels.blocks import BLOCK_TOKENS, CACHED_ELEMENTS, blocks_read, check_blocks

ATTENTION = "torch scaled_dot_product_attention"
"""What computes attention here, for records; torch chooses among its backends by itself."""

_QUERY_BLOCK = 1024


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Every row over the root of its mean square, times `weight_D`: [T, D]; the mean is taken in float32.

    Example: x = [[3, 4]] with weight [1, 2] and eps 0 has a mean square of 12.5 and gives [[0.849, 2.263]].
    """
    out_TD = torch.empty_like(x_TD)
    for x_RD, out_RD in _in_blocks(x_TD, out_TD):
        x_RD_float = x_RD.float()
        inverse_R1 = torch.rsqrt(x_RD_float.pow(2).mean(-1, keepdim=True) + eps)
        torch.mul(x_RD_float, inverse_R1, out=out_RD).mul_(weight_D)
    return out_TD


def rotate_in_place(x_THd: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
    """Rotary position embedding of `x_THd`, written into it and returned.

    The two halves of a head rotate against each other, as `rotate_half` of transformers does. Example: d = 2,
    x = [1, 0] at an angle of 90 degrees (cos [0, 0], sin [1, 1]) becomes [0, 1].
    """
    half = x_THd.shape[-1] // 2
    for x_RHd, cos_Rd, sin_Rd in _in_blocks(x_THd, cos_Td, sin_Td):
        crossed_RHd = torch.empty_like(x_RHd)
        torch.neg(x_RHd[..., half:], out=crossed_RHd[..., :half])
        crossed_RHd[..., half:] = x_RHd[..., :half]
        x_RHd.mul_(cos_Rd.unsqueeze(1)).add_(crossed_RHd.mul_(sin_Rd.unsqueeze(1)))
    return x_THd


def last_query_probe(q_Hd: Tensor, k_TKd: Tensor, scale: float) -> Tensor:
    """Attention of one query on every key, summed over the heads: float32 [T].

    Query head h reads key head h // (H // K). The softmax of each head runs over all T keys in float32. The
    sum, not the mean: under tensor parallelism a rank holds some of the heads, and their sums add up.

    Example: one head, d = 1, q = [1], keys [0, ln 3], scale 1 gives [0.25, 0.75].
    """
    num_tokens, num_kv_heads, head_dim = k_TKd.shape
    q_KGd = q_Hd.view(num_kv_heads, -1, head_dim)
    logits_KGT = torch.matmul(q_KGd, k_TKd.permute(1, 2, 0)).float().mul_(scale)
    return logits_KGT.softmax(dim=-1).view(-1, num_tokens).sum(dim=0)


def last_queries_probe(q_QHd: Tensor, k_TKd: Tensor, scale: float) -> Tensor:
    """Attention of the last Q of T tokens on every key, summed over heads and queries: float32 [T].

    As `last_query_probe` for each query, which sees the keys up to its own: query i the first T - Q + 1 + i.

    Example: one head, d = 1, Q = 2 queries [1], [1] over keys [0, 0, ln 2], scale 1: the first sees two keys
    (0.5, 0.5, 0), the second three (0.25, 0.25, 0.5); the sum is [0.75, 0.75, 0.5].
    """
    num_queries, (num_tokens, num_kv_heads, head_dim) = q_QHd.shape[0], k_TKd.shape
    q_KQGd = q_QHd.view(num_queries, num_kv_heads, -1, head_dim).transpose(0, 1)
    logits_KRT = torch.matmul(q_KQGd.flatten(1, 2), k_TKd.permute(1, 2, 0)).float().mul_(scale)
    logits_KQGT = logits_KRT.view(num_kv_heads, num_queries, -1, num_tokens)
    place_T = torch.arange(num_tokens, device=k_TKd.device)
    later_Q1T = place_T > place_T[-num_queries:].view(-1, 1, 1)
    return logits_KQGT.masked_fill_(later_Q1T, -torch.inf).softmax(dim=-1).sum(dim=(0, 1, 2))


def low_rank_norm(
    y_TD: Tensor,
    first_D2r: Tensor,
    gate_rC: Tensor,
    up_rC: Tensor,
    down_Cr: Tensor,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """Norm of a low-rank gated FFN's output, by token: float32 [T], without computing the output.

    The full down factor is (down_Cr) times an orthonormal [r, D], so the norm of the output is the norm of
    `act(y gate) * (y up) @ down_Cr`, and the last product is never formed.
    """
    rank = gate_rC.shape[0]
    factors_T2r = y_TD @ first_D2r
    gated_TC = activation(factors_T2r[:, :rank] @ gate_rC).mul_(factors_T2r[:, rank:] @ up_rC)
    out_Tr = gated_TC @ down_Cr
    summed_in = torch.promote_types(out_Tr.dtype, torch.float32)  # never narrower than its input
    return torch.linalg.vector_norm(out_Tr, dim=-1, dtype=summed_in).float()


def top_rows(scores_T: Tensor, num_kept: int, num_recent: int, has_nan: Tensor) -> Tensor:
    """Indices, int64 [num_kept], ascending, of the last `num_recent` rows and of the highest scores among the
    others.

    Of equal scores the lower index wins. With a NaN among the scores `has_nan`, a bool of no dimension, is
    set, and the indices are distinct rows without a meaning; nothing waits for the device.

    Example: scores [0.2, 0.5, 0.1, 0.5, 0.5, 0.0], 3 kept, 1 recent gives [1, 3, 5].
    """
    has_nan.logical_or_(scores_T.isnan().any())
    row_T = torch.arange(scores_T.shape[0], device=scores_T.device)
    num_earlier, num_chosen = scores_T.shape[0] - num_recent, num_kept - num_recent
    kept_M = row_T[-num_kept:].clone()
    if num_chosen:
        earlier_E = scores_T[:num_earlier].nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
        lowest = earlier_E.topk(num_chosen, sorted=False).values.amin()
        above_E, equal_E = earlier_E > lowest, earlier_E == lowest
        chosen_E = above_E | (equal_E & (equal_E.cumsum(0) <= num_chosen - above_E.sum()))
        # Each row goes to its place among the chosen; the others to one behind them all.
        place_E = torch.where(chosen_E, chosen_E.cumsum(0) - 1, num_chosen)
        placed = row_T.new_empty(num_chosen + 1).scatter_(0, place_E, row_T[:num_earlier])
        kept_M[:num_chosen] = placed[:-1]
    return kept_M


def gather_rows(x_TD: Tensor, index_M: Tensor) -> Tensor:
    """Rows `index_M` of `x_TD` as a new tensor [M, D]: rows [0, 2] of [[1], [2], [3]] are [[1], [3]]."""
    return x_TD.index_select(0, index_M)


def add_rows_in_place(x_TD: Tensor, index_M: Tensor, delta_MD: Tensor) -> Tensor:
    """Adds row m of `delta_MD` to row `index_M[m]` of `x_TD`, in place; the other rows keep their value.
    No index comes twice.

    Example: x = [[1], [2], [3]], index [0, 2], delta [[10], [20]] gives [[11], [2], [23]].
    """
    return x_TD.index_add_(0, index_M, delta_MD)


def gated_product(gate_MF: Tensor, up_MF: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """`act(gate) * up`, [M, F], written over `gate_MF`."""
    for gate_RF, up_RF in _in_blocks(gate_MF, up_MF):
        torch.mul(activation(gate_RF), up_RF, out=gate_RF)
    return gate_MF


def _in_blocks(first: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors by as many rows as are CACHED_ELEMENTS of the first."""
    rows = max(1, CACHED_ELEMENTS * first.shape[0] // max(1, first.numel()))
    return zip(*(each.split(rows) for each in (first, *others)), strict=True)


def causal_attention(q_MHd: Tensor, k_LKd: Tensor, v_LKd: Tensor, scale: float) -> Tensor:
    """Causal attention of the last M of L ascending tokens over all L, [M, H, d]; mostly M = L.

    Query head h reads key head h // (H // K). Causal over the compacted rows is causal in the prompt, as the
    rows ascend: of tokens [0, 3, 7], row 1 (token 3) sees rows 0 and 1 (tokens 0 and 3). With fewer queries
    than keys the last query belongs to the last key: M = 2, L = 5 gives query 0 the keys 0 … 3, query 1 all.
    """
    num_queries, num_keys = q_MHd.shape[0], k_LKd.shape[0]
    if num_queries == num_keys:
        return _attention(q_MHd, k_LKd, v_LKd, scale, is_causal=True)
    if q_MHd.is_cpu:
        return _attention_in_two(q_MHd, k_LKd, v_LKd, scale)
    # In blocks: where no kernel knows this alignment, torch writes the mask out.
    out_MHd = torch.empty_like(q_MHd)
    for start in range(0, num_queries, _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, num_queries)
        seen = num_keys - num_queries + stop
        out_MHd[start:stop] = _attention(
            q_MHd[start:stop],
            k_LKd[:seen],
            v_LKd[:seen],
            scale,
            attn_mask=causal_lower_right(stop - start, seen),
        )
    return out_MHd


def _attention_in_two(q_MHd: Tensor, k_LKd: Tensor, v_LKd: Tensor, scale: float) -> Tensor:
    """`causal_attention` of M < L queries on a CPU, whose kernel is slow where this alignment takes a mask.

    Once over the keys before the queries' own, which all of them see, and once over their own; each part is
    weighted with its share of the sum of exp.

    In the first part the query heads that share keys are rows of one head, so that keys are read once.
    """
    num_queries, num_kv_heads = q_MHd.shape[0], k_LKd.shape[1]
    before = k_LKd.shape[0] - num_queries
    q_KGMd = q_MHd.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)
    k_KLd, v_KLd = k_LKd.transpose(0, 1), v_LKd.transpose(0, 1)
    earlier, earlier_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_KGMd.flatten(1, 2)[None], k_KLd[None, :, :before], v_KLd[None, :, :before], scale=scale
    )
    own_KGMd, own_lse_KGM = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_KGMd,
        k_KLd[:, None, before:].expand_as(q_KGMd),
        v_KLd[:, None, before:].expand_as(q_KGMd),
        is_causal=True,
        scale=scale,
    )
    earlier_KGMd = earlier[0].view_as(own_KGMd)
    share_KGM = (earlier_lse.reshape(own_lse_KGM.shape) - own_lse_KGM).sigmoid()
    out_KGMd = own_KGMd.to(share_KGM.dtype).lerp_(earlier_KGMd.to(share_KGM.dtype), share_KGM[..., None])
    return out_KGMd.to(q_MHd.dtype).permute(2, 0, 1, 3).flatten(1, 2)


def sparse_attention(q_MHd: Tensor, k_LKd: Tensor, v_LKd: Tensor, scale: float, density: float) -> Tensor:
    """As `causal_attention`, but a block of queries reads `blocks.blocks_read` blocks of keys: [M, H, d].

    The last M of L tokens ask; L - M is a multiple of BLOCK_TOKENS, as blocks are counted from the prompt's
    first token. Every query head of a block chooses for itself (`choose_blocks`), so the result depends
    neither on where a prefill was sliced between blocks nor on the ranks. Where all blocks are read it is
    causal attention.
    """
    check_blocks(q_MHd.shape[0], k_LKd.shape[0], density)
    return attend_blocks(q_MHd, k_LKd, v_LKd, scale, density, choose_blocks(q_MHd, k_LKd, scale, density))


def attend_blocks(
    q_MHd: Tensor, k_LKd: Tensor, v_LKd: Tensor, scale: float, density: float, chosen_HRS: Tensor
) -> Tensor:
    """`sparse_attention` over the blocks of `choose_blocks`."""
    (num_queries, num_heads, _), (num_keys, num_kv_heads, _) = q_MHd.shape, k_LKd.shape
    chosen_HRS = chosen_HRS.long()
    before, whole = num_keys - num_queries, num_keys - num_keys % BLOCK_TOKENS
    head_H1 = torch.arange(num_heads, device=q_MHd.device)[:, None] // (num_heads // num_kv_heads)
    out_MHd = torch.empty_like(q_MHd)
    for row, q_BHd in enumerate(q_MHd.split(BLOCK_TOKENS)):
        own = row * BLOCK_TOKENS + before
        earlier_HS = chosen_HRS[:, row, : blocks_read(own // BLOCK_TOKENS, density) - 1]
        k_HXd, v_HXd = (
            torch.cat(
                (
                    x_LKd[:whole].unflatten(0, (-1, BLOCK_TOKENS))[earlier_HS, :, head_H1].flatten(1, 2),
                    x_LKd[own : own + BLOCK_TOKENS, head_H1[:, 0]].transpose(0, 1),
                ),
                dim=1,
            )
            for x_LKd in (k_LKd, v_LKd)
        )
        out_HBd = F.scaled_dot_product_attention(
            q_BHd.transpose(0, 1)[None],
            k_HXd[None],
            v_HXd[None],
            attn_mask=causal_lower_right(q_BHd.shape[0], k_HXd.shape[1]),
            scale=scale,
        )[0]
        out_MHd[row * BLOCK_TOKENS : (row + 1) * BLOCK_TOKENS] = out_HBd.transpose(0, 1)
    return out_MHd


def choose_blocks(q_MHd: Tensor, k_LKd: Tensor, scale: float, density: float) -> Tensor:
    """For each query head and block of queries, the blocks of keys before its own that it reads: int32
    [H, R, S], R blocks of queries, S the most that any of them reads; ascending, then -1.

    Always the first block and the one before the queries' own; then those that the mean of the block's
    queries gives most attention to, all keys of a block together: the log of the sum of exp over its
    logits. Of equal blocks the earlier wins; which ones are chosen among NaN has no meaning.
    """
    num_queries, num_keys = q_MHd.shape[0], k_LKd.shape[0]
    first = (num_keys - num_queries) // BLOCK_TOKENS
    # One row after the other: together their logits would take rows times keys.
    rows = mean_queries(q_MHd).split(1)
    scores_HRC = torch.cat([block_scores(q_1Hd, k_LKd, scale) for q_1Hd in rows], dim=1)
    num_rows, num_blocks = scores_HRC.shape[1:]
    own_R1 = torch.arange(first, first + num_rows, device=q_MHd.device)[:, None]
    block_C = torch.arange(num_blocks, device=q_MHd.device)
    always_RC = (block_C == 0) | (block_C == own_R1 - 1)
    scores_HRC = scores_HRC.nan_to_num(nan=0.0).masked_fill(always_RC, torch.inf)
    scores_HRC = scores_HRC.masked_fill(block_C >= own_R1, -torch.inf)
    order_HRC = scores_HRC.sort(dim=-1, descending=True, stable=True).indices
    counts = [blocks_read(first + row, density) - 1 for row in range(num_rows)]
    most = max(counts)
    chosen_HRS = order_HRC[..., :most]
    count_R1 = torch.tensor(counts, device=q_MHd.device)[:, None]
    unused_RS = torch.arange(most, device=q_MHd.device) >= count_R1
    chosen_HRS = chosen_HRS.masked_fill(unused_RS, num_blocks).sort(dim=-1).values
    return chosen_HRS.masked_fill(unused_RS, -1).int()


def mean_queries(q_MHd: Tensor) -> Tensor:
    """The mean of each block of BLOCK_TOKENS queries, the last one of what there is of it: [R, H, d]."""
    whole = q_MHd.shape[0] - q_MHd.shape[0] % BLOCK_TOKENS
    mean_RHd = q_MHd[:whole].unflatten(0, (-1, BLOCK_TOKENS)).mean(dim=1)
    return mean_RHd if whole == q_MHd.shape[0] else torch.cat((mean_RHd, q_MHd[whole:].mean(dim=0)[None]))


def block_scores(q_RHd: Tensor, k_LKd: Tensor, scale: float) -> Tensor:
    """How much attention queries give to each whole block of keys, as a log: float32 [H, R, L // 128]."""
    num_kv_heads = k_LKd.shape[1]
    whole = k_LKd.shape[0] - k_LKd.shape[0] % BLOCK_TOKENS
    q_KGRd = q_RHd.permute(1, 0, 2).unflatten(0, (num_kv_heads, -1))
    logits_KGRL = torch.matmul(q_KGRd, k_LKd[:whole].permute(1, 2, 0).unsqueeze(1)).float().mul_(scale)
    return logits_KGRL.unflatten(-1, (-1, BLOCK_TOKENS)).logsumexp(dim=-1).flatten(0, 1)


def _attention(q_MHd: Tensor, k_LKd: Tensor, v_LKd: Tensor, scale: float, **masking: Any) -> Tensor:
    out_1HMd = F.scaled_dot_product_attention(
        q_MHd.transpose(0, 1).unsqueeze(0),
        k_LKd.transpose(0, 1).unsqueeze(0),
        v_LKd.transpose(0, 1).unsqueeze(0),
        scale=scale,
        enable_gqa=q_MHd.shape[1] != k_LKd.shape[1],
        **masking,
    )
    return out_1HMd.squeeze(0).transpose(0, 1)


def ragged_attention(
    q_BHd: Tensor,
    k_BKd: Tensor,
    v_BKd: Tensor,
    held: Sequence[tuple[Tensor, Tensor]],
    table_B3: Tensor,
    scale: float,
) -> Tensor:
    """Appends a token to each of B caches and returns its attention on everything there, [B, H, d].

    held: keys and values of each cache, [C, K, d], contiguous, C at least the tokens held and one. table_B3:
    int64; of each request the addresses of its keys and of its values, multiples of 16, and the tokens held
    before this one. A row that holds -1 is no request: nothing is read or written for it, its attention is 0;
    such rows come last and have no entry in `held`. Query head h reads key head h // (H // K).

    Example: d = 1, keys [[0], [free]], values [[1], [free]], one token held, query [1], new key [ln 3] and
    value [5], scale 1: the weights are 0.25 and 0.75, the attention 4, and the free rows hold ln 3 and 5.
    """
    out_BHd = torch.zeros_like(q_BHd)
    for row, (keys_CKd, values_CKd) in enumerate(held):
        last = int(table_B3[row, 2])
        keys_CKd[last], values_CKd[last] = k_BKd[row], v_BKd[row]
        # The query heads that share keys are rows of one head, so that keys are read once.
        q_MKd = q_BHd[row].unflatten(0, (keys_CKd.shape[1], -1)).transpose(0, 1)
        out_MKd = _attention(q_MKd, keys_CKd[: last + 1], values_CKd[: last + 1], scale)
        out_BHd[row] = out_MKd.transpose(0, 1).flatten(0, 1)
    return out_BHd
