"""Is skipping safe for a model? Two curves over depth, measured on text (after arXiv 2601.13155, its
analysis).

Freezing: from layer l on, the hidden states of the context stay as they are; a live token alone is still
updated and attends over the whole context. Where its prediction no longer changes, the model has no more use
for updates of the context, and whatever a method skips from there on is safe to skip.

Coverage: the share of the dense model's attention of the last token that falls on the tokens a method keeps
active.

Legend: N prompt tokens, L live tokens, R = N + L rows, D width, H query heads, K key/value heads, d head
size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from spts.agreement import compare
from spts.cache import LayerCache
from spts.errors import RequestError
from spts.layer import DecoderLayer, Signals, Stream
from spts.methods import Dense, Method
from spts.model import SptsModel
from spts.proxy import ffn_norms


@dataclass(frozen=True, kw_only=True)
class FrozenRun:
    """What live tokens predict when their context is frozen.

    dense_LV: the dense model's logits, float32 [L, V].
    frozen_LV: one [L, V] for each layer l = 0 … num_layers - 1, the context frozen from layer l on. Nothing
        after the last layer reads an update made in it, so the last entry equals `dense_LV` but for rounding.
    """

    dense_LV: Tensor
    frozen_LV: tuple[Tensor, ...]


@torch.inference_mode()
def run_frozen(
    model: SptsModel, token_ids: Sequence[int], live_positions: Sequence[int], *, together: bool = False
) -> FrozenRun:
    """Runs a text densely and, for every layer, with a context that is frozen from that layer on.

    token_ids: N tokens. live_positions: ascending, each in 0 … N - 1. together: False = each live token is
    the last of a prompt of its own, all before it is its frozen context (many measurements of one text); True
    = what comes before the first live token is the context, and live tokens see each other updated (an
    answer, token by token).

    Costs a dense prefill, and the keys and values of N tokens for every pair of layers.

    Raises RequestError for positions out of range or order, and as `SptsModel.prefill` does.
    """
    if not live_positions or any(b <= a for a, b in zip([-1, *live_positions], live_positions, strict=False)):
        raise RequestError(
            f"live_positions must be ascending, at least one, from 0, got {list(live_positions)}; sort them",
            code="invalid_sampling",
            field="live_positions",
        )
    if live_positions[-1] >= len(token_ids):
        raise RequestError(
            f"live_positions must be below the {len(token_ids)} tokens, got {live_positions[-1]}; use fewer",
            code="invalid_sampling",
            field="live_positions",
        )
    stream = model.start_prefill(token_ids, Dense()).stream
    live_L = torch.tensor(live_positions, device=model.device)
    visible_LR = visible_rows(live_L, len(token_ids), together=together)
    frozen = []
    for index, layer in enumerate(model.layers):
        x_LD = stream.x_TD[live_L]
        for later in model.layers[index:]:
            x_LD = _update_live(later, stream, x_LD, live_L, visible_LR)
        frozen.append(model.logits(x_LD))
        layer.dense(stream, LayerCache(room_tokens=0))
    return FrozenRun(dense_LV=model.logits(stream.x_TD[live_L]), frozen_LV=tuple(frozen))


def visible_rows(live_L: Tensor, num_tokens: int, *, together: bool) -> Tensor:
    """Which rows each live token attends to, bool [L, N + L]: first the N frozen ones, then the L live ones.

    Example, N = 4 and live tokens 2, 3:

        apart      2 sees frozen 0, 1 and itself; 3 sees frozen 0, 1, 2 and itself
        together   2 sees frozen 0, 1 and itself; 3 sees frozen 0, 1, live 2 and itself
    """
    num_live = live_L.shape[0]
    position_N = torch.arange(num_tokens, device=live_L.device)
    context_end_L = live_L[:1].expand(num_live) if together else live_L
    among_LL = torch.ones(num_live, num_live, dtype=torch.bool, device=live_L.device).tril()
    if not together:
        among_LL = among_LL.triu()
    return torch.cat((position_N < context_end_L.unsqueeze(1), among_LL), dim=1)


def _update_live(
    layer: DecoderLayer, stream: Stream, x_LD: Tensor, live_L: Tensor, visible_LR: Tensor
) -> Tensor:
    """One layer of the live tokens alone, over the context as it stands in `stream`."""
    context_ND, h_LD = layer.block.input_layernorm(stream.x_TD), layer.block.input_layernorm(x_LD)
    cos_Ld, sin_Ld = stream.cos_Td[live_L], stream.sin_Td[live_L]
    q_LHd = layer.queries(h_LD, cos_Ld, sin_Ld)
    k_NKd, k_LKd = layer.keys(context_ND, stream.cos_Td, stream.sin_Td), layer.keys(h_LD, cos_Ld, sin_Ld)
    out_1HLd = F.scaled_dot_product_attention(
        q_LHd.transpose(0, 1).unsqueeze(0),
        torch.cat((k_NKd, k_LKd)).transpose(0, 1).unsqueeze(0),
        torch.cat((layer.values(context_ND), layer.values(h_LD))).transpose(0, 1).unsqueeze(0),
        attn_mask=visible_LR,
        scale=layer.scale,
        enable_gqa=q_LHd.shape[1] != k_NKd.shape[1],
    )
    x_LD = x_LD + layer.block.self_attn.o_proj(out_1HLd.squeeze(0).transpose(0, 1).flatten(1))
    return x_LD + layer.feed_forward(layer.block.post_attention_layernorm(x_LD))


@dataclass(frozen=True, kw_only=True)
class DenseRun:
    """What a dense run says about each layer.

    logits_V: after the last token, float32. attention_N: per layer the head mean of the last token's
    attention, which adds up to 1. proxy_correlation: per layer the rank correlation, -1 … 1, of the proxy's
    estimate with the norm of the FFN's output over the prompt; None where the model has no proxy.
    """

    logits_V: Tensor
    attention_N: tuple[Tensor, ...]
    proxy_correlation: tuple[float | None, ...]


@torch.inference_mode()
def run_dense(model: SptsModel, token_ids: Sequence[int]) -> DenseRun:
    """Runs a prompt densely and keeps what a method would predict from. Raises as `SptsModel.prefill`."""
    stream = model.start_prefill(token_ids, Dense()).stream
    attention: list[Tensor] = []
    correlation: list[float | None] = []
    for layer in model.layers:
        attention.append(Signals(layer, stream, probes=1).attention())
        y_ND = layer.dense(stream, LayerCache(room_tokens=0))
        if layer.proxy is None:
            correlation.append(None)
            continue
        estimate_N = ffn_norms(
            y_ND, layer.proxy, activation=layer.block.mlp.act_fn, collective=layer.collective
        )
        norm_N = torch.linalg.vector_norm(layer.feed_forward(y_ND), dim=-1, dtype=torch.float32)
        correlation.append(rank_correlation(estimate_N, norm_N))
    return DenseRun(
        logits_V=model.logits(stream.x_TD[-1:])[0],
        attention_N=tuple(attention),
        proxy_correlation=tuple(correlation),
    )


def rank_correlation(a_N: Tensor, b_N: Tensor) -> float:
    """Spearman's rank correlation, without correction for ties: [1, 5, 9] with [2, 3, 4] gives 1."""
    ranks_2N = torch.stack((a_N, b_N)).argsort(dim=-1, stable=True).argsort(dim=-1, stable=True).double()
    return float(torch.corrcoef(ranks_2N)[0, 1]) if a_N.shape[0] > 1 else 1.0


