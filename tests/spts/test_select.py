"""Selection: the worked example, a slow oracle, ties, NaN, and one decision for all ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spts.collective import Collective, Local
from spts.errors import ModelError
from spts.select import refuse_nan, select


def chosen(scores_T: Tensor, budget: int, group: Collective, *, recent: int = 1) -> Tensor:
    """A choice, refused if its scores are not all numbers."""
    has_nan = torch.zeros((), dtype=torch.bool)
    kept_M = select(scores_T, budget, group, has_nan=has_nan, recent=recent)
    refuse_nan(has_nan)
    return kept_M


def slow_select(scores: np.ndarray, budget: int, recent: int = 1) -> list[int]:
    """The rule read aloud: the last ones, then one by one the best of the rest, the first of equals."""
    kept = list(range(len(scores)))[-recent:]
    rest = list(range(len(scores) - len(kept)))
    while rest and len(kept) < budget:
        best = rest[0]
        for index in rest:
            if scores[index] > scores[best]:
                best = index
        rest.remove(best)
        kept.append(best)
    return sorted(kept)


def test_worked_example():
    scores_T = torch.tensor([0.2, 0.5, 0.1, 0.5, 0.5, 0.0])
    kept_M = chosen(scores_T, 3, Local())
    assert kept_M.dtype == torch.int64
    assert kept_M.tolist() == [1, 3, 5]


# Few distinct values, so that ties decide; both zeros, which are equal; both infinities, which are numbers.
tied_scores = st.lists(
    st.sampled_from([-math.inf, -1.0, -0.0, 0.0, 0.25, 0.5, math.inf]), min_size=1, max_size=40
)


@settings(max_examples=300, deadline=None)
@given(
    tied_scores,
    st.integers(1, 45),
    st.integers(1, 45),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_equals_the_slow_oracle_on_ties(scores, budget, recent, dtype):
    recent = min(recent, budget)
    kept_M = chosen(torch.tensor(scores, dtype=dtype), budget, Local(), recent=recent)
    assert kept_M.tolist() == slow_select(np.array(scores), budget, recent)


@pytest.mark.parametrize("num_candidates", [1, 2, 63, 500, 1000])
def test_equals_the_slow_oracle_at_odd_sizes(num_candidates):
    rng = np.random.default_rng()
    for budget in {
        1,
        2,
        num_candidates // 2 or 1,
        max(1, num_candidates - 1),
        num_candidates,
        num_candidates + 5,
    }:
        scores = rng.standard_normal(num_candidates).astype(np.float32)
        kept_M = chosen(torch.from_numpy(scores), budget, Local())
        assert kept_M.tolist() == slow_select(scores, budget)


def test_all_equal_keeps_the_first_and_the_last():
    kept_M = chosen(torch.zeros(100_003), 1000, Local())
    assert kept_M.tolist() == [*range(999), 100_002]


def test_scores_are_left_alone():
    scores_T = torch.rand(63)
    before_T = scores_T.clone()
    chosen(scores_T, 7, Local())
    assert torch.equal(scores_T, before_T)


class Group:
    """Ranks called one after the other: rank 0's broadcast is what the others then receive, in order."""

    world_size = 2

    def __init__(self) -> None:
        self.rank = 0
        self.sent: list[Tensor] = []

    def all_reduce(self, tensor: Tensor) -> Tensor:
        raise AssertionError("selection decides on one rank")

    def broadcast(self, tensor: Tensor) -> Tensor:
        if self.rank == 0:
            self.sent.append(tensor.clone())
            return tensor
        sent = self.sent.pop(0)
        assert (tensor.shape, tensor.dtype) == (sent.shape, sent.dtype)
        return tensor.copy_(sent)


@pytest.mark.parametrize("budget", [1, 7, 63, 64])
def test_rank_0_decides_for_all(budget):
    group = Group()
    scores_T = torch.rand(63)
    decided_M = chosen(scores_T, budget, group)
    group.rank = 1
    followed_M = chosen(torch.rand(63), budget, group)
    assert torch.equal(decided_M, followed_M)
    assert decided_M.tolist() == slow_select(scores_T.numpy(), budget)
    assert not group.sent


@pytest.mark.parametrize("where", [0, 31, 62])
@pytest.mark.parametrize("budget", [1, 7, 80])
def test_nan_is_an_error_on_every_rank(where, budget):
    group = Group()
    scores_T = torch.rand(63)
    scores_T[where] = math.nan
    with pytest.raises(ModelError, match="scores_T must be numbers, got NaN"):
        chosen(scores_T, budget, group)
    group.rank = 1
    with pytest.raises(ModelError, match="scores_T must be numbers"):
        chosen(torch.rand(63), budget, group)
    assert not group.sent


def test_indices_after_a_nan_are_rows_that_exist_and_every_rank_stays_refused():
    """No layer waits for the flag: what is chosen until somebody asks must be safe to gather by."""
    group, flags = Group(), [torch.zeros((), dtype=torch.bool) for _ in range(2)]
    for scores_T in (torch.full((63,), math.nan), torch.rand(63)):
        kept = []
        for group.rank in (0, 1):
            kept.append(select(scores_T, 7, group, has_nan=flags[group.rank]))
            assert bool(flags[group.rank])
        assert torch.equal(*kept)
        assert len(set(kept[0].tolist())) == 7
        assert int(kept[0].min()) >= 0 and int(kept[0].max()) < 63
