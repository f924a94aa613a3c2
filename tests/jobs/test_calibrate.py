import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

import spts
from jobs.calibrate import main, split, task_names
from jobs.options import describe_schedule, read_schedule, writable_folder
from jobs.tuning.verdict import TaskCurve, judge
from spts.safety import LayerSafety, Safety
from tests.cluster.tiny import NUM_LAYERS, write_model

STAGES = "[{last_layer: 4, active_tokens: %d, keep_tokens: %d}]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), proxies=False)


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog and the hen. " * 120)
    return path


def run(folder, text, out, *more: str) -> int:
    files = ["--model", str(folder), "--texts", str(text), "--out", str(out)]
    sizes = ["--tokens", "64", "--windows", "3", "--live-tokens", "4", "--channels", "24", "--rank", "8"]
    return main([*files, *sizes, *more])


def schedule_file(path: Path, active: int) -> str:
    path.write_text(f"num_layers: {NUM_LAYERS}\nfirst_skip_layer: 2\nstages: {STAGES % (active, active)}\n")
    return str(path)


def test_proxies_and_report_are_written_and_used(folder, text, tmp_path, capsys):
    out = tmp_path / "new" / "proxies"
    assert run(folder, text, out, "--schedule", schedule_file(tmp_path / "s.yaml", 12)) == 0
    report = json.loads((out / "calibration.json").read_text())
    model = spts.load(folder, proxies=out)
    assert report["fingerprint"] == model.fingerprint
    assert report["proxy"] == {"channels": 24, "rank": 8, "top_share": 0.2}
    assert report["held_out"] is True
    assert report["texts"] == [{"name": "text.txt", "sha256": hashlib.sha256(text.read_bytes()).hexdigest()}]
    assert [row["layer"] for row in report["safety"]["layers"]] == list(range(NUM_LAYERS))
    assert report["safety"]["num_prompts"] == 3
    assert report["safety"]["num_live"] == 12
    method = spts.methods.Spts(schedule=spts.Schedule.from_dict(report["schedule"]))
    assert model.prefill(list(range(1, 65)), method).work[2].attention_tokens == 12
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    header = next(index for index, line in enumerate(lines) if line.lstrip().startswith("layer"))
    assert len({len(line) for line in lines[header : header + NUM_LAYERS + 1]}) == 1  # aligned
    assert "12 of 64" in printed
    assert "SAFE" in printed
    assert sorted(path.name for path in out.iterdir()) == [
        "calibration.json",
        "proxies.json",
        "proxies.safetensors",
    ]


def test_the_top_share_chooses_channels_and_is_recorded(folder, text, tmp_path, capsys):
    schedule, weights = schedule_file(tmp_path / "s.yaml", 12), []
    for name, more in (("paper", ()), ("mean", ("--top-share", "1.0"))):
        out = tmp_path / name
        assert run(folder, text, out, "--schedule", schedule, *more) == 0
        manifest = json.loads((out / "proxies.json").read_text())
        assert manifest["top_share"] == (float(more[1]) if more else 0.2)
        assert (
            json.loads((out / "calibration.json").read_text())["proxy"]["top_share"] == manifest["top_share"]
        )
        weights.append((out / "proxies.safetensors").read_bytes())
    assert weights[0] != weights[1]
    assert run(folder, text, tmp_path / "none", "--schedule", schedule, "--top-share", "0") == 2
    assert "top_share must be in (0, 1], got 0.0" in capsys.readouterr().err


def test_a_full_budget_is_safe(folder, text, tmp_path, capsys):
    assert run(folder, text, tmp_path / "out", "--schedule", schedule_file(tmp_path / "s.yaml", 64)) == 0
    verdict = json.loads((tmp_path / "out" / "calibration.json").read_text())["verdict"]
    assert verdict["safe"] is True
    assert verdict["method_agreement"] == 1.0
    assert "\nSAFE: " in capsys.readouterr().out


def test_stale_proxies_in_the_model_folder_do_not_stop_it(tmp_path, text):
    model = write_model(tmp_path / "model", proxies=True)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 500}))
    with pytest.raises(spts.ProxyError):
        spts.load(model)
    args = ("--schedule", schedule_file(tmp_path / "s.yaml", 12))
    assert run(model, text, model / "proxies", *args) == 0
    spts.load(model)


