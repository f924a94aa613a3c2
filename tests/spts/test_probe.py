"""PAP scores against NumPy, head by head, and split over ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spts.collective import Local
from spts.kernels.reference import last_queries_probe, last_query_probe
from spts.probe import attention_scores


def _numpy_scores(q_Hd: np.ndarray, k_TKd: np.ndarray, scale: float) -> np.ndarray:
    total_T = np.zeros(k_TKd.shape[0])
    group = q_Hd.shape[0] // k_TKd.shape[1]
    for head in range(q_Hd.shape[0]):
        logits_T = scale * k_TKd[:, head // group].astype(np.float64) @ q_Hd[head].astype(np.float64)
        weights_T = np.exp(logits_T - logits_T.max())
        total_T += weights_T / weights_T.sum()
    return total_T / q_Hd.shape[0]


@pytest.mark.parametrize("num_tokens", [1, 2, 63, 500, 1000])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 2), (8, 1)])
def test_equals_numpy(heads, kv_heads, num_tokens):
    q_Hd, k_TKd = 3 * torch.randn(heads, 16), torch.randn(num_tokens, kv_heads, 16)
    scores_T = attention_scores(q_Hd[None], k_TKd, scale=0.25, num_heads=heads, collective=Local())
    assert scores_T.dtype == torch.float32
    np.testing.assert_allclose(scores_T, _numpy_scores(q_Hd.numpy(), k_TKd.numpy(), 0.25), atol=1e-6)
    assert float(scores_T.sum()) == pytest.approx(1.0, abs=1e-5)


def test_worked_example():
    keys_TKd = torch.tensor([0.0, float(np.log(3.0))]).view(2, 1, 1)
    scores_T = last_query_probe(torch.ones(1, 1), keys_TKd, 1.0)
    np.testing.assert_allclose(scores_T, [0.25, 0.75], rtol=1e-6)


def test_half_precision_keys_get_a_float32_softmax():
    """In bfloat16 a thousand weights near 1/1000 would collapse onto a handful of values."""
    q_Hd, k_TKd = torch.randn(4, 16).bfloat16(), torch.randn(1000, 2, 16).bfloat16()
    scores_T = attention_scores(q_Hd[None], k_TKd, scale=0.25, num_heads=4, collective=Local())
    assert scores_T.dtype == torch.float32
    assert scores_T.unique().numel() > 900
    np.testing.assert_allclose(
        scores_T, _numpy_scores(q_Hd.float().numpy(), k_TKd.float().numpy(), 0.25), rtol=0.05
    )


def test_far_apart_logits_do_not_overflow():
    scores_T = attention_scores(
        torch.full((1, 1, 1), 1e4),
        torch.tensor([-1e4, 0.0, 1e4]).view(3, 1, 1),
        scale=1.0,
        num_heads=1,
        collective=Local(),
    )
    assert scores_T.tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_hold_some_heads_sum_to_the_mean_over_all(ranks):
    q_Hd, k_TKd = torch.randn(8, 16), torch.randn(100, 4, 16)
    whole_T = attention_scores(q_Hd[None], k_TKd, scale=0.25, num_heads=8, collective=Local())
    parts = [
        last_query_probe(q_hd, k_Tkd, 0.25)
        for q_hd, k_Tkd in zip(q_Hd.chunk(ranks), k_TKd.chunk(ranks, dim=1), strict=True)
    ]

    class Group:
        rank, world_size = 0, ranks

        def all_reduce(self, tensor):
            assert torch.equal(tensor, parts[0])
            return torch.stack(parts).sum(dim=0)

        def broadcast(self, tensor):
            return tensor

    here_T = attention_scores(
        q_Hd.chunk(ranks)[0][None], k_TKd.chunk(ranks, dim=1)[0], scale=0.25, num_heads=8, collective=Group()
    )
    torch.testing.assert_close(here_T, whole_T)


@pytest.mark.parametrize("num_queries", [1, 4, 63])
@pytest.mark.parametrize("num_tokens", [63, 500])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2), (8, 1)])
def test_several_queries_are_the_mean_of_each_over_the_keys_it_sees(heads, kv_heads, num_tokens, num_queries):
    q_QHd, k_TKd = 3 * torch.randn(num_queries, heads, 16), torch.randn(num_tokens, kv_heads, 16)
    expected_T = np.zeros(num_tokens)
    for query in range(num_queries):
        seen = num_tokens - num_queries + 1 + query
        expected_T[:seen] += _numpy_scores(q_QHd[query].numpy(), k_TKd[:seen].numpy(), 0.25) / num_queries
    scores_T = attention_scores(q_QHd, k_TKd, scale=0.25, num_heads=heads, collective=Local())
    assert scores_T.dtype == torch.float32
    np.testing.assert_allclose(scores_T, expected_T, atol=1e-6)
    assert float(scores_T.sum()) == pytest.approx(1.0, abs=1e-5)


def test_several_queries_worked_example():
    keys_TKd = torch.tensor([0.0, 0.0, float(np.log(2.0))]).view(3, 1, 1)
    np.testing.assert_allclose(
        last_queries_probe(torch.ones(2, 1, 1), keys_TKd, 1.0), [0.75, 0.75, 0.5], rtol=1e-6
    )


def test_one_query_is_the_last_ones_probe():
    q_Hd, k_TKd = torch.randn(6, 16), torch.randn(100, 2, 16)
    torch.testing.assert_close(
        last_queries_probe(q_Hd[None], k_TKd, 0.25), last_query_probe(q_Hd, k_TKd, 0.25)
    )
