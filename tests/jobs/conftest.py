"""A tiny model and sweeps over it, for every test of jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.tiny import SCHEDULE, write_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """The folder of a tiny random model (6 layers, context 512) with proxies and a byte-level tokenizer."""
    return write_model(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture
def config(tiny_model, tmp_path) -> dict[str, Any]:
    """A valid sweep as plain data; tests change a key and write it with `write_config`."""
    schedule = {**SCHEDULE.to_dict(), "reference_tokens": 400}
    return {
        "name": "tiny",
        "model": str(tiny_model),
        "methods": [
            {"name": "dense"},
            {"name": "spts", "schedule": schedule},
            {"name": "random", "schedule": schedule, "seed": 1},
        ],
        "tasks": ["single", "multivalue"],
        "lengths": [340, 420],
        "samples": 2,
        "output": str(tmp_path / "out"),
    }


@pytest.fixture
def write_config(tmp_path):
    """Writes a configuration to a YAML file and returns its path."""

    def write(data: Any) -> Path:
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(data), encoding="utf-8")
        return path

    return write
