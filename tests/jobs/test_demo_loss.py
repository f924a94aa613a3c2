"""The demo model's losses: those of the model that is served, but for the windows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen2ForCausalLM

from jobs.demo.batches import IGNORED
from jobs.demo.circuit import new_model
from jobs.demo.loss import (
    SUPERVISED_LAYERS,
    SUPERVISED_WEIGHT,
    TEXT_SHARE,
    WINDOW,
    DemoLoss,
    window_attention,
)
from tests.jobs.short_training import batches, bundled_tokenizer


def colon() -> int:
    """The token that an answer follows."""
    token: int = bundled_tokenizer().encode(":")[0]
    return token


@pytest.mark.parametrize(("num_tokens", "window"), [(128, 32), (63, 7), (8, 8), (5, 1)])
def test_window_attention_equals_a_masked_softmax(num_tokens, window):
    q, k, v = (torch.randn(2, 3, num_tokens, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    offset = torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)
    hidden = (offset < 0) | (offset >= window)
    weights = (q @ k.transpose(2, 3) / 8**0.5).masked_fill(hidden, float("-inf")).softmax(-1)
    upstream = torch.randn(2, 3, num_tokens, 8, dtype=torch.float64)
    results = []
    for out in (weights @ v, window_attention(q, k, v, window)):
        results.append((out, *torch.autograd.grad(out, (q, k, v), upstream)))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


def test_window_that_does_not_divide_the_sequence():
    x = torch.randn(1, 1, 63, 8)
    with pytest.raises(ValueError, match="N must be a multiple of window = 32, got 63"):
        window_attention(x, x, x, 32)


@pytest.fixture(scope="module")
def untrained() -> Qwen2ForCausalLM:
    return new_model(0).eval()


@pytest.fixture(scope="module")
def loss(untrained) -> DemoLoss:
    return DemoLoss(untrained, colon=colon(), compiled=False)


def test_losses_are_those_of_the_served_forward(untrained, loss):
    tokens, targets = batches(count=1)[0]
    torch.manual_seed(3)
    losses = loss.losses(tokens, targets, windowed=False)
    out = untrained(tokens[:, :-1], output_hidden_states=True)

    def cross_entropy(logits):
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)

    answers = cross_entropy(out.logits)
    for layer in SUPERVISED_LAYERS:
        logits = untrained.lm_head(untrained.model.norm(out.hidden_states[layer + 1]))
        answers = answers + SUPERVISED_WEIGHT * cross_entropy(logits)
    torch.manual_seed(3)
    read = torch.randint(0, targets.numel(), (targets.numel() // TEXT_SHARE,))
    text = F.cross_entropy(out.logits.flatten(0, 1)[read], tokens[:, 1:].flatten()[read])
    torch.testing.assert_close(losses.answers, answers, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(losses.text, text, atol=1e-4, rtol=1e-5)


def test_accuracy_counts_first_tokens_of_answers():
    """A head that says one noun everywhere is right where that noun is what follows a prompt."""
    tokens, targets = batches(count=1)[0]
    firsts = targets[(targets != IGNORED) & (tokens[:, :-1] == colon())]
    model = new_model(0)
    model.lm_head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.copy_(torch.eye(model.config.vocab_size)[firsts[0]])
    losses = DemoLoss(model, colon=colon(), compiled=False).losses(tokens, targets, windowed=True)
    assert len(firsts) > 1
    assert losses.accuracy == (firsts == firsts[0]).float().mean()


def test_windows_hide_only_what_is_further_away(loss):
    tokens, targets = batches(count=1)[0]
    by_length = {}
    for length in (WINDOW, targets.shape[1]):
        part = tokens[:, -length - 1 :], targets[:, -length:]
        by_length[length] = [loss.losses(*part, windowed=windowed).answers for windowed in (True, False)]
    torch.testing.assert_close(*by_length[WINDOW])
    assert not torch.allclose(*by_length[targets.shape[1]])