def test_needle_questions_are_measured(folder, text, tmp_path):
    args = ("--schedule", schedule_file(tmp_path / "s.yaml", 12), "--task", "single", "--samples", "2")
    assert run(folder, text, tmp_path / "out", *args, "--tokens", "256") == 0
    report = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert [curve["name"] for curve in report["tasks"]] == ["single"]
    assert len(report["tasks"][0]["frozen"]) == NUM_LAYERS


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--schedule", "no-such"], "schedule must be one of"),
        (["--tokens", "0"], "tokens must be an integer of at least 1"),
        (["--tokens", "100000"], "texts must have a document of at least 100000 tokens"),
        (["--task", "no-such"], "task must be one of"),
        (["--task", "multikey"], "length must leave room for the needles of task 'multikey'"),
        (["--rank", "25"], "rank must be in 1..24"),
        (["--rank", "0"], "rank must be an integer of at least 1, got 0"),
        (["--channels", "0"], "channels must be an integer of at least 1, got 0"),
        (["--min-agreement", "90"], "min_agreement must be from 0 to 1, got 90.0"),
        (["--device", "nowhere"], "device must be there, got 'nowhere'"),
        (["--texts", "/no/such/file"], "texts must be readable UTF-8 files, got /no/such/file"),
        (["--model", "/no/such/model"], "model must be a folder or a hub id"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(folder, text, tmp_path, capsys, more, message):
    out = tmp_path / "out"
    schedule = schedule_file(tmp_path / "s.yaml", 12)
    assert run(folder, text, out, "--schedule", schedule, *more) == 2
    assert message in capsys.readouterr().err
    assert not out.exists() or not list(out.iterdir())


def test_out_that_cannot_be_written_is_refused(folder, text, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(folder, text, tmp_path / "file" / "out", "--schedule", schedule_file(tmp_path / "s", 12)) == 2
    assert "out must be a folder that can be written" in capsys.readouterr().err
    assert writable_folder(tmp_path / "a" / "b").is_dir()


def test_split_holds_windows_out():
    texts = split([list(range(1000)), list(range(1000, 1310))], tokens=100, windows=3, fit_windows=100)
    assert [window[0] for window in texts.measure] == [0, 400, 800]
    assert texts.held_out
    assert sorted(each for window in texts.measure + texts.fit for each in window) == list(range(1310))


def test_split_uses_little_text_twice_and_says_so():
    texts = split([list(range(300))], tokens=200, windows=4, fit_windows=100)
    assert not texts.held_out
    assert texts.measure == [list(range(200))]
    assert sum(map(len, texts.fit)) == 300


def test_needle_stands_for_the_family():
    assert task_names(["needle", "single"]) == ["single", "multikey", "twohop"]


def test_schedule_by_name_is_scaled_to_depth_and_length():
    paper = spts.Schedule.preset("llama-3.1-8b")
    assert read_schedule("llama-3.1-8b", num_layers=32, num_tokens=32768) == paper
    small = read_schedule("llama-3.1-8b", num_layers=32, num_tokens=4096)
    assert [stage.active_tokens for stage in small.stages] == [1152, 896, 512, 256]
    assert describe_schedule(small).startswith("dense before layer 10; 10-13: 1152 tokens, then keep 1024; ")
    assert describe_schedule(spts.Schedule.dense(3)) == "every layer dense"
    sparse = replace(small, attention_density=0.1)
    assert describe_schedule(sparse).startswith(
        "dense before layer 10, attention to 0.1 of the blocks; 10-13:"
    )
    alone = replace(spts.Schedule.dense(3), attention_density=0.25)
    assert describe_schedule(alone) == "every layer dense, attention to 0.25 of the blocks"
    demo = describe_schedule(spts.Schedule.preset("demo-12l"))
    assert demo.endswith("; 9-10: 256 tokens, then keep 160; the last 32 in every choice")


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("{preset: demo-12l, scale: true}", "schedule.scale must be a known key"),
        ("{num_layers: 6, first_skip_layer: 2}", "schedule.stages must be given"),
        ("[1, 2]", "schedule must be a mapping"),
        ("{a: [", "must be a YAML file"),
    ],
)
def test_faults_of_a_schedule_file_name_the_file(tmp_path, yaml, message):
    path = tmp_path / "schedule.yaml"
    path.write_text(yaml)
    with pytest.raises(spts.ConfigError, match=r"schedule\.yaml") as error:
        read_schedule(str(path), num_layers=6, num_tokens=100)
    assert message in str(error.value)


