"""The queue over fake engines: every answer once, whatever dies and whenever."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.config import EngineConfig
from cluster.protocol import EngineError
from jobs.cells import plan_models
from jobs.record import Row, RowWriter, read_rows
from jobs.runner import EnginesLostError, Limits, Runner
from jobs.spec import load_sweep
from jobs.work import Prompts, prepare
from tests.fakes import FakeEngine

REPOSITORY = Path(__file__).resolve().parents[2]
UNMEASURED = {"engine", "run", "attempts", "finished_unix_s", "queue_s", "ttft_s", "decode_s", "total_s"}


class SweptEngine:
    """A FakeEngine as the runner sees it. `script`: errors to raise, one a request, None = answer.

    deaths_left: recoveries that work before the engine is gone for good.
    """

    def __init__(self, name="engine-0", *, script=(), deaths_left=99, step_s=0.0):
        self.name = name
        self.script = list(script)
        self.deaths_left = deaths_left
        self.requests = []
        self.in_flight = self.most_in_flight = 0
        self._engine = FakeEngine(EngineConfig(model="fake"), step_s=step_s)

    async def run(self, request):
        await self._engine.start()
        self.requests.append(request)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            error = self.script.pop(0) if self.script else None
            if error is not None:
                raise error
            return await self._engine.run(request)
        finally:
            self.in_flight -= 1

    async def recover(self):
        self.deaths_left -= 1
        return self.deaths_left >= 0

    async def stop(self):
        await self._engine.shutdown()


@pytest.fixture
def work(config, write_config):
    (plan,) = plan_models(load_sweep(write_config(config)))
    return prepare(plan, Prompts(plan.folder))


@pytest.fixture
def decode(tiny_model):
    return Prompts(tiny_model).decode


def run(folder, work, engines, decode, *, on_row=lambda work, row: None, **limits):
    async def all_of_it():
        runner = Runner(folder=folder, run_id="r", limits=Limits(**limits), decode=decode, on_row=on_row)
        try:
            await runner.run(work, engines)
        finally:
            for engine in engines:
                await engine.stop()

    asyncio.run(all_of_it())


def answers(folder) -> dict[str, dict]:
    """What must not depend on when, where and in how many goes the rows came."""
    rows = {key: dataclasses.asdict(row) for key, row in read_rows(folder).items()}
    return {key: {k: v for k, v in row.items() if k not in UNMEASURED} for key, row in rows.items()}


def num_lines(folder) -> int:
    return sum(path.read_bytes().count(b"\n") for path in (folder / "rows").glob("*.jsonl"))


def left(folder, work):
    done = read_rows(folder)
    return [one for one in work if one.planned.key not in done]


def test_every_sample_gets_the_row_its_engine_measured(tmp_path, work, decode):
    engine = SweptEngine()
    seen = []
    run(tmp_path, work, [engine], decode, on_row=lambda one, row: seen.append((one.planned.key, row.key)))
    rows = read_rows(tmp_path)
    assert list(rows) == [one.planned.key for one in work]
    assert [key for key, _ in seen] == [key for _, key in seen] == list(rows)
    for one in work:
        row = rows[one.planned.key]
        assert row.error is None
        assert row.prompt_tokens == len(one.token_ids) == one.planned.prompt_tokens
        assert row.token_ids == one.token_ids[: one.max_new_tokens]  # the fake echoes the prompt
        assert row.text == decode(row.token_ids)
        assert row.flops == one.flops
        assert (row.flops == row.dense_flops) == (one.cell.method == "dense")
        assert (row.kv_bytes == row.dense_kv_bytes) == (one.cell.method == "dense")
        times = (0.0, row.queue_s, row.ttft_s, row.total_s)
        assert None not in times
        assert sorted(times) == list(times)  # type: ignore[type-var]  # none of them is None


def test_longest_prompts_first_and_a_samples_methods_together(tmp_path, work, decode):
    engine = SweptEngine()
    run(tmp_path, work, [engine], decode)
    sizes = [len(request.token_ids) for request in engine.requests]
    assert min(sizes[: len(sizes) // 2]) > max(sizes[len(sizes) // 2 :])
    lengths = [one.cell.length for one in work]
    assert lengths == sorted(lengths, reverse=True)
    first = {one.planned.sample for one in work[:6]}
    assert len(first) == 2, "both tasks' first sample with all three methods"


def test_engines_share_the_work(tmp_path, work, decode):
    engines = [SweptEngine(f"engine-{i}", step_s=0.002) for i in range(3)]
    run(tmp_path, work, engines, decode)
    assert num_lines(tmp_path) == len(work) == sum(len(engine.requests) for engine in engines)
    assert all(len(engine.requests) > 2 for engine in engines)
    assert {row.engine for row in read_rows(tmp_path).values()} == {"engine-0", "engine-1", "engine-2"}
    assert all(engine.most_in_flight == 1 for engine in engines)


def test_in_flight_is_kept(tmp_path, work, decode):
    engine = SweptEngine(step_s=0.001)
    run(tmp_path, work, [engine], decode, in_flight=3)
    assert engine.most_in_flight == 3
    assert num_lines(tmp_path) == len(work)


def test_a_faulty_sample_is_a_row_with_its_error_and_is_not_tried_again(tmp_path, work, decode):
    long = dataclasses.replace(work[0], token_ids=(1,) * 600)
    late = EngineError("deadline", "the answer must take at most 1 s; it took longer")
    engine = SweptEngine(script=[None, late])
    run(tmp_path, [long, *work[1:]], [engine], decode)
    rows = list(read_rows(tmp_path).values())
    assert str(rows[0].error).startswith("context_length_exceeded: prompt + max_")
    assert rows[1].error == "deadline: the answer must take at most 1 s; it took longer"
    assert [row.attempts for row in rows] == [1] * len(work)
    assert (rows[0].text, rows[0].flops, rows[0].token_ids) == (None, None, None)
    assert all(row.error is None for row in rows[2:])


def test_a_sample_is_tried_again_when_the_engine_was_at_fault(tmp_path, work, decode):
    dead = EngineError("unavailable", "a rank died")
    engine = SweptEngine(script=[dead, dead, None, dead])
    run(tmp_path, work, [engine], decode, attempts=3)
    rows = list(read_rows(tmp_path).values())
    assert [row.attempts for row in rows] == [3, 2, *[1] * (len(work) - 2)]
    assert all(row.error is None for row in rows)
    assert num_lines(tmp_path) == len(work)


def test_after_the_last_attempt_the_error_is_the_row(tmp_path, work, decode):
    engine = SweptEngine(script=[EngineError("internal", "a rank failed")] * 3)
    run(tmp_path, work[:2], [engine], decode, attempts=3)
    first, second = read_rows(tmp_path).values()
    assert (first.error, first.attempts) == ("internal: a rank failed", 3)
    assert second.error is None


def test_the_work_of_a_lost_engine_goes_to_the_others(tmp_path, work, decode):
    dead = EngineError("unavailable", "the engine died")
    lost = SweptEngine("engine-0", script=[None, dead], deaths_left=0, step_s=0.001)
    other = SweptEngine("engine-1", step_s=0.001)
    run(tmp_path, work, [lost, other], decode)
    assert len(lost.requests) == 2
    assert len(answers(tmp_path)) == num_lines(tmp_path) == len(work)


def test_a_sample_given_back_at_the_very_end_is_still_done(tmp_path, work, decode):
    """The other engine has nothing to do by then; it must wait, not leave."""
    lost = SweptEngine("engine-0", script=[EngineError("unavailable", "died")], deaths_left=0, step_s=0.05)
    other = SweptEngine("engine-1")
    run(tmp_path, work[:1], [lost, other], decode)
    assert len(answers(tmp_path)) == 1


def test_no_engine_left_is_an_error_and_what_is_done_stays(tmp_path, work, decode):
    script = [None, None, EngineError("unavailable", "died")]
    with pytest.raises(EnginesLostError, match=f"got none left with {len(work) - 2} samples to do"):
        run(tmp_path, work, [SweptEngine(script=script, deaths_left=0)], decode)
    assert num_lines(tmp_path) == 2
    run(tmp_path, left(tmp_path, work), [SweptEngine()], decode)
    assert len(answers(tmp_path)) == num_lines(tmp_path) == len(work)


def test_an_engine_that_never_answers_fails_by_the_second_clock(tmp_path, work, decode, monkeypatch):
    class Silent(SweptEngine):
        async def run(self, request):
            await asyncio.sleep(3600)

    async def at_once(awaitable, timeout):
        task = asyncio.ensure_future(awaitable)
        await asyncio.sleep(0.01)
        task.cancel()
        raise TimeoutError

    monkeypatch.setattr(asyncio, "wait_for", at_once)
    run(tmp_path, work[:1], [Silent()], decode, attempts=2, timeout_s=5)
    (row,) = read_rows(tmp_path).values()
    assert row.error == "unavailable: the engine gave no sign within 35 s"
    assert row.attempts == 2


def test_a_full_disk_stops_the_sweep_with_its_own_error(tmp_path, work, decode, monkeypatch):
    def full(self, row: Row) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RowWriter, "write", full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, work, [SweptEngine("engine-0"), SweptEngine("engine-1")], decode)


@pytest.mark.parametrize("seed", range(5))
def test_resumed_after_a_cut_at_any_byte_equals_uninterrupted(tmp_path, work, decode, seed):
    run(tmp_path / "whole", work, [SweptEngine()], decode)
    run(tmp_path / "cut", work, [SweptEngine("engine-0"), SweptEngine("engine-1")], decode)
    rng = random.Random(seed)
    for path in (tmp_path / "cut" / "rows").glob("*.jsonl"):
        path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
    missing = left(tmp_path / "cut", work)
    assert missing
    run(tmp_path / "cut", missing, [SweptEngine("engine-0")], decode)
    assert answers(tmp_path / "cut") == answers(tmp_path / "whole")
    assert num_lines(tmp_path / "cut") == len(work)


DRIVER = """
import sys
from pathlib import Path
from jobs.cells import plan_models
from jobs.spec import load_sweep
from jobs.work import Prompts, prepare
from tests.jobs.test_runner import SweptEngine, left, run

config, folder = map(Path, sys.argv[1:])
(plan,) = plan_models(load_sweep(config))
prompts = Prompts(plan.folder)
work = prepare(plan, prompts)
print("ready", flush=True)
run(folder, left(folder, work), [SweptEngine("engine-0", step_s=0.004)], prompts.decode)
"""


@pytest.mark.slow
def test_a_driver_killed_at_random_moments_equals_uninterrupted(tmp_path, work, decode, config, write_config):
    run(tmp_path / "whole", work, [SweptEngine()], decode)
    command = [sys.executable, "-c", DRIVER, str(write_config(config)), str(tmp_path / "killed")]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    rng = random.Random(11)
    for _ in range(4):
        driver = subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=subprocess.PIPE, text=True)
        assert driver.stdout is not None
        assert driver.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.0, 0.5))
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        driver.stdout.close()
    assert 0 < len(left(tmp_path / "killed", work)) < len(work), "killed on the way, else nothing was tested"
    subprocess.run(command, cwd=REPOSITORY, env=env, check=True, timeout=120, stdout=subprocess.DEVNULL)
    assert answers(tmp_path / "killed") == answers(tmp_path / "whole")
    assert num_lines(tmp_path / "killed") == len(work)
