"""Where in a prompt each layer computed: against plain counting, and against the model's own work."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spts
from cluster.activity import summed_up
from cluster.config import EngineConfig
from cluster.protocol import Request, Step
from cluster.stepper import Stepper
from spts.layer import LayerTrace
from spts.methods import Dense, Spts
from tests.cluster.tiny import SCHEDULE


def trace(attention: list[int], ffn: list[int]) -> LayerTrace:
    return LayerTrace(
        layer=0,
        candidates=torch.arange(0),
        probe_scores=None,
        attention_tokens=torch.tensor(attention, dtype=torch.int64),
        ffn_tokens=torch.tensor(ffn, dtype=torch.int64),
    )


def test_the_worked_example():
    activity = summed_up([trace([0, 2, 3], [])], num_tokens=4, bins=2)
    assert activity.attention == ((50, 100),)
    assert activity.ffn == ((0, 0),)


@settings(deadline=None)
@given(data=st.data(), num_tokens=st.integers(1, 300), bins=st.integers(1, 512))
def test_shares_are_those_of_plain_counting(data, num_tokens, bins):
    ran = data.draw(st.sets(st.integers(0, num_tokens - 1)))
    [shares] = summed_up([trace(sorted(ran), [])], num_tokens=num_tokens, bins=bins).attention
    bins = min(bins, num_tokens)
    assert len(shares) == bins
    for bin_, share in enumerate(shares):
        members = [token for token in range(num_tokens) if token * bins // num_tokens == bin_]
        exact = Fraction(100 * len(ran.intersection(members)), len(members))
        assert abs(share - exact) <= Fraction(1, 2) + Fraction(1, 10**4)


@pytest.mark.parametrize("num_tokens", [63, 200])
def test_the_shares_of_a_request_add_up_to_its_work(tiny_model, num_tokens):
    stepper = Stepper(spts.load(tiny_model), EngineConfig(model="tiny"), 0)
    token_ids = tuple(torch.randint(1, 298, (num_tokens,)).tolist())
    for method in (Dense(), Spts(schedule=SCHEDULE)):
        for bins in (0, num_tokens):  # a bin a token: each share is 0 or 100
            sent = Request(
                request_id="a", token_ids=token_ids, method=method, max_new_tokens=1, activity_bins=bins
            )
            output = stepper.step(Step(start=sent, advance=("a", None), release=("a",)))
            assert output is not None
            done = output.prefilled
            assert done is not None
            if not bins:
                assert done.activity is None
                continue
            assert done.activity is not None
            blocks = zip(done.work, done.activity.attention, done.activity.ffn, strict=True)
            for work, attention, ffn in blocks:
                assert sum(attention) == 100 * work.attention_tokens
                assert sum(ffn) == 100 * work.ffn_tokens
                assert attention[-1] == ffn[-1] == 100, "the last token is in every choice"
