"""The space of schedules: every point is a valid schedule at the cost that was asked for."""

from __future__ import annotations

import random

import pytest

from jobs.tuning.space import CostModel, Space, tidy
from spts.cost import ModelShape, ProxyShape, planned_work
from spts.errors import ConfigError
from spts.schedule import PRESETS, Schedule, Stage

DEMO = ModelShape(
    num_layers=12,
    hidden_size=256,
    intermediate_size=512,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=6144,
)
LLAMA = ModelShape(
    num_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
)


def costs(num_tokens: int = 2048, shape: ModelShape = DEMO) -> CostModel:
    return CostModel(shape=shape, proxy=ProxyShape.default(shape), num_tokens=num_tokens)


def preset(name: str, shape: ModelShape = DEMO) -> Schedule:
    return Schedule.preset(name, num_layers=shape.num_layers)


def draw(space: Space, seed: int) -> dict[str, float]:
    """A point, uniform over the ranges, with both ends of each more often than by chance."""
    rng = random.Random(seed)
    point: dict[str, float] = {}
    for name, range_ in space.distributions().items():
        low, high = range_.low, range_.high  # type: ignore[attr-defined]
        inner = rng.randint(low, high) if isinstance(low, int) else rng.uniform(low, high)
        point[name] = rng.choice([low, high, inner, inner, inner])
    return point


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen2.5-7b", "demo-12l"])
def test_sizing_finds_the_largest_budgets_that_are_fast_enough(name):
    model, schedule = costs(60), Schedule.preset(name, num_layers=12, num_tokens=640)
    factors = range(1, 4000)  # all that matter: at the last one every budget covers the prompt
    speedups = {
        factor: model.speedup(schedule.scaled(num_tokens=factor, reference_tokens=640)) for factor in factors
    }
    assert speedups[3999] == 1
    for target in (1.2, 1.8, 2.4):
        sized = model.sized(schedule, target, reference_tokens=640)
        largest = max(factor for factor in factors if speedups[factor] >= target)
        assert sized == tidy(schedule.scaled(num_tokens=largest, reference_tokens=640), 60)


@pytest.mark.parametrize("shape", [DEMO, LLAMA], ids=["demo", "llama"])
@pytest.mark.parametrize("num_tokens", [512, 4096, 32768])
def test_a_sized_preset_costs_what_was_asked_for(shape, num_tokens):
    model = costs(num_tokens, shape)
    for target in (1.1, 1.6, 2.3):
        sized = model.sized(preset("llama-3.1-8b", shape), target, reference_tokens=32768)
        assert sized is not None
        assert target <= model.speedup(sized) < target * 1.005


def test_the_published_schedule_is_what_its_own_cost_gives_back():
    model = costs(32768, LLAMA)
    published = Schedule.preset("llama-3.1-8b")
    assert model.sized(published, model.speedup(published), reference_tokens=32768) == published


def test_sizing_says_when_no_budget_is_small_enough():
    assert costs().sized(preset("openpangu-1b"), 2.5, reference_tokens=32768) is None
    assert costs().sized(Schedule.dense(12), 1.5, reference_tokens=32768) is None


@pytest.mark.parametrize("target", [None, 1.05, 1.9, 2.5, 2.9], ids=str)
def test_every_point_is_a_schedule_at_the_target(target):
    space = Space(costs=costs(), first_layer=4, target=target)
    limit = space.costs.limit(4)
    for seed in range(100):
        schedule = space.schedule(draw(space, seed))
        assert not schedule.stages or schedule.first_skip_layer >= 4
        assert tidy(schedule, 2048) == schedule
        speedup = space.costs.speedup(schedule)
        assert speedup <= limit
        if target is not None:
            # One token more or less in a stage is all that stands between a schedule and the target, unless
            # that token decides whether a whole stage is dense.
            assert target <= speedup < target * 1.02


