"""The endpoint as `make serve` runs it, from outside: alive while it works, guarded, measured."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.cluster.conftest import KEY, SITE

pytestmark = [pytest.mark.slow, pytest.mark.real]
# What an endpoint without requests has none of.
IN_USE = (
    *("num_requests_running", "num_requests_waiting", "num_requests_held", "queued_prefill_tokens"),
    *("kv_cache_bytes", "kv_reserved_bytes"),
)


@pytest.fixture
def http(demo_url):
    with httpx.Client(base_url=demo_url, headers={"Authorization": f"Bearer {KEY}"}, timeout=120) as client:
        yield client


def test_it_is_alive_and_ready_while_a_long_prompt_is_read(http):
    body = {
        "model": "spts-demo",
        "prompt": [7 + place % 5000 for place in range(8000)],
        "max_tokens": 2,
        "temperature": 0,
        "spts": {"method": "dense"},
    }
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(http.post("/v1/completions", json=body)))
    began = time.monotonic()
    asking.start()
    waits = []
    seen = {"running": 0.0, "queued": 0.0}
    while asking.is_alive():
        sent = time.monotonic()
        assert http.get("/health").status_code == 200
        assert http.get("/ready").status_code == 200
        waits.append(time.monotonic() - sent)
        found = gauges(http)
        seen["running"] = max(seen["running"], found["spts:num_requests_running"])
        seen["queued"] = max(seen["queued"], found["spts:queued_prefill_tokens"])
        time.sleep(0.05)
    assert answers[0].status_code == 200
    assert answers[0].json()["usage"]["prompt_tokens"] == 8000
    assert len(waits) >= 5, f"a prompt this long takes a while, not {time.monotonic() - began:.1f} s"
    assert max(waits) < 2
    assert seen == {"running": 1, "queued": 8000}
    assert gauges(http)["spts:num_requests_running"] == 0


def gauges(http: httpx.Client) -> dict[str, float]:
    families = text_string_to_metric_families(http.get("/metrics").text)
    return {
        sample.name: sample.value
        for family in families
        if family.type == "gauge"
        for sample in family.samples
    }


def test_the_key_is_asked_for_behind_the_proxy_too(http, demo_url):
    for path in ("/v1/models", "/metrics"):
        answer = httpx.get(f"{demo_url}{path}", timeout=30)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert http.get(path).status_code == 200
    assert httpx.get(f"{demo_url}/", timeout=30).headers["content-security-policy"]


def test_a_page_of_a_listed_site_may_ask_behind_the_proxy_too(http, demo_url):
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    for origin, status in ((SITE, 200), ("https://other.example.org", 400)):
        preflight = httpx.options(
            f"{demo_url}/v1/completions", headers={"Origin": origin, **asked}, timeout=30
        )
        assert preflight.status_code == status
        answer = http.get("/v1/models", headers={"Origin": origin})
        assert answer.status_code == 200
        for each in (preflight, answer):
            assert each.headers.get("access-control-allow-origin") == (SITE if origin == SITE else None)
            assert len(each.headers.get_list("x-request-id")) == 1


def test_every_answer_has_one_request_id_the_clients_own_if_it_brings_one(http):
    body = {"model": "spts-demo", "prompt": "The", "max_tokens": 1}
    for own in (None, "mine-1"):
        headers = {} if own is None else {"x-request-id": own}
        for answer in (
            http.get("/health", headers=headers),
            http.get("/nothing", headers=headers),
            http.get("/v1/models", headers={**headers, "Authorization": "Bearer no"}),
            http.post("/v1/completions", json=body, headers=headers),
            http.post("/v1/completions", json={**body, "stream": True}, headers=headers),
            http.post("/v1/completions", json={**body, "n": 0}, headers=headers),
            http.post("/v1/completions", content=b"{", headers=headers),
            http.post("/v1/completions", content=b"x" * 10_000_000, headers=headers),
        ):
            [given] = answer.headers.get_list("x-request-id")
            assert given == own if own else len(given) >= 16


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_a_client_that_leaves_frees_its_memory_within_a_second(http, demo_url, stream):
    body = {"model": "spts-demo", "prompt": "The", "max_tokens": 8000, "ignore_eos": True, "stream": stream}

    async def leave() -> None:
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=demo_url, headers=headers, timeout=60) as client:
            sent = asyncio.create_task(client.post("/v1/completions", json=body))
            while gauges(http)["spts:kv_cache_bytes"] == 0:
                assert not sent.done(), sent.result().text
                await asyncio.sleep(0.02)
            sent.cancel()
            await asyncio.gather(sent, return_exceptions=True)

    asyncio.run(leave())
    left = time.monotonic()
    while any(gauges(http)[f"spts:{name}"] for name in IN_USE):
        assert time.monotonic() - left < 1


def test_200_clients_that_leave_at_random_leave_nothing(http, demo_url):
    """Whole and streamed, dense and skipping, of any length; in the queue, the prefill and the answer."""
    draw = random.Random(0)

    async def ask(client: httpx.AsyncClient) -> str:
        length = draw.choice([5, 50, 500, 2000])
        body = {
            "model": "spts-demo",
            "prompt": [7 + draw.randrange(5000) for _ in range(length)],
            "max_tokens": draw.choice([1, 20, 400]),
            "n": draw.choice([1, 1, 1, 3]),
            "stream": draw.random() < 0.5,
            "ignore_eos": True,
            "spts": {"method": draw.choice(["dense", "spts"])},
        }
        try:
            async with asyncio.timeout(draw.random() ** 2 * 2):
                answer = await client.post("/v1/completions", json=body)
        except TimeoutError:
            return "left"
        assert answer.status_code in (200, 503), answer.text
        return str(answer.status_code)

    async def all_of_them() -> list[str]:
        headers = {"Authorization": f"Bearer {KEY}"}
        at_once = asyncio.Semaphore(16)

        async def one() -> str:
            async with at_once, httpx.AsyncClient(base_url=demo_url, headers=headers, timeout=60) as client:
                return await ask(client)

        return await asyncio.gather(*(one() for _ in range(200)))

    ends = asyncio.run(all_of_them())
    assert ends.count("left") > 100
    deadline = time.monotonic() + 5
    while any(gauges(http)[f"spts:{name}"] for name in IN_USE):
        assert time.monotonic() < deadline, gauges(http)
        time.sleep(0.1)
    body = {"model": "spts-demo", "prompt": "The code of falcon is amber.", "max_tokens": 3}
    assert http.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] >= 1


def test_the_openai_client_works_unmodified_sync_and_async(demo_url):
    question = "The code of falcon is amber.\n\nQuestion: What is the code of falcon?"
    ask: dict[str, Any] = {
        "model": "spts-demo",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 8,
        "temperature": 0,
    }
    options: dict[str, Any] = {"base_url": f"{demo_url}/v1", "api_key": KEY, "max_retries": 0}

    def said(chunks: list) -> str:
        return "".join(chunk.choices[0].delta.content for chunk in chunks).strip()

    sync = openai.OpenAI(**options)
    assert sync.chat.completions.create(**ask).choices[0].message.content.strip() == "amber"
    assert said(list(sync.chat.completions.create(**ask, stream=True))) == "amber"

    async def asynchronously() -> None:
        async with openai.AsyncOpenAI(**options) as client:
            whole = await client.chat.completions.create(**ask)
            assert whole.choices[0].message.content.strip() == "amber"
            stream = await client.chat.completions.create(**ask, stream=True)
            assert said([chunk async for chunk in stream]) == "amber"
            several = await asyncio.gather(*(client.chat.completions.create(**ask) for _ in range(5)))
            assert {each.choices[0].message.content.strip() for each in several} == {"amber"}

    asyncio.run(asynchronously())
