"""SPTS as the paper words it, slowly: every layer over all N tokens in float64, skipping by masks.

Independent of the code under test: it reads the weights of the transformers model and imports nothing that
computes from `spts`. The tokens that run are taken from a trace, so that rounding cannot tip a near tie;
every choice is checked to be a top-M choice by the reference's own scores.

Legend: N prompt tokens, D width, H query heads, K key/value heads, d head size, F FFN inner size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spts.cache import RaggedCache
from spts.layer import LayerTrace
from spts.proxy import Proxies
from spts.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class LayerReference:
    """One layer: keys (after RoPE) and values of all tokens, [N, K, d], and the scores, [N], if any."""

    keys: Tensor
    values: Tensor
    attention_scores: Tensor
    ffn_scores: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Logits of the last token, float64 [V], and every layer."""

    logits: Tensor
    layers: list[LayerReference]


class MaskedReference:
    """The reference for one transformers model (copied to float64) and its proxies."""

    def __init__(self, hf_model: Any, proxies: Proxies | None) -> None:
        self.model = copy.deepcopy(hf_model).double()
        self.config = hf_model.config
        self.proxies = proxies
        self.head_dim = hf_model.model.layers[0].self_attn.head_dim

    @torch.no_grad()
    def run(
        self,
        token_ids: Sequence[int],
        schedule: Schedule,
        trace: Sequence[LayerTrace],
        method: str,
        *,
        probe_tokens: int = 1,
        ffn_score: str = "product",
    ) -> Reference:
        """Replays the choices in `trace` and asserts of each: size, order, last token, top of the scores."""
        num_tokens = len(token_ids)
        recent = schedule.recent_tokens
        x_ND = self.model.model.embed_tokens(torch.tensor(token_ids))
        alive_N = torch.ones(num_tokens, dtype=torch.bool)
        layers = []
        for index, block in enumerate(self.model.model.layers):
            chosen = trace[index]
            assert chosen.layer == index
            assert chosen.candidates.tolist() == alive_N.nonzero().flatten().tolist()
            h_ND = self._norm(block.input_layernorm, x_ND)
            q_NHd, k_NKd, v_NKd = self._project(block.self_attn, h_ND)
            probe_N = self._probe(q_NHd, k_NKd, alive_N, probe_tokens)
            attends_N = self._chosen(chosen.attention_tokens, alive_N, schedule.active_tokens(index), recent)
            scores_N = probe_N if method == "spts" else torch.arange(num_tokens, dtype=torch.float64)
            if method != "random":
                _assert_top(scores_N, attends_N, alive_N, recent)
            x_ND = x_ND + self._attention(block.self_attn, q_NHd, k_NKd, v_NKd, attends_N)

            y_ND = self._norm(block.post_attention_layernorm, x_ND)
            fed = None if ffn_score == "dense" else schedule.active_tokens(index)
            feeds_N = self._chosen(chosen.ffn_tokens, alive_N, fed, recent)
            ffn_N = None
            if method == "spts" and feeds_N.sum() < alive_N.sum():
                ffn_N = probe_N * (self._proxy_norm(index, block.mlp, y_ND) if ffn_score == "product" else 1)
                _assert_top(ffn_N, feeds_N, alive_N, recent)
            elif method == "recency":
                _assert_top(scores_N, feeds_N, alive_N, recent)
            x_ND = x_ND + feeds_N[:, None] * self._ffn(block.mlp, y_ND)

            if index + 1 < len(trace):
                left_N = torch.zeros_like(alive_N)
                left_N[trace[index + 1].candidates] = True
                keep = schedule.keep_tokens(index)
                expected = int(alive_N.sum()) if keep is None else min(keep, int(alive_N.sum()))
                assert int(left_N.sum()) == expected
                assert not (left_N & ~alive_N).any(), "a pruned token came back"
                assert left_N[-recent:].all()
                if method != "random":
                    _assert_top(scores_N, left_N, alive_N, recent)
            else:
                left_N = alive_N
            layers.append(
                LayerReference(keys=k_NKd, values=v_NKd, attention_scores=probe_N, ffn_scores=ffn_N)
            )
            alive_N = left_N
        logits_V = self.model.lm_head(self._norm(self.model.model.norm, x_ND[-1]))
        return Reference(logits=logits_V, layers=layers)

    @torch.no_grad()
    def decode(self, token_id: int, cache: RaggedCache) -> Tensor:
        """Logits, float64 [V], of one more token over what each layer of `cache` holds; only reads it."""
        x_1D = self.model.model.embed_tokens(torch.tensor([token_id]))
        for index, block in enumerate(self.model.model.layers):
            held_k, held_v = (rows.double() for rows in cache.layers[index].rows())
            h_1D = self._norm(block.input_layernorm, x_1D)
            q_1Hd, k_1Kd, v_1Kd = self._project(block.self_attn, h_1D, first_position=cache.next_position)
            k_LKd, v_LKd = torch.cat((held_k, k_1Kd)), torch.cat((held_v, v_1Kd))
            group = q_1Hd.shape[1] // k_LKd.shape[1]
            heads = []
            for head in range(q_1Hd.shape[1]):
                logits_L = (k_LKd[:, head // group] @ q_1Hd[0, head]) / self.head_dim**0.5
                heads.append(logits_L.softmax(dim=-1) @ v_LKd[:, head // group])
            x_1D = x_1D + self._linear(block.self_attn.o_proj, torch.cat(heads)[None])
            x_1D = x_1D + self._ffn(block.mlp, self._norm(block.post_attention_layernorm, x_1D))
        logits_V: Tensor = self.model.lm_head(self._norm(self.model.model.norm, x_1D[0]))
        return logits_V

    def _linear(self, linear: Any, x: Tensor) -> Tensor:
        out: Tensor = x @ linear.weight.T
        return out if linear.bias is None else out + linear.bias

    def _chosen(self, tokens: Tensor, alive_N: Tensor, budget: int | None, recent: int) -> Tensor:
        ascending = tokens.tolist()
        assert ascending == sorted(set(ascending))
        last = list(range(alive_N.shape[0]))[-recent:]
        assert ascending[-len(last) :] == last, "the recent tokens are always active"
        alive = int(alive_N.sum())
        assert len(ascending) == (alive if budget is None else min(budget, alive))
        mask_N = torch.zeros_like(alive_N)
        mask_N[tokens] = True
        assert not (mask_N & ~alive_N).any()
        return mask_N

    def _norm(self, norm: Any, x: Tensor) -> Tensor:
        scale = (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
        return x * scale * norm.weight

    def _rotate(self, x_NHd: Tensor, first_position: int) -> Tensor:
        """RoPE by complex numbers: dimensions i and i + d/2 of a head are one, turned by its angle."""
        rotary = self.model.model.rotary_emb
        inv_freq = type(rotary)(config=self.config).inv_freq.double()
        positions_N = first_position + torch.arange(x_NHd.shape[0], dtype=torch.float64)
        angles = positions_N[:, None] * inv_freq
        turn = torch.polar(torch.full_like(angles, float(rotary.attention_scaling)), angles)[:, None, :]
        half = x_NHd.shape[-1] // 2
        turned = torch.complex(x_NHd[..., :half].contiguous(), x_NHd[..., half:].contiguous()) * turn
        return torch.cat((turned.real, turned.imag), dim=-1)

    def _project(
        self, attention: Any, h_ND: Tensor, *, first_position: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            self._linear(linear, h_ND).unflatten(-1, (-1, self.head_dim))
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "q_norm"):
            q, k = self._norm(attention.q_norm, q), self._norm(attention.k_norm, k)
        return self._rotate(q, first_position), self._rotate(k, first_position), v

    def _probe(self, q_NHd: Tensor, k_NKd: Tensor, alive_N: Tensor, num_queries: int) -> Tensor:
        total_N = torch.zeros(k_NKd.shape[0], dtype=torch.float64)
        group = q_NHd.shape[1] // k_NKd.shape[1]
        asking = alive_N.nonzero().flatten()[-num_queries:].tolist()
        for query in asking:
            visible_N = alive_N & (torch.arange(len(alive_N)) <= query)
            for head, q_d in enumerate(q_NHd[query]):
                logits_N = (k_NKd[:, head // group] @ q_d) / self.head_dim**0.5
                total_N += logits_N.masked_fill(~visible_N, -torch.inf).softmax(dim=-1)
        return total_N / (q_NHd.shape[1] * len(asking))

    def _attention(self, attention: Any, q: Tensor, k: Tensor, v: Tensor, active_N: Tensor) -> Tensor:
        num_tokens, num_heads = q.shape[:2]
        group = num_heads // k.shape[1]
        visible_NN = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril() & active_N[None, :]
        heads = []
        for head in range(num_heads):
            logits_NN = (q[:, head] @ k[:, head // group].T) / self.head_dim**0.5
            weights_NN = logits_NN.masked_fill(~visible_NN, -torch.inf).softmax(dim=-1).nan_to_num()
            heads.append(weights_NN @ v[:, head // group])
        return self._linear(attention.o_proj, torch.cat(heads, dim=-1)) * active_N[:, None]

    def _ffn(self, mlp: Any, y_ND: Tensor) -> Tensor:
        gate_NF, up_NF = self._linear(mlp.gate_proj, y_ND), self._linear(mlp.up_proj, y_ND)
        return self._linear(mlp.down_proj, gate_NF * gate_NF.sigmoid() * up_NF)

    def _proxy_norm(self, index: int, mlp: Any, y_ND: Tensor) -> Tensor:
        assert self.proxies is not None
        proxy = self.proxies.layers[index]
        rank = proxy.gate_rC.shape[0]
        gate = y_ND @ proxy.first_D2r[:, :rank].double() @ proxy.gate_rC.double()
        up = y_ND @ proxy.first_D2r[:, rank:].double() @ proxy.up_rC.double()
        return ((gate * gate.sigmoid() * up) @ proxy.down_Cr.double()).norm(dim=-1)


def _assert_top(scores_N: Tensor, chosen_N: Tensor, alive_N: Tensor, recent: int) -> None:
    """No token left out scores above a chosen one, the forced last ones and float32's rounding aside."""
    left_out_N = alive_N & ~chosen_N
    free_N = chosen_N.clone()
    free_N[-recent:] = False
    if left_out_N.any() and free_N.any():
        best, worst = float(scores_N[left_out_N].max()), float(scores_N[free_N].min())
        assert best <= worst * (1 + 1e-4) + 1e-12, (best, worst)
