"""The bundled demo model: small, safe to open, and it answers what it is there to answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, PretrainedConfig

import spts
from jobs.demo.circuit import LOOKUP_LAYERS, new_model
from jobs.tasks.needle import NEEDLE_TASKS
from jobs.tasks.tokens import PlainTokens
from spts.methods import Dense
from spts.model import SptsModel
from spts.schedule import Schedule
from tests.jobs.short_training import BUNDLED, bundled_tokenizer


@pytest.fixture(scope="module")
def model() -> SptsModel:
    return spts.load(BUNDLED)


@pytest.mark.parametrize("task", NEEDLE_TASKS, ids=lambda task: task.name)
def test_dense_answers_are_exact(task, model):
    tokenizer = bundled_tokenizer()
    samples = task.samples(PlainTokens(tokenizer.backend_tokenizer), length=1024, count=3, seed=0)
    for sample in samples:
        generation = model.generate(
            tokenizer.encode(sample.prompt), Dense(), max_new_tokens=task.max_new_tokens
        )
        answer = tokenizer.decode(generation.token_ids, skip_special_tokens=True)
        assert sorted(answer.strip().split(", ")) == sorted(sample.references)
        assert generation.finish_reason == "stop"


def test_small_and_safe_to_open():
    files = [path for path in BUNDLED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 24e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja", ".md"}
    weights = [path.relative_to(BUNDLED) for path in files if path.suffix == ".safetensors"]
    assert sorted(weights) == [Path("model.safetensors"), Path("proxies/proxies.safetensors")]


def test_its_configuration_is_its_trainers():
    def said(config: PretrainedConfig) -> dict[str, Any]:
        unlike = {"_name_or_path", "architectures", "dtype", "transformers_version"}  # written when saved
        return {key: value for key, value in config.to_dict().items() if key not in unlike}

    assert said(AutoConfig.from_pretrained(BUNDLED)) == said(new_model(0).config)


def test_its_proxies_are_its_own(model):
    assert model.proxies is not None
    assert model.proxies.manifest.fingerprint == model.fingerprint
    schedule = Schedule.preset("demo-12l")
    assert schedule.first_skip_layer == LOOKUP_LAYERS[0]
    assert set(range(schedule.first_skip_layer, schedule.num_layers)) <= set(model.proxies.layers)
