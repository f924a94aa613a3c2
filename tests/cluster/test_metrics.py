"""/metrics: what is counted, read by Prometheus' own parser, and the dashboard's names against it."""

from __future__ import annotations

import asyncio
import json
import re

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.metrics import Metrics
from cluster.protocol import EngineError, EngineStats
from tests.cluster.conftest import REPOSITORY
from tests.cluster.endpoint import CHAT, COMPLETIONS, chat, completion, endpoint

HISTOGRAMS = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
)
LABELS = r'\{[^}]*\}|"[^"]*"|\[[^\]]*\]'  # of a PromQL expression: matchers, strings, ranges


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(name without its prefix, labels) -> value."""
    return {
        (sample.name.removeprefix("spts:"), tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def scrape(client: httpx.AsyncClient) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    answer = await client.get("metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return samples(answer.text)


async def test_tokens_times_and_ends_are_counted_by_method(folder):
    async with endpoint(folder, step_s=0.002) as (client, _):
        await client.post(COMPLETIONS, json=completion(prompt=[7] * 20, max_tokens=5, n=2))
        await client.post(COMPLETIONS, json=completion(prompt=[7] * 100, max_tokens=3, stream=True))
        await client.post(COMPLETIONS, json=completion(prompt="a fox ", max_tokens=90, stop="fox"))
        found = await scrape(client)
    dense, skipped = (("method", "dense"),), (("method", "spts"),)
    assert found["prompt_tokens_total", skipped] == 100
    assert found["generation_tokens_total", skipped] == 3
    assert found["kv_tokens_kept_total", skipped] == 330
    assert found["kv_tokens_full_total", skipped] == 600
    assert found["kv_tokens_kept_total", dense] == found["kv_tokens_full_total", dense]
    assert found["request_success_total", (("finished_reason", "length"), *dense)] == 2
    assert found["request_success_total", (("finished_reason", "stop"), *dense)] == 1
    for name in HISTOGRAMS:
        choices = 2 if name == "inter_token_latency_seconds" else 1
        assert found[f"{name}_count", skipped] == choices, name
        assert found[f"{name}_bucket", (("le", "600.0"), *skipped)] == choices, name
    first, queue, prefill, decode, whole = (
        found[f"{name}_sum", skipped]
        for name in (
            "time_to_first_token_seconds",
            "request_queue_time_seconds",
            "request_prefill_time_seconds",
            "request_decode_time_seconds",
            "e2e_request_latency_seconds",
        )
    )
    assert 0.002 < prefill <= first  # a step of 2 ms, or more of them
    assert queue + prefill <= first
    assert first + decode == pytest.approx(whole)
    assert found["inter_token_latency_seconds_sum", skipped] == pytest.approx(decode)


async def test_refusals_and_failures_are_counted_by_their_kind(folder, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("sk-a")
    async with endpoint(folder, step_s=0.01, request_timeout_s=0.2, api_keys_file=str(keys)) as (client, _):
        await client.get("v1/models")
        client.headers["Authorization"] = "Bearer sk-a"
        await client.post(COMPLETIONS, json=completion(prompt=[7] * 600))
        await client.post(COMPLETIONS, json=completion(model="gpt-4"))
        for stream in (True, False):
            await client.post(CHAT, json=chat(max_tokens=300, stream=stream))
        found = await scrape(client)
    for kind in ("invalid_api_key", "context_length_exceeded", "model_not_found"):
        assert found["admission_rejections_total", (("reason", kind),)] == 1
    assert found["request_failures_total", (("reason", "deadline"),)] == 2


@pytest.mark.parametrize("stream", [True, False])
async def test_a_rank_lost_in_an_answer_is_a_failure_and_lost_before_it_a_refusal(folder, stream):
    async with endpoint(folder, step_s=0.005) as (client, engine):
        body = completion(max_tokens=400, stream=stream)
        sent = asyncio.create_task(client.post(COMPLETIONS, json=body))
        await asyncio.sleep(0.3)
        engine.group.fail_starts = 99
        engine.group.lose_a_rank()
        await sent
        found = await scrape(client)
        unavailable = (("reason", "unavailable"),)
        assert found["request_failures_total", unavailable] == 1
        assert ("admission_rejections_total", unavailable) not in found
        assert (await client.post(COMPLETIONS, json=body)).status_code == 503
        found = await scrape(client)
    assert found["request_failures_total", unavailable] == 1
    assert found["admission_rejections_total", unavailable] == 1


async def test_choices_whose_client_leaves_are_counted(folder):
    async with endpoint(folder, step_s=0.005) as (client, _):
        body = completion(prompt=[[7] * 4, [7, 0]], max_tokens=400)  # the second one ends by itself
        sent = asyncio.create_task(client.post(COMPLETIONS, json=body))
        await asyncio.sleep(0.3)
        sent.cancel()
        await asyncio.gather(sent, return_exceptions=True)
        found = await scrape(client)
    ends = {
        dict(labels)["finished_reason"]: v for (n, labels), v in found.items() if n == "request_success_total"
    }
    assert ends == {"stop": 1, "abort": 1}
    assert not [name for name, _ in found if name in ("request_failures_total", "admission_rejections_total")]


async def test_the_prefill_of_an_echo_is_that_of_its_answer(folder):
    step_s = 0.05
    async with endpoint(folder, step_s=step_s) as (client, _):
        await client.post(COMPLETIONS, json=completion(echo=True, logprobs=0, max_tokens=1))
        found = await scrape(client)
    first, queue, prefill = (
        found[f"{name}_seconds_sum", (("method", "dense"),)]
        for name in ("time_to_first_token", "request_queue_time", "request_prefill_time")
    )
    own_s = first - queue - prefill
    assert own_s >= step_s, "the prompt's own log-probabilities took a step or more before the answer"


async def test_the_engine_says_what_it_is_doing(folder):
    engine = {"max_running": 1, "max_waiting": 5}
    async with endpoint(folder, step_s=0.01, engine=engine) as (client, fake):
        sent = [
            asyncio.create_task(client.post(COMPLETIONS, json=completion(prompt=[7] * 30, max_tokens=100)))
            for _ in range(3)
        ]
        await asyncio.sleep(0.3)
        found = await scrape(client)
        of_engine = (("engine", "default"),)
        assert found["num_requests_running", of_engine] == 1
        assert found["num_requests_waiting", of_engine] == 2
        assert found["num_requests_held", of_engine] == 1
        assert found["queued_prefill_tokens", of_engine] == 60
        token_bytes = 2 * 4 * 2 * 16 * 6  # K and V, float32, heads, head size, layers
        assert 30 * token_bytes < found["kv_cache_bytes", of_engine] < 130 * token_bytes
        for task in sent:
            task.cancel()
        await asyncio.gather(*sent, return_exceptions=True)
        await asyncio.sleep(0.1)
        found = await scrape(client)
        names = ("num_requests_running", "num_requests_held", "kv_cache_bytes")
        assert {found[name, of_engine] for name in names} == {0}
        await fake.shutdown()


@pytest.mark.parametrize("bug", [True, False])
async def test_only_a_bug_that_hides_an_engine_is_logged(folder, monkeypatch, caplog, bug):
    async def stats():
        raise ZeroDivisionError if bug else EngineError("unavailable", "its ranks start again")

    async with endpoint(folder) as (client, engine):
        monkeypatch.setattr(engine, "stats", stats)
        assert not [name for name, labels in await scrape(client) if dict(labels).get("engine")]
    assert ("engine default has no stats: ZeroDivisionError()" in caplog.text) == bug


async def test_an_engine_that_does_not_answer_has_no_gauges(folder, monkeypatch):
    async with endpoint(folder) as (client, engine):
        monkeypatch.setattr("cluster.dispatch.ANSWER_S", 0.05)
        monkeypatch.setattr(engine, "stats", lambda: asyncio.sleep(10))
        found = await scrape(client)
    assert not [name for name, labels in found if dict(labels).get("engine")]


def test_every_name_of_the_dashboard_is_exposed():
    metrics = Metrics()
    stats = EngineStats(
        running=1,
        waiting=0,
        kv_bytes=1,
        kv_bytes_limit=10,
        queued_prefill_tokens=0,
        reserved_bytes=3,
        document_bytes=2,
        held_documents=4,
        restarts=6,
    )
    text = metrics.text({"default": stats}).decode()
    found = samples(text)
    for name, value in (("kv_cache_usage_perc", 0.5), ("num_documents_held", 4), ("num_restarts", 6)):
        assert found[name, (("engine", "default"),)] == value
    # A series appears with its first label; a family is listed from the start, with its type.
    suffixes = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
    exposed = {
        family.name + suffix
        for family in text_string_to_metric_families(text)
        for suffix in suffixes[family.type]
    }
    dashboard = json.loads((REPOSITORY / "cluster" / "grafana.json").read_text())
    asked: set[str] = set()
    for panel in dashboard["panels"]:
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            names = set(re.findall(r"spts:\w+", re.sub(LABELS, "", target["expr"])))
            assert names, target["expr"]
            assert target["expr"].count("(") == target["expr"].count(")")
            asked |= names
    assert asked <= exposed
    # And the other way round: nothing is measured that nobody looks at.
    families = {name.removesuffix("_bucket") for name in exposed if not name.endswith(("_sum", "_count"))}
    assert {name.removesuffix("_bucket") for name in asked} == families
