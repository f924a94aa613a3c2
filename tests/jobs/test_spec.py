"""Every fault of a sweep has one error that names key, rule and value, before anything is written."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

import jobs.sweeping.cells
import jobs.sweeping.spec
from cluster.strict import brief
from cluster.yaml_file import read_yaml
from jobs.sweep import main
from jobs.sweeping.cells import plan_models
from jobs.sweeping.spec import EngineSpec, Sweep, concrete_schedule, load_sweep, output_folder
from spts import Proxies, methods
from spts.errors import SptsError
from spts.methods import METHODS, Dense, Random, Spts
from spts.schedule import PRESETS, Schedule
from tests.cluster.tiny import SCHEDULE

FAULTS = [
    ({"name": None}, "name must be a valid string, got None"),
    ({"colour": "red"}, "colour must be one of name, model, .*, got an unknown key; remove it"),
    ({"model": None}, "model must .*, got None"),
    ({"tasks": ["single", "juggling"]}, "tasks.1: task must be one of .*multikey.*, got 'juggling'"),
    ({"tasks": [{"name": "grid", "label": "all"}]}, "tasks.0 .grid. must not be called 'all'"),
    ({"tasks": ["single", "single"]}, "tasks must list each value once, got 'single' twice"),
    ({"lengths": []}, r"lengths must list at least one value, got \[\]"),
    ({"lengths": [340, 0]}, "lengths.1 must be greater than or equal to 1, got 0"),
    ({"lengths": [340, "long"]}, "lengths.1 must be a valid integer, got 'long'"),
    (
        {"lengths": [340, 513]},
        r"lengths must fit the context of .*\(512 tokens\), got 513; use less",
    ),
    ({"samples": 0}, "samples must be an integer of at least 1, or a mapping .*, got 0; correct it"),
    ({"samples": {340: 2}}, r"samples must have one entry for each of lengths \[340, 420\], got \[340\]"),
    ({"seeds": [-1]}, "seeds.0 must be greater than or equal to 0, got -1"),
    ({"seeds": [2**63]}, "seeds.0 must be less than 9223372036854775808, got 9223372036854775808"),
    ({"sample_timeout_s": float("inf")}, "sample_timeout_s must be a finite number, got inf"),
    ({"engine": {"start_timeout_s": float("inf")}}, "engine.start_timeout_s must be a finite number"),
    ({"engine": {"step_timeout_s": float("nan")}}, "engine.step_timeout_s must be a finite number, got nan"),
    ({"engine": {"count": 0}}, "engine.count must be greater than or equal to 1, got 0"),
    ({"engine": {"gpus": 2}}, "engine.gpus must be one of count, in_flight, .*, got an unknown key"),
    ({"engine": {"dtype": "int8"}}, "engine.dtype must be 'float32'.*, got 'int8'"),
    (
        {"engine": {"tensor_parallel_size": 3}},
        "engine.tensor_parallel_size must divide the model's num_attention_heads = 4, got 3; use one of 1, 2",
    ),
    ({"methods": [{"name": "magic"}]}, "name must be one of dense, spts, random, recency, got 'magic'"),
    (
        {"methods": [{"name": "dense", "budget": 3}]},
        "methods.0: budget must be one of name, label for method 'dense', got an unknown key; remove it",
    ),
    (
        {"methods": [{"name": "random", "schedule": SCHEDULE.to_dict(), "sead": 1}]},
        "methods.0: sead must be one of name, label, schedule, seed for method 'random'",
    ),
    (
        {"methods": [{"name": "random", "schedule": SCHEDULE.to_dict(), "seed": -1}]},
        "methods.0: method.seed must be an integer of at least 0, got -1",
    ),
    (
        {"methods": [{"name": "dense", "proxies": "x"}]},
        "methods.0: proxies must be one of name, label for method 'dense', got an unknown key",
    ),
    ({"methods": [{"name": "spts", "schedule": SCHEDULE.to_dict(), "proxies": "no"}]}, "proxies must be a"),
    ({"tasks": ["single", {"name": "single", "depth": 3}]}, r"tasks.1: tasks.single.depth must be a known"),
    (
        {"tasks": [{"name": "agreement", "follow_tokens": 10**9}]},
        r"tasks must leave room for a prompt in the context of .* \(512 tokens\), got answers of up to 10{9}",
    ),
    ({"tasks": [{"names": "single"}]}, "tasks.0: task must be one of .*, got None; fix the name"),
    (
        {"tasks": ["single", "needle"]},
        r"tasks must make each task once, got 'single' from tasks.0 \(single\) and from tasks.1 \(needle\)",
    ),
    (
        {"methods": [{"name": "dense"}, {"name": "dense", "label": "again"}]},
        "methods must differ in what they compute, got the same cell from 'dense' of model 'tiny' and "
        "'again' of model 'tiny' for task 'single' at 340 tokens; remove one",
    ),
    (
        {"methods": [{"name": "dense"}, {"name": "dense"}]},
        "methods.1.label must be unique, got 'dense' again",
    ),
    ({"methods": [{"name": "spts"}]}, "methods.0: method.schedule must be given, got nothing"),
    (
        {"methods": [{"name": "dense", "schedule": "demo-12l"}]},
        "methods.0: schedule must be one of name, label for method 'dense', got an unknown key",
    ),
    ({"methods": [{"name": "dense", "seed": 1}]}, "methods.0: seed must be one of name, label for method"),
    (
        {"methods": [{"name": "spts", "schedule": "llama-9"}]},
        "preset must be one of llama-3.1-8b.*, got 'llama-9'",
    ),
    (
        {"methods": [{"name": "spts", "schedule": "demo-12l"}]},
        "num_layers must equal the model's 6 layers, got 12",
    ),
    (
        {"methods": [{"name": "spts", "schedule": {"preset": "demo-12l", "scaled": "yes"}}]},
        "schedule.scaled must be true or false, got 'yes'",
    ),
    (
        {"methods": [{"name": "spts", "schedule": {"preset": "demo-12l", "attention_density": 0}}]},
        "schedule.attention_density must be a number above 0 and at most 1, got 0",
    ),
    (
        {"methods": [{"name": "spts", "schedule": {"preset": "demo-12l", "num_layers": 6}}]},
        r"schedule.num_layers must be a known key \(preset, scaled, attention_density\)",
    ),
    (
        {"methods": [{"name": "spts", "schedule": {**SCHEDULE.to_dict(), "reference_tokens": 0}}]},
        "schedule.reference_tokens must be an integer of at least 1, got 0",
    ),
    (
        {"methods": [{"name": "spts", "schedule": {**SCHEDULE.to_dict(), "first_skip_layer": 1}}]},
        "proxies must start at first_skip_layer 1 or before, got proxies from layer 2 on",
    ),
    ({"proxies": ""}, "proxies must have at least 1 character, got ''"),
    (
        {"methods": [{"name": "spts", "schedule": SCHEDULE.to_dict(), "proxies": ""}]},
        "methods.0.proxies must have at least 1 character, got ''",
    ),
    ({"proxies": "nowhere"}, "proxies must be a folder with proxies.json, got .*nowhere"),
    ({"model": "m" * 5000}, "model must be a folder or a hub id .*, got mmm"),
    ({"methods": [{"name": "spts", "schedule": SCHEDULE.to_dict()}], "proxies": "p" * 5000}, "proxies must"),
    (
        {"output": "~nobody-of-this-name/x\0"},
        "output must be a folder that can be written, got .*~nobody.*embedded null byte",
    ),
    *(
        ({"tasks": [{"name": task, key: [path] if key == "texts" else path}]}, rf"task '{task}': {key} must")
        for task, key in (
            ("qa_1", "squad"),
            ("niah_single_1", "words"),
            ("niah_single_1", "templates"),
            ("agreement", "texts"),
            ("qasper", "data"),
        )
        for path in ("a\0b", "~nobody-of-this-name/x", "a" * 5000)
    ),
    (
        {"tasks": [{"name": "ruler", "tasks": [["vt"]]}]},
        r"tasks.ruler.tasks must be names of .*, got \['vt'\]",
    ),
    ({"model": "nowhere/at/all"}, "model must be a folder or a hub id .*, got nowhere/at/all"),
]


def fault_of(argv, capsys) -> str:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(("change", "message"), FAULTS, ids=[str(change)[:60] for change, _ in FAULTS])
def test_a_fault_is_named_and_nothing_is_written(change, message, config, write_config, capsys):
    path = write_config({**config, **change})
    error = fault_of(["--config", str(path)], capsys)
    assert re.search(message, error), error
    assert not Path(config["output"]).exists()


def test_every_required_key_is_asked_for(config, write_config, capsys):
    for key in ("name", "model", "methods", "tasks", "lengths", "samples", "output"):
        path = write_config({k: v for k, v in config.items() if k != key})
        assert f"{key} must be given, got nothing; add it" in fault_of(["--config", str(path)], capsys)


def test_a_missing_or_broken_file_is_named(tmp_path, capsys):
    assert "must be a readable YAML file" in fault_of(["--config", str(tmp_path / "no.yaml")], capsys)
    (tmp_path / "bad.yaml").write_text("name: [")
    assert main(["--config", str(tmp_path / "bad.yaml")]) == 2
    assert "bad.yaml must be a YAML file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        'samples: !!int "abc"',
        "samples: !!bool perhaps",
        "samples: !!timestamp soon",
        "samples: 2026-13-45",
        f"samples: {'9' * 5000}",
        f"samples: {'[' * 3000}",
    ],
    ids=lambda text: text[:25],
)
def test_yaml_that_is_no_value_is_named(text, tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text(text)
    assert (
        "bad.yaml must be a YAML file, got "
        in fault_of(["--config", str(tmp_path / "bad.yaml")], capsys)[:200]
    )
    with pytest.raises(SptsError, match=r"bad\.yaml must be a YAML file"):
        read_yaml(tmp_path / "bad.yaml")


@pytest.mark.parametrize("key", ["samples", "model", "tasks", "engine", "endless"])
def test_aliases_cannot_blow_up(key, tmp_path, capsys):
    lines = ["a: &a [0, 1, 2, 3, 4, 5, 6, 7, 8]"]
    lines += [
        f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefg", "bcdefgh", strict=True)
    ]
    lines.append("endless: &i [*i]" if key == "endless" else f"{key}: *h")
    (tmp_path / "bad.yaml").write_text("\n".join(lines))
    assert "must stand for at most 100000 values, got " in (
        fault := fault_of(["--config", str(tmp_path / "bad.yaml")], capsys)
    )
    assert len(fault) < 1000


def test_a_quoted_value_is_short():
    nested: object = "x"
    for _ in range(6):
        nested = [nested] * 20
    assert len(brief(nested)) < 2000


@pytest.fixture
def copied_model(tiny_model, tmp_path, config):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_model, folder)
    config["model"] = str(folder)
    return folder


def test_a_model_without_safetensors(copied_model, config, write_config, capsys):
    (copied_model / "model.safetensors").unlink()
    assert "must hold *.safetensors, got none" in fault_of(["--config", str(write_config(config))], capsys)


def test_a_model_without_tokenizer(copied_model, config, write_config, capsys):
    (copied_model / "tokenizer.json").unlink()
    assert "model must hold tokenizer.json, got none" in fault_of(
        ["--config", str(write_config(config))], capsys
    )


def test_a_model_without_proxies_runs_all_but_spts(copied_model, config, write_config, capsys):
    shutil.rmtree(copied_model / "proxies")
    message = fault_of(["--config", str(write_config(config))], capsys)
    assert "proxies must be a folder with proxies.json" in message
    assert "jobs.calibrate" in message
    config["methods"] = [method for method in config["methods"] if method["name"] != "spts"]
    assert main(["--config", str(write_config(config)), "--dry-run"]) == 0


def test_foreign_proxies(copied_model, config, write_config, capsys):
    manifest = json.loads((copied_model / "proxies" / "proxies.json").read_text())
    (copied_model / "proxies" / "proxies.json").write_text(json.dumps({**manifest, "fingerprint": "f" * 64}))
    message = fault_of(["--config", str(write_config(config))], capsys)
    assert "proxies must belong to the model with fingerprint" in message


def test_an_output_that_cannot_be_written(config, write_config, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    message = fault_of(["--config", str(write_config(config)), "--out", str(out)], capsys)
    assert f"output must be a folder that can be written, got {out} (Not a directory)" in message


def test_a_length_without_room_for_the_answer(config, write_config, capsys):
    config["lengths"] = [505]
    message = fault_of(["--config", str(write_config(config))], capsys)
    expected = (
        r"lengths must leave room for the answer in the model's context of 512 tokens, got \d+ \+ \d+ in"
    )
    assert re.search(expected, message)
    assert not (Path(config["output"]) / "plan.jsonl").exists()


def test_a_length_without_room_for_the_needles(config, write_config, capsys):
    config["lengths"] = [60]
    message = fault_of(["--config", str(write_config(config))], capsys)
    assert "length must leave room for the needles of task" in message


def test_dry_run_prints_the_plan_and_writes_nothing(config, write_config, capsys):
    assert main(["--config", str(write_config(config)), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "24 samples" in printed
    lines = printed.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:2] == ["method", "tokens"])
    rows = [line.split() for line in lines[start + 1 : start + 10]]
    assert [row[:5] for row in rows[:3]] == [
        ["dense", "340", "2", "4", "4"],
        ["dense", "420", "2", "4", "4"],
        ["dense", "all", "4", "8", "8"],
    ]
    assert len({len(line) for line in lines[start : start + 10]}) == 1, "aligned"
    assert {row[6] for row in rows if row[0] == "dense"} == {"100.0%"}
    assert all(20 < float(row[6].rstrip("%")) < 80 for row in rows if row[0] == "spts")
    assert "time from a 1024 x 1024 float32 matrix product on this machine's cpu" in printed
    assert not Path(config["output"]).exists()


def test_dry_run_predicts_no_time_without_the_device(config, write_config, capsys):
    config["engine"] = {"device": "cuda"}
    assert main(["--config", str(write_config(config)), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "time is not predicted: the engines want a GPU" in printed
    assert "prefill time" not in printed


def test_the_demo_is_valid():
    root = Path(jobs.__file__).parent
    sweep = load_sweep(root / "configs" / "demo.yaml")
    assert [method.title for method in sweep.methods] == ["dense", "spts", "random", "recency"]
    assert sweep.lengths == (1024, 2048, 4096, 8192)
    for length in sweep.lengths:
        schedules = {method.at(num_layers=12, length=length).schedule_for(12) for method in sweep.methods[1:]}
        assert len(schedules) == 1, "the controls have the same budgets"


def test_cells_hold_concrete_schedules(config, write_config):
    (plan,) = plan_models(load_sweep(write_config(config)))
    assert len(plan.cells) == 3 * 2 * 2
    for cell in plan.cells:
        length = cell.record.length
        expected = {
            "dense": Dense(),
            "spts": Spts(schedule=SCHEDULE.scaled(num_tokens=length, reference_tokens=400)),
            "random": Random(schedule=SCHEDULE.scaled(num_tokens=length, reference_tokens=400), seed=1),
        }[cell.record.label]
        assert cell.method == expected
        assert cell.record.content["method"] == expected.to_dict()


CELL_CHANGES: dict[str, dict[str, Any]] = {
    "seeds": {"seeds": [3]},
    "lengths": {"lengths": [341, 421]},
    "tasks": {"tasks": ["twohop", "multikey"]},
    "dtype": {"engine": {"dtype": "bfloat16"}},
    "device": {"engine": {"device": "cuda"}},
    "tensor_parallel_size": {"engine": {"tensor_parallel_size": 2}},
    "num_threads": {"engine": {"num_threads": 2}},
    "in_flight": {"engine": {"in_flight": 2}},
}
NO_CELL_CHANGES: dict[str, dict[str, Any]] = {
    "name": {"name": "other"},
    "output": {"output": "elsewhere"},
    "samples": {"samples": 7},
    "samples per length": {"samples": {340: 3, 420: 4}},
    "count": {"engine": {"count": 2}},
    "start_timeout_s": {"engine": {"start_timeout_s": 5.0}},
    "step_timeout_s": {"engine": {"step_timeout_s": 5.0}},
    "sample_timeout_s": {"sample_timeout_s": 5.0},
    "attempts": {"attempts": 1},
}
OTHERWISE_TESTED = {"model", "methods", "proxies", "engine"}


def test_every_field_of_a_sweep_is_known_to_change_its_cells_or_not():
    fields = {*Sweep.model_fields, *EngineSpec.model_fields}
    assert fields == {*CELL_CHANGES, *NO_CELL_CHANGES, *OTHERWISE_TESTED} - {"samples per length"}


def cell_ids(path) -> set[str]:
    return {cell.record.id for plan in plan_models(load_sweep(path)) for cell in plan.cells}


@pytest.mark.parametrize("field", CELL_CHANGES)
def test_a_field_that_can_change_answers_changes_every_cell(field, config, write_config):
    before = cell_ids(write_config(config))
    assert cell_ids(write_config(config)) == before
    assert not before & cell_ids(write_config({**config, **CELL_CHANGES[field]}))


@pytest.mark.parametrize("field", NO_CELL_CHANGES)
def test_a_field_that_cannot_change_answers_changes_no_cell(field, config, write_config):
    before = cell_ids(write_config(config))
    assert cell_ids(write_config({**config, **NO_CELL_CHANGES[field]})) == before


def test_a_cell_is_named_by_its_method_and_its_model(copied_model, config, write_config, tmp_path):
    def ids():
        plans = plan_models(load_sweep(write_config(config)))
        return {(c.record.label, c.record.task, c.record.length): c.record.id for p in plans for c in p.cells}

    before = ids()
    config["methods"][1]["label"] = "spts"
    assert ids() == before, "the name in reports does not change an answer"

    def changed(labels, change):
        change()
        after = ids()
        assert {key for key in before if after[key] != before[key]} == {k for k in before if k[0] in labels}
        before.update(after)

    everything = ("dense", "spts", "random")
    changed(("random",), lambda: config["methods"][2].update(seed=2))
    changed(("spts", "random"), lambda: config["methods"][1]["schedule"].update(reference_tokens=500))
    changed(everything, lambda: (copied_model / "chat_template.jinja").write_text("{{ messages }}"))
    changed(everything, lambda: (copied_model / "tokenizer_config.json").write_text("{}"))
    changed(everything, lambda: (copied_model / "generation_config.json").write_text('{"eos_token_id": 7}'))
    import spts

    model = spts.load(copied_model)
    other = Proxies.fit(model, [list(range(1, 200))], first_layer=2, channels=24, rank=8)
    other.save(tmp_path / "proxies")
    changed(("spts",), lambda: config["methods"][1].update(proxies=str(tmp_path / "proxies")))
    changed(("spts",), lambda: config["methods"][1].pop("proxies"))
    changed(("spts",), lambda: other.save(copied_model / "proxies"))
    changed((), lambda: config.update(proxies=str(tmp_path / "proxies")))

    def another_context():
        data = json.loads((copied_model / "config.json").read_text())
        (copied_model / "config.json").write_text(json.dumps({**data, "max_position_embeddings": 513}))
        config["methods"] = [method for method in config["methods"] if method["name"] != "spts"]
        before_spts = [key for key in before if key[0] == "spts"]
        for key in before_spts:
            del before[key]

    changed(everything, another_context)


def test_engines_are_started_per_set_of_proxies(tiny_model, config, write_config, tmp_path):
    import spts

    fitted = Proxies.fit(spts.load(tiny_model), [list(range(1, 200))], first_layer=2, channels=24, rank=8)
    fitted.save(tmp_path / "small")
    config["methods"].append(
        {**config["methods"][1], "label": "small proxies", "proxies": str(tmp_path / "small")}
    )
    sweep = load_sweep(write_config(config))
    first, second = plan_models(sweep)
    assert {cell.record.label for cell in first.cells} == {"dense", "spts", "random"}
    assert {cell.record.label for cell in second.cells} == {"small proxies"}
    assert [plan.engine_config(sweep).proxies for plan in (first, second)] == [None, str(tmp_path / "small")]
    assert [plan.proxy and plan.proxy.channels for plan in (first, second)] == [48, 24]
    assert first.name == second.name
    config["model"] = [str(tiny_model), "other"]
    with pytest.raises(SptsError, match="proxies must be left out with several models"):
        load_sweep(write_config(config))


def test_a_methods_own_fields_reach_it(config, write_config, monkeypatch):
    """Whatever fields a method of `spts.methods` gets, a sweep can set them."""

    @dataclass(frozen=True, kw_only=True)
    class Picky(Random):
        name: ClassVar[str] = "picky"
        probe_tokens: int = 1

        def to_dict(self):
            return {**super().to_dict(), "probe_tokens": self.probe_tokens}

    for module in (jobs.sweeping.spec, methods):
        monkeypatch.setattr(module, "METHODS", {**METHODS, "picky": Picky})
    schedule = config["methods"][1]["schedule"]
    config["methods"] = [
        {"name": "picky", "label": f"{n} tokens", "schedule": schedule, "probe_tokens": n} for n in (1, 4)
    ]
    (plan,) = plan_models(load_sweep(write_config(config)))
    assert {(cell.record.label, cell.method.to_dict()["probe_tokens"]) for cell in plan.cells} == {
        ("1 tokens", 1),
        ("4 tokens", 4),
    }
    assert len({cell.record.id for cell in plan.cells}) == len(plan.cells)


def test_concrete_schedules():
    llama = PRESETS["llama-3.1-8b"].schedule
    assert concrete_schedule("llama-3.1-8b", num_layers=32, length=10) == llama
    assert concrete_schedule({"preset": "llama-3.1-8b"}, num_layers=32, length=10) == llama
    half = concrete_schedule({"preset": "llama-3.1-8b", "scaled": True}, num_layers=32, length=16384)
    assert [stage.active_tokens for stage in half.stages] == [4608, 3584, 2048, 1024]
    fewer = concrete_schedule({"preset": "llama-3.1-8b", "scaled": True}, num_layers=8, length=1000)
    assert fewer == llama.scaled(num_layers=8, num_tokens=1000)
    assert concrete_schedule(llama.to_dict(), num_layers=32, length=10) == llama
    sparse = {"preset": "llama-3.1-8b", "attention_density": 0.1}
    assert concrete_schedule(sparse, num_layers=32, length=10) == replace(llama, attention_density=0.1)
    both = concrete_schedule({**sparse, "scaled": True}, num_layers=32, length=16384)
    assert both == replace(half, attention_density=0.1)
    assert concrete_schedule(Schedule.dense(4).to_dict(), num_layers=4, length=10) == Schedule.dense(4)


def test_two_models_of_one_name_are_refused(tiny_model, config, write_config, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "other" / tiny_model.name)
    config["model"] = [str(tiny_model), str(tmp_path / "other" / tiny_model.name)]
    with pytest.raises(SptsError, match="model must list folders of different names"):
        plan_models(load_sweep(write_config(config)))


def test_where_results_go(config, write_config, tmp_path, monkeypatch):
    sweep = load_sweep(write_config({**config, "output": "results/x"}))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert output_folder(sweep, None) == tmp_path / "here" / "results" / "x"
    assert output_folder(sweep, "other") == tmp_path / "here" / "other"
    assert output_folder(sweep, str(tmp_path / "abs")) == tmp_path / "abs"
    assert os.listdir(tmp_path / "abs") == []
    # In the copy that `ray job submit --working-dir` makes and deletes, relative paths start at home.
    copy = tmp_path / "working_dir_files" / "_ray_pkg_0123abcd"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert output_folder(sweep, None) == tmp_path / "home" / "results" / "x"
    assert output_folder(sweep, str(tmp_path / "abs")) == tmp_path / "abs"


def test_a_copied_working_directory_keeps_the_models_name(
    tiny_model, config, write_config, tmp_path, monkeypatch
):
    """Nodes have the copy at different places, so only the name relative to it is good everywhere."""
    copy = tmp_path / "_ray_pkg_0123abcd"
    shutil.copytree(tiny_model, copy / "models" / "tiny")
    path = write_config({**config, "model": "models/tiny"})
    monkeypatch.chdir(copy)
    sweep = load_sweep(path)
    (plan,) = plan_models(sweep)
    assert plan.engine_config(sweep).model == "models/tiny"
    assert plan.name == "tiny"
    monkeypatch.chdir(tmp_path)
    shutil.move(copy, tmp_path / "plain")
    monkeypatch.chdir(tmp_path / "plain")
    (plan,) = plan_models(sweep)
    assert plan.engine_config(sweep).model == str(tmp_path / "plain" / "models" / "tiny")


def test_yaml_anchors_share_a_schedule(config, write_config, tmp_path):
    text = yaml.safe_dump({**config, "methods": [{"name": "dense"}]})
    text = text.replace(
        "- name: dense",
        "- name: dense\n- name: spts\n  schedule: &s {preset: demo-12l, scaled: true}\n"
        "- name: recency\n  schedule: *s",
    )
    (tmp_path / "anchored.yaml").write_text(text)
    sweep = load_sweep(tmp_path / "anchored.yaml")
    assert sweep.methods[1].schedule == sweep.methods[2].schedule
