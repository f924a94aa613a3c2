"""/openapi.json: true to what the routes take and answer, and no request made from it is a 500."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.types import ASGIApp

from cluster.api import UNSUPPORTED, ChatBody, CompletionBody
from cluster.config import AppConfig
from cluster.page import FILES
from cluster.router import Router
from tests.cluster.endpoint import CHAT, COMPLETIONS, POOLS, chat, completion, endpoint
from tests.fakes import FakeEngine

METHODS = {"get", "post"}
CHECKS = [
    not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]


async def test_every_route_is_published_and_every_published_one_is_there(folder):
    async with endpoint(folder) as (client, _):
        document = (await client.get("openapi.json")).json()
        routes = {
            (route.path.replace(":path", ""), method.lower())
            for route in client._transport.app._app.routes
            for method in getattr(route, "methods", ())
        }
    published = {(path, method) for path, item in document["paths"].items() for method in METHODS & set(item)}
    page = {(path, "get") for path in FILES}
    assert {route for route in routes if route[1] in METHODS} - page == published | {("/openapi.json", "get")}
    schemas = document["components"]["schemas"]
    assert {"ChatBody", "CompletionBody", "TokenizeBody", "DetokenizeBody", "Error"} <= set(schemas)
    assert "security" not in document


async def test_keys_are_published_as_a_scheme(folder, tmp_path):
    (tmp_path / "keys").write_text("sk-a")
    async with endpoint(folder, api_keys_file=str(tmp_path / "keys")) as (client, _):
        client.headers["Authorization"] = "Bearer sk-a"
        document = (await client.get("openapi.json")).json()
    assert document["security"] == [{"key": []}]
    assert document["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}
    assert document["paths"]["/health"]["get"]["security"] == []


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
async def test_the_published_neutral_values_of_what_is_not_supported_are_taken(folder, name):
    async with endpoint(folder) as (client, _):
        document = (await client.get("openapi.json")).json()
        for path, body, model in ((COMPLETIONS, completion(), CompletionBody), (CHAT, chat(), ChatBody)):
            published = document["components"]["schemas"][model.__name__]["properties"][name]
            assert ("enum" in published) == (name in model.unsupported)
            for value in published.get("enum", ()):
                answer = await client.post(path, json={**body, name: value})
                assert answer.status_code == 200, (name, value, answer.text)


@pytest.fixture(scope="module")
def app(folder) -> Iterator[ASGIApp]:
    """The application; its fake engine runs in an event loop of another thread, as it would in another
    process."""
    config = AppConfig.model_validate(
        {
            "served_model_name": "tiny",
            "engines": {"default": {"model": str(folder), "max_waiting": 5000}},
            "pools": POOLS,
        }
    )
    engine = FakeEngine(config.engines["default"])
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def there(call: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(call, loop)

    class Remote:
        """`EngineClient` of an engine in the other loop."""

        async def info(self) -> Any:
            return await asyncio.wrap_future(there(engine.info()))

        async def ready(self) -> Any:
            return await asyncio.wrap_future(there(engine.ready()))

        async def stats(self) -> Any:
            return await asyncio.wrap_future(there(engine.stats()))

        async def generate(self, request: Any) -> Any:
            chunks = engine.generate(request)
            try:
                while True:
                    try:
                        yield await asyncio.wrap_future(there(anext(chunks)))
                    except StopAsyncIteration:
                        return
            finally:
                await asyncio.wrap_future(there(chunks.aclose()))

    there(engine.start()).result(30)
    yield Router(config, {"default": Remote()}).app()
    there(engine.shutdown()).result(30)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(30)
    loop.close()


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(
    ("path", "method"),
    [
        ("/v1/completions", "POST"),
        ("/v1/chat/completions", "POST"),
        ("/tokenize", "POST"),
        ("/detokenize", "POST"),
        ("/v1/models/{model}", "GET"),
        ("/v1/models", "GET"),
        ("/ready", "GET"),
        ("/health", "GET"),
        ("/metrics", "GET"),
    ],
)
def test_no_request_made_from_the_schema_is_a_500(app, path, method, mode):
    """positive: what the schema allows. negative: what it does not."""
    operation = schemathesis.openapi.from_asgi("/openapi.json", app)[path][method]

    @settings(
        max_examples=60,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    @given(case=operation.as_strategy(generation_mode=mode), ours=st.booleans())
    def ask(case: schemathesis.Case, ours: bool) -> None:
        if ours and isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "tiny"  # any other is a 404
        case.call_and_validate(checks=CHECKS)

    try:
        ask()
    except Unsatisfiable:
        assert mode is GenerationMode.NEGATIVE and method == "GET", (
            "a GET without parameters has no wrong form"
        )
