"""One rank's steps on a tiny model in this process: followed tokens, and faults that end one request."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import spts
from cluster.config import EngineConfig
from cluster.protocol import Request, Step, StepOutput
from cluster.stepper import Answer, Prefilling, Running, Stepper
from spts import cost
from spts.cache import RaggedCache
from spts.methods import Dense, Method, Recency, Spts
from spts.request import digest
from spts.sampling import Sampling
from tests.cluster.tiny import NUM_LAYERS, SCHEDULE

SPTS = Spts(schedule=SCHEDULE)


@pytest.fixture(scope="module")
def model(tiny_model):
    return spts.load(tiny_model)


def request(
    token_ids: list[int], method: Method, max_new_tokens: int = 1, *, name: str = "a", **fields: Any
) -> Request:
    return Request(
        request_id=name, token_ids=tuple(token_ids), method=method, max_new_tokens=max_new_tokens, **fields
    )


def prompt(num_tokens: int) -> list[int]:
    return torch.randint(1, 298, (num_tokens,)).tolist()


def run(stepper: Stepper, sent: Request, *, layers: int = NUM_LAYERS) -> StepOutput:
    """The step that ends the prefill of `sent`; its cache is dropped."""
    start: Request | None = sent
    for _ in range(0, NUM_LAYERS, layers):
        output = stepper.step(Step(start=start, advance=(sent.request_id, layers)))
        start = None
    assert output is not None
    stepper.step(Step(release=(sent.request_id,)))
    return output


def test_densely_followed_tokens_agree_exactly(model):
    stepper = Stepper(model, EngineConfig(model="tiny"), 0)
    output = run(stepper, request(prompt(70), Dense(), 4, follow=(3, 0, 3, 9)), layers=2)
    assert [token.token_id for token in output.tokens] == [3, 0, 3, 9]
    agreement = [token.agreement for token in output.tokens]
    assert all(each is not None and (each.kl, each.rank) == (0.0, 1) for each in agreement)


@pytest.mark.parametrize("kept_bytes", [0, 2**20])
def test_a_reference_is_computed_once_where_there_is_room_and_gives_the_same(model, monkeypatch, kept_bytes):
    calls = []

    def follow(token_ids, continuation, method):
        calls.append(continuation)
        return type(model).follow(model, token_ids, continuation, method)

    monkeypatch.setattr(model, "follow", follow)
    stepper = Stepper(model, EngineConfig(model="tiny", reference_cache_bytes=kept_bytes), 0)
    sent = request(prompt(90), SPTS, 3, follow=(3, 4, 5), sampling=Sampling(logprobs=2))
    outputs = [run(stepper, sent) for _ in range(3)]
    assert outputs[0] == outputs[1] == outputs[2]
    assert all(token.logprobs is not None and len(token.logprobs.top) == 2 for token in outputs[0].tokens)
    run(stepper, request(list(sent.token_ids), Dense(), 2, follow=(3, 4)))
    assert calls == ([(3, 4, 5), (3, 4)] if kept_bytes else [(3, 4, 5)] * 3 + [(3, 4)])


def test_ranks_that_choose_nothing_still_compute_and_count_the_reference(model):
    first, other = (Stepper(model, EngineConfig(model="tiny"), rank) for rank in (0, 1))
    sent = request(prompt(50), SPTS, 3, follow=(3, 4, 5))
    run(first, sent)
    assert other.step(Step(start=sent, advance=("a", NUM_LAYERS))) is None
    assert first._references.num_bytes == other._references.num_bytes == 3 * model.vocab_size * 4


def test_a_prefix_is_reused_and_counted(model):
    stepper = Stepper(model, EngineConfig(model="tiny"), 0)
    shared = prompt(100)
    first, then, other = (
        run(stepper, request(shared + prompt(30), SPTS, prefix_tokens=100), layers=layers)
        for layers in (1, 2, 3)
    )
    assert [_reused(each) for each in (first, then, other)] == [0, 100, 100]
    assert first.prefilled is not None
    assert then.prefilled is not None
    assert first.prefilled.reused_flops == 0
    assert then.prefilled.reused_flops == cost.reused_flops(model.shape, 100, SCHEDULE.first_skip_layer)
    same = ("work", "kv_tokens", "kv_bytes", "flops", "dense_flops", "dense_kv_bytes")
    assert all(getattr(first.prefilled, name) == getattr(then.prefilled, name) for name in same)
    assert _reused(run(stepper, request([*shared, 1], SPTS))) == 0, "only if it is asked for"
    assert _reused(run(stepper, request([*shared, 1], SPTS, prefix_tokens=99))) == 0, "only the same tokens"
    assert _reused(run(stepper, request([*shared, 1], Dense(), prefix_tokens=100))) == 0, "and the same depth"
    assert _reused(run(stepper, request([*shared, 1], Recency(schedule=SCHEDULE), prefix_tokens=100))) == 100


def _reused(output: StepOutput) -> int:
    assert output.prefilled is not None
    return output.prefilled.reused_tokens


@pytest.mark.parametrize("rank", [0, 1])
def test_prefixes_are_kept_within_their_bytes(model, rank):
    depth = SCHEDULE.first_skip_layer
    one = cost.prefix_bytes(model.shape, 50, depth, dtype_bytes=4)
    stepper = Stepper(model, EngineConfig(model="tiny", prefix_cache_bytes=2 * one + 1), rank)
    texts = [prompt(50) for _ in range(3)]
    for text in (texts[0], texts[1], texts[0], texts[2]):
        _prefill(stepper, request([*text, 5], SPTS, prefix_tokens=50))
    assert stepper._prefixes.num_bytes == 2 * one
    kept = [stepper._prefixes.get((digest(text), depth)) is not None for text in texts]
    assert kept == [True, False, True]
    _prefill(stepper, request(prompt(120), SPTS, prefix_tokens=110))
    assert stepper._prefixes.num_bytes == 2 * one, "one that is larger than all the room is not kept"


@pytest.mark.parametrize("kept_bytes", [0, 100])
def test_without_room_nothing_is_kept_and_answers_are_as_ever(model, kept_bytes):
    stepper = Stepper(model, EngineConfig(model="tiny", prefix_cache_bytes=kept_bytes), 0)
    token_ids = prompt(80)
    alone = run(stepper, request(token_ids, SPTS))
    for _ in range(2):
        state = stepper.step(Step(start=request(token_ids, SPTS, prefix_tokens=60), advance=("a", 6)))
        assert state is not None
        assert state.tokens == alone.tokens
        assert _reused(state) == 0
    assert stepper._prefixes.num_bytes == 0


def test_a_prefill_that_is_released_halfway_leaves_its_prefix_out(model):
    stepper = Stepper(model, EngineConfig(model="tiny"), 0)
    sent = request(prompt(80), SPTS, prefix_tokens=60)
    stepper.step(Step(start=sent, advance=("a", 3)))
    stepper.step(Step(release=("a",)))
    assert stepper._prefixes.num_bytes == 0
    assert _reused(run(stepper, sent)) == 0
    assert _reused(run(stepper, sent)) == 60


def _prefill(stepper: Stepper, sent: Request) -> None:
    stepper.step(Step(start=sent, advance=(sent.request_id, NUM_LAYERS)))
    stepper.step(Step(release=(sent.request_id,)))


def test_logits_that_are_not_finite_end_their_own_request_only(model):
    stepper, answer = Stepper(model, EngineConfig(model="tiny"), 0), Answer()
    cache = RaggedCache(num_layers=1, prompt_tokens=1, room_tokens=0)
    for name, logits in (("bad", [1.0, float("nan")]), ("good", [1.0, 2.0])):
        running = Running(request=request([1], Dense(), name=name), cache=cache, generator=torch.Generator())
        stepper._choose(running, torch.tensor(logits), answer)
    assert [(request_id, error.kind) for request_id, error in answer.refused] == [("bad", "internal")]
    assert [(token.request_id, token.token_id) for token in answer.tokens] == [("good", 1)]


def test_distributions_that_are_not_finite_cannot_be_compared(model):
    stepper, answer = Stepper(model, EngineConfig(model="tiny"), 0), Answer()
    sent = request([1, 2], Dense(), 1, follow=(1,))
    overflowed = torch.full((1, model.vocab_size), float("nan"))
    stepper._follow(sent, model.prefill([1, 2], Dense()), overflowed, answer)
    assert [(request_id, error.kind) for request_id, error in answer.refused] == [("a", "internal")]
    assert answer.tokens == []


def test_a_prefill_that_overflows_ends_its_own_request_only(model):
    class Overflowing:
        device = model.device

        def advance(self, state, num_layers):
            raise spts.ModelError("scores_T must be numbers, got NaN", field="scores_T")

    overflowing: Any = Overflowing()
    stepper, answer = Stepper(overflowing, EngineConfig(model="tiny"), 0), Answer()
    state: Any = None
    stepper._prefills["bad"] = Prefilling(request=request([1], Dense()), state=state, dense_NV=None)
    stepper._advance("bad", 2, answer)
    assert [(request_id, error.kind) for request_id, error in answer.refused] == [("bad", "internal")]
    assert stepper._prefills == {}
    stepper._advance("bad", 2, answer)
    assert len(answer.refused) == 1
