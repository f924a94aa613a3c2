"""A router on a fake engine, asked over HTTP in this process; bodies to send, and answers read."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import httpx

from cluster.config import AppConfig
from cluster.router import Router
from tests.cluster.tiny import SCHEDULE
from tests.fakes import FakeEngine

POOLS: list[dict[str, Any]] = [
    {"max_prompt_tokens": 50, "method": {"name": "dense"}},
    {"method": {"name": "spts", "schedule": SCHEDULE.to_dict()}},
]
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


@contextlib.asynccontextmanager
async def endpoint(folder, *, step_s=0.0, start=True, engine=None, **config):
    """An HTTP client of a router on a fake engine, and the engine."""
    app_config = AppConfig.model_validate(
        {
            "served_model_name": "tiny",
            "engines": {"default": {"model": str(folder), **(engine or {})}},
            "pools": POOLS,
            **config,
        }
    )
    fake = FakeEngine(app_config.engines["default"], step_s=step_s)
    if start:
        await fake.start()
    app = Router(app_config, {"default": fake}).app()
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test/", timeout=30) as client:
        yield client, fake
    await fake.shutdown()


def error_of(response: httpx.Response) -> dict:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    return body["error"]


def events(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def completion(**fields) -> dict:
    return {"model": "tiny", "prompt": "the fox ", "max_tokens": 4, "temperature": 0, **fields}


def chat(**fields) -> dict:
    return {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, **fields}
