"""Schedules: what is refused, what the presets are, and how they scale."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spts.errors import ConfigError
from spts.schedule import PRESETS, Schedule, Stage


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Any valid schedule of up to 40 layers, dense ones and stages without a cut included."""
    num_layers = draw(st.integers(1, 40))
    first = draw(st.integers(0, num_layers))
    ends = sorted(draw(st.sets(st.integers(first, num_layers - 1), max_size=6))) if first < num_layers else []
    sizes = st.lists(st.integers(1, 70_000), min_size=len(ends), max_size=len(ends))
    budgets, cuts = (sorted(draw(sizes), reverse=True) for _ in range(2))
    if not ends:
        return replace(Schedule.dense(num_layers), attention_density=draw(st.sampled_from([1.0, 0.2])))
    return Schedule(
        num_layers=num_layers,
        first_skip_layer=first,
        stages=tuple(
            Stage(last_layer=end, active_tokens=budget, keep_tokens=draw(st.sampled_from([cut, None])))
            for end, budget, cut in zip(ends, budgets, cuts, strict=True)
        ),
        recent_tokens=draw(st.integers(1, min(*budgets, *cuts))),
        attention_density=draw(st.sampled_from([1.0, 0.1, 0.5])),
    )


def test_worked_example():
    schedule = Schedule(
        num_layers=6,
        first_skip_layer=2,
        stages=(
            Stage(last_layer=3, active_tokens=40, keep_tokens=30),
            Stage(last_layer=4, active_tokens=10),
        ),
    )
    assert [schedule.active_tokens(layer) for layer in range(6)] == [None, None, 40, 40, 10, None]
    assert [schedule.keep_tokens(layer) for layer in range(6)] == [None, None, None, 30, None, None]


# The published settings, in units of 1024 tokens; what is kept after a stage is M less what it prunes.
@pytest.mark.parametrize(
    ("name", "num_layers", "first", "last_layers", "budgets", "kept"),
    [
        ("llama-3.1-8b", 32, 10, (13, 18, 23, 28), (9, 7, 4, 2), (8, 6, 3, 1)),
        ("qwen2.5-7b", 28, 9, (12, 16, 20, 24), (13, 10, 7, 4), (11, 8, 5, 2)),
        ("openpangu-1b", 26, 11, (13, 16, 19, 22), (13, 10, 7, 4), (11, 8, 5, 2)),
    ],
)
def test_published_presets(name, num_layers, first, last_layers, budgets, kept):
    schedule = Schedule.preset(name)
    assert (schedule.num_layers, schedule.first_skip_layer) == (num_layers, first)
    assert tuple(stage.last_layer for stage in schedule.stages) == last_layers
    assert tuple(stage.active_tokens for stage in schedule.stages) == tuple(1024 * m for m in budgets)
    assert tuple(stage.keep_tokens for stage in schedule.stages) == tuple(1024 * t for t in kept)
    assert PRESETS[name].reference_tokens == 32768


def test_unknown_preset_lists_the_known():
    with pytest.raises(ConfigError, match=r"preset must be one of llama-3\.1-8b, .*demo-12l, got 'gpt'"):
        Schedule.preset("gpt")


