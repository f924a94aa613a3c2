"""Sampling: the worked example, a NumPy reference of the filters, seeds, extremes, faults."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from spts.errors import ModelError, RequestError
from spts.sampling import Sampling, make_generator, sample, token_logprobs


def slow_distribution(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, float]:
    """Probability of every token, filter by filter, and by how much top_p missed to cut elsewhere."""
    scaled = logits.astype(np.float64) / sampling.temperature
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    kept = order[: sampling.top_k] if sampling.top_k else order
    weight = {token: math.exp(scaled[token] - scaled[order[0]]) for token in kept}
    total = sum(weight.values())
    nucleus, reached, margin = [], 0.0, math.inf
    for token in kept:
        nucleus.append(token)
        reached += weight[token] / total
        margin = min(margin, abs(reached - sampling.top_p)) if sampling.top_p < 1 else margin
        if sampling.top_p < 1 and reached >= sampling.top_p:
            break
    total = sum(weight[token] for token in nucleus)
    probabilities = np.zeros(len(logits))
    for token in nucleus:
        probabilities[token] = weight[token] / total
    return probabilities, margin


def frequencies(logits_V: torch.Tensor, sampling: Sampling, draws: int) -> np.ndarray:
    generator = make_generator(sampling)
    counts = np.zeros(len(logits_V))
    for _ in range(draws):
        counts[sample(logits_V, sampling, generator)] += 1
    return counts / draws


def test_worked_example():
    sampling = Sampling(temperature=1.0, top_k=3, top_p=0.8, seed=0)
    logits_V = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    assert slow_distribution(logits_V.numpy(), sampling)[0] == pytest.approx([0, 2 / 3, 0, 1 / 3])
    drawn = frequencies(logits_V, sampling, 3000)
    assert drawn == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=0.04)  # 4.6 standard deviations


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, seed=1),
        Sampling(temperature=0.5, seed=2),
        Sampling(temperature=2.0, top_k=5, seed=3),
        Sampling(temperature=1.3, top_p=0.7, seed=4),
        Sampling(temperature=0.9, top_p=0.6, top_k=4, seed=5),
    ],
    ids=repr,
)
def test_draws_follow_the_reference_distribution(sampling):
    logits = np.random.default_rng(sampling.seed).normal(size=7).astype(np.float32)
    expected, _ = slow_distribution(logits, sampling)
    drawn = frequencies(torch.from_numpy(logits), sampling, 3000)
    assert drawn == pytest.approx(expected, abs=0.045)
    assert set(drawn.nonzero()[0]) <= set(expected.nonzero()[0])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([-math.inf, -3.0, -1.0, 0.0, 0.5, 2.0]), min_size=1, max_size=12),
    st.floats(0.2, 3),
    st.floats(0.05, 1),
    st.integers(0, 14),
    st.integers(0, 2**40),
)
def test_only_tokens_of_the_reference_are_drawn(logits, temperature, top_p, top_k, seed):
    assume(max(logits) > -math.inf)
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    expected, margin = slow_distribution(np.array(logits), sampling)
    assume(margin > 1e-9)  # a cut that rounding decides is nobody's promise
    generator = make_generator(sampling)
    for _ in range(5):
        assert expected[sample(torch.tensor(logits), sampling, generator)] > 0


@pytest.mark.parametrize(
    ("draw", "drawn"),
    [(0.0, 2), (2.0**-53, 2), (0.49, 2), (0.51, 0), (0.74, 0), (0.76, 3), (1 - 2.0**-53, 3)],
)
def test_the_ends_of_the_draw_hit_possible_tokens(monkeypatch, draw, drawn):
    logits_V = torch.tensor([0.25, 0.0, 0.5, 0.25, 0.0, 0.0]).log()
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.tensor(draw, dtype=torch.float64))
    sampling = Sampling(temperature=1.0)
    assert sample(logits_V, sampling, make_generator(sampling)) == drawn


def test_greedy_takes_the_lowest_id_of_equals_and_no_draw():
    sampling = Sampling(seed=3)
    generator = make_generator(sampling)
    before = generator.get_state()
    for size in (1, 2, 63, 1000, 100_003):
        logits_V = torch.zeros(size)
        logits_V[size // 2 :] = 1.5
        assert sample(logits_V, sampling, generator) == size // 2
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_top_k_of_one_is_greedy_in_every_dtype(dtype):
    logits_V = torch.randn(500).to(dtype)
    logits_V[[41, 300]] = 60.0
    generator = make_generator(Sampling())
    for sampling in (Sampling(), Sampling(temperature=5.0, top_k=1), Sampling(temperature=5.0, top_p=1e-9)):
        assert sample(logits_V, sampling, generator) == 41


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e30])
def test_extreme_temperatures_stay_numbers(temperature):
    logits_V = torch.tensor([-1e30, 3.0, -math.inf, 1e30, 2.0])
    sampling = Sampling(temperature=temperature, seed=0)
    drawn = frequencies(logits_V, sampling, 50)
    assert drawn[2] == 0
    if temperature < 1:
        assert drawn[3] == 1


def test_a_seed_repeats_and_another_differs():
    logits_V = torch.randn(1000)

    def draws(seed: int | None) -> list[int]:
        sampling = Sampling(temperature=1.5, seed=seed)
        generator = make_generator(sampling)
        return [sample(logits_V, sampling, generator) for _ in range(20)]

    assert draws(11) == draws(11)
    assert draws(11) != draws(12)
    assert draws(-(2**63)) != draws(2**63 - 1)
    assert draws(None) != draws(None)


def test_every_request_draws_once_per_token_whatever_its_filters():
    logits_V = torch.randn(63)
    states = []
    for sampling in (
        Sampling(temperature=1.0, seed=5),
        Sampling(temperature=0.1, top_k=1, seed=5),
        Sampling(temperature=2.0, top_p=0.3, seed=5),
    ):
        generator = make_generator(sampling)
        sample(logits_V, sampling, generator)
        states.append(generator.get_state())
    assert all(torch.equal(state, states[0]) for state in states)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0)], ids=["greedy", "drawn"])
def test_logits_that_are_no_numbers_are_an_error(bad, sampling):
    logits_V = torch.randn(63)
    logits_V[40] = bad
    with pytest.raises(ModelError, match="logits_V must have a finite maximum, got"):
        sample(logits_V, sampling, make_generator(sampling))


def test_logits_that_allow_nothing_are_an_error():
    with pytest.raises(ModelError, match="logits_V must have a finite maximum, got -inf"):
        sample(torch.full((9,), -math.inf), Sampling(), make_generator(Sampling()))


@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
@pytest.mark.parametrize("vocab", [3, 63, 1000])
def test_the_most_likely_tokens_are_those_of_a_stable_sort(vocab, num_top):
    for logits in (
        torch.randn(vocab),
        torch.randint(0, 4, (vocab,)).float(),
        torch.full((vocab,), -torch.inf),
    ):
        logits[vocab // 2] = 1.0
        values, ids = torch.log_softmax(logits, dim=0).sort(descending=True, stable=True)
        expected = list(zip(ids.tolist(), values.tolist(), strict=True))[:num_top]
        assert list(token_logprobs(logits, 1, num_top).top) == expected


def test_logprobs_equal_the_reference():
    logits = np.random.default_rng().normal(size=63).astype(np.float32) * 4
    logits[[7, 50]] = logits.max() + 1  # the best two are equal: the lower id comes first
    reference = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    order = sorted(range(63), key=lambda token: (-logits[token], token))
    for num_top in (0, 1, 5, 20):
        report = token_logprobs(torch.from_numpy(logits), 33, num_top)
        assert report.token_id == 33
        assert report.logprob == pytest.approx(reference[33], abs=1e-5)
        assert [token for token, _ in report.top] == order[:num_top]
        assert [value for _, value in report.top] == pytest.approx(reference[order[:num_top]], abs=1e-5)
    assert len(token_logprobs(torch.randn(3), 0, 20).top) == 3


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("temperature", -0.1, "be a finite number of at least 0"),
        ("temperature", math.nan, "be a finite number"),
        ("temperature", math.inf, "be a finite number"),
        ("temperature", "1", "be a finite number"),
        ("temperature", True, "be a finite number"),
        ("top_p", 0, "be above 0 and at most 1"),
        ("top_p", 1.01, "be above 0 and at most 1"),
        ("top_p", math.nan, "be above 0 and at most 1"),
        ("top_k", -1, "be an integer of at least 0"),
        ("top_k", 2.0, "be an integer of at least 0"),
        ("seed", 1.5, "be a 64-bit integer or null"),
        ("seed", 2**63, "be a 64-bit integer or null"),
        ("stop_token_ids", [3], "be a tuple of token ids"),
        ("stop_token_ids", (3, -1), "be a tuple of token ids"),
        ("logprobs", -1, "be an integer from 0 to 20 or null"),
        ("logprobs", 21, "be an integer from 0 to 20 or null"),
    ],
)
def test_faults_name_field_rule_and_value(field, value, rule):
    with pytest.raises(RequestError) as caught:
        Sampling(**{field: value})
    assert (caught.value.code, caught.value.field) == ("invalid_sampling", field)
    assert str(caught.value).startswith(f"{field} must {rule}")
    assert f"got {value!r}; use " in str(caught.value)


def test_faults_cross_processes():
    with pytest.raises(RequestError) as caught:
        Sampling(top_k=-1)
    received = pickle.loads(pickle.dumps(caught.value))
    assert type(received) is RequestError
    assert str(received) == str(caught.value)
    assert (received.code, received.field) == ("invalid_sampling", "top_k")


def test_sampling_crosses_processes():
    sampling = Sampling(temperature=0.7, top_p=1, stop_token_ids=(2, 5), logprobs=0)
    assert pickle.loads(pickle.dumps(sampling)) == sampling
