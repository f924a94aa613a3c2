"""docs/sweeps.md names every key of a sweep, docs/benchmarks.md every family of tasks."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from jobs.sweeping.spec import EngineSpec, MethodSpec, Sweep
from jobs.tasks import FAMILIES
from spts.methods import METHODS
from spts.schedule import PRESETS, Schedule, Stage

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def page() -> str:
    return (DOCS / "sweeps.md").read_text()


@pytest.mark.parametrize("model", [Sweep, EngineSpec, MethodSpec])
def test_every_key_has_its_place_in_a_table(page, model):
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    first = [row.split("|")[1] for row in rows]
    assert [name for name in model.model_fields if not any(f"`{name}`" in cell for cell in first)] == []


def test_every_method_and_its_fields(page):
    names = {*METHODS} | {field.name for method in METHODS.values() for field in fields(method)}
    assert [name for name in sorted(names) if f"`{name}`" not in page] == []


def test_every_preset_and_key_of_a_schedule(page):
    names = {*PRESETS} | {field.name for part in (Schedule, Stage) for field in fields(part)}
    assert [name for name in sorted(names) if f"`{name}`" not in page] == []


def test_every_family_of_tasks():
    page = (DOCS / "benchmarks.md").read_text()
    assert [names[0] for names in FAMILIES.values() if names[0] not in page] == []
