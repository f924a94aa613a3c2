"""The most that a run was predicted to hold, against what recorded runs on GPUs held."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from jobs.timing.arena import SHAPES
from jobs.timing.cases import plan
from spts.cost import ProxyShape

RESULTS = Path(__file__).resolve().parents[2] / "jobs" / "results"


def measured() -> list[Any]:
    """Every recorded run of this library on a GPU: what ran, and the row."""
    runs = []
    for path in sorted(RESULTS.glob("*.json")):
        report = json.loads(path.read_text())
        runs += [
            pytest.param(report, row, id=f"{path.stem}-{row['method']}-{row['length_tokens']}")
            for row in report.get("rows", ())  # one that is not of jobs.latency has none
            if row.get("peak_bytes") is not None and row["method"] != "transformers"
        ]
    return runs


@pytest.mark.parametrize(("report", "row"), measured())
def test_no_recorded_run_held_more_than_predicted_nor_a_tenth_less(report, row):
    name = report["model"].split(",")[0]
    channels, rank = map(int, re.findall(r"\d+", report["proxies"]))
    method = "dense" if row["method"].startswith("dense, ") else row["method"]
    densities = [float(each) for each in re.findall(r"density (.+)", method)]
    case = plan(
        SHAPES[name],
        row["length_tokens"],
        names=[each for each in ("pap", "pap+ltp", "spts") if each == method],
        schedule=name,
        proxy=ProxyShape(channels=channels, rank=rank),
        dtype_bytes=2,
        published=report["schedule"].endswith("as published"),
        densities=densities,
        max_new_tokens=int(re.findall(r"(\d+) tokens out", report["setting"])[0]) - 1,
    )
    assert row["kv_bytes"] == case.kv_bytes[method]
    assert row["peak_bytes"] <= case.peak_bytes[method] <= 1.1 * row["peak_bytes"]


def test_runs_were_recorded_from_4k_to_128k():
    lengths = {param.values[1]["length_tokens"] for param in measured()}
    assert {4096, 8192, 16384, 32768, 65536, 131072} <= lengths
