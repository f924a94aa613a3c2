"""The queue over fake engines: every answer once, whatever dies and whenever."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import jobs.sweeping.runner
from cluster.protocol import EngineError
from jobs.disk.lines import DiskError
from jobs.disk.record import read_rows
from jobs.sweeping.runner import EnginesLostError
from tests.jobs.swept import SweptEngine, answers, made, num_lines, run

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def work(config, write_config, tmp_path):
    with made(write_config(config), tmp_path / "made") as one:
        yield one


def test_every_sample_gets_the_row_its_engine_measured(tmp_path, work):
    engine = SweptEngine()
    seen = []
    run(tmp_path, work, [engine], on_row=lambda one, row: seen.append((one.key, row.key)))
    rows = read_rows(tmp_path)
    assert list(rows) == [one.key for one in work.work]
    assert [key for key, _ in seen] == [key for _, key in seen] == list(rows)
    for one in work.work:
        row = rows[one.key]
        assert row.error is None
        assert row.prompt_tokens == one.num_tokens == work.plan_file.sample(one.planned).prompt_tokens
        prompt = work.token_ids(one)
        assert row.token_ids == prompt[: one.cell.task.max_new_tokens]  # the fake echoes the prompt
        assert row.text == work.prompts.tokens.decode(row.token_ids)
        assert row.flops == one.flops
        assert (row.flops == row.dense_flops) == (one.cell.record.method == "dense")
        assert (row.kv_bytes == row.dense_kv_bytes) == (one.cell.record.method == "dense")
        times = (0.0, row.queue_s, row.ttft_s, row.total_s)
        assert None not in times
        assert sorted(times) == list(times)  # type: ignore[type-var]  # none of them is None


def test_the_most_expensive_contexts_first_and_their_methods_side_by_side(tmp_path, work):
    engine = SweptEngine()
    run(tmp_path, work, [engine])
    assert [request.token_ids for request in engine.requests] == [work.token_ids(w) for w in work.work]
    for first in range(0, len(work.work), 3):
        labels = [group.cell.record.label for group in work.groups[first : first + 3]]
        assert labels[0] == "dense" and set(labels) == {"dense", "spts", "random"}
        assert len({one.sample for one in work.work[first : first + 3]}) == 1
    dense = [group.flops for group in work.groups[::3]]
    assert dense == sorted(dense, reverse=True)


def test_engines_share_the_work(tmp_path, work):
    engines = [SweptEngine(f"engine-{i}", step_s=0.002) for i in range(3)]
    run(tmp_path, work, engines)
    assert num_lines(tmp_path) == len(work.work) == sum(len(engine.requests) for engine in engines)
    assert all(len(engine.requests) > 2 for engine in engines)
    assert {row.engine for row in read_rows(tmp_path).values()} == {"engine-0", "engine-1", "engine-2"}
    assert all(engine.most_in_flight == 1 for engine in engines)


def test_in_flight_is_kept(tmp_path, work):
    engine = SweptEngine(step_s=0.001)
    run(tmp_path, work, [engine], in_flight=3)
    assert engine.most_in_flight == 3
    assert num_lines(tmp_path) == len(work.work)


def test_a_faulty_sample_is_a_row_with_its_error_and_is_not_tried_again(tmp_path, work):
    late = EngineError("deadline", "the answer must take at most 1 s; it took longer")
    odd = EngineError("invalid_request", "no such token")
    engine = SweptEngine(script=[odd, late])
    run(tmp_path, work, [engine])
    rows = list(read_rows(tmp_path).values())
    assert rows[0].error == "invalid_request: no such token"
    assert rows[1].error == "deadline: the answer must take at most 1 s; it took longer"
    assert [row.error_kind for row in rows[:3]] == ["invalid_request", "deadline", None]
    assert [row.attempts for row in rows] == [1] * len(work.work)
    assert (rows[0].text, rows[0].flops, rows[0].token_ids) == (None, None, None)
    assert all(row.error is None for row in rows[2:])


def test_a_sample_is_tried_again_when_the_engine_was_at_fault(tmp_path, work):
    dead = EngineError("unavailable", "a rank died")
    engine = SweptEngine(script=[dead, dead, None, dead])
    run(tmp_path, work, [engine], attempts=3)
    rows = list(read_rows(tmp_path).values())
    assert [row.attempts for row in rows] == [3, 2, *[1] * (len(work.work) - 2)]
    assert all(row.error is None for row in rows)
    assert num_lines(tmp_path) == len(work.work)


def test_after_the_last_attempt_the_error_is_the_row(tmp_path, work):
    engine = SweptEngine(script=[EngineError("internal", "a rank failed")] * 3)
    run(tmp_path, work, [engine], groups=work.groups[:2], attempts=3)
    first, second = read_rows(tmp_path).values()
    assert (first.error, first.error_kind, first.attempts) == ("internal: a rank failed", "internal", 3)
    assert second.error is None


def test_the_work_of_a_lost_engine_goes_to_the_others(tmp_path, work):
    dead = EngineError("unavailable", "the engine died")
    lost = SweptEngine("engine-0", script=[None, dead], deaths_left=0, step_s=0.001)
    other = SweptEngine("engine-1", step_s=0.001)
    run(tmp_path, work, [lost, other])
    assert len(lost.requests) == 2
    assert len(answers(tmp_path)) == num_lines(tmp_path) == len(work.work)


def test_a_sample_given_back_at_the_very_end_is_still_done(tmp_path, work):
    """The other engine has nothing to do by then; it must wait, not leave."""
    lost = SweptEngine("engine-0", script=[EngineError("unavailable", "died")], deaths_left=0, step_s=0.05)
    other = SweptEngine("engine-1")
    run(tmp_path, work, [lost, other], groups=work.groups[:1])
    assert len(answers(tmp_path)) == 1


def test_no_engine_left_is_an_error_and_what_is_done_stays(tmp_path, work):
    script = [None, None, EngineError("unavailable", "died")]
    with pytest.raises(EnginesLostError, match=f"got none left with {len(work.work) - 2} samples to do"):
        run(tmp_path, work, [SweptEngine(script=script, deaths_left=0)])
    assert num_lines(tmp_path) == 2
    run(tmp_path, work, [SweptEngine()], groups=work.left(tmp_path))
    assert len(answers(tmp_path)) == num_lines(tmp_path) == len(work.work)


def test_an_engine_that_never_answers_fails_by_the_second_clock(tmp_path, work, monkeypatch):
    class Silent(SweptEngine):
        async def run(self, request, until=None):
            await asyncio.sleep(3600)

    monkeypatch.setattr(jobs.sweeping.runner, "_GRACE_S", 0.02)
    run(tmp_path, work, [Silent()], groups=work.groups[:1], attempts=2, timeout_s=0.01)
    (row,) = read_rows(tmp_path).values()
    assert row.error == "unavailable: the engine gave no sign within 0.03 s"
    assert row.attempts == 2


@pytest.mark.parametrize("in_flight", [1, 3])
@pytest.mark.parametrize("place", [0, 7, -1])
def test_a_sample_that_kills_its_engine_takes_no_other_with_it(tmp_path, work, in_flight, place):
    """With three on the engine, two that did nothing die with it; tried again alone, they are answered."""
    work.groups[:] = [g for g in work.groups if g.cell.record.method == "dense"]
    bad = work.groups[place].members[0]
    engines = [SweptEngine(f"engine-{i}", poison=[work.token_ids(bad)]) for i in range(2)]
    run(tmp_path, work, engines, in_flight=in_flight, attempts=3)
    rows = read_rows(tmp_path)
    assert (rows[bad.key].error_kind, rows[bad.key].attempts) == ("unavailable", 3)
    assert [row.key for row in rows.values() if row.error is not None] == [bad.key]
    assert num_lines(tmp_path) == len(work.work)
    assert sum(engine.forgiven for engine in engines) == 1
    assert sum(work.token_ids(bad) == r.token_ids for e in engines for r in e.requests) == 3


def test_a_group_is_leased_whole_and_what_is_answered_of_it_is_not_run_again(tmp_path, work):
    dense = [w for w in work.work if w.cell.record.method == "dense"]
    group = dataclasses.replace(work.groups[0], members=tuple(dense), prefix_tokens=5)
    died = EngineError("unavailable", "died")
    first = SweptEngine("engine-0", script=[None, None, died], deaths_left=0, step_s=0.001)
    second = SweptEngine("engine-1", step_s=0.001)
    run(tmp_path, work, [first, second], groups=[group])
    asked = [[r.token_ids for r in engine.requests] for engine in (first, second)]
    prompts = [work.token_ids(w) for w in dense]
    assert asked == [prompts[:3], prompts[2:]]
    assert all(r.prefix_tokens == 5 for engine in (first, second) for r in engine.requests)
    assert [row.attempts for row in read_rows(tmp_path).values()] == [1, 1, 2, *[1] * (len(dense) - 3)]


def test_busy_time_is_that_of_the_engines(tmp_path, work):
    engines = [SweptEngine(f"engine-{i}", step_s=0.01) for i in range(2)]
    groups = [g for g in work.groups if g.cell.task.name == "single"]
    usage = run(tmp_path, work, engines, groups=groups).usage.to_dict()
    rows = read_rows(tmp_path).values()
    for engine in engines:
        mine = sum(row.total_s or 0 for row in rows if row.engine == engine.name)
        assert mine <= usage["engines"][engine.name]["busy_s"] <= min(mine * 1.2 + 0.05, usage["wall_s"])
        assert usage["engines"][engine.name]["utilisation"] > 0.75
    assert usage["samples"] == len(groups)
    assert usage["prompt_tokens_per_s"] == pytest.approx(
        sum(row.prompt_tokens or 0 for row in rows) / usage["wall_s"], rel=0.01
    )


def test_a_full_disk_stops_the_sweep_and_the_next_start_repairs_the_file(tmp_path, work):
    """The size limit of files is the operating system's: the write that crosses it is cut, the next fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    out = tmp_path / "out"

    def fill(one, row):
        if len(seen) == 3:
            size = (out / "rows" / "engine-0.jsonl").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, hard))
        seen.append(row.key)

    seen: list[str] = []
    try:
        with pytest.raises(DiskError, match=r"results must be written to .*engine-0.jsonl, got File too"):
            run(out, work, [SweptEngine()], on_row=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    torn = (out / "rows" / "engine-0.jsonl").read_bytes()
    assert not torn.endswith(b"\n")
    assert len(torn.splitlines()[-1]) == 100
    assert list(read_rows(out)) == seen
    run(out, work, [SweptEngine()], groups=work.left(out))
    run(tmp_path / "whole", work, [SweptEngine()])
    assert answers(out) == answers(tmp_path / "whole")
    assert num_lines(out) == len(work.work)


def test_a_number_that_is_not_finite_is_an_error_of_its_sample(tmp_path, work):
    class Broken(SweptEngine):
        async def run(self, request, until=None):
            result = await super().run(request, until)
            broken = request is self.requests[0]
            return dataclasses.replace(result, flops=float("nan")) if broken else result

    run(tmp_path, work, [Broken()])
    first, *others = read_rows(tmp_path).values()
    assert first.error == "internal: the engine gave a number that is not finite"
    assert all(row.error is None for row in others)


@pytest.mark.parametrize("seed", range(5))
def test_resumed_after_a_cut_at_any_byte_equals_uninterrupted(tmp_path, work, seed):
    run(tmp_path / "whole", work, [SweptEngine()])
    run(tmp_path / "cut", work, [SweptEngine("engine-0"), SweptEngine("engine-1")])
    rng = random.Random(seed)
    for path in (tmp_path / "cut" / "rows").glob("*.jsonl"):
        path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
    missing = work.left(tmp_path / "cut")
    assert missing
    run(tmp_path / "cut", work, [SweptEngine("engine-0")], groups=missing)
    assert answers(tmp_path / "cut") == answers(tmp_path / "whole")
    assert num_lines(tmp_path / "cut") == len(work.work)


DRIVER = """
import sys
from pathlib import Path
from tests.jobs.swept import SweptEngine, made, run

config, folder = map(Path, sys.argv[1:])
with made(config, folder) as work:
    print("ready", flush=True)
    run(folder, work, [SweptEngine("engine-0", step_s=0.004)], groups=work.left(folder))
"""


@pytest.mark.slow
def test_a_driver_killed_at_random_moments_equals_uninterrupted(tmp_path, work, config, write_config):
    run(tmp_path / "whole", work, [SweptEngine()])
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
    assert 0 < num_lines(tmp_path / "killed") < len(work.work), "killed on the way, else nothing was tested"
    subprocess.run(command, cwd=REPOSITORY, env=env, check=True, timeout=120, stdout=subprocess.DEVNULL)
    assert answers(tmp_path / "killed") == answers(tmp_path / "whole")
    assert num_lines(tmp_path / "killed") == len(work.work)
