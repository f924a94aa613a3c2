"""Prompts and keys: the same samples for every method, the same keys in every process."""

from __future__ import annotations

import pytest

from jobs.cells import plan_models
from jobs.spec import load_sweep
from jobs.tasks import get_task
from jobs.work import Prompts, prepare
from spts.cost import dense_flops


@pytest.fixture
def prepared(config, write_config):
    def prepare_it(**change):
        (plan,) = plan_models(load_sweep(write_config({**config, **change})))
        return plan, prepare(plan, Prompts(plan.folder))

    return prepare_it


def test_every_method_gets_the_same_prompts(prepared):
    _, work = prepared()
    assert len(work) == 3 * 2 * 2 * 2
    by_label: dict[str, set] = {}
    for one in work:
        by_label.setdefault(one.cell.label, set()).add((one.planned.sample, one.token_ids))
    assert by_label["dense"] == by_label["spts"] == by_label["random"]
    assert len(by_label["dense"]) == 8


def test_keys_are_unique_and_repeatable(prepared):
    keys = [one.planned.key for one in prepared()[1]]
    assert len(set(keys)) == len(keys)
    assert keys == [one.planned.key for one in prepared()[1]]


def test_more_samples_keep_the_ones_that_are_done(prepared):
    few = {one.planned.key for one in prepared(samples=2)[1]}
    many = {one.planned.key for one in prepared(samples=3)[1]}
    assert few < many


def test_samples_per_length(prepared):
    _, work = prepared(samples={340: 1, 420: 3})
    counts = {length: sum(one.cell.length == length for one in work) for length in (340, 420)}
    assert counts == {340: 3 * 2 * 1, 420: 3 * 2 * 3}


def test_prompts_fill_their_length_and_hold_what_is_asked(prepared):
    plan, work = prepared()
    prompts = Prompts(plan.folder)
    for one in work:
        assert 0.8 * one.cell.length < len(one.token_ids) <= one.cell.length
        assert one.planned.prompt_tokens == len(one.token_ids)
        text = prompts.decode(one.token_ids)
        assert text.endswith(one.planned.question)
        assert get_task(one.cell.task).score(text, one.planned.references, one.planned.meta) == 1.0
        assert "Question:" in one.planned.question
        assert 0 <= one.planned.meta["depth"] <= 1


def test_predicted_cost(prepared):
    plan, work = prepared()
    for one in work:
        dense = dense_flops(plan.shape, len(one.token_ids)).total
        assert one.flops == dense if one.cell.label == "dense" else one.flops < 0.8 * dense