@pytest.mark.parametrize("num_tokens", [63, 500, 2048])
def test_tidy_schedules_do_the_same_work(num_tokens):
    for seed in range(300):
        rng = random.Random(seed)
        ends = sorted(rng.sample(range(2, 12), k=3))
        budgets = sorted((rng.randint(1, 2 * num_tokens) for _ in ends), reverse=True)
        cuts = sorted((rng.randint(1, 2 * num_tokens) for _ in ends), reverse=True)
        stages = tuple(
            Stage(last_layer=end, active_tokens=budget, keep_tokens=rng.choice([cut, None]))
            for end, budget, cut in zip(ends, budgets, cuts, strict=True)
        )
        schedule = Schedule(num_layers=12, first_skip_layer=2, stages=stages)
        small = tidy(schedule, num_tokens)
        assert planned_work(small, num_tokens) == planned_work(schedule, num_tokens)
        assert all(stage.active_tokens <= num_tokens for stage in small.stages)


def test_a_tidy_schedule_says_nothing_twice():
    stages = (
        Stage(last_layer=3, active_tokens=200, keep_tokens=150),  # nothing to skip or cut in 100 tokens
        Stage(last_layer=5, active_tokens=90, keep_tokens=40),
        Stage(last_layer=7, active_tokens=80, keep_tokens=40),
    )
    assert tidy(Schedule(num_layers=8, first_skip_layer=2, stages=stages), 100) == Schedule(
        num_layers=8,
        first_skip_layer=4,
        stages=(
            Stage(last_layer=5, active_tokens=90, keep_tokens=40),
            Stage(last_layer=7, active_tokens=40, keep_tokens=None),
        ),
    )
    assert tidy(Schedule(num_layers=8, first_skip_layer=2, stages=stages), 40) == Schedule.dense(8)
    last = (Stage(last_layer=7, active_tokens=80, keep_tokens=40),)
    uncut = (Stage(last_layer=7, active_tokens=80),)
    assert tidy(Schedule(num_layers=8, first_skip_layer=4, stages=last), 100).stages == uncut
    assert tidy(Schedule(num_layers=8, first_skip_layer=4, stages=last), 80) == Schedule.dense(8)


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen2.5-7b", "demo-12l"])
def test_the_point_of_a_preset_is_that_preset_at_the_same_cost(name):
    space = Space(costs=costs(4096), first_layer=4, target=2.2)
    here = space.schedule(space.point(preset(name)))
    there = space.costs.sized(preset(name), 2.2, reference_tokens=PRESETS[name].reference_tokens)
    assert there is not None
    assert (here.first_skip_layer, here.recent_tokens) == (there.first_skip_layer, there.recent_tokens)
    for one, other in zip(here.stages, there.stages, strict=True):
        assert one.last_layer == other.last_layer
        assert abs(one.active_tokens - other.active_tokens) <= 1
        assert abs((one.keep_tokens or 0) - (other.keep_tokens or 0)) <= 1


def test_without_a_target_the_point_of_a_preset_is_that_preset():
    space = Space(costs=costs(4096), first_layer=4)
    schedule = Schedule.preset("demo-12l", num_tokens=4096)
    assert space.schedule(space.point(schedule)) == schedule


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("first_layer", [0, 7, 11])
def test_a_preset_out_of_the_space_starts_where_the_space_does(name, first_layer):
    space = Space(costs=costs(), first_layer=first_layer, target=1.05)
    point = space.point(preset(name))
    for parameter, range_ in space.distributions().items():
        if parameter in point:
            assert range_._contains(range_.to_internal_repr(point[parameter]))
    assert space.schedule(point).first_skip_layer >= first_layer


def test_the_limit_is_reached_by_one_token_and_by_nothing_else():
    model = costs(1000)
    stages = (Stage(last_layer=4, active_tokens=1, keep_tokens=1),)
    fastest = Schedule(num_layers=12, first_skip_layer=4, stages=stages)
    assert model.limit(4) == model.speedup(fastest)
    work = planned_work(fastest, 1000)
    assert [layer.candidates for layer in work] == [1000] * 5 + [1] * 7
    assert model.limit(4, 3) < model.limit(4) > model.limit(5)


@pytest.mark.parametrize("target", [4.0, 1.0, 0.5])
def test_a_target_out_of_reach_is_refused_with_the_limit(target):
    with pytest.raises(ConfigError, match=r"target_speedup must be above 1 and at most 2\.96, .*layer 4 on"):
        Space(costs=costs(), first_layer=4, target=target)