def _plain(**changes: object) -> dict[str, object]:
    first = {"last_layer": 3, "active_tokens": 40, "keep_tokens": 30}
    second = {"last_layer": 5, "active_tokens": 20, "keep_tokens": 10}
    plain: dict[str, object] = {"num_layers": 8, "first_skip_layer": 2, "stages": [first, second]}
    for key, value in changes.items():
        where, _, field = key.partition("__")
        if field:
            {"first": first, "second": second}[where][field] = value  # type: ignore[assignment]
        else:
            plain[key] = value
    return plain


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"first__active_tokens": 0}, "stages[0].active_tokens", "must be an integer of at least 1, got 0"),
        ({"second__active_tokens": 41}, "stages[1].active_tokens", "must not grow .* got 41 after 40"),
        (
            {"second__active_tokens": -3},
            "stages[1].active_tokens",
            "must be an integer of at least 1, got -3",
        ),
        ({"first__active_tokens": 9.5}, "stages[0].active_tokens", "must be an integer .* got 9.5"),
        ({"first__active_tokens": "9"}, "stages[0].active_tokens", "must be an integer .* got '9'"),
        ({"first__active_tokens": True}, "stages[0].active_tokens", "must be an integer .* got True"),
        ({"first__keep_tokens": 0}, "stages[0].keep_tokens", "must be an integer of at least 1, got 0"),
        ({"second__keep_tokens": 31}, "stages[1].keep_tokens", "must not grow .* got 31 after 30"),
        ({"second__last_layer": 8}, "stages[1].last_layer", "must be below num_layers = 8, got 8"),
        ({"second__last_layer": 3}, "stages[1].last_layer", r"must be at least 4 .*stages\[0\].* got 3"),
        ({"first__last_layer": 1}, "stages[0].last_layer", r"must be at least 2 \(first_skip_layer\), got 1"),
        ({"first__last_layer": -1}, "stages[0].last_layer", "must be an integer of at least 0, got -1"),
        ({"first_skip_layer": -1}, "first_skip_layer", "must be an integer of at least 0, got -1"),
        ({"first_skip_layer": 9}, "first_skip_layer", "must be at most num_layers = 8, got 9"),
        ({"first_skip_layer": 8}, "stages[0].last_layer", "must be at least 8"),
        ({"num_layers": 0}, "num_layers", "must be an integer of at least 1, got 0"),
        ({"stages": []}, "first_skip_layer", "must equal num_layers = 8 when there are no stages, got 2"),
        ({"stages": None}, "stages", "must be a list of stages, got None"),
        ({"stages": [7]}, "stages[0]", "must be a mapping with the keys last_layer, .* got 7"),
        ({"attention_density": 0}, "attention_density", "must be a number above 0 and at most 1, got 0;"),
        ({"attention_density": -0.5}, "attention_density", "must be a number above 0 .* got -0.5;"),
        ({"attention_density": 1.01}, "attention_density", "must be a number .* at most 1, got 1.01;"),
        ({"attention_density": math.nan}, "attention_density", "must be a number above 0 .* got nan;"),
        ({"attention_density": math.inf}, "attention_density", "must be a number above 0 .* got inf;"),
        ({"attention_density": True}, "attention_density", "must be a number above 0 .* got True;"),
        ({"attention_density": "0.5"}, "attention_density", "must be a number above 0 .* got '0.5';"),
        ({"attention_density": None}, "attention_density", "must be a number above 0 .* got None;"),
        ({"budget": 3}, "budget", r"must be a known key \(num_layers, .*\), got 'budget'; remove it"),
        ({"second__keep": 3}, "stages[1].keep", r"must be a known key \(last_layer, .*\), got 'keep'"),
    ],
)
def test_faults_name_field_rule_and_value(changes, field, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Schedule.from_dict(_plain(**changes))
    assert caught.value.field == f"schedule.{field}"
    assert str(caught.value).startswith(f"schedule.{field} must ")


@pytest.mark.parametrize("key", ["num_layers", "first_skip_layer", "stages"])
def test_missing_keys_are_named(key):
    data = _plain()
    del data[key]
    with pytest.raises(ConfigError, match=f"schedule.{key} must be given"):
        Schedule.from_dict(data)


def test_a_later_cut_may_not_grow_across_a_stage_without_one():
    stages = [
        {"last_layer": 3, "active_tokens": 40, "keep_tokens": 30},
        {"last_layer": 5, "active_tokens": 20, "keep_tokens": None},
        {"last_layer": 6, "active_tokens": 20, "keep_tokens": 35},
    ]
    with pytest.raises(ConfigError, match=r"stages\[2\].keep_tokens must not grow .* got 35 after 30"):
        Schedule.from_dict(_plain(stages=stages))


def test_stages_must_be_a_tuple_of_stage():
    with pytest.raises(ConfigError, match=r"stages must be a tuple of Stage, got .*Schedule.from_dict"):
        Schedule(num_layers=4, first_skip_layer=1, stages=[Stage(last_layer=2, active_tokens=5)])  # type: ignore[arg-type]


@settings(deadline=None)
@given(schedules())
def test_plain_data_round_trip(schedule):
    assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


def test_scaling_worked_example():
    llama = Schedule.preset("llama-3.1-8b")
    to_8 = llama.scaled(num_layers=8, num_tokens=1000)
    assert to_8.first_skip_layer == 3
    assert [(s.last_layer, s.active_tokens, s.keep_tokens) for s in to_8.stages] == [
        (3, 281, 250),
        (4, 219, 188),
        (5, 125, 94),
        (6, 63, 31),
    ]
    to_4 = llama.scaled(num_layers=4, num_tokens=1000)
    assert to_4.first_skip_layer == 2
    assert [(s.last_layer, s.active_tokens, s.keep_tokens) for s in to_4.stages] == [
        (2, 125, 94),
        (3, 63, 31),
    ]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_at_its_own_depth_and_length_is_itself(name):
    preset = PRESETS[name]
    reference = preset.reference_tokens
    same = preset.schedule.scaled(num_tokens=reference, reference_tokens=reference)
    assert same == preset.schedule
    assert same == preset.schedule.scaled(
        num_layers=preset.schedule.num_layers, num_tokens=reference, reference_tokens=reference
    )


@settings(deadline=None)
@given(schedules(), st.integers(1, 10**6))
def test_any_schedule_at_its_own_depth_and_length_is_itself(schedule, reference):
    assert schedule.scaled(num_tokens=reference, reference_tokens=reference) == schedule


def _round_half_up(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 2))


