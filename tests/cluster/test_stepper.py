"""One rank's steps on a tiny model in this process: followed tokens, and faults that end one request."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import spts
from cluster.admission import request_bytes
from cluster.config import EngineConfig
from cluster.protocol import Agreement, Request, Step, StepOutput
from cluster.stepper import Answer, Prefilling, Running, Stepper
from spts import cost
from spts.cache import RaggedCache
from spts.methods import Dense, Method, Spts
from spts.sampling import Sampling
from tests.cluster.tiny import SCHEDULE
from tests.fakes import info
from tests.held import Held

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


def run(stepper: Stepper, sent: Request, *, flops: int | None = None, **start: Any) -> StepOutput:
    """The step that ends the prefill of `sent`; its cache is dropped."""
    output = stepper.step(Step(start=sent, advance=(sent.request_id, flops), **start))
    while output is not None and output.prefilled is None:
        output = stepper.step(Step(advance=(sent.request_id, flops)))
    assert output is not None
    stepper.step(Step(release=(sent.request_id,)))
    return output


def test_densely_followed_tokens_agree_exactly(model):
    stepper = Stepper(model, EngineConfig(model="tiny"), 0)
    output = run(stepper, request(prompt(70), Dense(), 4, follow=(3, 0, 3, 9)), flops=10**6)
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
    run(stepper, replace(sent, follow=(3, 4), max_new_tokens=2))
    assert calls == ([(3, 4, 5), (3, 4)] if kept_bytes else [(3, 4, 5)] * 3 + [(3, 4)])


def test_a_dense_request_is_its_own_reference(model, monkeypatch):
    monkeypatch.setattr(model, "follow", None)
    stepper = Stepper(model, EngineConfig(model="tiny"), 0)
    sent = request(prompt(90), Dense(), 3, follow=(3, 4, 5), sampling=Sampling(logprobs=2))
    output = run(stepper, sent)
    assert [token.agreement for token in output.tokens] == [Agreement(kl=0.0, rank=1)] * 3
    assert stepper._references.num_bytes == 0


@pytest.mark.parametrize("method", [Dense(), SPTS], ids=["dense", "spts"])
@pytest.mark.parametrize(("num_tokens", "num_follow"), [(1, 400), (300, 100)])
def test_a_request_that_follows_never_holds_more_than_was_reserved(model, method, num_tokens, num_follow):
    follow = tuple(prompt(num_follow))
    sent = request(prompt(num_tokens), method, num_follow, follow=follow, sampling=Sampling(logprobs=2))
    stepper = Stepper(model, EngineConfig(model="tiny"), 0)
    with Held() as used:
        run(stepper, sent)
    assert used.most <= request_bytes(sent, replace(info(EngineConfig(model="tiny")), shape=model.shape))


def test_ranks_that_choose_nothing_still_compute_and_count_the_reference(model):
    first, other = (Stepper(model, EngineConfig(model="tiny"), rank) for rank in (0, 1))
    sent = request(prompt(50), SPTS, 3, follow=(3, 4, 5))
    run(first, sent)
    assert other.step(Step(start=sent, advance=("a", None))) is None
    assert first._references.num_bytes == other._references.num_bytes == 3 * model.vocab_size * 4


def test_a_document_is_reused_and_counted(model):
    stepper = Stepper(model, EngineConfig(model="tiny"), 0)
    shared = prompt(100)
    first = run(stepper, request(shared + prompt(30), SPTS), keep=(7, 120))
    assert first.kept == 7
    then = run(stepper, request(shared + prompt(60), SPTS), flops=10**6, reuse=(7, 100), keep=(8, 159))
    assert then.kept == 8
    assert first.prefilled is not None
    assert then.prefilled is not None
    assert (first.prefilled.reused_tokens, then.prefilled.reused_tokens) == (0, 100)
    assert first.prefilled.reused_flops == 0
    assert then.prefilled.reused_flops == cost.reused_flops(model.shape, 100, SCHEDULE.first_skip_layer)
    sizes = {
        name: cost.prefix_bytes(model.shape, tokens, SCHEDULE.first_skip_layer, dtype_bytes=4)
        for name, tokens in ((7, 120), (8, 59))
    }
    assert {name: each.num_bytes for name, each in stepper._documents.items()} == sizes
    stepper.step(Step(forget=(7,)))
    assert set(stepper._documents) == {8}
    sent = request([*shared, 1, 2], SPTS)
    fresh = Stepper(model, EngineConfig(model="tiny"), 0)
    assert run(stepper, sent, reuse=(8, 100)).tokens == run(fresh, sent).tokens


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_keeps_what_it_is_told_to_keep(model, rank):
    stepper = Stepper(model, EngineConfig(model="tiny"), rank)
    stepper.step(Step(start=request(prompt(80), Dense()), keep=(3, 70), advance=("a", None)))
    assert {name: each.num_tokens for name, each in stepper._documents.items()} == {3: 70}


def test_a_rank_says_what_it_holds(model):
    stepper = Stepper(model, EngineConfig(model="tiny"), 0)

    def held(**step: Any) -> tuple[int, int]:
        output = stepper.step(Step(**step))
        assert output is not None
        return output.held_requests, output.held_documents

    assert held(start=request(prompt(80), Dense(), 9), keep=(3, 70), advance=("a", 10**6)) == (1, 0)
    assert held(advance=("a", None)) == (1, 1)
    assert held(start=request(prompt(80), SPTS, name="b"), advance=("b", 10**6)) == (2, 1)
    assert held(release=("a",)) == (1, 1)
    assert held(release=("b",), forget=(3,)) == (0, 0)


def test_a_prefill_that_is_released_halfway_leaves_nothing(model):
    stepper = Stepper(model, EngineConfig(model="tiny"), 0)
    stepper.step(Step(start=request(prompt(80), SPTS), keep=(3, 60), advance=("a", 10**6)))
    stepper.step(Step(release=("a",)))
    assert stepper._documents == {}
    assert stepper._prefills == {}


@pytest.mark.parametrize("where", ["start_prefill", "advance"])
def test_a_prefill_without_memory_ends_its_own_request_only(model, monkeypatch, where):
    stepper = Stepper(model, EngineConfig(model="tiny"), 0)
    stepper.step(Step(start=request(prompt(40), Dense(), 9, name="good"), advance=("good", None)))
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(set(stepper._prefills)))

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no room for 1 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(model, where, full)
        sent = request(prompt(80), SPTS, name="bad")
        output = stepper.step(Step(start=sent, advance=("bad", None), keep=(3, 70), decode=(("good", 5),)))
    assert output is not None
    assert [(request_id, error.kind) for request_id, error in output.refused] == [("bad", "overloaded")]
    assert [token.request_id for token in output.tokens] == ["good"]
    assert (output.held_requests, output.held_documents, emptied) == (1, 0, [set()])
    assert stepper.step(Step(start=sent, advance=("bad", None))).tokens  # type: ignore[union-attr]


def test_ranks_that_cannot_agree_on_what_to_drop_start_again(model, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no room for 1 GiB")

    monkeypatch.setattr(model, "advance", full)
    stepper = Stepper(model, EngineConfig(model="tiny", tensor_parallel_size=2), 0)
    with pytest.raises(torch.OutOfMemoryError):
        stepper.step(Step(start=request(prompt(80), SPTS), advance=("a", None)))


def test_logits_that_are_not_finite_end_their_own_request_only(model):
    stepper, answer = Stepper(model, EngineConfig(model="tiny"), 0), Answer()
    cache = RaggedCache(num_layers=1, prompt_tokens=1, room_tokens=0)
    for name, logits in (("bad", [1.0, float("nan")]), ("good", [1.0, 2.0])):
        running = Running(request=request([1], Dense(), name=name), cache=cache, generator=torch.Generator())
        stepper._choose(running, torch.tensor(logits), answer)
    assert [(request_id, error.kind) for request_id, error in answer.refused] == [("bad", "internal")]
    assert [(token.request_id, token.token_id) for token in answer.tokens] == [("good", 1)]


@pytest.mark.parametrize("compared", [True, False])
def test_distributions_that_are_not_finite_cannot_be_compared(model, monkeypatch, compared):
    stepper, answer = Stepper(model, EngineConfig(model="tiny"), 0), Answer()
    sent = request([1, 2], Dense(), 1, follow=(1,))
    overflowed = torch.full((1, model.vocab_size), float("nan"))
    prefill = model.prefill([1, 2], Dense())
    monkeypatch.setattr(
        model, "follow_on", lambda *_: torch.ones_like(overflowed) if compared else overflowed
    )
    stepper._follow(sent, prefill, overflowed if compared else None, answer)
    assert [(request_id, error.kind) for request_id, error in answer.refused] == [("a", "internal")]
    assert answer.tokens == []


def test_a_prefill_that_overflows_ends_its_own_request_only(model):
    class Overflowing:
        device = model.device

        def advance(self, state, flops):
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
