"""Pages of other sites: what a browser is told, with and without API keys, and what is refused."""

from __future__ import annotations

import doctest

import httpx
import pytest

from cluster import origins
from cluster.config import AppConfig
from cluster.strict import parse
from spts.errors import ConfigError
from tests.cluster.endpoint import COMPLETIONS, completion, endpoint, error_of, events

SITE, OTHER = "https://chat.example.org", "http://localhost:3000"
KEY = "sk-first-9d1"
# What a browser may read of a cross-origin answer beyond the few headers that are always there.
EXPOSED = {"x-request-id", "retry-after"}


def preflight(origin: str, method: str = "POST") -> dict[str, str]:
    return {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
        "Access-Control-Request-Private-Network": "true",
    }


def cors_headers(answer: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control-")}


def exposed(answer: httpx.Response) -> set[str]:
    return {name.strip() for name in answer.headers["access-control-expose-headers"].split(",")}


@pytest.fixture
def keys(tmp_path) -> dict[str, str]:
    (tmp_path / "keys").write_text(KEY)
    return {"api_keys_file": str(tmp_path / "keys")}


@pytest.mark.parametrize("guarded", [False, True], ids=["open", "with keys"])
@pytest.mark.parametrize("origin", [SITE, OTHER])
async def test_a_listed_site_may_ask(folder, keys, guarded, origin):
    config = keys if guarded else {}
    async with endpoint(folder, cors_origins=[SITE, OTHER], **config) as (client, engine):
        steps = len(engine.group.steps)
        asked = await client.options(COMPLETIONS, headers=preflight(origin))
        assert asked.status_code == 200, "a browser's preflight has no key"
        assert asked.headers["access-control-allow-origin"] == origin
        assert "POST" in asked.headers["access-control-allow-methods"]
        allowed = asked.headers["access-control-allow-headers"]
        assert {"authorization", "content-type", "x-stainless-lang"} <= {*allowed.split(",")}
        assert "access-control-allow-credentials" not in asked.headers
        assert asked.headers["access-control-allow-private-network"] == "true"
        assert "Origin" in asked.headers["vary"]
        assert asked.headers["x-request-id"]
        assert len(engine.group.steps) == steps
        headers = {"Origin": origin, "Authorization": f"Bearer {KEY}"}
        for stream in (False, True):
            answer = await client.post(COMPLETIONS, json=completion(stream=stream), headers=headers)
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-origin"] == origin
            assert answer.headers["x-request-id"]
            assert exposed(answer) == EXPOSED
        assert events(answer)[-1] == "[DONE]"


async def test_what_is_refused_can_be_read_by_the_page_too(folder, keys, monkeypatch):
    async with endpoint(folder, cors_origins=[SITE], **keys) as (client, engine):
        headers = {"Origin": SITE, "Authorization": f"Bearer {KEY}"}
        monkeypatch.setattr(engine, "generate", lambda request: 1 / 0)
        for answer, status in (
            (await client.get("v1/models", headers={"Origin": SITE}), 401),
            (await client.post(COMPLETIONS, json=completion(n=0), headers=headers), 400),
            (await client.get("nothing", headers=headers), 404),
            (await client.post(COMPLETIONS, json=completion(), headers=headers), 500),
        ):
            error_of(answer)
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, SITE)
            assert exposed(answer) == EXPOSED


@pytest.mark.parametrize(
    "origin",
    [
        "https://chat.example.com",
        "http://chat.example.org",
        "https://chat.example.org:8443",
        "https://chat.example.org.evil.net",
        "null",
    ],
)
async def test_another_site_is_not_let_in(folder, keys, origin):
    async with endpoint(folder, cors_origins=[SITE], **keys) as (client, _):
        asked = await client.options(COMPLETIONS, headers=preflight(origin))
        assert asked.status_code == 400
        assert "access-control-allow-origin" not in asked.headers
        headers = {"Origin": origin, "Authorization": f"Bearer {KEY}"}
        answer = await client.get("v1/models", headers=headers)
        assert answer.status_code == 200, "it is the browser that keeps it from the page"
        assert "access-control-allow-origin" not in answer.headers
        assert "Origin" in answer.headers["vary"]
        refused = await client.options(COMPLETIONS, headers=preflight(SITE, "DELETE"))
        assert refused.status_code == 400


