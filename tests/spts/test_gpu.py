"""The whole model on a GPU: equal to the CPU, and no layer waits for the host."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spts.methods import Dense, Method, Random, Recency, Spts
from spts.model import SptsModel
from spts.schedule import Schedule, Stage
from tests.spts.tiny import FINGERPRINT, ample_schedule, prompt, spts_model, transformers_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SCHEDULE = Schedule(
    num_layers=6,
    first_skip_layer=1,
    stages=(
        Stage(last_layer=2, active_tokens=150, keep_tokens=120),
        Stage(last_layer=4, active_tokens=60, keep_tokens=40),
    ),
)


@pytest.fixture(scope="module")
def models() -> tuple[SptsModel, SptsModel]:
    """The same model on the CPU and on the GPU, with the same proxies."""
    hf_model = transformers_model("llama")
    here = spts_model(hf_model, first_layer=0)
    there = transformers_model("llama")
    there.load_state_dict(hf_model.state_dict())
    return here, SptsModel(there.cuda(), fingerprint=FINGERPRINT, proxies=here.proxies)


SPARSE = replace(SCHEDULE, first_skip_layer=2, attention_density=0.7)


@pytest.mark.parametrize(
    "method",
    [
        Dense(),
        Spts(schedule=ample_schedule(6, 300)),
        Spts(schedule=replace(Schedule.dense(6), attention_density=0.1)),  # of 300 tokens it reads all
    ],
    ids=["dense", "full", "sparse"],
)
def test_a_gpu_answers_as_the_cpu(models, method):
    here, there = models
    token_ids = prompt(300)
    expected, found = (model.prefill(token_ids, method, max_new_tokens=3) for model in models)
    torch.testing.assert_close(found.logits.cpu(), expected.logits, rtol=1e-3, atol=1e-3)
    for token in (5, 6, 7):
        logits_BV = [
            model.decode_step(torch.tensor([token]), [prefill.cache]).cpu()
            for model, prefill in ((here, expected), (there, found))
        ]
        torch.testing.assert_close(logits_BV[1], logits_BV[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "method",
    [Spts(schedule=SCHEDULE), Recency(schedule=SCHEDULE), Spts(schedule=SPARSE)],
    ids=["spts", "recency", "sparse"],
)
def test_no_layer_waits_for_the_host(models, method):
    _, there = models
    there.prefill(prompt(700), method)  # what is compiled at first use is compiled
    state = there.start_prefill(prompt(700), method)
    torch.cuda.set_sync_debug_mode("error")
    try:
        while state.next_layer < 5:  # the last layer's slice ends the prefill, which asks for NaN
            there.advance(state, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert there.advance(state)


def test_a_gpu_chooses_as_the_cpu_where_rounding_has_no_say(models):
    token_ids = prompt(300)
    methods: list[Method] = [Recency(schedule=SCHEDULE), Random(schedule=SCHEDULE)]
    for method in methods:
        expected, found = (model.prefill(token_ids, method, trace=True) for model in models)
        assert expected.trace is not None and found.trace is not None
        for a, b in zip(expected.trace, found.trace, strict=True):
            assert torch.equal(a.attention_tokens, b.attention_tokens)
            assert torch.equal(a.ffn_tokens, b.ffn_tokens)
        torch.testing.assert_close(found.logits.cpu(), expected.logits, rtol=1e-3, atol=1e-3)


def test_graphs_answer_as_the_cpu_whoever_is_in_the_batch(models):
    """Requests of different lengths and methods, in and out of the batch; each size is captured once."""
    requests: list[tuple[list[int], Method]] = [
        (prompt(300), Recency(schedule=SCHEDULE)),
        (prompt(3), Dense()),
        (prompt(700), Dense()),
        (prompt(200), Recency(schedule=SCHEDULE)),
        (prompt(64), Dense()),
    ]
    here, there = models
    theirs, ours = (
        [model.prefill(ids, method, max_new_tokens=12).cache for ids, method in requests] for model in models
    )
    answers = []
    for chosen in ([0, 1, 2], [4, 3, 2, 1, 0], [2, 0], [3], [1, 4], [0, 1, 2, 3], [4], [3, 4, 0, 1, 2]):
        token_ids = torch.tensor(prompt(len(chosen)))
        expected = here.decode_step(token_ids, [theirs[i] for i in chosen])
        answers.append((there.decode_step(token_ids, [ours[i] for i in chosen]), expected))
    for found, expected in answers:  # after the last step: an answer outlives those that follow
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)
    assert there._graphs is not None and sorted(there._graphs._sizes) == [1, 2, 4, 8]


def test_greedy_answers_are_the_cpus(models):
    token_ids = prompt(300)
    expected, found = (
        model.generate(token_ids, Recency(schedule=SCHEDULE), 40).token_ids for model in models
    )
    assert found == expected


def test_a_captured_step_does_not_wait_for_the_host(models):
    _, there = models
    cache = there.prefill(prompt(300), Dense(), max_new_tokens=4).cache
    token_ids = torch.tensor([5])
    there.decode_step(token_ids, [cache])  # captured
    torch.cuda.set_sync_debug_mode("error")
    try:
        there.decode_step(token_ids, [cache])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("flops", [3 * 10**7, None])
def test_sparse_attention_on_a_gpu_is_the_same_in_slices_and_on_a_document(models, flops):
    """Not compared with the CPU: a near tie may choose another block there."""
    _, there = models
    method, document = Spts(schedule=SPARSE), prompt(900)
    first = there.start_prefill(document, method, keep_prefix=640)
    while not there.advance(first):
        pass
    token_ids = document[:700] + prompt(200)
    whole = there.prefill(token_ids, method)
    for state in (
        there.start_prefill(token_ids, method),
        there.start_prefill(token_ids, method, prefix=first.kept),
    ):
        while not there.advance(state, flops):
            pass
        assert state.result is not None
        for layer in range(2):
            for ours, theirs in zip(
                state.cache.layers[layer].rows(), whole.cache.layers[layer].rows(), strict=True
            ):
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