def test_schedule_file_with_a_reference_length_is_scaled(tmp_path):
    path = tmp_path / "schedule.yaml"
    path.write_text(
        f"num_layers: 6\nfirst_skip_layer: 2\nstages: {STAGES % (40, 20)}\nreference_tokens: 100\n"
    )
    schedule = read_schedule(str(path), num_layers=12, num_tokens=50)
    assert (schedule.num_layers, schedule.first_skip_layer) == (12, 4)
    assert schedule.stages == (spts.Stage(last_layer=9, active_tokens=20, keep_tokens=10),)


def safety(agreement: list[float], method: float) -> Safety:
    rows = tuple(
        LayerSafety(
            layer=layer,
            active_tokens=None,
            frozen_agreement=value,
            frozen_kl_nats=0.0,
            coverage=1.0,
            proxy_correlation=None,
        )
        for layer, value in enumerate(agreement)
    )
    return Safety(layers=rows, method_agreement=method, method_kl_nats=0.0, num_live=9, num_prompts=3)


def schedule_from(first: int) -> spts.Schedule:
    return spts.Schedule(
        num_layers=6, first_skip_layer=first, stages=(spts.Stage(last_layer=5, active_tokens=9),)
    )


def test_verdict_names_the_layer_from_which_on_it_is_safe():
    curve = safety([0.1, 0.95, 0.4, 0.92, 0.97, 1.0], method=0.5)
    verdict = judge(curve, [], schedule_from(2), min_agreement=0.9)
    assert (verdict.safe, verdict.early, verdict.safe_from_layer) == (False, True, 3)
    assert verdict.lines[0].startswith("NOT SAFE")
    assert verdict.lines[-1].startswith("WARNING: first_skip_layer 2 is before layer 3")


def test_verdict_warns_of_an_early_schedule_that_still_agrees():
    verdict = judge(safety([0.1, 0.2, 0.4, 0.95, 0.97, 1.0], 0.95), [], schedule_from(2), min_agreement=0.9)
    assert (verdict.safe, verdict.early) == (True, True)
    late = judge(safety([0.1, 0.2, 0.4, 0.95, 0.97, 1.0], 0.95), [], schedule_from(3), min_agreement=0.9)
    assert (late.safe, late.early) == (True, False)
    assert not any("WARNING" in line for line in late.lines)


def test_a_lost_task_is_not_safe_however_well_text_agrees():
    lost = TaskCurve(name="twohop", samples=50, dense=0.96, method=0.3, frozen=(0, 0, 0.1, 0.2, 0.9, 0.96))
    verdict = judge(safety([1.0] * 6, method=1.0), [lost], schedule_from(3), min_agreement=0.9)
    assert (verdict.safe, verdict.early, verdict.safe_from_layer) == (False, True, 4)
    assert "NOT SAFE on twohop: 30.0% of 50 right, dense 96.0%" in verdict.lines


@pytest.mark.parametrize("layer", [-1, 3, 99])
def test_a_first_layer_after_the_schedules_is_refused(layer, folder, text, tmp_path, capsys):
    schedule = schedule_file(tmp_path / "s.yaml", 12)
    assert run(folder, text, tmp_path / "o", "--schedule", schedule, "--first-layer", str(layer)) == 2
    assert f"first_layer must be 0 to 2, the first layer that the schedule skips tokens in, got {layer};" in (
        capsys.readouterr().err
    )


def test_a_task_without_answers_is_refused(folder, text, tmp_path, capsys):
    assert run(folder, text, tmp_path / "out", "--task", "agreement") == 2
    assert "task must have answers to be right or wrong, got 'agreement'" in capsys.readouterr().err
