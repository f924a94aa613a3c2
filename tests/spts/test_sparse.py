"""Sparse attention in the layers before the first that skips: where it runs, and that neither slices nor kept
documents change what it computes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from spts.errors import RequestError
from spts.kernels import dispatch
from spts.methods import Method, Recency, Spts
from spts.model import SptsModel
from spts.prefill import Prefill, PrefillState
from spts.schedule import Schedule, Stage
from tests.spts.tiny import ample_schedule, prompt, spts_model, transformers_model

SKIPPING = Schedule(
    num_layers=6,
    first_skip_layer=2,
    stages=(Stage(last_layer=3, active_tokens=300, keep_tokens=200), Stage(last_layer=4, active_tokens=50)),
    recent_tokens=9,
)
EVERYTHING = math.nextafter(1.0, 0.0)  # as sparse as can be, and no block is left out


def sparse(schedule: Schedule, density: float) -> Spts:
    return Spts(schedule=replace(schedule, attention_density=density))


# Of 8 blocks, 3 are always read: at 0.1 no more, at 0.5 one and at 0.75 three are chosen.
METHODS: dict[str, Method] = {
    "spts": sparse(SKIPPING, 0.5),
    "least": sparse(SKIPPING, 0.1),
    "alone": sparse(Schedule.dense(6), 0.75),
    "recency": Recency(schedule=replace(SKIPPING, attention_density=0.5)),
}


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model(request) -> SptsModel:
    """In float64, so that no near tie can tip a choice."""
    torch.manual_seed(6)
    return spts_model(transformers_model(request.param).double(), first_layer=1)


def finish(model: SptsModel, state: PrefillState, flops: int | None = None) -> Prefill:
    while not model.advance(state, flops):
        pass
    assert state.result is not None
    return state.result


def assert_same(ours: Prefill, theirs: Prefill) -> None:
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-6, rtol=1e-6)
    assert ours.work == theirs.work
    for mine, other in zip(ours.trace or (), theirs.trace or (), strict=True):
        for name in ("candidates", "attention_tokens", "ffn_tokens"):
            assert torch.equal(getattr(mine, name), getattr(other, name))
    for layer, cached in zip(ours.cache.layers, theirs.cache.layers, strict=True):
        for rows in zip(layer.rows(), cached.rows(), strict=True):
            torch.testing.assert_close(*rows, atol=1e-9, rtol=1e-9)


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, int, float]]:
    """Queries, keys and density of each call of sparse attention."""
    seen = []
    run = dispatch.sparse_attention

    def noted(q: Any, k: Any, v: Any, scale: float, density: float) -> Any:
        seen.append((q.shape[0], k.shape[0], density))
        return run(q, k, v, scale, density)

    monkeypatch.setattr(dispatch, "sparse_attention", noted)
    return seen


@pytest.mark.parametrize("name", METHODS)
def test_it_runs_in_the_first_layers_of_a_prefill_and_nowhere_else(model, calls, name):
    method, token_ids = METHODS[name], prompt(500)
    result = model.prefill(token_ids, method, max_new_tokens=2)
    schedule = method.schedule_for(6)
    assert calls == [(500, 500, schedule.attention_density)] * schedule.first_skip_layer
    assert result.work == method.planned_work(6, 500)
    model.decode_step(torch.tensor([3]), [result.cache])
    model.extend([3], result.cache)
    assert len(calls) == schedule.first_skip_layer


def test_a_density_of_1_is_the_dense_layer_bit_for_bit(model, calls):
    token_ids = prompt(700)
    plain = model.prefill(token_ids, Spts(schedule=SKIPPING))
    full = model.prefill(token_ids, sparse(SKIPPING, 1.0))
    assert torch.equal(plain.logits, full.logits)
    assert not calls
    assert not torch.allclose(plain.logits, model.prefill(token_ids, METHODS["spts"]).logits, atol=1e-3)


@pytest.mark.parametrize(("num_tokens", "density"), [(1000, EVERYTHING), (384, 0.01), (129, 0.1), (1, 0.1)])
@pytest.mark.parametrize("schedule", [SKIPPING, Schedule.dense(6), ample_schedule(6, 1000)])
def test_where_everything_is_read_it_equals_the_dense_layer(model, schedule, num_tokens, density):
    token_ids = prompt(num_tokens)
    whole = model.prefill(token_ids, Spts(schedule=schedule), trace=True)
    ours = model.prefill(token_ids, sparse(schedule, density), trace=True)
    work = [replace(layer, attention_density=1.0) for layer in ours.work]
    assert_same(replace(ours, work=work), whole)


@pytest.mark.parametrize("flops", [1, 10**6, 3 * 10**7, 10**8])
@pytest.mark.parametrize("name", METHODS)
def test_a_prefill_in_slices_equals_a_whole_one(model, calls, name, flops):
    method, token_ids = METHODS[name], prompt(1000)
    whole = model.prefill(token_ids, method, trace=True, max_new_tokens=2)
    calls.clear()
    ours = finish(model, model.start_prefill(token_ids, method, trace=True, max_new_tokens=2), flops)
    assert_same(ours, whole)
    depth = method.schedule_for(6).first_skip_layer
    assert len(calls) > depth
    assert all((seen - rows) % 128 == 0 for rows, seen, _ in calls)


@pytest.mark.parametrize("flops", [3 * 10**7, None])
@pytest.mark.parametrize(("prefix_tokens", "num_tokens"), [(128, 800), (640, 1000), (640, 645)])
@pytest.mark.parametrize("name", METHODS)
def test_a_prompt_on_a_kept_document_equals_one_computed_whole(model, name, prefix_tokens, num_tokens, flops):
    """The document ends within a block; what is kept of it ends before that."""
    method, document = METHODS[name], prompt(prefix_tokens + 50)
    first = model.start_prefill(document + prompt(80), method, keep_prefix=prefix_tokens)
    finish(model, first)
    assert first.kept is not None
    token_ids = document[: min(len(document), num_tokens - 1)]
    token_ids += prompt(num_tokens - len(token_ids))
    state = model.start_prefill(token_ids, method, trace=True, max_new_tokens=3, prefix=first.kept)
    reused = finish(model, state, flops)
    assert state.reused_tokens == prefix_tokens
    assert_same(reused, model.prefill(token_ids, method, trace=True, max_new_tokens=3))


def test_a_block_that_document_and_question_share_is_computed_anew(model):
    """Its queries choose together: one later token may change what an earlier one of the block reads."""
    method, document = METHODS["spts"], prompt(920)
    results = [model.prefill([*document, *prompt(100)], method) for _ in range(12)]
    keys = [result.cache.layers[1].rows()[0] for result in results]  # after the first layer's choice
    assert all(torch.allclose(each[:896], keys[0][:896], atol=1e-9) for each in keys)
    assert not all(torch.allclose(each[896:920], keys[0][896:920], atol=1e-9) for each in keys)


def test_what_was_computed_otherwise_or_ends_within_a_block_is_refused(model):
    document = prompt(400)
    first = model.start_prefill(document, METHODS["spts"], keep_prefix=256)
    finish(model, first)
    assert first.kept is not None
    token_ids = document[:300] + prompt(200)
    for method, reuse, message in (
        (METHODS["least"], 256, "prefix must be of the method's attention_density 0.1, got 0.5"),
        (Spts(schedule=SKIPPING), 256, "prefix must be of the method's attention_density 1.0, got 0.5"),
        (METHODS["spts"], 200, "prefix_tokens must be a multiple of 128 where attention is sparse, got 200"),
    ):
        with pytest.raises(RequestError, match=message) as refused:
            model.start_prefill(token_ids, method, prefix=first.kept, reuse_tokens=reuse)
        assert refused.value.code == "invalid_prefix"
    with pytest.raises(RequestError, match="must be a multiple of 128 where attention is sparse, got 257"):
        model.start_prefill(token_ids, METHODS["spts"], keep_prefix=257)


@pytest.mark.parametrize("density", [0.5, 0.75])
def test_heads_choose_by_themselves_so_ranks_need_not_agree(density):
    """A rank has some of the heads: what it computes is what these heads compute among all."""
    torch.manual_seed(2)
    q, k, v = (torch.randn(1000, heads, 16) for heads in (6, 2, 2))
    whole = dispatch.sparse_attention(q, k, v, 0.25, density)
    for rank in range(2):
        queries, keys = slice(3 * rank, 3 * rank + 3), slice(rank, rank + 1)
        part = dispatch.sparse_attention(q[:, queries], k[:, keys], v[:, keys], 0.25, density)
        torch.testing.assert_close(part, whole[:, queries])
