"""Methods: what each one scores with, how it is recorded, and that naming one loads no torch."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from spts import methods
from spts.errors import ConfigError
from spts.methods import Dense, Method, Random, Recency, Spts
from spts.schedule import Schedule, Stage

SCHEDULE = Schedule(
    num_layers=4, first_skip_layer=1, stages=(Stage(last_layer=2, active_tokens=20, keep_tokens=10),)
)
ALL: list[Method] = [
    Dense(),
    Spts(schedule=SCHEDULE),
    Random(schedule=SCHEDULE, seed=7),
    Recency(schedule=SCHEDULE),
    Spts(schedule=SCHEDULE, probe_tokens=64),
    Spts(schedule=SCHEDULE, ffn_score="attention"),
    Spts(schedule=SCHEDULE, ffn_score="dense"),
]


class FakeSignals:
    """A layer's signals with known values, remembering what was asked."""

    def __init__(self, num_candidates: int) -> None:
        self.positions = torch.arange(num_candidates) * 3 + 5
        self.attention_T = torch.rand(num_candidates)
        self.norm_T = torch.rand(num_candidates)
        self.asked: list[object] = []

    def attention(self) -> Tensor:
        self.asked.append("attention")
        return self.attention_T

    def ffn_norm(self) -> Tensor:
        self.asked.append("ffn_norm")
        return self.norm_T

    def random(self, seed: int) -> Tensor:
        self.asked.append(seed)
        return torch.rand(len(self.positions), generator=torch.Generator().manual_seed(seed))


def test_spts_scores():
    signals = FakeSignals(63)
    method = Spts(schedule=SCHEDULE)
    assert torch.equal(method.attention_scores(signals), signals.attention_T)
    ffn_T = method.ffn_scores(signals)
    assert ffn_T is not None
    assert torch.equal(ffn_T, signals.norm_T * signals.attention_T)
    assert torch.equal(method.prune_scores(signals), signals.attention_T)
    assert (method.probes, method.needs_proxies, method.skips_ffn) == (1, True, True)


def test_the_ffn_by_attention_alone_asks_for_no_proxy():
    signals = FakeSignals(63)
    method = Spts(schedule=SCHEDULE, probe_tokens=4, ffn_score="attention")
    for question in (method.attention_scores, method.ffn_scores, method.prune_scores):
        scores_T = question(signals)
        assert scores_T is not None
        assert torch.equal(scores_T, signals.attention_T)
    assert "ffn_norm" not in signals.asked
    assert (method.probes, method.needs_proxies, method.skips_ffn) == (4, False, True)


def test_a_dense_ffn_chooses_nothing():
    signals = FakeSignals(63)
    method = Spts(schedule=SCHEDULE, ffn_score="dense")
    assert method.ffn_scores(signals) is None
    assert signals.asked == []
    assert (method.probes, method.needs_proxies, method.skips_ffn) == (1, False, False)


def test_defaults_are_the_papers_and_are_recorded():
    data = Spts(schedule=SCHEDULE).to_dict()
    assert data == {
        "name": "spts",
        "schedule": SCHEDULE.to_dict(),
        "probe_tokens": 1,
        "ffn_score": "product",
    }
    short = {"name": "spts", "schedule": SCHEDULE.to_dict()}
    assert methods.from_dict(short) == methods.from_dict(data)


@pytest.mark.parametrize(
    ("data", "reads"),
    [
        ({"name": "spts"}, True),
        ({"name": "spts", "ffn_score": "product", "probe_tokens": 4}, True),
        ({"name": "spts", "ffn_score": "attention"}, False),
        ({"name": "spts", "ffn_score": "dense"}, False),
        ({"name": "random", "seed": 3}, False),
        ({"name": "recency"}, False),
        ({"name": "dense"}, False),
    ],
)
def test_whether_proxies_are_read_is_known_before_the_schedule(data, reads):
    assert methods.reads_proxies(data) is reads


@pytest.mark.parametrize("data", [{"name": "sparse"}, {}, {"name": "spts", "seed": 1}])
def test_what_is_no_method_reads_nothing(data):
    with pytest.raises(ConfigError, match="method"):
        methods.reads_proxies(data)


def test_recency_prefers_the_latest():
    signals = FakeSignals(63)
    method = Recency(schedule=SCHEDULE)
    for scores_T in (
        method.attention_scores(signals),
        method.ffn_scores(signals),
        method.prune_scores(signals),
    ):
        assert scores_T.dtype == torch.float32
        assert scores_T.argsort(descending=True).tolist() == list(range(62, -1, -1))
    assert not signals.asked
    assert (method.probes, method.needs_proxies, method.skips_ffn) == (0, False, True)


