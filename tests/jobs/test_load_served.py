"""A small load on a real endpoint, started and ended by the command that users type."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest

from jobs.load.__main__ import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.real,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray uses what pydantic deprecates
]
ROOT = Path(__file__).resolve().parents[2]


def test_every_stream_of_a_load_is_complete_or_refused(tmp_path, monkeypatch):
    """Twelve streams where four may be running and four waiting, so that some are refused."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    status = main(
        [
            *("--serve", "ray_config.yaml", "--out", str(tmp_path), "--streams", "12", "--seconds", "12"),
            *("--set", "engines.default.max_running=4", "--set", "engines.default.max_waiting=4"),
            *("--lengths", "400:0.6,1500:0.4", "--max-tokens", "12"),
        ]
    )
    found = json.loads((tmp_path / "report.json").read_text())
    assert status == 0, found["messages"]
    outcomes = found["outcomes"]
    assert outcomes["complete"] >= 8
    assert outcomes["refused"] >= 4, "twelve streams, eight places"
    assert (outcomes["error"], outcomes["fault"]) == (0, 0)
    assert [(line["length"], line["method"]) for line in found["lines"]] == [(400, "dense"), (1500, "spts")]
    assert found["total"]["score"] > 0.8, "the answers are right under load too"
    assert found["total"]["cached"] == 0
    assert (found["kv_left_bytes"], found["held"]) == (0, 0)
    assert found["memory"]["first"] > 2**28
    assert found["memory"]["growth_less_documents"] < 2**27
    left = {process.pid for process in psutil.Process().children(recursive=True)} - before
    assert not left, "the endpoint and its cluster are gone"
