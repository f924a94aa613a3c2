"""The second question on a document: what it saves by FLOP, and that it is answered as without the first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.config import EngineConfig
from jobs.reuse import QUESTION_TOKENS, main, measure
from spts.cost import ModelShape, ProxyShape, prefill_flops, reused_flops
from spts.methods import Dense, Spts
from spts.schedule import Schedule

DEMO = Path(__file__).resolve().parents[2] / "jobs" / "demo_model"
SPTS = Spts(schedule=Schedule.preset("demo-12l"))


def test_the_second_question_on_8192_tokens_of_the_demo_model_costs_a_tenth_of_the_first():
    shape = ModelShape.from_config(json.loads((DEMO / "config.json").read_text()))
    fitted = json.loads((DEMO / "proxies" / "proxies.json").read_text())
    proxy = ProxyShape(channels=fitted["channels"], rank=fitted["rank"])
    flops = prefill_flops(shape, SPTS.planned_work(shape.num_layers, 8192), proxy).total
    left = flops - reused_flops(shape, 8192 - QUESTION_TOKENS, SPTS.schedule.first_skip_layer)
    assert left / flops == pytest.approx(0.100, abs=0.001)


@pytest.mark.parametrize(("same", "status"), [(True, 0), (False, 1)])
def test_answers_that_differ_are_a_failure(monkeypatch, capsys, same, status):
    times = {"first_s": 2.0, "second_s": 1.0, "measured": 0.5, "predicted": 0.5}
    times |= {"tokens": 8192, "reused_tokens": 8160}
    rows = [{"method": name, "same": same or name == "dense", **times} for name in ("spts", "dense")]
    monkeypatch.setattr("jobs.reuse.measure", lambda *_: rows)
    assert main([]) == status
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == rows


@pytest.mark.slow
@pytest.mark.real
def test_a_measurement_says_what_was_predicted_and_whether_the_answers_are_the_same():
    rows = measure(EngineConfig(model=str(DEMO), slice_tokens=None), [SPTS, Dense()], 512, 1, 4)
    assert [(row["method"], row["same"], row["reused_tokens"]) for row in rows] == [
        ("spts", True, 512 - QUESTION_TOKENS),
        ("dense", True, 512 - QUESTION_TOKENS),
    ]
    assert 0 < rows[1]["predicted"] < rows[0]["predicted"] < 1
