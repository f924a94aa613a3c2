"""API keys: which routes ask for one, what is accepted, and that none is ever shown."""

from __future__ import annotations

import hmac
import logging

import httpx
import openai
import pytest

from cluster.app import build
from cluster.config import AppConfig
from cluster.keys import ApiKeys, read_keys
from spts.errors import ConfigError
from tests.cluster.endpoint import COMPLETIONS, completion, endpoint, error_of

# Ray uses what pydantic deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
FIRST, SECOND = "sk-first-9d1", "sk-second-77e"


@pytest.fixture
def keys_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"# who\n{FIRST}\n\n{SECOND}  # the second\n")
    return str(path)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def test_every_route_but_health_ready_and_the_page_asks_for_a_key(folder, keys_file):
    async with endpoint(folder, api_keys_file=keys_file) as (client, engine):
        for path in ("health", "ready", "", "page.css", "page.js", "picture.js", "icon.svg"):
            assert (await client.get(path)).status_code == 200, path
        steps = len(engine.group.steps)
        guarded = (
            "v1/models",
            "v1/models/tiny",
            "metrics",
            "openapi.json",
            "nothing",
            "health/",
            "page.css/",
        )
        refused = [await client.get(path) for path in guarded]
        refused += [await client.post(path, json={}) for path in (COMPLETIONS, "tokenize", "detokenize")]
        refused.append(await client.post(COMPLETIONS, json=completion()))
        for answer in refused:
            assert answer.status_code == 401, answer.url
            assert answer.headers["www-authenticate"] == "Bearer"
            error = error_of(answer)
            assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        assert len(engine.group.steps) == steps
        for key in (FIRST, SECOND):
            answer = await client.post(COMPLETIONS, json=completion(), headers=bearer(key))
            assert answer.status_code == 200


@pytest.mark.parametrize(
    "given",
    [
        "Bearer " + FIRST[:-1],
        "Bearer " + FIRST + "x",
        "Bearer " + FIRST.upper(),
        "Bearer ",
        "Bearer",
        FIRST,
        "Basic " + FIRST,
        "Bearer # who",
        "Bearer " + FIRST + "," + SECOND,
        "Bearer \xe9",
    ],
)
async def test_a_wrong_key_is_refused_and_never_repeated(folder, keys_file, given, caplog):
    caplog.set_level(logging.DEBUG)
    async with endpoint(folder, api_keys_file=keys_file) as (client, _):
        answer = await client.get("v1/models", headers={"Authorization": given.encode("latin-1")})
    assert answer.status_code == 401
    for key in (FIRST, SECOND):
        assert key not in answer.text
        assert key not in caplog.text


async def test_keys_may_come_from_the_environment_too(folder, keys_file, monkeypatch):
    monkeypatch.setenv("MY_KEYS", "sk-a, sk-b\nsk-c,")
    async with endpoint(folder, api_keys_file=keys_file, api_keys_env="MY_KEYS") as (client, _):
        for key in ("sk-a", "sk-b", "sk-c", FIRST):
            assert (await client.get("v1/models", headers=bearer(key))).status_code == 200
        sdk = openai.AsyncOpenAI(api_key="sk-b", base_url="http://test/v1", http_client=client, max_retries=0)
        assert [model.id for model in (await sdk.models.list()).data] == ["tiny"]
        sdk = openai.AsyncOpenAI(api_key="sk-z", base_url="http://test/v1", http_client=client, max_retries=0)
        with pytest.raises(openai.AuthenticationError) as refused:
            await sdk.completions.create(model="tiny", prompt="fox")
        assert refused.value.code == "invalid_api_key"


async def test_without_keys_a_key_is_no_obstacle(folder):
    async with endpoint(folder) as (client, _):
        assert (await client.get("v1/models", headers=bearer("none"))).status_code == 200


def test_all_keys_are_compared_each_time_in_constant_time(monkeypatch):
    compared: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return one == other

    keys = ApiKeys(["a", "bb", "ccc"])
    monkeypatch.setattr(hmac, "compare_digest", compare)
    for given, admitted in (
        (b"Bearer a", True),
        (b"Bearer ccc", True),
        (b"Bearer d" * 99, False),
        (b"", False),
    ):
        compared.clear()
        assert keys.admits(given) is admitted
        assert len(compared) == 3
        assert {len(each) for pair in compared for each in pair} == {32}


@pytest.mark.parametrize(
    ("source", "text", "message"),
    [
        ("api_keys_file", None, "must be a readable text file, got No such file"),
        ("api_keys_file", b"", "must hold at least one key, got none"),
        ("api_keys_file", b"# nobody\n\n", "must hold at least one key, got none"),
        ("api_keys_file", b"good\nnot good\n", "got another one in line 2"),
        ("api_keys_file", "schlüssel".encode(), "got another one in line 1"),
        ("api_keys_file", b"\xff\xfe", "got bytes that are no UTF-8"),
        ("api_keys_env", None, "must hold at least one key, got none"),
        ("api_keys_env", b" , ", "must hold at least one key, got none"),
        ("api_keys_env", b"a,b c", "got another one in entry 2"),
    ],
)
def test_a_faulty_source_ends_the_deployment_and_is_named(
    folder, tmp_path, monkeypatch, source, text, message
):
    path = tmp_path / "keys"
    if text is not None:
        path.write_bytes(text)
        if source == "api_keys_env":
            monkeypatch.setenv("MY_KEYS", text.decode())
    args = {
        "engines": {"default": {"model": str(folder)}},
        "pools": [{"method": {"name": "dense"}}],
        source: str(path) if source == "api_keys_file" else "MY_KEYS",
    }
    with pytest.raises(ConfigError, match=message) as caught:
        build(args)
    assert caught.value.field == source
    assert str(caught.value).startswith(source)
    assert "schl" not in str(caught.value)
    assert "not good" not in str(caught.value)


def test_an_unreadable_file_is_said_to_be_so(folder, tmp_path):
    config = {"engines": {"default": {"model": str(folder)}}, "pools": [{"method": {"name": "dense"}}]}
    with pytest.raises(ConfigError, match="got Is a directory"):
        read_keys(AppConfig.model_validate({**config, "api_keys_file": str(tmp_path)}))
    with pytest.raises(ConfigError, match="api_keys_file must be an absolute path, got 'keys'"):
        build({**config, "api_keys_file": "keys"})


async def test_below_a_route_prefix_the_same_paths_are_open(folder, keys_file):
    """Serve mounts an application at its route_prefix and says so in root_path."""
    async with endpoint(folder, api_keys_file=keys_file) as (client, _):
        transport = httpx.ASGITransport(app=client._transport.app, root_path="/spts")
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as below:
            for path, status in (("/health", 200), ("/page.css", 200), ("/", 200), ("/v1/models", 401)):
                assert (await below.get(f"/spts{path}")).status_code == status, path
