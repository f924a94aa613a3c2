"""KL and rank against scipy and sorting, ties, and the worked example."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from spts import agreement
from spts.agreement import compare
from spts.memory import COMPARED_ELEMENTS, comparison_bytes
from tests.held import Held


def test_worked_example():
    dense = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    kl, rank = compare(dense, torch.tensor([[0.0, 1.0], [0.0, 2.0]]))
    assert kl.tolist() == pytest.approx([0.0, 2.0 * np.tanh(1.0)], abs=1e-12)
    assert rank.tolist() == [1, 2]


@pytest.mark.parametrize("vocab", [2, 63, 1000])
def test_kl_is_scipys_entropy_and_rank_a_place_in_the_sorted_list(vocab):
    dense, other = torch.randn(7, vocab) * 4, torch.randn(7, vocab) * 4
    kl, rank = compare(dense, other)
    p, q = (scipy.special.softmax(each.double().numpy(), axis=-1) for each in (dense, other))
    np.testing.assert_allclose(kl.numpy(), scipy.stats.entropy(p, q, axis=-1), rtol=1e-6)
    for row in range(7):
        order = sorted(range(vocab), key=lambda token: -float(other[row, token]))
        assert rank[row] == 1 + order.index(int(dense[row].argmax()))


def test_equal_logits_agree_exactly_also_where_tokens_tie():
    logits = torch.randn(5, 64, dtype=torch.bfloat16).float()
    logits[:, [3, 40]] = 9.0
    kl, rank = compare(logits, logits.clone())
    assert kl.tolist() == [0.0] * 5
    assert rank.tolist() == [1] * 5


def test_tokens_that_tie_with_denses_choice_do_not_push_it_back():
    _, rank = compare(torch.tensor([[0.0, 5.0, 0.0]]), torch.tensor([[2.0, 2.0, 3.0]]))
    assert rank.tolist() == [2]


def test_a_difference_that_is_no_number_is_seen():
    kl, _ = compare(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, float("nan")]]))
    assert kl.isnan().all()


@pytest.mark.parametrize("rows", [1, 3, 7, 8])
def test_blocks_of_rows_give_the_same_as_all_at_once(monkeypatch, rows):
    dense, other = torch.randn(7, 300) * 4, torch.randn(7, 300) * 4
    kl, rank = agreement._compare(dense, other)
    monkeypatch.setattr(agreement, "COMPARED_ELEMENTS", rows * 300 + 299)
    in_blocks, rank_in_blocks = compare(dense, other)
    assert torch.equal(in_blocks, kl)
    assert torch.equal(rank_in_blocks, rank)


@pytest.mark.parametrize(("num_tokens", "vocab"), [(1, 1000), (63, 1000), (3, COMPARED_ELEMENTS + 1)])
def test_what_a_comparison_holds_is_what_is_counted_and_bounded(num_tokens, vocab):
    dense, other = torch.randn(num_tokens, vocab), torch.randn(num_tokens, vocab)
    with Held() as used:
        compare(dense, other)
    counted = comparison_bytes(vocab, num_tokens)
    assert counted / 1.3 < used.most <= counted <= 44 * max(vocab, COMPARED_ELEMENTS)
