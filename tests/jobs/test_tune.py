"""`python -m jobs.tune` as users run it: what it prints and writes, what it refuses, and once on real Ray."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import spts
from cluster.config import EngineConfig
from cluster.local import local_ray
from cluster.protocol import Agreement, EngineError
from jobs.disk.lines import read_lines
from jobs.disk.record import locked
from jobs.options import read_schedule
from jobs.sweeping.spec import MethodSpec
from jobs.tune import main
from jobs.tuning.inputs import Model, Samples
from jobs.tuning.pool import Prompt
from jobs.tuning.space import CostModel
from spts.cost import ProxyShape
from spts.methods import Spts
from tests.cluster.tiny import write_model
from tests.jobs.test_search import FakeEngine

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = ["--length", "400", "--windows", "2", "--held-out", "3", "--trials", "12"]


class FakeCluster:
    """`start_engines` with fake engines: `setups` are their arguments, one a start; `engines` all of them."""

    def __init__(self) -> None:
        self.setups: list[dict[str, Any]] = []
        self.engines: list[FakeEngine] = []
        self.config: Any = None

    async def start(self, config, count):
        setup = self.setups.pop(0) if self.setups else {}
        self.config = config
        engines = [FakeEngine(f"engine-{index}", needs_recent, **setup) for index in range(count)]
        self.engines.extend(engines)
        return engines, None

    async def stop(self, engines):
        pass


def needs_recent(schedule: spts.Schedule) -> float:
    """KL of a model that needs the last 8 tokens, and then as many as possible in its last layer."""
    last = schedule.stages[-1]
    left = last.active_tokens if last.last_layer == 5 else last.keep_tokens or last.active_tokens
    return (0.7 if schedule.recent_tokens < 8 else 0.0) + 1 / (1 + left)


@pytest.fixture
def cluster(monkeypatch) -> FakeCluster:
    import ray

    import jobs.engines

    cluster = FakeCluster()
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(jobs.engines, "check_capacity", lambda config, count: None)
    monkeypatch.setattr(jobs.engines, "start_engines", cluster.start)
    monkeypatch.setattr(jobs.engines, "stop_engines", cluster.stop)
    return cluster


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    lines = (f"{number} the quick brown fox jumps over the lazy dog and the hen.\n" for number in range(500))
    path.write_text("".join(lines))
    return path


def run(model: Path, out: Path, *more: str) -> int:
    return main(["--model", str(model), "--out", str(out), *SMALL, *more])


def test_a_search_prints_what_it_found_and_writes_a_schedule(cluster, tiny_model, text, tmp_path, capsys):
    arguments = ["--target-speedup", "1.6", "--texts", str(text), "--engines", "2"]
    assert run(tiny_model, tmp_path / "out", *arguments) == 0
    printed = capsys.readouterr().out
    assert "skipping can start at layer 2, the first one with a proxy" in printed
    assert (
        "12 schedules on 2 samples of agreement; then the best 8 on 3 others, and one of them against "
        "llama-3.1-8b on 3 more" in printed
    )
    assert re.search(r"^\[12/12\] ", printed, re.MULTILINE)
    summary = json.loads(printed.splitlines()[-1])
    assert summary["num_trials"] == 12
    assert 1.6 <= summary["speedup"] < 1.62
    found, preset = summary["held_out"]["found"], summary["held_out"]["llama-3.1-8b"]
    assert found["kl_nats"] < preset["kl_nats"] - 0.6, "the preset forgets the last tokens"
    difference = summary["held_out"]["agreement_difference"]
    assert difference["value"] == found["agreement"] - preset["agreement"] > 0

    # Every way to read the file gives the schedule found, at its cost.
    path = tmp_path / "out" / "schedule.yaml"
    assert path.read_text().startswith("# Found by: python -m jobs.tune --model ")
    schedule = read_schedule(str(path), num_layers=6, num_tokens=400)
    assert schedule.to_dict() == summary["schedule"]
    import yaml

    swept = MethodSpec(name="spts", schedule=yaml.safe_load(path.read_text())).at(num_layers=6, length=400)
    assert swept == Spts(schedule=schedule)
    shape = spts.load(tiny_model).shape
    costs = CostModel(shape=shape, proxy=ProxyShape(channels=48, rank=16), num_tokens=400)
    assert costs.speedup(schedule) == summary["speedup"]

    # The front is a table, slowest first, from all that was measured.
    rows = [line for line in printed.splitlines() if re.match(r" +\d\.\d{3}x", line)]
    speedups = [float(row.split("x")[0]) for row in rows]
    assert speedups == sorted(speedups)
    assert len(speedups) > 3
    assert sum(" found " in row for row in rows) == sum(" llama-3.1-8b " in row for row in rows) == 1


def test_each_stage_has_samples_of_its_own(cluster, tiny_model, text, tmp_path):
    assert run(tiny_model, tmp_path / "out", "--target-speedup", "1.6", "--texts", str(text)) == 0
    (engine,) = cluster.engines
    requests = list(engine.requests)
    searched = {request.token_ids for request in requests[: 12 * 2]}
    chosen_by = {request.token_ids for request in requests[12 * 2 : 12 * 2 + 8 * 3]}
    held_out = {request.token_ids for request in requests[-2 * 3 :]}
    assert (len(searched), len(chosen_by), len(held_out)) == (2, 3, 3)
    assert len(searched | chosen_by | held_out) == 8
    assert all(len(request.follow) == request.max_new_tokens == 32 for request in engine.requests)
    # Room for the dense distributions of either set: at most 3 samples of 32 tokens.
    assert cluster.config.reference_cache_bytes == 3 * 32 * spts.load(tiny_model).shape.vocab_size * 4


def test_questions_are_measured_along_the_dense_model_s_answers(cluster, tiny_model, tmp_path):
    assert run(tiny_model, tmp_path / "out", "--target-speedup", "1.6", "--task", "single", "twohop") == 0
    (engine,) = cluster.engines
    dense = [request for request in engine.requests if request.method.name == "dense"]
    answers = {request.token_ids: request.token_ids * request.max_new_tokens for request in dense}
    assert len(dense) == len(answers) == 2 * (2 + 3 + 3)
    followed = [request for request in engine.requests if request.follow]
    assert all(request.follow == answers[request.token_ids] for request in followed)


def test_the_same_command_does_only_what_is_missing(cluster, tiny_model, text, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--target-speedup", "1.6", "--texts", str(text)]
    cluster.setups.append({"script": [None] * 9 + [EngineError("deadline", "late")]})
    assert run(tiny_model, out, *arguments) == 1
    assert "error: deadline: late" in capsys.readouterr().err
    assert not (out / "schedule.yaml").exists()
    assert run(tiny_model, out, *arguments) == 0
    first = capsys.readouterr().out
    assert "4 of 12 schedules measured before" in first
    measured = list(read_lines(out / "trials.jsonl"))
    assert run(tiny_model, out, *arguments) == 0
    again = capsys.readouterr().out
    assert "12 of 12 schedules measured before" in again
    assert again.splitlines()[-1] == first.splitlines()[-1]
    assert cluster.engines[-1].requests == []
    assert list(read_lines(out / "trials.jsonl")) == measured
    # Another target is another search, in the same file.
    assert run(tiny_model, out, "--target-speedup", "1.5", "--texts", str(text)) == 0
    assert "0 of 12 schedules measured before" in capsys.readouterr().out


def test_luck_in_the_search_is_found_out(cluster, tiny_model, text, tmp_path, capsys, monkeypatch):
    """Schedules with one recent token look perfect on the samples of the search, and only there."""
    searched: set[tuple[int, ...]] = set()
    run_request = FakeEngine.run

    async def lucky(engine, request, until=None):
        result = await run_request(engine, request)
        if len(searched) < 2:
            searched.add(request.token_ids)
        if request.token_ids in searched and request.method.schedule.recent_tokens == 1:
            return replace(result, agreement=(Agreement(kl=0.0, rank=1),))
        return result

    monkeypatch.setattr(FakeEngine, "run", lucky)
    assert run(tiny_model, tmp_path / "out", "--target-speedup", "1.6", "--texts", str(text)) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["schedule"]["recent_tokens"] >= 8
    trials = [line for line in read_lines(tmp_path / "out" / "trials.jsonl") if line["point"]]
    best = min(trials, key=lambda line: sum(line["kl_nats"]))
    assert best["schedule"]["recent_tokens"] == 1


def test_engines_keep_as_many_beginnings_as_they_have_room_for(tiny_model):
    model = Model.read(str(tiny_model), None)
    prompts = tuple(
        Prompt(id=str(length), task="t", token_ids=(1,) * length, follow=(), max_new_tokens=1)
        for length in (100, 200, 100)
    )
    samples = Samples(calibration=prompts, selection=prompts[:2], held_out=prompts)
    # A token is two layers of keys and values, 2 heads of 16, and 64 of hidden state, 4 bytes each.
    config = EngineConfig(model="any", prefix_cache_bytes=300 * (2 * 2 * 2 * 16 + 64) * 4)
    kept = samples.kept(config, model)
    assert [prompt.kept for prompt in kept.calibration] == [True, True, False]
    assert [prompt.kept for prompt in kept.selection] == [True, True]
    assert not any(prompt.kept for prompt in kept.held_out), "they come twice only"


def test_the_fastest_within_a_drop(cluster, tiny_model, text, tmp_path, capsys):
    # The fake engine's tokens agree half below a KL of 0.6, and all below 0.1.
    assert run(tiny_model, tmp_path / "out", "--max-drop", "50", "--texts", str(text)) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["chosen_by"]["num_samples"] == 2 + 3
    assert summary["chosen_by"]["agreement"] >= 0.5
    lines = [line for line in read_lines(tmp_path / "out" / "trials.jsonl") if line["set"] == "calibration"]
    keeping = [line["speedup"] for line in lines if line["point"] and min(line["agreement"]) >= 0.5]
    assert summary["speedup"] == max(keeping)


def test_a_drop_that_nothing_keeps(cluster, tiny_model, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "needs_recent", lambda schedule: 2.0)
    assert run(tiny_model, tmp_path / "out", "--max-drop", "1", "--texts", str(text)) == 1
    captured = capsys.readouterr()
    assert "error: no schedule of 12 loses at most 1 points of agreement" in captured.err
    assert " nearest " in captured.out
    assert not (tmp_path / "out" / "schedule.yaml").exists()


def test_a_target_that_the_preset_cannot_reach_has_nothing_to_compare_with(cluster, text, tmp_path, capsys):
    model = write_model(tmp_path / "model", proxies=False)
    loaded = spts.load(model)
    spts.Proxies.fit(loaded, [[*range(1, 201)]], first_layer=1, channels=48, rank=16).save(model / "proxies")
    assert run(model, tmp_path / "out", "--target-speedup", "3.5", "--texts", str(text)) == 0
    printed = capsys.readouterr().out
    assert "llama-3.1-8b cannot be as fast on this model" in printed
    assert json.loads(printed.splitlines()[-1])["held_out"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "goal must be one of --target-speedup and --max-drop, got neither"),
        (["--target-speedup", "2", "--max-drop", "1"], "got both"),
        (["--target-speedup", "9"], r"target_speedup must be above 1 and at most 2\.\d\d, .* got 9\.0"),
        (["--target-speedup", "1"], "target_speedup must be above 1"),
        (["--target-speedup", "nan"], "target_speedup must be above 1"),
        (["--max-drop", "-1"], "max_drop must be points from 0 to below 100, got -1.0"),
        (["--max-drop", "nan"], "max_drop must be points from 0 to below 100, got nan"),
        (["--max-drop", "1", "--trials", "0"], "trials must be an integer of at least 1, got 0"),
        (["--max-drop", "1", "--task", "nothing"], "task must be one of needle, .*, got 'nothing'"),
        (["--max-drop", "1", "--task", "single", "--texts", "a"], "texts must come with task agreement"),
        (["--max-drop", "1", "--texts", "no.txt"], r"texts must be readable UTF-8 files, got no\.txt"),
        (["--max-drop", "1", "--length", "500"], "length must leave room for the answer .* 512 tokens"),
        (["--max-drop", "1", "--model", "no/model/there"], "no such folder"),
        (["--max-drop", "1", "--proxies", "no-proxies"], "proxies must"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_refused_before_anything_starts(
    arguments, message, cluster, tiny_model, tmp_path, capsys
):
    assert run(tiny_model, tmp_path / "out", *arguments) == 2
    assert re.search(message, capsys.readouterr().err)
    assert cluster.engines == []
    assert not (tmp_path / "out").exists()


def test_texts_that_are_too_short_are_refused(cluster, tiny_model, text, tmp_path, capsys):
    few = tmp_path / "few.txt"
    few.write_text("".join(text.read_text().splitlines(keepends=True)[:40]))
    assert run(tiny_model, tmp_path / "out", "--max-drop", "1", "--texts", str(few)) == 2
    message = r"texts must give task 'agreement' 2 \+ 2 x 3 samples of 400 tokens, got \d; give more text"
    assert re.search(message, capsys.readouterr().err)
    few.write_text("too short")
    assert run(tiny_model, tmp_path / "out", "--max-drop", "1", "--texts", str(few)) == 2
    assert "in few.txt; give longer texts" in capsys.readouterr().err
    assert cluster.engines == []


def test_a_model_without_proxies_is_refused(cluster, tmp_path, capsys):
    model = write_model(tmp_path / "model", proxies=False)
    assert run(model, tmp_path / "out", "--max-drop", "1") == 2
    assert "python -m jobs.calibrate" in capsys.readouterr().err


def test_two_searches_do_not_write_to_one_folder(cluster, tiny_model, text, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"):
        assert run(tiny_model, tmp_path / "out", "--max-drop", "1", "--texts", str(text)) == 2
    assert "must not be in use by another" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.real
def test_a_search_on_real_engines(tiny_model, text, tmp_path):
    out = tmp_path / "out"
    arguments = [
        "--model",
        str(tiny_model),
        "--out",
        str(out),
        "--texts",
        str(text),
        "--engines",
        "2",
        *SMALL,
    ]
    command = [sys.executable, "-m", "jobs.tune", *arguments, "--target-speedup", "1.6"]
    with local_ray(num_cpus=4) as env:
        done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    lines = list(read_lines(out / "trials.jsonl"))
    trials = [line for line in lines if line["point"]]
    assert len(trials) == summary["num_trials"] == 12
    assert all(1.6 <= line["speedup"] < 1.63 for line in trials)
    # What an engine measured is what the library says of the same prompt.
    from jobs.sweeping.prompts import Prompts
    from jobs.tasks import get_task
    from spts.agreement import compare

    task = get_task({"name": "agreement", "texts": [str(text)]})
    sample = next(task.samples(Prompts(tiny_model).tokens, length=400, count=1, seed=0))
    model, method = spts.load(tiny_model), Spts(schedule=spts.Schedule.from_dict(summary["schedule"]))
    prompt = list(Prompts(tiny_model).encode(sample))
    dense, skipping = (model.follow(prompt, sample.follow, each) for each in (spts.methods.Dense(), method))
    kl, rank = compare(dense, skipping)
    (best,) = (line for line in trials if line["schedule"] == summary["schedule"])
    assert best["kl_nats"][0] == pytest.approx(float(kl.mean()), rel=1e-3)
    assert best["agreement"][0] == pytest.approx(float((rank == 1).double().mean()))
