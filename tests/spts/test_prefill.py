"""A prefill in slices: the same result, and no slice longer than was asked for."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spts import cost
from spts.cost import ModelShape, ProxyShape
from spts.methods import Dense, Method, Random, Recency, Spts
from spts.model import SptsModel
from spts.schedule import Schedule, Stage
from tests.spts.tiny import prompt, random_schedule, spts_model, transformers_model

SKIPPING = Schedule(
    num_layers=6,
    first_skip_layer=2,
    stages=(Stage(last_layer=3, active_tokens=60, keep_tokens=40), Stage(last_layer=4, active_tokens=20)),
    recent_tokens=7,
)
# Its last two layers run every token again: what may be cut by rows is not only at the beginning.
UNCUT = Schedule(num_layers=6, first_skip_layer=1, stages=(Stage(last_layer=3, active_tokens=50),))
METHODS: dict[str, Method] = {
    "dense": Dense(),
    "spts": Spts(schedule=SKIPPING),
    "uncut": Spts(schedule=UNCUT, probe_tokens=4),
    "dense-ffn": Spts(schedule=UNCUT, ffn_score="dense"),
    "random": Random(schedule=SKIPPING, seed=2),
}


@pytest.fixture(scope="module")
def model() -> SptsModel:
    """In float64, so that blocks of rows and whole layers round alike enough to choose alike."""
    torch.manual_seed(3)
    return spts_model(transformers_model("qwen2").double(), first_layer=1)


@pytest.mark.parametrize(
    ("num_tokens", "flops"), [(1, 1), (22, 1), (150, 10**6), (63, 7 * 10**6), (150, 7 * 10**6), (150, 10**12)]
)
@pytest.mark.parametrize("name", METHODS)
def test_a_prefill_in_slices_equals_a_whole_one(model, name, num_tokens, flops):
    method, token_ids = METHODS[name], prompt(num_tokens)
    whole = model.prefill(token_ids, method, trace=True, max_new_tokens=2)
    state = model.start_prefill(token_ids, method, trace=True, max_new_tokens=2)
    slices = 1
    while not model.advance(state, flops):
        assert state.result is None
        slices += 1
        if slices % 9 == 0:
            model.prefill(prompt(40), method)  # others run between two slices
    result = state.result
    assert result is not None
    torch.testing.assert_close(result.logits, whole.logits, atol=1e-6, rtol=1e-6)
    assert result.work == whole.work
    for ours, theirs in zip(result.trace or (), whole.trace or (), strict=True):
        assert torch.equal(ours.candidates, theirs.candidates)
        assert torch.equal(ours.attention_tokens, theirs.attention_tokens)
        assert torch.equal(ours.ffn_tokens, theirs.ffn_tokens)
    assert result.cache.allocated_bytes == whole.cache.allocated_bytes
    assert (slices == 1) if flops == 10**12 else (flops > 1 or slices >= 6)
    assert model.advance(state, 1)
    assert state.result is result, "a finished prefill stays as it is"


@pytest.mark.parametrize(("num_tokens", "flops"), [(60, 10**5), (500, 3 * 10**6), (1000, 5 * 10**7)])
@pytest.mark.parametrize("seed", range(3))
def test_no_slice_costs_more_than_was_asked_for(model, seed, flops, num_tokens, monkeypatch):
    """FLOP as torch's own rows say: what every linear layer of the model sees in one slice."""
    draw = random.Random(seed)
    method = Recency(schedule=random_schedule(draw, layers=6, num_tokens=num_tokens))
    planned = method.planned_work(6, num_tokens)
    whole_layers = [  # those that skip, and those that cut
        cost.layer_flops(model.shape, work, None).total
        for work, after in zip(planned, [*planned[1:], planned[-1]], strict=True)
        if work.attention_tokens < work.candidates or after.candidates < work.candidates
    ]
    row = cost.rows_flops(model.shape, num_tokens - 1, 1)
    bound = max(flops, row, *whole_layers, 0)
    seen = 0

    def count(module, args, _):
        nonlocal seen
        seen += 2 * module.weight.numel() * args[0].shape[0]

    linears = [
        module
        for layer in model.layers
        for module in layer.block.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    hooks = [linear.register_forward_hook(count) for linear in linears]
    try:
        state, spent = model.start_prefill(prompt(num_tokens), method), []
        while state.result is None:
            seen = 0
            model.advance(state, flops)
            spent.append(seen)
    finally:
        for hook in hooks:
            hook.remove()
    assert max(spent) <= bound
    if flops > 64 * row:  # and no more slices than that takes: at least half of each is used
        assert len(spent) <= 2 * cost.prefill_flops(model.shape, planned).total / flops + 7


SHAPE = ModelShape(
    num_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
)


@given(before=st.integers(0, 2**20), flops=st.integers(0, 2**60))
def test_rows_within_are_the_most_that_fit(before, flops):
    rows = cost.rows_within(SHAPE, before, 2**60, flops)
    assert cost.rows_flops(SHAPE, before, rows) <= flops < cost.rows_flops(SHAPE, before, rows + 1)
    assert cost.rows_within(SHAPE, before, rows // 2, flops) == rows // 2


@given(before=st.integers(0, 10**5), rows=st.integers(0, 10**5))
def test_rows_of_a_dense_layer_add_up_to_the_layer(before, rows):
    parts = cost.rows_flops(SHAPE, 0, before) + cost.rows_flops(SHAPE, before, rows)
    assert parts == cost.rows_flops(SHAPE, 0, before + rows)
    if rows:
        work = cost.planned_work(Schedule.dense(32), rows)[0]
        proxy = ProxyShape(channels=512, rank=192)
        assert cost.rows_flops(SHAPE, 0, rows) == cost.layer_flops(SHAPE, work, proxy).total


@given(
    blocks=st.integers(0, 300),
    most=st.integers(1, 40_000),
    flops=st.integers(0, 10**15),
    density=st.sampled_from([0.05, 0.3, 0.9]),
)
def test_rows_within_are_all_or_the_most_whole_blocks_that_fit(blocks, most, flops, density):
    before = 128 * blocks

    def spent(rows: int) -> int:
        return cost.rows_flops(SHAPE, before, rows, density)

    rows = cost.rows_within(SHAPE, before, most, flops, density)
    assert rows <= most
    assert spent(rows) <= flops or rows == 0
    if rows < most:
        assert rows % 128 == 0
        assert spent(min(most, rows + 128)) > flops


@given(
    before=st.integers(0, 300).map(lambda blocks: 128 * blocks),
    rows=st.integers(1, 10**4),
    density=st.sampled_from([0.05, 0.3, 0.9]),
)
def test_rows_of_a_sparse_layer_add_up_to_the_layer(before, rows, density):
    whole = cost.rows_flops(SHAPE, 0, before + rows, density)
    assert cost.rows_flops(SHAPE, 0, before, density) + cost.rows_flops(SHAPE, before, rows, density) == whole
    schedule = replace(Schedule.dense(32), attention_density=density)
    work = cost.planned_work(schedule, before + rows)[0]
    assert whole == cost.layer_flops(SHAPE, work, None).total
