"""Gaps between tokens while a long prompt is read: which count, on fake ranks and on a real engine."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.config import EngineConfig
from cluster.protocol import EngineError
from jobs import random_model, stalls
from jobs.stalls import Reader, Reading, gaps, row, table
from spts.cost import dense_flops
from spts.methods import Dense
from tests import fakes
from tests.cluster.tiny import CONTEXT
from tests.jobs.test_latency import TINY, interrupted
from tests.jobs.test_random_model import tiny_shape  # noqa: F401 - a fixture


def test_a_gap_belongs_to_where_its_middle_lies():
    assert gaps([[0, 1, 2, 5.5, 6.5]], joined=0.5, start=2, end=5.5) == ([1], [3.5])


def test_tokens_come_a_moment_after_the_step_that_made_them():
    late = 0.001
    steps = [0, 1, 2, 4, 6, 7]  # the prompt is read in the two from 2 to 6
    answer = [step + late for step in steps]
    before, during = gaps([answer, answer], joined=late, start=2, end=6)
    assert before == pytest.approx([1, 1, 1, 1])
    assert during == pytest.approx([2, 2, 2, 2])


def test_the_wait_between_two_answers_of_a_stream_is_no_gap():
    assert gaps([[0, 1, 2], [7, 8]], joined=0, start=1.2, end=9) == ([1], [1, 1])


def test_gaps_with_prefills_of_other_streams_in_them_do_not_count():
    assert gaps([[0, 3, 4], [3, 4]], joined=3, start=4, end=9) == ([1, 1], [])


def reading(
    alone_s: float, beside_s: float, before: list[float], during: list[float], token: int = 7
) -> Reading:
    alone, beside = (
        SimpleNamespace(ttft_s=seconds, token_ids=(chosen,))
        for seconds, chosen in ((alone_s, 7), (beside_s, token))
    )
    return Reading(alone=alone, beside=beside, before=before, during=during)  # type: ignore[arg-type]


def test_a_row_holds_the_worst_of_all_readings_and_the_median_time():
    readings = [
        reading(1.0, 2.0, [0.01] * 3, [0.1, 0.2]),
        reading(5.0, 9.0, [0.02], [0.1, 0.9]),
        reading(2.0, 3.0, [0.01], [0.1] * 2),
    ]
    found = row("dense", readings)
    assert (found["ttft_alone_s"], found["ttft_beside_s"]) == (2.0, 3.0)
    assert (found["gaps_before"], found["gap_before_longest_s"]) == (5, 0.02)
    assert (found["gaps_during"], found["gap_during_longest_s"]) == (6, 0.9)
    assert found["gap_during_p50_s"] == pytest.approx(0.1)
    assert 0.8 < found["gap_during_p99_s"] < 0.9
    assert found["same_token"]
    assert not row("spts", [*readings, reading(2.0, 3.0, [0.01], [0.1], token=8)])["same_token"]


ROW = row("dense", [reading(12.0, 34.5, [0.0125], [0.5, 1.5])])


def test_the_table_is_aligned_and_in_milliseconds():
    header, first, second = table([ROW, {**ROW, "method": "spts"}]).splitlines()
    assert len(header) == len(first) == len(second)
    assert first.split() == [
        "dense",
        "12.000",
        "34.500",
        "1",
        "12.5",
        "12.5",
        "12.5",
        "2",
        "1000.0",
        "1490.0",
        "1500.0",
    ]


@pytest.mark.parametrize("slice_tokens", [64, None])
async def test_every_stream_has_a_token_after_every_slice(monkeypatch, slice_tokens):
    monkeypatch.setattr(stalls, "SETTLED_TOKENS", 8)
    engine = fakes.FakeEngine(EngineConfig(model="fake", slice_tokens=slice_tokens), step_s=0.03)
    await engine.start()
    try:
        prompt = range(1, 251)
        found = await Reader(engine, prompt, 3, fakes.MAX_CONTEXT).read(Dense())
        assert (await engine.stats()).running == 0
    finally:
        await engine.shutdown()
    slices = 1
    if slice_tokens is not None:
        whole, part = (dense_flops(fakes.SHAPE, tokens).total for tokens in (len(prompt), slice_tokens))
        slices = -(-whole // part)
        assert slices > 3
    assert len(found.during) == 3 * slices
    read_s = found.beside.ttft_s - found.beside.queue_s
    assert sum(found.during) / 3 == pytest.approx(read_s, abs=0.02)
    assert len(found.before) >= 3 * 7
    assert found.alone.token_ids == found.beside.token_ids == (1,)


async def test_a_stream_that_fails_ends_the_reading():
    engine = fakes.FakeEngine(EngineConfig(model="fake", max_running=1, max_waiting=0))
    await engine.start()
    try:
        with pytest.raises(EngineError, match="requests in flight must be at most 1"):
            await Reader(engine, range(1, 101), 2, fakes.MAX_CONTEXT).read(Dense())
        assert (await engine.stats()).running == 0
    finally:
        await engine.shutdown()


@pytest.fixture
def schedule(tmp_path) -> Path:
    path = tmp_path / "schedule.yaml"
    path.write_text("{preset: llama-3.1-8b, scaled: true}")
    return path


def command(model: Path, *more: str) -> list[str]:
    return ["--model", str(model), "--tokens", "400", *more]


def ray_must_not_start() -> AbstractContextManager[None]:
    raise AssertionError("started")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--tokens", str(CONTEXT)],
            f"tokens must leave room for an answer in the context of {CONTEXT} tokens",
        ),
        (["--tokens", "10"], "tokens must be an integer of at least 64, got 10"),
        (["--streams", "0"], "streams must be an integer of at least 1, got 0"),
        (["--repeats", "0"], "repeats must be an integer of at least 1, got 0"),
        (["--slice-tokens", "5"], "slice_tokens must be greater than or equal to 64, got 5"),
        (["--tensor-parallel-size", "3"], "tensor_parallel_size must divide the model's"),
        (["--schedule", "no-such"], "schedule must be one of"),
        (["--schedule", "llama-3.1-8b"], "schedule.num_layers must equal the model's 6 layers, got 32"),
        (["--model", "/no/such/model"], "model must be a folder or a hub id"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(tiny_model, monkeypatch, capsys, args, message):
    monkeypatch.setattr("jobs.engines.connected", ray_must_not_start)
    assert stalls.main(command(tiny_model, *args)) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert not printed.out


def test_streams_that_do_not_fit_beside_the_prompt_are_refused(tiny_model, schedule, monkeypatch, capsys):
    class Small(fakes.FakeEngine):
        def __init__(self, config):
            super().__init__(EngineConfig(**{**config.model_dump(), "kv_cache_bytes": 3_000_000}))

    monkeypatch.setattr("jobs.engines.connected", nullcontext)
    monkeypatch.setattr("cluster.engine.Engine", Small)
    assert stalls.main(command(tiny_model, "--schedule", str(schedule), "--streams", "20")) == 2
    assert "streams must fit beside the prompt into 3000000 bytes of KV memory" in capsys.readouterr().err


def test_ctrl_c_ends_in_one_line(tiny_model, schedule, monkeypatch, capsys):
    monkeypatch.setattr("jobs.engines.connected", interrupted)
    assert stalls.main(command(tiny_model, "--schedule", str(schedule))) == 130
    assert capsys.readouterr().err == "interrupted: the same command again starts from the beginning\n"


@pytest.mark.parametrize(("same", "status"), [(True, 0), (False, 1)])
def test_another_token_beside_streams_is_a_failure(tiny_model, schedule, monkeypatch, capsys, same, status):
    async def measured(*_):
        return {"rows": [{**ROW, "same_token": same}]}

    monkeypatch.setattr("jobs.engines.connected", nullcontext)
    monkeypatch.setattr("jobs.stalls.measure", measured)
    assert stalls.main(command(tiny_model, "--schedule", str(schedule))) == status
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"][0]["same_token"] == same


@pytest.mark.slow
@pytest.mark.real
def test_on_a_real_engine_and_a_random_model(tmp_path, tiny_shape, schedule, capsys):  # noqa: F811
    model = tmp_path / "model"
    assert random_model.main(["--shape", "tiny", "--max-tokens", "512", "--out", str(model)]) == 0
    more = ("--schedule", str(schedule), "--streams", "2", "--slice-tokens", "64", "--repeats", "2")
    assert stalls.main(command(model, *more)) == 0
    printed = capsys.readouterr().out
    found = json.loads(printed.splitlines()[-1])
    dense, spts = found["rows"]
    assert (dense["method"], spts["method"], found["slice_tokens"]) == ("dense", "spts", 64)
    least = -(-dense_flops(TINY, 400).total // dense_flops(TINY, 64).total)
    assert dense["gaps_during"] >= 2 * 2 * least > spts["gaps_during"] >= 2 * 2
    assert dense["gap_during_longest_s"] < dense["ttft_beside_s"]
    assert "TTFT alone s" in printed
