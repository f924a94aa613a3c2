"""Prompts that begin alike: answers, choices, caches and counts are those of computing all of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spts.cost import prefix_bytes, reused_flops
from spts.errors import RequestError
from spts.methods import Dense, Method, Random, Recency, Spts
from spts.model import SptsModel
from spts.prefill import Prefill, PrefillState
from spts.prefix import Prefix
from spts.schedule import Schedule, Stage
from tests.spts.tiny import ample_schedule, prompt, spts_model, transformers_model

SCHEDULE = Schedule(
    num_layers=6,
    first_skip_layer=2,
    stages=(
        Stage(last_layer=3, active_tokens=60, keep_tokens=40),
        Stage(last_layer=4, active_tokens=20, keep_tokens=15),
    ),
    recent_tokens=9,
)
METHODS: dict[str, Method] = {
    "dense": Dense(),
    "spts": Spts(schedule=SCHEDULE),
    "random": Random(schedule=SCHEDULE, seed=5),
    "recency": Recency(schedule=SCHEDULE),
    "ample": Spts(schedule=ample_schedule(6, 300)),
    "no-stage": Spts(schedule=Schedule.dense(6)),
}


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model(request) -> SptsModel:
    """In float64: with it the two ways differ by so little that no near tie can tip a choice."""
    torch.manual_seed(4)
    rope = {"llama": "llama3", "qwen2": "yarn"}[request.param]
    return spts_model(transformers_model(request.param, rope=rope).double(), first_layer=1)


def kept(model: SptsModel, token_ids: list[int], method: Method, keep_prefix: int) -> Prefix:
    state = model.start_prefill(token_ids, method, keep_prefix=keep_prefix)
    model.advance(state)
    assert state.kept is not None
    return state.kept


def finish(model: SptsModel, state: PrefillState, flops: int | None = None) -> Prefill:
    while not model.advance(state, flops):
        pass
    assert state.result is not None
    return state.result


def assert_same(ours: Prefill, theirs: Prefill) -> None:
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-6, rtol=1e-6)
    assert ours.work == theirs.work
    assert (ours.cache.kv_tokens, ours.cache.num_bytes, ours.cache.allocated_bytes) == (
        theirs.cache.kv_tokens,
        theirs.cache.num_bytes,
        theirs.cache.allocated_bytes,
    )
    assert ours.trace is not None
    assert theirs.trace is not None
    for layer, (mine, other) in enumerate(zip(ours.trace, theirs.trace, strict=True)):
        assert mine.layer == other.layer
        for name in ("candidates", "attention_tokens", "ffn_tokens"):
            assert torch.equal(getattr(mine, name), getattr(other, name))
        assert torch.equal(ours.cache.positions(layer), theirs.cache.positions(layer))
        for rows in zip(ours.cache.layers[layer].rows(), theirs.cache.layers[layer].rows(), strict=True):
            torch.testing.assert_close(*rows, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("flops", [10**6, 10**7, None])
@pytest.mark.parametrize(("prefix_tokens", "num_tokens"), [(1, 63), (100, 163), (200, 201)])
@pytest.mark.parametrize("name", METHODS)
def test_a_prompt_on_a_kept_prefix_equals_one_computed_whole(model, name, prefix_tokens, num_tokens, flops):
    method, shared = METHODS[name], prompt(prefix_tokens)
    prefix = kept(model, shared + prompt(30), method, prefix_tokens)
    token_ids = shared + prompt(num_tokens - prefix_tokens)
    whole = model.prefill(token_ids, method, trace=True, max_new_tokens=6)
    state = model.start_prefill(token_ids, method, trace=True, max_new_tokens=6, prefix=prefix)
    reused = finish(model, state, flops)
    assert state.reused_tokens == prefix_tokens
    assert state.kept is None
    assert_same(reused, whole)
    for token in prompt(6):
        ours, theirs = (model.decode_step(torch.tensor([token]), [each.cache]) for each in (reused, whole))
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["dense", "spts"])
def test_greedy_answers_in_float32_are_the_same(name):
    model = spts_model(transformers_model("qwen3"), first_layer=2)
    method, shared = METHODS[name], prompt(150)
    prefix = kept(model, shared + prompt(3), method, 150)
    for _ in range(3):
        token_ids = shared + prompt(20)
        state = model.start_prefill(token_ids, method, max_new_tokens=12, prefix=prefix)
        result = finish(model, state)
        whole = model.prefill(token_ids, method)
        torch.testing.assert_close(result.logits, whole.logits, atol=1e-3, rtol=1e-4)
        answer = [int(result.logits.argmax())]
        while len(answer) < 12:
            answer.append(int(model.decode_step(torch.tensor(answer[-1:]), [result.cache])[0].argmax()))
        assert answer == model.generate(token_ids, method, 12).token_ids


@pytest.mark.parametrize("name", METHODS)
def test_a_prefix_is_never_changed_by_those_that_use_it(model, name):
    method, shared = METHODS[name], prompt(120)
    first = model.start_prefill(shared + prompt(40), method, max_new_tokens=3, keep_prefix=120)
    result = finish(model, first)
    prefix = first.kept
    assert prefix is not None
    before = [tensor.clone() for tensor in _tensors(prefix)]
    model.extend(prompt(3), result.cache)
    prompts = [shared + prompt(30), shared + prompt(5)]
    expected = [model.prefill(each, method, trace=True) for each in prompts]
    for order in ([0, 1], [1, 0]):
        states = [model.start_prefill(prompts[each], method, trace=True, prefix=prefix) for each in order]
        while any(state.result is None for state in states):  # side by side, slice by slice
            for state in states:
                model.advance(state, 10**6)
        for each, state in zip(order, states, strict=True):
            assert state.result is not None
            assert_same(state.result, expected[each])
    assert all(torch.equal(a, b) for a, b in zip(before, _tensors(prefix), strict=True))


def _tensors(prefix: Prefix) -> list[torch.Tensor]:
    tensors = [tensor for pair in prefix.keys_values for tensor in pair]
    return tensors + ([] if prefix.x_SD is None else [prefix.x_SD])


def test_methods_that_first_skip_in_the_same_layer_share_a_prefix(model):
    shared = prompt(100)
    prefix = kept(model, shared + prompt(9), METHODS["recency"], 100)
    token_ids = shared + prompt(25)
    state = model.start_prefill(token_ids, METHODS["spts"], trace=True, prefix=prefix)
    assert_same(finish(model, state), model.prefill(token_ids, METHODS["spts"], trace=True))


@pytest.mark.parametrize("name", ["dense", "spts"])
def test_what_a_prompt_on_a_prefix_adds_is_a_piece_of_its_own(model, name):
    """A question's tokens on a document's, another's on part of both: each prompt equals itself alone."""
    method, document = METHODS[name], prompt(80)
    first = kept(model, document + prompt(9), method, 85)
    longer = document + prompt(40)
    state = model.start_prefill(longer + prompt(5), method, prefix=first, reuse_tokens=80, keep_prefix=120)
    finish(model, state)
    second = state.kept
    assert second is not None
    assert (second.num_tokens, second.before_tokens, len(second.token_ids)) == (120, 80, 40)
    assert second.num_bytes * 85 == first.num_bytes * 40, "only what is new is there twice"
    for reuse_tokens in (120, 119, 100, 81, 80, 79, 1):
        token_ids = longer[:reuse_tokens] + prompt(130 - reuse_tokens)
        again = model.start_prefill(
            token_ids, method, trace=True, prefix=second, reuse_tokens=reuse_tokens, keep_prefix=125
        )
        assert_same(finish(model, again, 10**7), model.prefill(token_ids, method, trace=True))
        assert again.kept is not None
        assert len(again.kept.token_ids) == 125 - reuse_tokens


