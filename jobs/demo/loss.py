"""The demo model's forward pass in training, with windows, and its losses, on middle layers too.

What a small model must be taught on purpose, so that it can show what token skipping does, is where in depth
it retrieves (docs/demo_model.md):

- In windowed phases, layers below FIRST_GLOBAL_LAYER see only the last WINDOW tokens. So the needles' own
  tokens learn early what they say, and nobody looks at them from afar before FIRST_GLOBAL_LAYER.
- The language-model head is also put on SUPERVISED_LAYERS at the answers, so that lookups are done by then.

Shapes: B sequences, N tokens, D hidden size, H heads, K key/value heads, d head size, S supervised tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, apply_rotary_pos_emb

from jobs.demo.batches import IGNORED

FIRST_GLOBAL_LAYER = 4
WINDOW = 32
SUPERVISED_LAYERS = (6, 8)
SUPERVISED_WEIGHT = 0.5
TEXT_SHARE = 4  # the text loss reads one token in so many


class Losses(NamedTuple):
    """Scalars: loss of the answers, summed over supervised layers; text loss; share of right first tokens."""

    answers: Tensor
    text: Tensor
    accuracy: Tensor


class DemoLoss:
    """Computes the losses of a batch; `compiled` compiles the parts whose shapes do not depend on N.

    `colon` is the last token of a prompt: what follows it is an answer's first token.
    """

    def __init__(self, model: Qwen2ForCausalLM, *, colon: int, compiled: bool) -> None:
        self.model, self.colon = model, colon
        wrap: Callable[[Any], Any] = torch.compile if compiled else lambda function: function
        self.before, self.after = wrap(_before_attention), wrap(_after_attention)
        self.token_losses = wrap(self._token_losses)

    def losses(self, tokens: Tensor, targets: Tensor, *, windowed: bool) -> Losses:
        """Losses of `tokens` int64 [B, N + 1] with the answers in `targets` int64 [B, N], else IGNORED."""
        inputs, (B, N) = tokens[:, :-1], targets.shape
        position = torch.arange(N, device=inputs.device)[None]
        x = self.model.model.embed_tokens(inputs)
        cos, sin = self.model.model.rotary_emb(x, position)
        x, cos, sin = x.flatten(0, 1), cos[0].repeat(B, 1), sin[0].repeat(B, 1)
        place_S = (targets.flatten() != IGNORED).nonzero().squeeze(1)
        wanted_S = targets.flatten()[place_S]
        answers = torch.zeros((), device=x.device)
        for index, layer in enumerate(self.model.model.layers):
            q, k, v = (t.unflatten(0, (B, N)).transpose(1, 2) for t in self.before(layer, x, cos, sin))
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
            if windowed and index < FIRST_GLOBAL_LAYER:
                attended = window_attention(q, k, v, WINDOW)
            else:
                attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = self.after(layer, x, attended.transpose(1, 2).flatten(2).flatten(0, 1))
            if index in SUPERVISED_LAYERS:
                # Not compiled: the number of supervised tokens differs from batch to batch.
                answers = answers + SUPERVISED_WEIGHT * self._token_losses(x[place_S], wanted_S).mean()
        last_SD = x[place_S]
        answers = answers + self._token_losses(last_SD, wanted_S).mean()
        with torch.no_grad():
            right_S = self._logits(last_SD).argmax(-1) == wanted_S
            accuracy = right_S[inputs.flatten()[place_S] == self.colon].float().mean()
        read = torch.randint(0, B * N, (B * N // TEXT_SHARE,), device=x.device)
        text = self.token_losses(x[read], tokens[:, 1:].flatten()[read]).mean()
        return Losses(answers=answers, text=text, accuracy=accuracy)

    def _logits(self, x_SD: Tensor) -> Tensor:
        logits: Tensor = self.model.lm_head(self.model.model.norm(x_SD))
        return logits

    def _token_losses(self, x_SD: Tensor, targets_S: Tensor) -> Tensor:
        return F.cross_entropy(self._logits(x_SD).float(), targets_S, reduction="none")


def _before_attention(
    layer: Qwen2DecoderLayer, x: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B * N, H, d], keys and values [B * N, K, d] of hidden states [B * N, D]."""
    h, attention = layer.input_layernorm(x), layer.self_attn
    q, k, v = (
        proj(h).unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)[None]
        for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = apply_rotary_pos_emb(q, k, cos[None], sin[None])
    return q[0].transpose(0, 1), k[0].transpose(0, 1), v[0].transpose(0, 1)


def _after_attention(layer: Qwen2DecoderLayer, x: Tensor, attended: Tensor) -> Tensor:
    """The layer's output [B * N, D], given its input and what its heads attended to, both [B * N, D]."""
    x = x + layer.self_attn.o_proj(attended)
    return x + layer.mlp(layer.post_attention_layernorm(x))


def window_attention(q_BHNd: Tensor, k_BHNd: Tensor, v_BHNd: Tensor, window: int) -> Tensor:
    """Causal attention over the last `window` tokens, itself included: [B, H, N, d] for N = n * window.

    Each block of `window` queries sees its own block and the one before, so the cost is linear in N. With
    window 2, the query of token 5 sees tokens 4 and 5, that of token 4 sees 3 and 4.

    Raises:
        ValueError: N is no multiple of `window`.
    """
    B, H, N, d = q_BHNd.shape
    if N % window:
        raise ValueError(f"N must be a multiple of window = {window}, got {N}; pad the sequence")
    blocks = N // window

    def pairs(x: Tensor) -> Tensor:
        x = x.reshape(B, -1, blocks, window, d)
        return torch.cat([F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x], dim=3).transpose(1, 2).flatten(0, 1)

    q = q_BHNd.reshape(B, H, blocks, window, d).transpose(1, 2).flatten(0, 1)
    place = torch.arange(2 * window, device=q.device)
    offset = place[window:, None] - place[None]
    visible = ((offset >= 0) & (offset < window)).expand(blocks, 1, window, 2 * window).clone()
    visible[0, :, :, :window] = False
    out = F.scaled_dot_product_attention(
        q, pairs(k_BHNd), pairs(v_BHNd), attn_mask=visible.repeat(B, 1, 1, 1)
    )
    return out.reshape(B, blocks, H, window, d).transpose(1, 2).reshape(B, H, N, d)
