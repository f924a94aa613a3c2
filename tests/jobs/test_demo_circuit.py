"""The demo model before training: its circuit looks where it was set to look."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import Qwen2ForCausalLM

from jobs.demo.circuit import HEADS_PER_KV, LOOK_BACK, LOOKUP_LAYERS, new_model
from jobs.tasks import get_task
from jobs.tasks.tokens import PlainTokens
from tests.jobs.short_training import bundled_tokenizer


@pytest.fixture(scope="module")
def untrained() -> Qwen2ForCausalLM:
    model = new_model(0).eval()
    model.set_attn_implementation("eager")  # the one that tells its attention weights
    return model


@pytest.fixture(scope="module", params=[0, 1])
def looked_at(request, untrained):
    """Token ids of a prompt, the key it asks for, and the untrained model's attention weights by layer."""
    tokenizer = bundled_tokenizer()
    sample = next(
        get_task("multikey").samples(
            PlainTokens(tokenizer.backend_tokenizer), length=512, count=1, seed=request.param
        )
    )
    token_ids = tokenizer.encode(sample.prompt)
    with torch.no_grad():
        attentions = untrained(torch.tensor([token_ids]), output_attentions=True).attentions
    asked = re.search(r"of (\w+)\?\nAnswer:$", sample.prompt)
    assert asked is not None
    return token_ids, tokenizer.encode(f" {asked[1]}"), [weights[0] for weights in attentions]


def test_untrained_heads_look_back_by_their_offset(looked_at):
    _, _, attentions = looked_at
    for layer, offsets in enumerate(LOOK_BACK):
        for kv, back in enumerate(offsets):
            for head in range(HEADS_PER_KV * kv, HEADS_PER_KV * (kv + 1)):
                looks = attentions[layer][head].diagonal(-back)
                assert looks[8:].mean() > 0.95, (layer, head, back)


def test_untrained_lookup_head_finds_what_stands_two_after_the_key(looked_at):
    """That is the needle's value, and the line end of the question itself."""
    token_ids, (key,), attentions = looked_at
    places = [place + 2 for place, token in enumerate(token_ids) if token == key]
    assert len(places) == 2
    found = attentions[LOOKUP_LAYERS[0]][0, -1, places]
    assert found.sum() > 0.8
    assert found.min() > 0.1


def test_a_seed_is_a_model(untrained):
    again, other = new_model(0).state_dict(), new_model(1).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in untrained.state_dict().items())
    assert not torch.equal(again["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    assert untrained.num_parameters() == 8_663_296
