"""One decoder layer under token skipping: the whole method of arXiv 2601.13155 on one screen.

    probe -> select -> gather -> attend -> scatter | score -> select -> gather -> FFN -> scatter | cut

The residual stream holds the candidates only: rows in prompt order, the last one the last prompt token. Head
counts are read off the tensors, so the same lines run on one rank or on several.

Legend: T candidates, M active, N prompt tokens, B requests, D width, H query heads on this rank, K key/value
heads on this rank, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spts.cache import LayerCache
from spts.collective import Collective
from spts.cost import LayerWork
from spts.kernels import dispatch as ops
from spts.methods import Method
from spts.probe import attention_scores
from spts.proxy import LayerProxy, ffn_norms
from spts.select import select


@dataclass(frozen=True, kw_only=True)
class LayerTrace:
    """What a layer chose, as original prompt positions (int64, ascending, on the CPU)."""

    layer: int
    candidates: Tensor
    probe_scores: Tensor | None
    attention_tokens: Tensor
    ffn_tokens: Tensor


@dataclass(kw_only=True)
class Stream:
    """The residual stream between layers: one row per candidate, with its position and its rotation.

    has_nan: whether a choice met a score that is NaN; on the device, so that no layer waits for it.
    """

    x_TD: Tensor
    positions_T: Tensor
    cos_Td: Tensor
    sin_Td: Tensor
    has_nan: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.has_nan = torch.zeros((), dtype=torch.bool, device=self.x_TD.device)

    def rows(self, start: int, stop: int) -> Stream:
        """Rows `start` to `stop` as views: what changes in them changes here."""
        part = slice(start, stop)
        return Stream(
            x_TD=self.x_TD[part],
            positions_T=self.positions_T[part],
            cos_Td=self.cos_Td[part],
            sin_Td=self.sin_Td[part],
        )

    def cut(self, index_M: Tensor) -> None:
        """Drops every candidate but `index_M` for good."""
        self.x_TD = ops.gather_rows(self.x_TD, index_M)
        self.positions_T = ops.gather_rows(self.positions_T, index_M)
        self.cos_Td = ops.gather_rows(self.cos_Td, index_M)
        self.sin_Td = ops.gather_rows(self.sin_Td, index_M)


class DecoderLayer:
    """A layer of a Hugging Face model, walked by us: its modules are called, none is changed."""

    def __init__(
        self,
        block: Any,
        *,
        index: int,
        num_heads: int,
        head_dim: int,
        collective: Collective,
        proxy: LayerProxy | None,
    ) -> None:
        self.block = block
        self.index = index
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.scale = float(block.self_attn.scaling)
        self.collective = collective
        self.proxy = proxy
        self._q_norm = getattr(block.self_attn, "q_norm", None)
        self._k_norm = getattr(block.self_attn, "k_norm", None)

    def prefill(
        self,
        stream: Stream,
        cache: LayerCache,
        *,
        method: Method,
        active_tokens: int | None,
        keep_tokens: int | None,
        recent_tokens: int,
        trace: bool,
    ) -> tuple[LayerWork, LayerTrace | None]:
        """Runs the layer on the candidates in `stream`, in place, and fills `cache` with the active tokens.

        `active_tokens` is the budget of the attention and of the FFN, None for all; `keep_tokens` the number
        of candidates left afterwards, None for all; both include the last `recent_tokens`. Budgets of at
        least T cost nothing extra: the layer runs dense.
        """
        num_candidates = stream.x_TD.shape[0]
        num_active = min(active_tokens or num_candidates, num_candidates)
        num_kept = min(keep_tokens or num_candidates, num_candidates)
        skips, cuts = num_active < num_candidates, num_kept < num_candidates
        positions_T = stream.positions_T
        signals = Signals(self, stream, probes=method.probes if skips or cuts else 0)

        choose = partial(select, collective=self.collective, has_nan=stream.has_nan, recent=recent_tokens)

        attention_M = ffn_M = None
        if skips:
            attention_M = choose(method.attention_scores(signals), num_active)
        self._attend(stream, signals, attention_M, cache)
        ffn_T = method.ffn_scores(signals) if skips else None
        if ffn_T is not None:
            ffn_M = choose(ffn_T, num_active)
        self._feed_forward(stream, signals, ffn_M)
        if cuts:
            stream.cut(choose(method.prune_scores(signals), num_kept))

        work = LayerWork(
            candidates=num_candidates,
            attention_tokens=num_active,
            ffn_tokens=num_candidates if ffn_M is None else num_active,
            probe_tokens=signals.probe_tokens if signals.probed else 0,
            proxied=signals.scored_ffn,
        )
        if not trace:
            return work, None
        return work, LayerTrace(
            layer=self.index,
            candidates=positions_T.cpu(),
            probe_scores=signals.attention().cpu() if signals.probed else None,
            attention_tokens=_take(positions_T, attention_M).cpu(),
            ffn_tokens=_take(positions_T, ffn_M).cpu(),
        )

    def dense(
        self, stream: Stream, cache: LayerCache, positions_P: Tensor | None = None, density: float = 1.0
    ) -> Tensor:
        """Runs the layer on every row of `stream` (changed in place) and returns its FFN's input, [T, D].

        The rows are a prompt, the first part of one whose tokens are at `positions_P`, or what comes after
        the tokens that `cache` holds. density: share of the blocks of keys that they read; below 1 `cache`
        holds whole blocks.
        """
        self._attend(stream, Signals(self, stream, probes=0), None, cache, positions_P, density)
        y_TD = _normed(self.block.post_attention_layernorm, stream.x_TD)
        stream.x_TD.add_(self.feed_forward(y_TD))
        return y_TD

    def decode(
        self,
        x_BD: Tensor,
        cos_Bd: Tensor,
        sin_Bd: Tensor,
        held: Sequence[tuple[Tensor, Tensor]],
        table_B3: Tensor,
    ) -> Tensor:
        """Runs the layer on one new token of each request and returns `x_BD`, changed in place.

        The linears run once for the batch; the attention of each request reads its own cache of this layer
        and stores the new token there. `held` and `table_B3` say where: see `kernels.reference`.
        """
        h_BD = _normed(self.block.input_layernorm, x_BD)
        out_BHd = ops.ragged_attention(
            self.queries(h_BD, cos_Bd, sin_Bd),
            self.keys(h_BD, cos_Bd, sin_Bd),
            self.values(h_BD),
            held,
            table_B3,
            self.scale,
        )
        x_BD.add_(self.block.self_attn.o_proj(out_BHd.flatten(1)))
        return x_BD.add_(self.feed_forward(_normed(self.block.post_attention_layernorm, x_BD)))

    def queries(self, h_TD: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
        """Queries after RoPE, [T, H, d], of normed rows `h_TD`."""
        q_THd = self.block.self_attn.q_proj(h_TD).view(h_TD.shape[0], -1, self.head_dim)
        return ops.rotate_in_place(q_THd if self._q_norm is None else self._q_norm(q_THd), cos_Td, sin_Td)

    def keys(self, h_TD: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
        """Keys after RoPE, [T, K, d], of normed rows `h_TD`."""
        k_TKd = self.block.self_attn.k_proj(h_TD).view(h_TD.shape[0], -1, self.head_dim)
        return ops.rotate_in_place(k_TKd if self._k_norm is None else self._k_norm(k_TKd), cos_Td, sin_Td)

    def values(self, h_TD: Tensor) -> Tensor:
        """Values, [T, K, d], of normed rows `h_TD`."""
        return self.block.self_attn.v_proj(h_TD).view(h_TD.shape[0], -1, self.head_dim)

    def feed_forward(self, y_TD: Tensor) -> Tensor:
        """Output of the FFN for normed rows `y_TD`, [T, D]; on several ranks already their sum."""
        mlp = self.block.mlp
        return mlp.down_proj(ops.gated_product(mlp.gate_proj(y_TD), mlp.up_proj(y_TD), mlp.act_fn))

    def _attend(
        self,
        stream: Stream,
        signals: Signals,
        active_M: Tensor | None,
        cache: LayerCache,
        positions_P: Tensor | None = None,
        density: float = 1.0,
    ) -> None:
        cos_Md, sin_Md = _take(stream.cos_Td, active_M), _take(stream.sin_Td, active_M)
        if signals.probe_tokens:
            h_MD, k_MKd = (
                _take(signals.attention_input(), active_M),
                _take(signals.candidate_keys(), active_M),
            )
        else:
            h_MD = _normed(self.block.input_layernorm, _take(stream.x_TD, active_M))
            k_MKd = self.keys(h_MD, cos_Md, sin_Md)
        if positions_P is None:
            positions_P = _take(stream.positions_T, active_M)
        k_LKd, v_LKd = cache.store(k_MKd, self.values(h_MD), positions_P)
        q_MHd = self.queries(h_MD, cos_Md, sin_Md)
        if density < 1:
            out_MHd = ops.sparse_attention(q_MHd, k_LKd, v_LKd, self.scale, density)
        else:
            out_MHd = ops.causal_attention(q_MHd, k_LKd, v_LKd, self.scale)
        _add(stream.x_TD, active_M, self.block.self_attn.o_proj(out_MHd.flatten(1)))
        signals.attended = True

    def _feed_forward(self, stream: Stream, signals: Signals, active_M: Tensor | None) -> None:
        if signals.scored_ffn:
            y_MD = _take(signals.ffn_input(), active_M)
        else:
            y_MD = _normed(self.block.post_attention_layernorm, _take(stream.x_TD, active_M))
        _add(stream.x_TD, active_M, self.feed_forward(y_MD))


class Signals:
    """What a method may ask about a layer's candidates; computed when first asked for and kept.

    A method that never probes costs no keys of skipped tokens, one that never asks for FFN norms no proxy.
    """

    def __init__(self, layer: DecoderLayer, stream: Stream, *, probes: int) -> None:
        self.probe_tokens = min(probes, stream.x_TD.shape[0])
        self.attended = False
        self.positions = stream.positions_T
        self._layer = layer
        self._stream = stream
        self._attention_input_TD: Tensor | None = None
        self._keys_TKd: Tensor | None = None
        self._attention_T: Tensor | None = None
        self._ffn_input_TD: Tensor | None = None
        self._ffn_norm_T: Tensor | None = None

    @property
    def probed(self) -> bool:
        """Whether the probe has run."""
        return self._attention_T is not None

    @property
    def scored_ffn(self) -> bool:
        """Whether the proxy has run."""
        return self._ffn_norm_T is not None

    def attention(self) -> Tensor:
        """PAP: mean attention over the candidates, of all heads and the last `probe_tokens`, float32 [T]."""
        if self._attention_T is None:
            layer, stream = self._layer, self._stream
            assert self.probe_tokens, "a method that asks for attention scores says so in `probes`"
            last = slice(-self.probe_tokens, None)
            q_QHd = layer.queries(self.attention_input()[last], stream.cos_Td[last], stream.sin_Td[last])
            self._attention_T = attention_scores(
                q_QHd,
                self.candidate_keys(),
                scale=layer.scale,
                num_heads=layer.num_heads,
                collective=layer.collective,
            )
        return self._attention_T

    def ffn_norm(self) -> Tensor:
        """LTP: the proxy's estimate of the norm of the FFN's output, float32 [T]."""
        if self._ffn_norm_T is None:
            layer = self._layer
            assert layer.proxy is not None, "a method that asks for FFN norms says so in `needs_proxies`"
            self._ffn_norm_T = ffn_norms(
                self.ffn_input(), layer.proxy, activation=layer.block.mlp.act_fn, collective=layer.collective
            )
        return self._ffn_norm_T

    def random(self, seed: int) -> Tensor:
        """Uniform noise in [0, 1), float32 [T], fixed by seed, layer, prompt length and position."""
        generator = torch.Generator().manual_seed((seed * 1_000_003 + self._layer.index) % 2**63)
        noise_N = torch.rand(int(self.positions[-1]) + 1, generator=generator)
        return noise_N.to(self.positions.device)[self.positions]

    def attention_input(self) -> Tensor:
        """Normed rows entering the attention, [T, D]."""
        if self._attention_input_TD is None:
            assert not self.attended, "the rows before attention are gone"
            self._attention_input_TD = _normed(self._layer.block.input_layernorm, self._stream.x_TD)
        return self._attention_input_TD

    def candidate_keys(self) -> Tensor:
        """Keys of all candidates after RoPE, [T, K, d]."""
        if self._keys_TKd is None:
            stream = self._stream
            self._keys_TKd = self._layer.keys(self.attention_input(), stream.cos_Td, stream.sin_Td)
        return self._keys_TKd

    def ffn_input(self) -> Tensor:
        """Normed rows entering the FFN, [T, D]."""
        if self._ffn_input_TD is None:
            assert self.attended, "the rows entering the FFN come after attention"
            self._ffn_input_TD = _normed(self._layer.block.post_attention_layernorm, self._stream.x_TD)
        return self._ffn_input_TD


def _normed(norm: Any, x_TD: Tensor) -> Tensor:
    return ops.rms_norm(x_TD, norm.weight, norm.variance_epsilon)


def _take(x_TD: Tensor, index_M: Tensor | None) -> Tensor:
    return x_TD if index_M is None else ops.gather_rows(x_TD, index_M)


def _add(x_TD: Tensor, index_M: Tensor | None, delta_MD: Tensor) -> None:
    if index_M is None:
        x_TD.add_(delta_MD)
    else:
        ops.add_rows_in_place(x_TD, index_M, delta_MD)
