"""A prompt on its way through the layers, a slice at a time.

Prompts with skipping layers cannot be computed a few tokens at a time: the probe reads the last token. So a
prefill goes layer by layer, and a slice of it is a number of FLOP. Where a layer runs all its candidates it
may stop between two rows, as in each layer a row depends on earlier rows only; a layer that skips or cuts is
computed at once. It costs its budgets of tokens and, for the probe and the proxy, a few per cent of a dense
layer for each candidate. Where attention is sparse, the queries of a block choose together what they read, so
there a slice ends between two blocks.

Legend: N prompt tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spts.cache import RaggedCache
from spts.cost import LayerWork, ModelShape, ProxyShape, layer_flops, rows_flops, rows_within
from spts.kernels.blocks import BLOCK_TOKENS
from spts.layer import DecoderLayer, LayerTrace, Stream
from spts.methods import Method
from spts.prefix import Prefix
from spts.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Prefill:
    """A prompt computed.

    logits: of its last token, float32 [V]. cache: to decode over. work: what each layer did, in layer order.
    trace: what each layer chose, if asked for.
    """

    logits: Tensor
    cache: RaggedCache
    work: list[LayerWork]
    trace: list[LayerTrace] | None


@dataclass(kw_only=True)
class PrefillState:
    """A prefill that has run `next_layer` layers, and `rows_done` rows of the next one; `result` is there
    when it has run all of them.

    prefix: where the first `reused_tokens` come from, if anywhere, until their rows have joined the others.
    kept: its own first `keep_prefix` tokens for others, once they are there.
    """

    token_ids: Sequence[int]
    method: Method
    schedule: Schedule
    stream: Stream
    cache: RaggedCache
    tracing: bool
    prefix: Prefix | None = None
    reused_tokens: int = 0
    keep_prefix: int = 0
    kept: Prefix | None = None
    next_layer: int = 0
    rows_done: int = 0
    work: list[LayerWork] = field(default_factory=list)
    trace: list[LayerTrace] = field(default_factory=list)
    result: Prefill | None = None

    @property
    def dense_next(self) -> bool:
        """Whether the next layer runs and keeps every candidate."""
        rows, layer = self.stream.x_TD.shape[0], self.next_layer
        budgets = (self.schedule.active_tokens(layer), self.schedule.keep_tokens(layer))
        return layer < self.schedule.first_skip_layer or all((each or rows) >= rows for each in budgets)


class Walker:
    """Takes prefills through the layers of one model.

    layers, shape, fingerprint: the model's. proxy: size of its proxies, if it has some. stream: rows [N, D]
    that begin a prompt as a residual stream.
    """

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        *,
        shape: ModelShape,
        proxy: ProxyShape | None,
        fingerprint: str,
        stream: Callable[[Tensor], Stream],
    ) -> None:
        self._layers = layers
        self._shape = shape
        self._proxy = proxy
        self._fingerprint = fingerprint
        self._stream = stream

    def run(self, state: PrefillState, flops: int | None) -> None:
        """Runs the next layers, stopping before `flops` are exceeded; None = to the end.

        Something is always run: at least one row of a dense layer, or a block of them where attention is
        sparse, or one layer that skips.
        """
        spent = 0
        while state.next_layer < len(self._layers):
            left, begun, layer = None if flops is None else max(0, flops - spent), spent > 0, state.next_layer
            run = self._dense if state.dense_next else self._skip
            cost = run(state, left, begun)
            if cost == 0:
                return
            spent += cost
            if layer < state.next_layer == state.schedule.first_skip_layer:
                self._share(state)

    def _share(self, state: PrefillState) -> None:
        """Where layers begin to see all tokens at once: another prompt's rows come before those of the rest,
        and what others may begin with is copied."""
        prefix, state.prefix = state.prefix, None
        depth, reused_tokens = state.schedule.first_skip_layer, state.reused_tokens
        if prefix is not None and depth < len(self._layers):
            state.stream = self._stream(prefix.joined(reused_tokens, state.stream.x_TD))
        if state.keep_prefix > reused_tokens:
            state.kept = Prefix.copied(
                state.token_ids[: state.keep_prefix],
                before=prefix,
                before_tokens=reused_tokens,
                depth=depth,
                density=state.schedule.attention_density,
                cache=state.cache,
                x_ND=state.stream.x_TD if depth < len(self._layers) else None,
                fingerprint=self._fingerprint,
            )

    def _dense(self, state: PrefillState, flops: int | None, begun: bool) -> int:
        """Rows of the next layer, at most for `flops`; returns what they cost, 0 = they did not fit.

        Fewer than a block are not begun at the end of a slice, and more end with a block: odd lengths are
        slow, and sparse attention stops nowhere else.
        """
        stream, start = state.stream, state.rows_done
        density = state.schedule.density(state.next_layer)
        before = start + (0 if state.prefix is None else state.reused_tokens)
        rows_left = stream.x_TD.shape[0] - start
        rows = rows_left
        if flops is not None:
            block = min(BLOCK_TOKENS, rows_left)
            rows = rows_within(self._shape, before, rows_left, flops, density)
            if block < rows < rows_left:
                rows -= rows % BLOCK_TOKENS
            if begun and rows < block:
                return 0
            rows = max(1 if density == 1 else block, rows)
        layer = self._layers[state.next_layer]
        cache = state.cache.layers[layer.index]
        layer.dense(stream.rows(start, start + rows), cache, stream.positions_T, density)
        state.rows_done += rows
        if state.rows_done == stream.x_TD.shape[0]:
            self._end_dense(state, layer.index)
        return rows_flops(self._shape, before, rows, density)

    def _end_dense(self, state: PrefillState, layer: int) -> None:
        """Reports the layer as it is for the whole prompt, wherever its first rows come from."""
        num_tokens = state.rows_done + (0 if state.prefix is None else state.reused_tokens)
        state.rows_done, state.next_layer = 0, layer + 1
        state.work.append(
            LayerWork(
                candidates=num_tokens,
                attention_tokens=num_tokens,
                ffn_tokens=num_tokens,
                probe_tokens=0,
                proxied=False,
                attention_density=state.schedule.density(layer),
            )
        )
        if state.tracing:
            everyone_T = state.stream.positions_T.cpu()
            if state.prefix is not None:
                everyone_T = torch.arange(num_tokens)
            state.trace.append(
                LayerTrace(
                    layer=layer,
                    candidates=everyone_T,
                    probe_scores=None,
                    attention_tokens=everyone_T,
                    ffn_tokens=everyone_T,
                )
            )

    def _skip(self, state: PrefillState, flops: int | None, begun: bool) -> int:
        """The next layer whole; returns what it cost, 0 = it did not fit into `flops`."""
        layer, schedule = self._layers[state.next_layer], state.schedule
        if begun and flops is not None:
            planned = state.method.planned_work(len(self._layers), len(state.token_ids))[layer.index]
            if layer_flops(self._shape, planned, self._proxy).total > flops:
                return 0
        work, trace = layer.prefill(
            state.stream,
            state.cache.layers[layer.index],
            method=state.method,
            active_tokens=schedule.active_tokens(layer.index),
            keep_tokens=schedule.keep_tokens(layer.index),
            recent_tokens=schedule.recent_tokens,
            trace=state.tracing,
        )
        state.next_layer += 1
        state.work.append(work)
        if trace is not None:
            state.trace.append(trace)
        return layer_flops(self._shape, work, self._proxy).total