@settings(max_examples=300, deadline=None)
@given(schedules(), st.integers(1, 90), st.integers(1, 200_000), st.sampled_from([1, 63, 4096, 32768]))
def test_scaling_is_valid_everywhere_and_follows_its_rule_layer_by_layer(schedule, depth, length, reference):
    scaled = schedule.scaled(num_layers=depth, num_tokens=length, reference_tokens=reference)

    # The rule read off per layer, with exact fractions and no notion of merging.
    in_depth, in_length = Fraction(depth, schedule.num_layers), Fraction(length, reference)
    first = math.ceil(schedule.first_skip_layer * in_depth)
    ends = [_round_half_up((stage.last_layer + 1) * in_depth) for stage in schedule.stages]
    tokens: Callable[[int], int] = lambda count: max(1, _round_half_up(count * in_length))  # noqa: E731
    for layer in range(depth):
        running = [
            stage for stage, end in zip(schedule.stages, ends, strict=True) if layer >= first and end > layer
        ]
        ending = [
            stage.keep_tokens
            for stage, end in zip(schedule.stages, ends, strict=True)
            if layer >= first and end == layer + 1 and stage.keep_tokens is not None
        ]
        assert scaled.active_tokens(layer) == (tokens(running[0].active_tokens) if running else None)
        cut = tokens(ending[-1]) if ending and layer < depth - 1 else None
        assert scaled.keep_tokens(layer) == cut
    assert scaled.num_layers == depth
    assert scaled.attention_density == schedule.attention_density
    assert scaled.first_skip_layer == (first if scaled.stages else depth)
    assert scaled == Schedule.from_dict(scaled.to_dict())


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("num_layers", {"num_layers": 0, "num_tokens": 5}),
        ("num_tokens", {"num_tokens": 0}),
        ("num_tokens", {"num_tokens": 2.5}),
        ("reference_tokens", {"num_tokens": 5, "reference_tokens": 0}),
    ],
)
def test_scaling_to_nothing_is_refused(field, arguments):
    with pytest.raises(ConfigError, match=f"{field} must be an integer of at least 1"):
        Schedule.preset("llama-3.1-8b").scaled(**arguments)


def test_after_the_last_layer_nothing_is_cut():
    stages = (
        Stage(last_layer=1, active_tokens=9, keep_tokens=8),
        Stage(last_layer=2, active_tokens=7, keep_tokens=6),
    )
    schedule = Schedule(num_layers=3, first_skip_layer=1, stages=stages)
    assert [schedule.keep_tokens(layer) for layer in range(3)] == [None, 8, None]


def test_dense_schedule_has_no_budget_anywhere():
    schedule = Schedule.dense(3)
    assert [schedule.active_tokens(layer) for layer in range(3)] == [None] * 3
    assert [schedule.keep_tokens(layer) for layer in range(3)] == [None] * 3


def test_equal_schedules_are_one_key():
    assert (
        len({Schedule.preset("llama-3.1-8b"), Schedule.from_dict(Schedule.preset("llama-3.1-8b").to_dict())})
        == 1
    )


def test_recent_tokens_fit_every_choice_and_stay_when_scaled():
    demo = Schedule.preset("demo-12l")
    assert demo.recent_tokens == 32
    assert Schedule.preset("demo-12l", num_tokens=8192).recent_tokens == 32
    assert Schedule.preset("demo-12l", num_tokens=256).recent_tokens == 10  # the last cut: 160 * 256 / 4096
    assert Schedule.preset("llama-3.1-8b").recent_tokens == 1  # the paper's
    with pytest.raises(ConfigError, match=r"stages\[0\].keep_tokens must be at least recent_tokens = 9"):
        Schedule(
            num_layers=2,
            first_skip_layer=0,
            stages=(Stage(last_layer=1, active_tokens=9, keep_tokens=8),),
            recent_tokens=9,
        )


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_scales_by_its_own_reference(name):
    preset = PRESETS[name]
    assert Schedule.preset(name) == preset.schedule
    assert Schedule.preset(name, num_layers=8, num_tokens=1000) == preset.schedule.scaled(
        num_layers=8, num_tokens=1000, reference_tokens=preset.reference_tokens
    )


def test_attention_is_sparse_before_the_first_layer_that_skips_and_nowhere_else():
    sparse = replace(Schedule.preset("llama-3.1-8b"), attention_density=0.1)
    assert [sparse.density(layer) for layer in range(32)] == [0.1] * 10 + [1.0] * 22
    assert (sparse.block_tokens, Schedule.preset("llama-3.1-8b").block_tokens) == (128, 1)
    alone = replace(Schedule.dense(4), attention_density=0.1)
    assert [alone.density(layer) for layer in range(4)] == [0.1] * 4
    assert Schedule.preset("llama-3.1-8b").attention_density == 1.0


def test_a_density_of_1_is_the_same_schedule_and_record_however_it_is_written():
    said = Schedule.from_dict({**_plain(), "attention_density": 1})
    assert said == Schedule.from_dict(_plain())
    assert json.dumps(said.to_dict()) == json.dumps(Schedule.from_dict(_plain()).to_dict())
