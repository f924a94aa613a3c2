"""The demo model before training: a Qwen2 whose first layers already hold a circuit that looks words up.

The residual stream has three parts at the start: what a token is, what stands two tokens before it (written
by layer 0) and what stands four before it (written by layer 1). A needle's value stands two tokens after its
key, the end of a prompt four after the key it asks for:

    The code of  falcon  is  amber .  ...  What is the code of  falcon  ?  \\n  Answer  :
                 key         value                              key                     end

So heads that match one part against the other, and copy what the token found is, answer one hop each: the
first of LOOKUP_LAYERS from the end of the prompt, the second from the word that the first one found.

Shapes: D hidden size, d head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from jobs.demo.tokenizer import CONTEXT, END_ID, VOCAB_SIZE

HIDDEN_SIZE = 256
HEAD_SIZE = 64
HEADS_PER_KV = 2
ROPE_THETA = 1e7
TOKEN, TWO_BACK, FOUR_BACK = slice(0, 128), slice(128, 192), slice(192, 256)  # parts of the residual stream
LOOK_BACK = ((1, 2), (2, 4))  # tokens that the key/value heads of layers 0 and 1 look back
LOOK_BACK_AMPLITUDE = 8.0
LOOKUP_LAYERS = (4, 5)
MATCH_GAIN = 2.2
EMBEDDING_STD = 0.06


def new_model(seed: int) -> Qwen2ForCausalLM:
    """A Qwen2 that starts out with the circuit, which training then sharpens and stretches; float32."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=HIDDEN_SIZE,
            intermediate_size=512,
            num_hidden_layers=12,
            num_attention_heads=HIDDEN_SIZE // HEAD_SIZE,
            num_key_value_heads=HIDDEN_SIZE // HEAD_SIZE // HEADS_PER_KV,
            max_position_embeddings=CONTEXT,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=END_ID,
            use_sliding_window=False,
        )
    )
    with torch.no_grad():
        _set_circuit(model)
    return model


def _set_circuit(model: Qwen2ForCausalLM) -> None:
    d, parts = HEAD_SIZE, model.model.embed_tokens.weight
    attention = [layer.self_attn for layer in model.model.layers]
    frequency = ROPE_THETA ** (-torch.arange(0, d, 2) / d)  # radians per token of each pair of channels
    far = (frequency * CONTEXT < 1).nonzero().flatten()  # pairs that hardly turn within the context
    compared = torch.cat([far, far + d // 2])
    identity = nn.init.orthogonal_(torch.empty(d, HIDDEN_SIZE // 2))  # what is copied and compared of a token
    matching = nn.init.orthogonal_(torch.empty(len(compared), d)) * MATCH_GAIN

    parts[:, TOKEN].normal_(std=EMBEDDING_STD)
    parts[:, TOKEN.stop :].normal_(std=EMBEDDING_STD / 10)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(0.1)
        layer.mlp.down_proj.weight.mul_(0.1)
    for index, offsets in enumerate(LOOK_BACK):
        for kv, back in enumerate(offsets):
            _look_back(attention[index], kv, back, frequency)

    _copy(attention[0], head=2, read=identity, write=torch.eye(d), to=TWO_BACK, gain=0.7 * EMBEDDING_STD)
    _copy(attention[1], head=2, read=identity, write=torch.eye(d), to=FOUR_BACK, gain=0.85 * EMBEDDING_STD)
    first, second = (attention[index] for index in LOOKUP_LAYERS)
    for lookup in (first, second):
        lookup.q_proj.weight[compared] = 0
        lookup.k_proj.weight[compared] = 0
        lookup.k_proj.weight[compared, TWO_BACK] = matching
        _copy(lookup, head=0, read=identity, write=identity.T, to=TOKEN, gain=2 * EMBEDDING_STD)
    first.q_proj.weight[compared, FOUR_BACK] = matching
    second.q_proj.weight[compared, TOKEN] = matching @ identity


def _look_back(attention: Qwen2Attention, kv: int, back: int, frequency: Tensor) -> None:
    """Sets the query and key biases of a key/value head and its query heads: they look `back` tokens back.

    With equal keys everywhere and queries turned by `back` positions, the score over the offset m - n is
    sum_i a_i^2 cos((m - n - back) f_i) / sqrt(d), highest at m - n = back.
    """
    d = HEAD_SIZE
    near = LOOK_BACK_AMPLITUDE * (frequency > 1 / 300)  # slower pairs say nothing about near offsets
    query = torch.cat([near * torch.cos(back * frequency), -near * torch.sin(back * frequency)])
    attention.k_proj.bias[kv * d : (kv + 1) * d] = torch.cat([near, torch.zeros(d // 2)])
    attention.q_proj.bias[HEADS_PER_KV * kv * d : HEADS_PER_KV * (kv + 1) * d] = query.repeat(HEADS_PER_KV)


def _copy(
    attention: Qwen2Attention, *, head: int, read: Tensor, write: Tensor, to: slice, gain: float
) -> None:
    """Sets a query head to write `write @ read` of the token it looks at, times `gain`, into one part.

    The other query heads of the same key/value head read the same values and start out silent.
    """
    d, kv = HEAD_SIZE, head // HEADS_PER_KV
    attention.v_proj.weight[kv * d : (kv + 1) * d] = 0
    attention.v_proj.weight[kv * d : (kv + 1) * d, TOKEN] = read
    attention.o_proj.weight[:, HEADS_PER_KV * kv * d : HEADS_PER_KV * (kv + 1) * d] = 0
    attention.o_proj.weight[to, head * d : (head + 1) * d] = gain * write
