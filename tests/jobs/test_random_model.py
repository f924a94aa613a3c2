"""A model folder of random weights: the library takes it, and what cannot be written is refused."""

from __future__ import annotations

import json

import pytest

import spts
from jobs import random_model
from jobs.timing import arena
from spts.cost import ProxyShape
from spts.methods import Spts
from spts.schedule import PRESETS, Schedule
from tests.jobs.test_latency import TINY, interrupted


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch):
    monkeypatch.setattr(arena, "SHAPES", {**arena.SHAPES, "tiny": TINY})


def run(*more: str) -> int:
    return random_model.main(["--shape", "tiny", "--max-tokens", "200", *more])


def test_the_library_loads_it_and_skips_as_it_was_told(tmp_path, capsys):
    out = tmp_path / "model"
    assert run("--out", str(out), "--channels", "20", "--rank", "8", "--dtype", "bfloat16") == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    model = spts.load(out, dtype="bfloat16")
    assert (model.shape, model.max_context) == (TINY, 200)
    assert model.proxies is not None and model.proxies.shape == ProxyShape(channels=20, rank=8)
    assert facts["bytes"] > 2 * 2 * TINY.vocab_size * TINY.hidden_size
    firsts = []
    for name in PRESETS:
        method = Spts(schedule=Schedule.preset(name, num_layers=TINY.num_layers, num_tokens=150))
        prefill = model.prefill(list(range(1, 76)) * 2, method)
        assert prefill.work == method.planned_work(TINY.num_layers, 150)
        firsts.append(method.schedule.first_skip_layer)
    assert facts["proxies"]["first_layer"] == min(firsts) > 0


def test_sizes_that_are_not_given_are_the_papers(tmp_path):
    assert run("--out", str(tmp_path)) == 0
    proxies = spts.load(tmp_path).proxies
    assert proxies is not None and proxies.shape == ProxyShape.default(TINY)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--shape", "no-such"], "shape must be one of"),
        (["--max-tokens", "0"], "max_tokens must be an integer of at least 1, got 0"),
        (["--channels", "0"], "channels must be an integer of at least 1, got 0"),
        (["--channels", "65"], "channels must be at most 64, the FFN's inner size, got 65"),
        (["--rank", "99999999"], "rank must be at most 32, the hidden size, got 99999999"),
        (["--rank", "-1"], "rank must be an integer of at least 1, got -1"),
        (["--device", "nowhere"], "device must be there, got 'nowhere'"),
    ],
)
def test_bad_input_is_refused_before_a_folder_is_made(tmp_path, args, message, capsys):
    assert run("--out", str(tmp_path / "model"), *args) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("step", ["random_model", "random_proxies"])
def test_ctrl_c_ends_in_one_line_and_leaves_no_folder(tmp_path, monkeypatch, capsys, step):
    monkeypatch.setattr(f"jobs.timing.contestants.{step}", interrupted)
    assert run("--out", str(tmp_path / "model")) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "interrupted: the same command again starts from the beginning"
    assert not (tmp_path / "model").exists()


def test_a_folder_that_holds_something_is_left_as_it_is(tmp_path, capsys):
    (tmp_path / "notes").write_text("mine")
    assert run("--out", str(tmp_path)) == 2
    assert "out must be a folder that is empty" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["notes"]
    assert run("--out", str(tmp_path / "notes")) == 2
    assert "out must be a folder that can be written" in capsys.readouterr().err
