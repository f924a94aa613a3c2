"""docs/serving.md names every key, route, error and metric that there is."""

from __future__ import annotations

import re

import pytest

from cluster.config import AppConfig, EngineConfig, PoolConfig
from cluster.errors import HTTP_ERRORS
from cluster.metrics import Metrics
from cluster.openapi import openapi
from tests.cluster.conftest import REPOSITORY


@pytest.fixture(scope="module")
def page() -> str:
    return (REPOSITORY / "docs" / "serving.md").read_text()


@pytest.mark.parametrize("model", [AppConfig, PoolConfig, EngineConfig])
def test_every_key_of_the_configuration(page, model):
    assert [name for name in model.model_fields if f"`{name}`" not in page] == []


def test_every_route(page):
    paths = [path.replace("{model}", "NAME") for path in openapi(needs_key=False)["paths"]]
    assert [path for path in paths if f"{path}`" not in page] == []


def test_every_error_with_its_status(page):
    rows = [line for line in page.splitlines() if re.match(r"\| \d{3} \|", line)]
    for row in HTTP_ERRORS.values():
        found = [line for line in rows if line.startswith(f"| {row.status} | {row.type} |")]
        assert any(row.code is None or f"`{row.code}`" in line for line in found), row


def test_every_metric(page):
    names = {
        family.name.removeprefix("spts:") + ("_total" if family.type == "counter" else "")
        for family in Metrics().registry.collect()
    }
    assert [name for name in sorted(names) if f"`{name}`" not in page] == []