def test_random_draws_anew_for_each_question_and_seed_and_repeats():
    def draws(seed: int) -> list[tuple[float, ...]]:
        signals = FakeSignals(63)
        method = Random(schedule=SCHEDULE, seed=seed)
        questions = (method.attention_scores, method.ffn_scores, method.prune_scores)
        scores = [tuple(question(signals).tolist()) for question in questions]
        assert not {"attention", "ffn_norm"} & set(signals.asked)
        return scores

    assert draws(5) == draws(5)
    assert len({scores for seed in range(6) for scores in draws(seed)}) == 18
    method = Random(schedule=SCHEDULE)
    assert (method.probes, method.needs_proxies) == (0, False)


def test_dense_is_never_asked():
    assert Dense().schedule_for(5) == Schedule.dense(5)
    for question in (Dense().attention_scores, Dense().ffn_scores, Dense().prune_scores):
        with pytest.raises(AssertionError):
            question(FakeSignals(3))
    assert (Dense().probes, Dense().needs_proxies) == (0, False)


@pytest.mark.parametrize("method", ALL[1:], ids=range(1, len(ALL)))
def test_a_schedule_for_another_depth_is_refused(method):
    assert method.schedule_for(4) is SCHEDULE
    with pytest.raises(
        ConfigError,
        match=r"schedule.num_layers must equal the model's 12 layers, got 4; .*scaled\(num_layers=12",
    ):
        method.schedule_for(12)


@pytest.mark.parametrize("method", ALL, ids=range(len(ALL)))
def test_records(method):
    data = method.to_dict()
    assert data["name"] == method.name
    assert methods.from_dict(json.loads(json.dumps(data))) == method
    assert pickle.loads(pickle.dumps(method)) == method
    assert eval(repr(method), {**vars(methods), "Stage": Stage}) == method
    assert len({method, methods.from_dict(data)}) == 1


def test_records_tell_methods_apart():
    assert len(set(ALL)) == 7
    assert Random(schedule=SCHEDULE, seed=7) != Random(schedule=SCHEDULE, seed=8)


@pytest.mark.parametrize(
    ("data", "field", "message"),
    [
        ({"name": "sparse"}, "method.name", "must be one of dense, spts, random, recency, got 'sparse'"),
        ({"name": ["spts"]}, "method.name", "must be one of dense, .* got"),
        ({"schedule": SCHEDULE.to_dict()}, "method", "must be a mapping with the key name"),
        (None, "method", "must be a mapping with the key name, got None"),
        ({"name": "spts"}, "method.schedule", "must be given"),
        (
            {"name": "dense", "schedule": None},
            "method.schedule",
            r"must be a known key \(name\), got 'schedule'",
        ),
        ({"name": "spts", "schedule": SCHEDULE.to_dict(), "seed": 1}, "method.seed", "must be a known key"),
        (
            {"name": "spts", "schedule": "llama"},
            "method.schedule",
            "must be a mapping with the keys num_layers",
        ),
        (
            {"name": "spts", "schedule": {**SCHEDULE.to_dict(), "first_skip_layer": 9}},
            "method.schedule.first_skip_layer",
            "must be at most num_layers = 4, got 9",
        ),
        (
            {"name": "spts", "schedule": SCHEDULE.to_dict(), "probe_tokens": 0},
            "method.probe_tokens",
            "must be an integer of at least 1, got 0",
        ),
        (
            {"name": "spts", "schedule": SCHEDULE.to_dict(), "ffn_score": "norm"},
            "method.ffn_score",
            "must be one of product, attention, dense, got 'norm'",
        ),
        (
            {"name": "spts", "schedule": SCHEDULE.to_dict(), "ffn_score": ["dense"]},
            "method.ffn_score",
            "must be one of product, attention, dense, got",
        ),
        (
            {"name": "random", "schedule": SCHEDULE.to_dict(), "seed": -1},
            "method.seed",
            "must be an integer of at least 0, got -1",
        ),
    ],
)
def test_faults_name_field_rule_and_value(data, field, message):
    with pytest.raises(ConfigError, match=message) as caught:
        methods.from_dict(data)
    assert caught.value.field == field
    assert str(caught.value).startswith(field)


def test_a_schedule_is_a_schedule():
    with pytest.raises(ConfigError, match=r"schedule must be a Schedule, got \{"):
        Spts(schedule=SCHEDULE.to_dict())  # type: ignore[arg-type]


def test_naming_a_method_loads_no_torch():
    program = (
        "import sys, spts, spts.collective\n"
        "from spts import Schedule, Stage, Sampling, methods, cost, ConfigError\n"
        "methods.Spts(schedule=Schedule.preset('llama-3.1-8b')).schedule_for(32)\n"
        "methods.from_dict({'name': 'dense'}); Sampling(temperature=1.0)\n"
        "print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.stderr) == ("[]\n", "")
