"""The training loop of the demo model: two steps on the CPU, what they leave, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

import spts
from jobs import train_demo
from jobs.demo.circuit import new_model
from jobs.demo.phases import PHASES
from jobs.demo.tokenizer import END_ID
from jobs.train_demo import Training, TrainingError
from spts.methods import Dense
from tests.jobs.short_training import SHORT, bundled_tokenizer, shorten_text


@pytest.fixture(autouse=True)
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_text(monkeypatch)


def test_two_steps_leave_a_model_that_loads(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_demo, "LOG_STEPS", 1)
    training = Training(bundled_tokenizer(), seed=0, device="cpu", batch_tokens=128, workers=0)
    training.run((SHORT, SHORT), minutes=1e-9, out=tmp_path)
    assert training.num_steps == 2
    rows = json.loads((tmp_path / "training.json").read_text())
    assert [(row["phase"], row["step"]) for row in rows] == [("short", 1), ("short", 2)]
    assert capsys.readouterr().out.count(" right, loss ") == 2

    start = new_model(0).state_dict()
    saved = Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    for name, tensor in training.model.state_dict().items():
        assert torch.equal(saved[name], tensor.bfloat16()), name
        assert not torch.equal(tensor, start[name]), name
    model = spts.load(tmp_path)
    assert model.eos_token_ids == (END_ID,)
    assert model.prefill(bundled_tokenizer().encode("import os\n"), Dense()).logits.isfinite().all()
    tokenizer = bundled_tokenizer()
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert again.chat_template == tokenizer.chat_template
    assert again.get_vocab() == tokenizer.get_vocab()


def test_a_phase_that_does_not_form_fails(tmp_path):
    training = Training(bundled_tokenizer(), seed=0, device="cpu", batch_tokens=256, workers=0)
    with pytest.raises(TrainingError, match=r"phase 'form' must reach an accuracy of 0.5, got 0.00 after 1 "):
        training.run(PHASES, minutes=1e-9, out=tmp_path)


def test_a_loss_that_is_not_finite_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(train_demo, "LOG_STEPS", 1)
    training = Training(bundled_tokenizer(), seed=0, device="cpu", batch_tokens=128, workers=0)
    with torch.no_grad():
        training.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="loss must stay finite"):
        training.run((SHORT,), minutes=1e-9, out=tmp_path)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--minutes", "0", "minutes must be above 0, got 0.0"),
        ("--minutes", "nan", "minutes must be above 0, got nan"),
        ("--batch-tokens", "4096", "batch_tokens must be an integer of at least 8192, got 4096"),
        ("--workers", "-1", "workers must be an integer of at least 0, got -1"),
    ],
)
def test_refused_options(option, value, message, tmp_path, capsys):
    assert train_demo.main(["--out", str(tmp_path), option, value]) == 2
    assert message in capsys.readouterr().err