def test_a_prompt_that_goes_no_further_than_what_is_reused_keeps_nothing(model):
    method, document = METHODS["spts"], prompt(80)
    prefix = kept(model, document + prompt(9), method, 80)
    state = model.start_prefill(document + prompt(5), method, prefix=prefix, keep_prefix=80)
    finish(model, state)
    assert state.kept is None


@pytest.mark.parametrize("name", ["dense", "spts"])
def test_bytes_are_those_that_were_predicted_and_no_view_holds_more(model, name):
    method = METHODS[name]
    prefix = kept(model, prompt(130), method, 70)
    depth = method.schedule_for(6).first_skip_layer
    assert (prefix.num_tokens, prefix.depth, len(prefix.keys_values)) == (70, depth, depth)
    assert (prefix.x_SD is None) == (name == "dense")
    assert prefix.num_bytes == prefix_bytes(model.shape, 70, depth, dtype_bytes=8)
    assert prefix.num_bytes == sum(tensor.untyped_storage().nbytes() for tensor in _tensors(prefix))


@pytest.mark.parametrize("name", ["dense", "spts"])
@pytest.mark.parametrize(("prefix_tokens", "num_tokens"), [(1, 2), (63, 100), (100, 163)])
def test_reused_flops_are_those_of_the_rows_and_pairs_left_out(model, name, prefix_tokens, num_tokens):
    """Rows of every linear module as its forward sees them; attention by the pairs below the diagonal."""
    method, shared = METHODS[name], prompt(prefix_tokens)
    depth = method.schedule_for(6).first_skip_layer
    prefix = kept(model, shared + prompt(1), method, prefix_tokens)
    token_ids = shared + prompt(num_tokens - prefix_tokens)
    whole = _linear_flops(model, lambda: model.prefill(token_ids, method))
    reused = _linear_flops(
        model, lambda: finish(model, model.start_prefill(token_ids, method, prefix=prefix))
    )
    # A pair is a product with a key and one with a value; of each square on the diagonal, half is counted.
    later = num_tokens - prefix_tokens
    pairs = num_tokens**2 / 2 - (later * prefix_tokens + later**2 / 2)
    attention = depth * pairs * 2 * 2 * model.shape.num_heads * model.shape.head_dim
    assert reused_flops(model.shape, prefix_tokens, depth) == whole - reused + attention


