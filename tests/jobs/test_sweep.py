"""The sweep as users run it, on real Ray with a tiny random model; and its ends and turns on fake engines."""

from __future__ import annotations

import csv
import os
import resource
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

import spts
from cluster.local import local_ray
from cluster.protocol import EngineError
from jobs.disk import provenance
from jobs.disk.record import locked, read_plan, read_rows
from jobs.reporting import scoring
from jobs.sweep import main
from jobs.sweeping.cells import plan_models
from jobs.sweeping.spec import load_sweep, output_folder
from jobs.sweeping.work import Fewer
from tests import fakes
from tests.cluster.tiny import write_model
from tests.jobs.swept import SweptEngine, answers, made

REPOSITORY = Path(__file__).resolve().parents[2]


def sweep_as_a_job(env, *arguments: str) -> str:
    """Runs `ray job submit --working-dir . -- python -m jobs.sweep ...` and returns what it printed."""
    ray = str(Path(sys.executable).parent / "ray")
    command = [ray, "job", "submit", "--working-dir", ".", "--", "python", "-m", "jobs.sweep", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def default_agent_port_taken():
    """As if another Ray cluster ran on this machine: its agent has the port that Ray gives every agent."""
    with socket.socket() as other:
        with suppress(OSError):  # there may be one
            other.bind(("127.0.0.1", 52365))
            other.listen()
        yield


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.timeout(600)
def test_a_sweep_as_a_ray_job(config, write_config, tiny_model, tmp_path):
    config["samples"] = 1
    config["engine"] = {"count": 2}
    path, out = str(write_config(config)), tmp_path / "out"
    with default_agent_port_taken(), local_ray(num_cpus=4) as env:
        printed = sweep_as_a_job(env, "--config", path, "--out", str(out), "--commit", "c0ffee")
        assert f"results: {out} (0 of 12 samples there, 12 to do)" in printed
        assert "[12/12 100%]" in printed
        assert f"report: {out / 'report.html'}" in printed
        first = read_rows(out)
        again = sweep_as_a_job(env, "--config", path, "--out", str(out))
        assert "(12 of 12 samples there, 0 to do)" in again
        assert "starting" not in again
        assert read_rows(out) == first

        # More is asked for, and one answer was lost: both are done, the rest is left alone.
        rows = next(file for file in (out / "rows").glob("*.jsonl") if file.stat().st_size)
        rows.write_bytes(rows.read_bytes()[:-40])
        config["samples"] = 2
        more = sweep_as_a_job(env, "--config", str(write_config(config)), "--out", str(out))
        assert "(11 of 24 samples there, 13 to do)" in more

    plan, rows_by_key = read_plan(out), read_rows(out)
    assert {sample.key for sample in plan.samples} == set(rows_by_key)
    assert all(row.error is None for row in rows_by_key.values())
    assert {row.engine for row in rows_by_key.values()} == {"engine-0", "engine-1"}
    model = spts.load(tiny_model)
    (models,) = plan_models(load_sweep(write_config(config)))
    with made(write_config(config), tmp_path / "made") as whole:
        for work in whole.work:
            row = rows_by_key[work.key]
            cell = work.cell
            expected = model.generate(whole.token_ids(work), cell.method, cell.task.max_new_tokens)
            assert row.token_ids == tuple(expected.token_ids), "a swept answer is the library's answer"
            assert row.flops == work.flops
    starts = provenance.read(out)
    assert [start["code"]["commit"] for start in starts] == ["c0ffee", None]
    assert {row.run for row in rows_by_key.values()} == {start["run"] for start in starts}
    assert starts[0]["engine"]["fingerprint"] == models.fingerprint == model.fingerprint
    for name in ("report.html", "report.md", "report.csv", "README.md"):
        assert (out / name).stat().st_size > 500


class FakeCluster:
    """`start_engines` with fake engines: `setups` are their arguments, one a start; `engines` all of them."""

    def __init__(self) -> None:
        self.setups: list[dict[str, Any]] = []
        self.engines: list[SweptEngine] = []
        self.engine = SweptEngine

    async def start(self, config, count):
        setup = self.setups.pop(0) if self.setups else {}
        engines = [self.engine(f"engine-{i}", **setup) for i in range(count)]
        self.engines.extend(engines)
        return engines, fakes.info(config)

    async def stop(self, engines):
        for engine in engines:
            await engine.stop()


@pytest.fixture
def fake_cluster(monkeypatch):
    import ray

    import jobs.engines

    cluster = FakeCluster()
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(jobs.engines, "check_capacity", lambda config, count: None)
    monkeypatch.setattr(jobs.engines, "start_engines", cluster.start)
    monkeypatch.setattr(jobs.engines, "stop_engines", cluster.stop)
    return cluster


def test_failed_samples_are_rows_and_are_retried_when_asked(fake_cluster, config, write_config, capsys):
    path, out = str(write_config(config)), Path(config["output"])
    late = EngineError("deadline", "late")
    fake_cluster.setups.append({"script": [None, late, None, late]})
    assert main(["--config", path]) == 0
    assert sum(row.error is not None for row in read_rows(out).values()) == 2
    printed = capsys.readouterr().out
    assert "deadline: late" in printed
    assert "2 samples failed" in printed

    assert main(["--config", path]) == 0
    assert len(fake_cluster.engines) == 1, "a failed sample is done, until asked for"
    capsys.readouterr()
    assert main(["--config", path, "--retry-failed"]) == 0
    assert len(fake_cluster.engines[1].requests) == 2
    rows = read_rows(out)
    assert all(row.error is None for row in rows.values())
    assert set(rows) == {sample.key for sample in read_plan(out).samples}
    assert "samples failed" not in capsys.readouterr().out


def test_agreement_with_dense_is_swept_like_an_answer(fake_cluster, config, write_config, capsys):
    config |= {"tasks": [{"name": "agreement", "follow_tokens": 8}], "lengths": [340], "samples": 2}
    assert main(["--config", str(write_config(config))]) == 0
    compared = [row.agreement or {} for row in read_rows(Path(config["output"])).values()]
    shares = [sum(rank == 1 for rank in one["rank"]) / 8 for one in compared]
    assert len(shares) == 6
    assert all(len(one["kl"]) == 8 for one in compared)
    printed = capsys.readouterr().out
    assert f"score so far: dense {100 * sum(shares) / 6:.0f}" in printed, "all fakes answer alike"
    assert "agreement with dense, per token" in printed


def test_a_sweep_scores_its_answers_once_for_the_report(fake_cluster, config, write_config, monkeypatch):
    import jobs.reporting.summary

    score_rows = MagicMock(wraps=scoring.score_rows)
    monkeypatch.setattr(jobs.reporting.summary, "score_rows", score_rows)
    assert main(["--config", str(write_config(config))]) == 0
    assert score_rows.call_count == 1


def test_a_task_that_one_model_s_tokens_leave_short_is_told_whatever_model_comes_last(
    config, write_config, tiny_model, tmp_path, monkeypatch, capsys
):
    """The last model of a sweep has all samples: what an earlier one lacks is still said."""
    from jobs import sweep
    from jobs.sweeping import work

    other = write_model(tmp_path / "other", seed=1)
    config["model"] = [config["model"], str(other)]
    whole = work.prepare

    def prepare(plans, *args, **kwargs):
        prepared, _ = whole(plans, *args, **kwargs)
        short = Fewer(task="single", length=340, wanted=2, got=1)
        return prepared, [short] if plans[0].name == tiny_model.name else []

    monkeypatch.setattr(sweep, "prepare", prepare)
    assert main(["--config", str(write_config(config)), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "single at 340 tokens has 1 samples, 2 were asked for" in printed
    assert "in all 48 samples, " in printed


def test_a_sweep_starts_without_what_only_its_report_needs():
    heavy = "{'matplotlib', 'scipy', 'pyarrow', 'torch'}"
    code = f"import sys, jobs.sweep; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_sweep_in_which_everything_fails_is_a_failure(fake_cluster, config, write_config):
    fake_cluster.setups.append({"script": [EngineError("deadline", "late")] * 24})
    assert main(["--config", str(write_config(config))]) == 1


def test_lost_engines_leave_a_report_of_what_is_there(fake_cluster, config, write_config, capsys):
    path = str(write_config(config))
    fake_cluster.setups.append({"script": [None, None, EngineError("unavailable", "died")], "deaths_left": 0})
    assert main(["--config", path]) == 1
    captured = capsys.readouterr()
    assert "engines must stay alive, got none left with 22 samples to do" in captured.err
    assert "Incomplete: 2 of 24 samples are done." in captured.out
    assert (Path(config["output"]) / "report.html").is_file()
    assert main(["--config", path]) == 0
    assert len(fake_cluster.engines[1].requests) == 22


def test_a_sweep_in_goes_equals_one_at_once(fake_cluster, config, write_config, tmp_path):
    whole = str(write_config(config))
    assert main(["--config", whole, "--out", str(tmp_path / "once")]) == 0
    few = {**config, "tasks": ["single"], "samples": 1}
    assert main(["--config", str(write_config(few)), "--out", str(tmp_path / "goes")]) == 0
    assert main(["--config", str(write_config(config)), "--out", str(tmp_path / "goes")]) == 0
    assert [len(engine.requests) for engine in fake_cluster.engines] == [24, 6, 18]
    assert read_plan(tmp_path / "once") == read_plan(tmp_path / "goes")
    assert answers(tmp_path / "once") == answers(tmp_path / "goes")
    tables = [list(csv.DictReader((tmp_path / name / "report.csv").open())) for name in ("once", "goes")]
    for table in tables:
        for line in table:
            for time in [name for name in line if name.endswith("_s") or "_speedup_" in name]:
                del line[time]
    assert tables[0] == tables[1]


def test_how_a_start_ended_is_on_record(fake_cluster, config, write_config, capsys):
    config["engine"] = {"count": 2}
    fake_cluster.setups.append({"step_s": 0.002})
    assert main(["--config", str(write_config(config))]) == 0
    (start,) = provenance.read(Path(config["output"]))
    end = start["end"]
    assert (end["samples"], end["failed"]) == (24, 0)
    assert end["samples_per_s"] == pytest.approx(24 / end["wall_s"], rel=0.01)
    busy = [end["engines"][name]["utilisation"] for name in ("engine-0", "engine-1")]
    assert all(0.5 < share <= 1 for share in busy)
    line = next(line for line in capsys.readouterr().out.splitlines() if "samples/s" in line)
    assert f"busy: engine-0 {100 * busy[0]:.1f}%, engine-1 {100 * busy[1]:.1f}%" in line
    assert start["chat_template"]
    assert not list(Path(config["output"]).glob("*.bin"))


def test_a_folder_of_another_version_is_refused(fake_cluster, config, write_config, capsys):
    path, out = str(write_config(config)), Path(config["output"])
    out.mkdir()
    (out / "plan.json").write_text('{"schema": 1, "name": "old", "cells": [], "samples": []}')
    assert main(["--config", path]) == 2
    assert f"{out / 'plan.json'} must have schema 2, got 1; use it with" in capsys.readouterr().err
    (out / "plan.json").unlink()
    (out / "rows").mkdir()
    (out / "rows" / "engine-0.jsonl").write_text('{"key": "x", "answer": "y"}\n')
    assert main(["--config", path]) == 2
    assert "must have the keys of schema 2, got other" in capsys.readouterr().err
    assert fake_cluster.engines == []
    assert not (out / "plan.jsonl").exists()


@pytest.fixture
def file_limit():
    """Sets the size that files may have at most: the operating system then refuses as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("full", ["prompts.bin", "plan.jsonl", "rows/engine-0.jsonl"])
def test_a_full_disk_is_one_error_and_the_same_command_goes_on(
    full, fake_cluster, config, write_config, capsys, file_limit
):
    out = Path(config["output"])
    if full == "prompts.bin":
        config.update(methods=[{"name": "dense"}], samples=6)  # more in prompts than in the plan
        file_limit(16_000)
    elif full == "plan.jsonl":
        file_limit(20_000)  # more than the prompts, less than the plan
    else:

        class Filling(SweptEngine):
            async def run(self, request, until=None):
                if len(self.requests) == 5:
                    file_limit((out / full).stat().st_size + 300)
                return await super().run(request, until)

        fake_cluster.engine = Filling
    path = str(write_config(config))
    assert main(["--config", path]) == 1
    file_limit(resource.RLIM_INFINITY)
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert f"error: results must be written to {out / full}, got File too large" in captured.err
    assert "make room and run the same command again" in captured.err
    kept = read_rows(out)
    assert len(kept) == (5 if full.startswith("rows") else 0)
    fake_cluster.engine = SweptEngine
    assert main(["--config", path]) == 0
    rows = read_rows(out)
    assert {key: rows[key] for key in kept} == kept
    assert len(rows) == 24


def test_two_sweeps_do_not_write_to_one_folder(fake_cluster, config, write_config, capsys):
    with locked(output_folder(load_sweep(write_config(config)), None)):
        assert main(["--config", str(write_config(config))]) == 2
    assert "output must not be in use by another sweep" in capsys.readouterr().err
    assert fake_cluster.engines == []


def test_more_engines_than_the_cluster_holds(config, write_config, monkeypatch, capsys):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    config["engine"] = {"count": 2, "num_threads": 2}
    assert main(["--config", str(write_config(config))]) == 2
    message = (
        "engine.count x tensor_parallel_size x num_threads must fit into the cluster's 2 CPU, got 4 CPU for 2"
    )
    assert message in capsys.readouterr().err
    assert not (Path(config["output"]) / "plan.jsonl").exists()


def test_ctrl_c_ends_in_one_line(monkeypatch, capsys):
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("jobs.sweep._main", interrupted)
    assert main(["--config", "any.yaml"]) == 130
    assert capsys.readouterr().err == "interrupted: the same command again goes on from here\n"


def test_ctrl_c_while_importing_ends_in_one_line(tmp_path):
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich" / "__init__.py").write_text("import os\nos.kill(os.getpid(), 2)\n")
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    done = subprocess.run(
        [sys.executable, "-m", "jobs.sweep", "--config", "any.yaml"],
        capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": path}, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, "interrupted: nothing was started\n")