@dataclass(frozen=True, kw_only=True)
class LayerSafety:
    """One layer of the two curves.

    active_tokens: budget there, None = dense. frozen_agreement: share of live tokens whose most likely next
    token is the dense model's when the context is frozen from this layer on. frozen_kl_nats: mean KL(dense ||
    frozen).
    coverage: mean share of the dense attention on the tokens that ran attention. proxy_correlation: mean.
    """

    layer: int
    active_tokens: int | None
    frozen_agreement: float
    frozen_kl_nats: float
    coverage: float
    proxy_correlation: float | None


@dataclass(frozen=True, kw_only=True)
class Safety:
    """The curves, and how a method's own predictions agree with the dense model's.

    num_live: predictions behind each value of the freezing curve. num_prompts: behind all other values.
    """

    layers: tuple[LayerSafety, ...]
    method_agreement: float
    method_kl_nats: float
    num_live: int
    num_prompts: int

    def safe_from(self, min_agreement: float) -> int:
        """The first layer from which on freezing agrees on at least `min_agreement`, in it and all later."""
        unsafe = [row.layer for row in self.layers[:-1] if row.frozen_agreement < min_agreement]
        return unsafe[-1] + 1 if unsafe else 0


def measure(
    model: SptsModel,
    prompts: Sequence[Sequence[int]],
    method: Method,
    *,
    live_tokens: int = 32,
    progress: Callable[[], object] | None = None,
) -> Safety:
    """Both curves over `prompts`, each at least one token; `progress()` after each prompt.

    live_tokens: per prompt, spread over its second half, the last token among them. Raises as
    `SptsModel.prefill`.
    """
    schedule = method.schedule_for(len(model.layers))
    for prompt in prompts:
        model.check(prompt, method, 0)
    agree, kl, coverage, correlation = [], [], [], []
    method_agree, method_kl = [], []
    for prompt in prompts:
        live = spread(len(prompt) // 2, len(prompt), live_tokens)
        frozen = run_frozen(model, prompt, live)
        pairs = [compare(frozen.dense_LV, logits_LV) for logits_LV in frozen.frozen_LV]
        kl.append(torch.stack([kl_L for kl_L, _ in pairs]))
        agree.append(torch.stack([rank_L == 1 for _, rank_L in pairs]).double())
        dense = run_dense(model, prompt)
        ran = model.prefill(prompt, method, trace=True)
        assert ran.trace is not None
        coverage.append(
            [
                float(attention_N[trace.attention_tokens.to(model.device)].sum())
                for attention_N, trace in zip(dense.attention_N, ran.trace, strict=True)
            ]
        )
        correlation.append(dense.proxy_correlation)
        kl_1, rank_1 = compare(dense.logits_V[None], ran.logits[None])
        method_agree.append(float(rank_1 == 1))
        method_kl.append(float(kl_1))
        if progress is not None:
            progress()
    agree_l, kl_l = torch.cat(agree, dim=1).mean(dim=1), torch.cat(kl, dim=1).mean(dim=1)
    rows = [
        LayerSafety(
            layer=layer,
            active_tokens=schedule.active_tokens(layer),
            frozen_agreement=float(agree_l[layer]),
            frozen_kl_nats=float(kl_l[layer]),
            coverage=sum(each[layer] for each in coverage) / len(prompts),
            proxy_correlation=_mean_or_none([each[layer] for each in correlation]),
        )
        for layer in range(len(model.layers))
    ]
    return Safety(
        layers=tuple(rows),
        method_agreement=sum(method_agree) / len(prompts),
        method_kl_nats=sum(method_kl) / len(prompts),
        num_live=sum(part.shape[1] for part in agree),
        num_prompts=len(prompts),
    )


def spread(start: int, stop: int, count: int) -> list[int]:
    """At most `count` of start … stop - 1, evenly apart, the last always: spread(4, 10, 3) is [5, 7, 9]."""
    count = min(count, stop - start)
    return [stop - 1 - (stop - start) * i // count for i in reversed(range(count))]


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