async def test_any_site_may_ask_if_that_is_configured(folder):
    async with endpoint(folder, cors_origins=["*"]) as (client, _):
        asked = await client.options(COMPLETIONS, headers=preflight("https://any.net"))
        answer = await client.post(COMPLETIONS, json=completion(), headers={"Origin": "https://any.net"})
    for each in (asked, answer):
        assert (each.status_code, each.headers["access-control-allow-origin"]) == (200, "*")
        assert "access-control-allow-credentials" not in each.headers


@pytest.mark.parametrize("guarded", [False, True], ids=["open", "with keys"])
async def test_without_the_setting_nobody_is_told_anything(folder, keys, guarded):
    async with endpoint(folder, **(keys if guarded else {})) as (client, _):
        asked = await client.options(COMPLETIONS, headers=preflight(SITE))
        headers = {"Origin": SITE, "Authorization": f"Bearer {KEY}"}
        answer = await client.get("v1/models", headers=headers)
    assert asked.status_code == (401 if guarded else 405)
    assert answer.status_code == 200
    for each in (asked, answer):
        assert cors_headers(each) == {}
        assert "vary" not in each.headers


async def test_requests_that_are_not_from_a_page_are_as_before(folder, keys):
    async with endpoint(folder, cors_origins=[SITE], **keys) as (client, _):
        answer = await client.get("v1/models", headers={"Authorization": f"Bearer {KEY}"})
        assert (answer.status_code, cors_headers(answer)) == (200, {})
        # OPTIONS without the two headers of a preflight is no preflight, and asks for a key as any request.
        assert (await client.options(COMPLETIONS, headers={"Origin": SITE})).status_code == 401


def configured(value: object) -> AppConfig:
    args = {"engines": {"default": {"model": "m"}}, "pools": [{"method": {"name": "dense"}}]}
    return parse({**args, "cors_origins": value}, AppConfig, source="args")


def test_origins_as_browsers_send_them_are_taken():
    assert configured([]).cors_origins == ()
    for origin in (
        "https://a.example",
        "http://localhost",
        "http://localhost:3000",
        "https://xn--bcher-kva.example:8443",
        "http://127.0.0.1:8080",
        "http://[::1]:3000",
        "http://a.example:443",
        "*",
    ):
        assert configured([origin]).cors_origins == (origin,)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("*", "cors_origins must be a list, got '\\*'"),
        (["a.example"], "got 'a.example'; correct it"),
        (["https://a.example/"], "got 'https://a.example/'; correct it"),
        (["https://a.example/chat"], "got 'https://a.example/chat'"),
        (["https://A.example"], "got 'https://A.example'"),
        (["https://a.example:443"], "no port that is the scheme's own"),
        (["http://a.example:80"], "got 'http://a.example:80'"),
        (["http://a.example:65536"], "got 'http://a.example:65536'"),
        (["http://a.example:080"], "got 'http://a.example:080'"),
        (["http://a.example:"], "got 'http://a.example:'"),
        (["https://me@a.example"], "got 'https://me@a.example'"),
        (["https://*.example"], "got 'https://\\*.example'"),
        (["https://bücher.example"], "got 'https://bücher.example'"),
        (["https://a.example\n"], "got 'https://a.example\\\\n'"),
        (["null"], "got 'null'"),
        (["file://"], "got 'file://'"),
        ([""], "got ''"),
        (["*", "https://a.example"], "must hold '\\*' alone, got it among 2; remove the others"),
        ([3], "cors_origins.0 must be a valid string, got 3"),
        (None, "cors_origins must be a list, got None"),
    ],
)
def test_what_no_browser_would_send_is_refused_by_name(value, message):
    with pytest.raises(ConfigError, match=message) as caught:
        configured(value)
    assert (caught.value.field or "").startswith("cors_origins")
    assert str(caught.value).startswith("args: cors_origins")
    assert str(caught.value).count("cors_origins") == 1


def test_the_docstrings_examples_are_true():
    assert doctest.testmod(origins, optionflags=doctest.ELLIPSIS).failed == 0
