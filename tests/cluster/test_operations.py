"""The endpoint as `make serve` runs it, from outside: alive while it works, guarded, measured."""

from __future__ import annotations

import threading
import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.cluster.conftest import KEY

pytestmark = [pytest.mark.slow, pytest.mark.real]


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