def _linear_flops(model: SptsModel, run: Any) -> int:
    flops = 0

    def count(module, args, _):
        nonlocal flops
        flops += 2 * module.weight.numel() * args[0].shape[0]

    linears = [
        module
        for layer in model.layers
        for module in layer.block.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    hooks = [linear.register_forward_hook(count) for linear in linears]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return flops


def test_a_method_that_skips_from_the_first_layer_on_leaves_nothing_to_keep():
    model = spts_model(transformers_model("llama"))
    schedule = Schedule(num_layers=6, first_skip_layer=0, stages=(Stage(last_layer=5, active_tokens=9),))
    state = model.start_prefill(prompt(40), Recency(schedule=schedule), keep_prefix=20)
    finish(model, state)
    assert state.kept is None
    assert reused_flops(model.shape, 20, 0) == reused_flops(model.shape, 0, 6) == 0


def test_what_does_not_fit_together_is_refused_before_any_compute(model, monkeypatch):
    shared = prompt(50)
    prefix = kept(model, shared + prompt(9), METHODS["spts"], 50)
    other = SptsModel(transformers_model("llama"), fingerprint="another")
    for refusing in (model, other):
        monkeypatch.setattr(refusing, "_embed", _unreachable)
    changed = [(shared[0] + 1) % 211, *shared[1:], 3]
    recency = METHODS["recency"]
    for asked, token_ids, method, message in (
        (model, changed, METHODS["spts"], "be of the prompt's first tokens"),
        (model, [*shared, 3], Dense(), "end where the method first skips, after layers: 6, got 2"),
        (model, shared, METHODS["spts"], "below the prompt's 50 tokens, got 50"),
        (other, [*shared, 3], recency, "be of the model with fingerprint another, got tiny"),
    ):
        with pytest.raises(RequestError, match=message) as refused:
            asked.start_prefill(token_ids, method, prefix=prefix)
        assert refused.value.code == "invalid_prefix"
    with pytest.raises(RequestError, match="prefix must hold 51 tokens, got 50"):
        model.start_prefill([*shared, 3, 4], METHODS["spts"], prefix=prefix, reuse_tokens=51)
    for keep_prefix in (-1, 50, 51):
        with pytest.raises(RequestError, match=f"prefix_tokens must .* got {keep_prefix};"):
            model.start_prefill(shared, METHODS["spts"], keep_prefix=keep_prefix)


def _unreachable(*args: object, **kwargs: object) -> None:
    raise AssertionError("nothing should be computed")
