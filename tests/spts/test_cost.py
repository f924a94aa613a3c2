"""Cost: the published tables, FLOP as torch counts them on the products written out, short prompts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from spts.cost import (
    Flops,
    LayerWork,
    ModelShape,
    ProxyShape,
    dense_flops,
    dense_kv_bytes,
    kv_bytes,
    kv_tokens,
    pairs_share,
    planned_work,
    prefill_flops,
    speedup,
)
from spts.errors import ConfigError
from spts.schedule import Schedule, Stage
from spts.traffic import collective_bytes

LLAMA = ModelShape(
    num_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
)
LLAMA_PROXY = ProxyShape(channels=512, rank=192)
LLAMA_SCHEDULE = Schedule.preset("llama-3.1-8b")
# Odd everywhere, and H * d is not D.
TINY = ModelShape(
    num_layers=3,
    hidden_size=20,
    intermediate_size=33,
    num_heads=6,
    num_kv_heads=2,
    head_dim=5,
    vocab_size=71,
)
TINY_PROXY = ProxyShape(channels=11, rank=3)
K = 1024


def _work(candidates: int, attention: int, ffn: int, *, probed: int = 0, proxied: bool = False) -> LayerWork:
    return LayerWork(
        candidates=candidates,
        attention_tokens=attention,
        ffn_tokens=ffn,
        probe_tokens=int(probed),
        proxied=proxied,
    )


def _sum(flops: Flops, *components: str) -> int:
    return sum(getattr(layer, name) for layer in flops.layers for name in components)


def test_planned_work_worked_example():
    schedule = Schedule(
        num_layers=3,
        first_skip_layer=1,
        stages=(
            Stage(last_layer=1, active_tokens=40, keep_tokens=30),
            Stage(last_layer=2, active_tokens=40),
        ),
    )
    assert planned_work(schedule, 100) == [
        _work(100, 100, 100),
        _work(100, 40, 40, probed=True, proxied=True),
        _work(30, 30, 30),
    ]
    assert planned_work(schedule, 35) == [
        _work(35, 35, 35),
        _work(35, 35, 35, probed=True),
        _work(30, 30, 30),
    ]
    assert planned_work(schedule, 30) == [_work(30, 30, 30)] * 3


def test_no_probe_is_planned_for_a_cut_after_the_last_layer():
    stages = (Stage(last_layer=2, active_tokens=40, keep_tokens=30),)
    schedule = Schedule(num_layers=3, first_skip_layer=1, stages=stages)
    assert planned_work(schedule, 35) == [_work(35, 35, 35)] * 3


# "Physical limit, LLaMA-3.1-8B": TFLOP of linears, of attention, of both; ideal speed-up of SPTS.
@pytest.mark.parametrize(
    ("num_tokens", "linear", "attention", "total", "ratio"),
    [
        (8 * K, 114, 18, 132, 1.44),
        (16 * K, 229, 70, 299, 2.04),
        (32 * K, 457, 282, 739, 2.59),
        (64 * K, 915, 1126, 2041, 2.94),
        (128 * K, 1830, 4504, 6333, 3.11),
    ],
    ids=lambda value: f"N{value // K}K" if isinstance(value, int) and value >= 8 * K else None,
)
def test_published_table(num_tokens, linear, attention, total, ratio):
    dense = dense_flops(LLAMA, num_tokens)
    of_linears = _sum(dense, "query", "key", "value", "output", "ffn")
    assert of_linears / 1e12 == pytest.approx(linear, abs=1)
    assert _sum(dense, "attention") / 1e12 == pytest.approx(attention, abs=1)
    assert dense.total / 1e12 == pytest.approx(total, abs=1)
    work = planned_work(LLAMA_SCHEDULE, num_tokens)
    assert speedup(LLAMA, work, LLAMA_PROXY) == pytest.approx(ratio, abs=0.01)


# The same table with sparse attention in layers 0-9. It counts the asked share of the pairs; blocks that are
# always read are a little more, which tells at 8K.
@pytest.mark.parametrize(
    ("density", "ratios"),
    [
        (0.5, {32 * K: 3.06, 64 * K: 3.94, 128 * K: 4.74}),
        (0.2, {32 * K: 3.44, 64 * K: 4.95, 128 * K: 6.94}),
        (0.1, {8 * K: 1.52, 16 * K: 2.35, 32 * K: 3.59, 64 * K: 5.41, 128 * K: 8.20}),
    ],
)
def test_published_table_with_sparse_attention(density, ratios):
    sparse = replace(LLAMA_SCHEDULE, attention_density=density)
    for num_tokens, ratio in ratios.items():
        work = planned_work(sparse, num_tokens)
        assert speedup(LLAMA, work, LLAMA_PROXY) == pytest.approx(ratio, abs=0.012)
        assert density <= pairs_share(work) < density + 0.12 * 1024 / num_tokens


def _visible(num_tokens: int, density: float) -> torch.Tensor:
    """Which query sees which key, written out pair by pair: blocks in order, as only their number matters."""
    seen = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    for query in range(num_tokens):
        block = query // 128
        num_read = min(block + 1, max(3, math.ceil(density * (block + 1))))
        seen[query, (num_read - 1) * 128 : block * 128] = False
    return seen


@pytest.mark.parametrize("num_tokens", [1, 127, 128, 129, 384, 500, 1000, 1300])
@pytest.mark.parametrize("density", [1.0, 0.9, 0.5, 0.1, 0.001])
def test_sparse_attention_costs_the_pairs_that_it_reads(num_tokens, density):
    schedule = replace(Schedule.dense(TINY.num_layers), attention_density=density)
    work = planned_work(schedule, num_tokens)
    pairs = int(_visible(num_tokens, density).sum())
    attention = _sum(prefill_flops(TINY, work), "attention") // TINY.num_layers
    # A product with a key and one with a value, 2 FLOP each; of a query's pair with itself, half.
    assert attention == (pairs - num_tokens / 2) * 2 * 2 * TINY.num_heads * TINY.head_dim
    assert pairs_share(work) == pairs / (num_tokens * (num_tokens + 1) / 2)
    if num_tokens <= 384 or density == 1:
        assert prefill_flops(TINY, work) == dense_flops(TINY, num_tokens)


def test_only_layers_that_run_every_token_are_sparse():
    work = planned_work(replace(LLAMA_SCHEDULE, attention_density=0.1), 32 * K)
    assert [layer.attention_density for layer in work] == [0.1] * 10 + [1.0] * 22
    plain = planned_work(LLAMA_SCHEDULE, 32 * K)
    assert [replace(layer, attention_density=1.0) for layer in work] == plain
    assert kv_bytes(LLAMA, work, 2) == kv_bytes(LLAMA, plain, 2)
    assert pairs_share(plain) == 1.0
    assert pairs_share([*plain, *work]) == pairs_share(work)


def test_published_figures_at_32k():
    work = planned_work(LLAMA_SCHEDULE, 32 * K)
    flops = prefill_flops(LLAMA, work, LLAMA_PROXY)
    linear = dense_flops(LLAMA, 1).layers[0].total - dense_flops(LLAMA, 1).layers[0].attention
    assert linear / 1e6 == pytest.approx(436.2, abs=0.05)  # MFLOP per token and layer
    assert sum(layer.total for layer in flops.layers[:10]) / flops.total == pytest.approx(0.81, abs=0.005)
    saved = 1 - kv_bytes(LLAMA, work, 2) / dense_kv_bytes(LLAMA, 32 * K, 2)
    assert round(100 * saved, 2) == 58.59
    assert 16 * (1 - saved) == pytest.approx(6.63, abs=0.005)  # of the paper's 16 GB
    assert dense_kv_bytes(LLAMA, 32 * K, 2) == 4 * 2**30  # bfloat16, one request


def test_published_ablation_at_32k():
    constant = Schedule(
        num_layers=32, first_skip_layer=10, stages=(Stage(last_layer=31, active_tokens=9 * K),)
    )
    both = planned_work(constant, 32 * K)
    attention_only = planned_work(constant, 32 * K, proxy=False, skips_ffn=False)
    assert speedup(LLAMA, attention_only) == pytest.approx(1.42, abs=0.005)
    assert speedup(LLAMA, both, LLAMA_PROXY) == pytest.approx(2.16, abs=0.005)


def _counted(shape: ModelShape, work: LayerWork, proxy: ProxyShape) -> dict[str, int]:
    """FLOP that torch counts for one layer's products, written out from the paper's description."""
    h, d, rank = shape.num_heads, shape.head_dim, proxy.rank
    groups = h // shape.num_kv_heads
    w_q, w_o = torch.rand(shape.hidden_size, h * d), torch.rand(h * d, shape.hidden_size)
    w_kv = torch.rand(shape.hidden_size, shape.num_kv_heads * d)
    w_up, w_down = (torch.rand(shape.hidden_size, shape.intermediate_size) for _ in range(2))
    x_TD = torch.rand(work.candidates, shape.hidden_size)
    x_MD, y_MD = x_TD[: work.attention_tokens], x_TD[: work.ffn_tokens]
    counted = {}

    def count(name, product):
        with FlopCounterMode(display=False) as counter:
            result = product()
        counted[name] = counter.get_total_flops()
        return result

    def heads(rows, num_heads):
        return rows.view(rows.shape[0], num_heads, d).transpose(0, 1)

    k_TKd = count("key", lambda: (x_TD if work.probed else x_MD) @ w_kv)
    k_HTd = heads(k_TKd, shape.num_kv_heads).repeat_interleave(groups, 0)

    def probe():  # query by query, each over the keys up to its own
        for place in range(work.candidates - work.probe_tokens, work.candidates):
            q_H1d = heads(x_TD[place : place + 1] @ w_q, h)
            torch.bmm(q_H1d, k_HTd[:, : place + 1].transpose(1, 2)).softmax(-1)

    count("probe", probe)
    q_HMd = heads(count("query", lambda: x_MD @ w_q), h)
    v_HMd = heads(count("value", lambda: x_MD @ w_kv), shape.num_kv_heads).repeat_interleave(groups, 0)
    k_HMd = k_HTd[:, : work.attention_tokens]
    out_HMd = count("attention", lambda: torch.bmm(torch.bmm(q_HMd, k_HMd.transpose(1, 2)), v_HMd))
    counted["attention"] //= 2  # causal: half of the square
    count("output", lambda: out_HMd.transpose(0, 1).reshape(-1, h * d) @ w_o)

    def ltp():
        gate_TR, up_TR = (x_TD @ torch.rand(shape.hidden_size, 2 * rank)).chunk(2, -1)
        to_channels = torch.rand(rank, proxy.channels)
        hidden_TC = (gate_TR @ to_channels).relu() * (up_TR @ to_channels)
        return (hidden_TC @ torch.rand(proxy.channels, rank)).norm(dim=-1)

    count("proxy", ltp if work.proxied else lambda: None)
    count("ffn", lambda: ((y_MD @ w_up).relu() * (y_MD @ w_up)) @ w_down.T)
    return counted


@pytest.mark.parametrize("num_tokens", [1, 2, 63, 500])
@pytest.mark.parametrize(
    ("probe", "proxy", "skips_ffn"),
    [(1, True, True), (1, False, True), (0, False, True), (4, False, False), (64, True, True)],
)
def test_components_equal_what_torch_counts(num_tokens, probe, proxy, skips_ffn):
    schedule = Schedule(
        num_layers=3,
        first_skip_layer=1,
        stages=(Stage(last_layer=1, active_tokens=41, keep_tokens=37), Stage(last_layer=2, active_tokens=19)),
    )
    work = planned_work(schedule, num_tokens, probe=probe, proxy=proxy, skips_ffn=skips_ffn)
    flops = prefill_flops(TINY, work, TINY_PROXY)
    for layer, done in zip(flops.layers, work, strict=True):
        counted = _counted(TINY, done, TINY_PROXY)
        assert {name: getattr(layer, name) for name in counted} == counted
        assert layer.total == sum(counted.values())
    with FlopCounterMode(display=False) as counter:
        torch.rand(1, TINY.hidden_size) @ torch.rand(TINY.hidden_size, TINY.vocab_size)
    assert flops.lm_head == counter.get_total_flops()
    assert flops.total == flops.lm_head + sum(layer.total for layer in flops.layers)


@pytest.mark.parametrize("num_tokens", [1, 2, 63, 500, 1000, 1024])
def test_a_prompt_within_every_budget_costs_what_dense_costs(num_tokens):
    work = planned_work(LLAMA_SCHEDULE, num_tokens)
    assert prefill_flops(LLAMA, work, LLAMA_PROXY) == dense_flops(LLAMA, num_tokens)
    assert kv_bytes(LLAMA, work, 2) == dense_kv_bytes(LLAMA, num_tokens, 2)
    assert speedup(LLAMA, work) == 1


def test_a_probe_has_no_more_queries_than_there_are_candidates():
    schedule = Schedule(
        num_layers=3,
        first_skip_layer=1,
        stages=(Stage(last_layer=1, active_tokens=41, keep_tokens=37), Stage(last_layer=2, active_tokens=19)),
    )
    assert [layer.probe_tokens for layer in planned_work(schedule, 500, probe=64)] == [0, 64, 37]
    assert [layer.probe_tokens for layer in planned_work(schedule, 10, probe=64)] == [0, 0, 0]


def test_controls_pay_for_no_signal():
    plan = planned_work(LLAMA_SCHEDULE, 32 * K, probe=0, proxy=False)
    control = prefill_flops(LLAMA, plan)
    assert _sum(control, "probe", "proxy") == 0
    for layer in control.layers:
        assert layer.key == layer.value
    spts_work = planned_work(LLAMA_SCHEDULE, 32 * K)
    assert control.total < prefill_flops(LLAMA, spts_work, LLAMA_PROXY).total
    assert kv_bytes(LLAMA, plan, 2) == kv_bytes(LLAMA, spts_work, 2)


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 30), st.integers(1, 30), st.integers(1, 30), st.integers(1, 30))
def test_planned_work_equals_a_walk_over_token_sets(num_tokens, budget, smaller, cut, deeper):
    smaller, deeper = min(budget, smaller), min(cut, deeper)
    schedule = Schedule(
        num_layers=5,
        first_skip_layer=1,
        stages=(
            Stage(last_layer=2, active_tokens=budget, keep_tokens=cut),
            Stage(last_layer=3, active_tokens=smaller, keep_tokens=deeper),
        ),
    )
    alive, walked = list(range(num_tokens)), []
    for budget_here, keep_here in [
        (None, None),
        (budget, None),
        (budget, cut),
        (smaller, deeper),
        (None, None),
    ]:
        active = alive if budget_here is None else alive[-budget_here:]
        left = alive if keep_here is None else alive[-keep_here:]
        chose = active != alive
        walked.append(
            _work(len(alive), len(active), len(active), probed=chose or left != alive, proxied=chose)
        )
        alive = left
    assert planned_work(schedule, num_tokens) == walked
    assert kv_tokens(walked) == sum(layer.attention_tokens for layer in walked)


def test_kv_bytes_count_keys_and_values_of_attended_tokens():
    work = [_work(63, 63, 63), _work(63, 17, 40, probed=True), _work(20, 20, 20)]
    cached = sum(
        tensor.nbytes
        for tokens in (63, 17, 20)
        for tensor in (torch.zeros(tokens, 2, 5), torch.zeros(tokens, 2, 5))
    )
    assert kv_bytes(TINY, work, 4) == cached
    assert kv_tokens(work) == 100


def test_collective_bytes_worked_example():
    work = [
        _work(100, 100, 100),
        _work(100, 40, 25, probed=True, proxied=True),  # chooses 40, then 25, then keeps 30
        _work(30, 30, 30),
    ]
    spent = collective_bytes(TINY, work, dtype_bytes=2, world_size=2)
    assert spent.hidden == (100 + 100 + 40 + 25 + 30 + 30) * 20 * 2
    assert spent.scores == (100 + 100) * 4
    assert spent.selection == (40 + 25 + 30) * 8
    assert spent.total == spent.hidden + spent.scores + spent.selection
    assert collective_bytes(TINY, work, dtype_bytes=2, world_size=1).total == 0


def test_proxies_that_ran_have_a_size():
    work = planned_work(LLAMA_SCHEDULE, 32 * K)
    with pytest.raises(ConfigError, match="proxy must be given when a layer ran its proxy, got None"):
        prefill_flops(LLAMA, work)


def test_work_of_another_depth_is_refused():
    for count in (prefill_flops, lambda shape, work: kv_bytes(shape, work, 2)):
        with pytest.raises(ConfigError, match="work must have one entry for each of 32 layers, got 3"):
            count(LLAMA, [_work(9, 9, 9)] * 3)


def test_an_empty_prompt_has_no_plan():
    with pytest.raises(ConfigError, match="num_tokens must be an integer of at least 1, got 0"):
        planned_work(LLAMA_SCHEDULE, 0)


CONFIG = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_theta": 5e5,
}


def test_shape_from_config():
    assert ModelShape.from_config(CONFIG) == LLAMA
    assert ModelShape.from_config({**CONFIG, "head_dim": None}) == LLAMA
    assert ModelShape.from_config({**CONFIG, "head_dim": 96}).head_dim == 96
    no_groups = {key: value for key, value in CONFIG.items() if key != "num_key_value_heads"}
    assert ModelShape.from_config(no_groups).num_kv_heads == 32


@pytest.mark.parametrize("key", sorted(set(CONFIG) - {"rope_theta", "num_key_value_heads"}))
def test_shape_from_config_names_what_is_missing(key):
    config = {name: value for name, value in CONFIG.items() if name != key}
    with pytest.raises(ConfigError, match=f"config.{key} must be an integer of at least 1, got None"):
        ModelShape.from_config(config)


def test_heads_that_do_not_share_evenly_are_refused():
    with pytest.raises(ConfigError, match="num_heads must be a multiple of num_kv_heads = 5, got 32"):
        ModelShape.from_config({**CONFIG, "num_key_value_heads": 5})
