"""Many streams at once against an endpoint that answers as it is told; what is refused before any load."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from cluster.local import free_ports
from jobs.load.__main__ import main
from jobs.load.asks import Asks, read_tokens
from jobs.load.drive import _turns, run
from jobs.load.record import Record
from jobs.load.settings import Settings, parse_lengths
from jobs.load.watch import gauges, memory_by_kind, server_process
from spts.errors import ConfigError

DEMO = str(Path(__file__).resolve().parents[2] / "jobs" / "demo_model")
SETTINGS = Settings(
    url="http://127.0.0.1:1",
    tokenizer=DEMO,
    lengths=((400, 0.5), (800, 0.5)),
    streams=4,
    requests=20,
    max_tokens=2,
)
METRICS = """# TYPE spts:kv_cache_bytes gauge
spts:kv_cache_bytes{engine="a"} 7.0
spts:kv_cache_bytes{engine="b"} 5.0
# TYPE python_info gauge
python_info 1.0
"""
Reply = tuple[int, dict[str, str], list[bytes]]


@pytest.fixture(scope="module")
def tokens():
    return read_tokens(DEMO)


@pytest.fixture(scope="module")
def asks(tokens):
    return Asks(SETTINGS, tokens, mark="test")


def event(data: Any) -> bytes:
    return b"data: " + (data if isinstance(data, str) else json.dumps(data)).encode() + b"\n\n"


def answer(text: str, usage: dict[str, Any]) -> list[bytes]:
    def chunk(part: str, reason: str | None) -> bytes:
        choice = {"index": 0, "text": part, "finish_reason": reason}
        return event({"id": "cmpl-1", "choices": [choice]})

    last = event({"id": "cmpl-1", "choices": [], "usage": usage})
    return [chunk(text[:2], None), chunk(text[2:], "length"), last, event("[DONE]")]


class Fake:
    """An endpoint. reply: gives status, headers and the parts of the body, by the number of the request."""

    def __init__(self, reply: Callable[[int, dict[str, Any]], Reply]) -> None:
        self.reply = reply
        self.bodies: list[dict[str, Any]] = []
        self.now = self.most = 0
        self.keys: set[str | None] = set()
        self.max_model_len: int | None = 1000

    async def answer(self, http: web.Request) -> web.StreamResponse:
        body = await http.json()
        number = len(self.bodies)
        self.bodies.append(body)
        self.keys.add(http.headers.get("Authorization"))
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            status, headers, parts = self.reply(number, body)
            kind = "text/event-stream" if status == 200 else "application/json"
            response = web.StreamResponse(status=status, headers={"Content-Type": kind, **headers})
            await response.prepare(http)
            for part in parts:
                if part == b"hang":
                    await asyncio.sleep(60)
                await response.write(part)
                await asyncio.sleep(0.002)
            return response
        finally:
            self.now -= 1

    async def models(self, http: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "tiny", "max_model_len": self.max_model_len}]})

    async def metrics(self, http: web.Request) -> web.Response:
        return web.Response(text=METRICS)

    def server(self) -> TestServer:
        app = web.Application()
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_post("/v1/completions", self.answer)
        return TestServer(app, host="127.0.0.1")


def well(number: int, body: dict[str, Any], text: str = "amber") -> Reply:
    method = {"method": "dense" if len(body["prompt"]) < 2000 else "spts"}
    usage = {
        "prompt_tokens": len(body["prompt"]) // 4,
        "completion_tokens": 2,
        "prompt_tokens_details": {"cached_tokens": 0},
        "spts": method,
    }
    return 200, {}, answer(text, usage)


def refused(message: str = "full") -> list[bytes]:
    error = {"message": message, "type": "server_error", "param": None, "code": "overloaded"}
    return [json.dumps({"error": error}).encode()]


async def drive(fake: Fake, asks: Asks, key: str | None = None, **changes: Any) -> tuple[Any, list[Record]]:
    seen: list[Record] = []
    async with fake.server() as server:
        settings = replace(SETTINGS, url=str(server.make_url("/")), **changes)
        return await run(settings, asks, key=key, start=lambda: seen.append), seen


async def test_so_many_requests_with_so_many_streams(asks):
    fake = Fake(well)
    done, seen = await drive(fake, asks, key="sk-1")
    assert [record.index for record in done.records] == list(range(20))
    assert sorted(seen, key=lambda record: record.index) == list(done.records)
    assert {record.outcome for record in done.records} == {"complete"}
    assert fake.most == 4
    assert fake.keys == {"Bearer sk-1"}
    assert len(fake.bodies) == 22, "one of each length is sent before"
    assert {record.method for record in done.records if record.length == 800} == {"spts"}
    for record in done.records:
        assert len(record.times_s) == 2
        assert 0 < record.times_s[0] < record.times_s[1] <= record.end_s
        assert record.sent_s + record.end_s <= done.wall_s
    assert done.moments[-1].gauges == {"kv_cache_bytes": 12.0}
    assert done.moments[-1].memory, "the server is this process"


async def test_each_stream_ends_as_what_it_was(asks):
    """Requests 2 to 7, after the two that try the endpoint; whatever fails, the others are answered."""
    cut = well(0, {"prompt": ""})[2][:2]
    said = {
        2: (503, {"Retry-After": "0"}, refused()),
        3: (503, {}, refused()),
        4: (408, {}, refused("too late")),
        5: (200, {}, cut),
        6: (200, {}, [cut[0], *(b"data: " + refused("lost")[0] + b"\n\n",)]),
        7: (500, {}, [b"Internal Server Error"]),
        8: (200, {"Content-Type": "application/json"}, [b"{}"]),
        9: (200, {}, [cut[0], b"hang"]),
    }
    fake = Fake(lambda number, body: said.get(number) or well(number, body))
    done, _ = await drive(fake, asks, timeout_s=2.0, streams=1)
    outcomes = [record.outcome for record in done.records]
    assert outcomes == [
        "refused", "fault", "error", "fault", "error", "fault", "fault", "fault", *["complete"] * 12,
    ]  # fmt: skip
    messages = [record.message or "" for record in done.records]
    assert "Retry-After" in messages[1]
    assert messages[2] == "408: too late (overloaded)"
    assert messages[4] == "lost (overloaded)"
    assert "within 2 s" in messages[7]
    assert done.records[3].times_s, "what came before the cut is kept"


async def test_answers_are_scored(asks):
    [right] = {asks.ask(0).sample.references}
    fake = Fake(lambda number, body: well(number, body, text=" and ".join(right)))
    done, _ = await drive(fake, asks, requests=1)
    assert done.records[0].score == 1.0
    done, _ = await drive(Fake(well), asks, requests=1)
    assert done.records[0].score == float("amber" in right)


async def test_no_request_begins_after_the_time(asks):
    done, _ = await drive(Fake(well), asks, requests=None, seconds=0.3)
    assert done.records
    assert all(record.sent_s < 0.3 for record in done.records)
    done, _ = await drive(Fake(well), asks, requests=10**6, seconds=0.3, rate=20.0)
    assert len(done.records) < 40


def test_arrivals_are_a_poisson_process():
    settings = replace(SETTINGS, rate=4.0, requests=4000)
    due = [due_s or 0.0 for _, due_s in _turns(settings)]
    between = [b - a for a, b in itertools.pairwise(due)]
    assert due == [due_s for _, due_s in _turns(settings)]
    assert statistics.mean(between) == pytest.approx(1 / 4, rel=0.1)
    assert statistics.stdev(between) == pytest.approx(1 / 4, rel=0.1), "exponential: as wide as its mean"
    assert {due_s for _, due_s in _turns(SETTINGS)} == {None}


def test_prompts_have_their_lengths_are_never_the_same_and_repeat_with_the_seed(asks, tokens):
    made = [asks.ask(index) for index in range(200)]
    again = Asks(SETTINGS, tokens, mark="test")
    assert [ask.prompt for ask in made] == [again.ask(index).prompt for index in range(200)]
    beginnings = {tuple(tokens.encode(ask.prompt)[:20]) for ask in made}
    assert len(beginnings) == 200, "nothing of a prompt can have been kept from another"
    for ask in made:
        assert ask.length - 60 < tokens.count(ask.prompt) <= ask.length
    assert 60 < sum(ask.length == 400 for ask in made) < 140
    assert len({ask.task.name for ask in made}) == 4


async def test_what_is_asked_for_is_in_the_body(asks):
    ask = asks.ask(0)
    body = ask.body(SETTINGS, "tiny")
    assert body["prompt"] == ask.prompt
    assert not {"ignore_eos", "spts"} & set(body), "other endpoints may not know these"
    body = ask.body(replace(SETTINGS, chat=True, ignore_eos=True, method="dense"), "tiny")
    assert body["messages"] == [{"role": "user", "content": ask.prompt}]
    assert (body["ignore_eos"], body["spts"]) == (True, {"method": "dense"})


async def test_nothing_is_loaded_that_cannot_be_answered(asks):
    """Each fault is one error, and no prompt was sent."""
    for changes, said in (
        ({"model": "gpt-4"}, "model must be one of tiny, got gpt-4"),
        ({"lengths": ((999, 1.0),)}, "room for 2 tokens in the context of 1000, got 999; use at most 998"),
    ):
        fake = Fake(well)
        with pytest.raises(ConfigError, match=said):
            await drive(fake, asks, **changes)
        assert not fake.bodies
    [port] = free_ports(1)
    with pytest.raises(ConfigError, match="url must be an OpenAI endpoint that answers"):
        await run(replace(SETTINGS, url=f"http://127.0.0.1:{port}"), asks, key=None, start=lambda: print)
    fake = Fake(lambda number, body: (503, {"Retry-After": "5"}, refused("loading")))
    with pytest.raises(ConfigError, match=r"one prompt of 400 tokens before a load, got refused: loading"):
        await drive(fake, asks)
    assert len(fake.bodies) == 1


async def test_an_endpoint_without_a_list_of_models_is_named(asks):
    async def models(http: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "no key"}}, status=401)

    fake = Fake(well)
    fake.models = models  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=r"got 401 from .*OPENAI_API_KEY"):
        await drive(fake, asks)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--lengths", "512:0.5,1024:0.4"], "lengths must have shares that sum to 1, got 0.9"),
        (["--lengths", "512:0.5,512:0.5"], "lengths must name each length once"),
        (["--lengths", "512:1.5,1024:-0.5"], "lengths must have shares above 0"),
        (["--lengths", "512:nan,1024:0.5"], "lengths must have shares above 0"),
        (["--lengths", "512,1024"], "lengths must be LENGTH:SHARE"),
        (["--lengths", "0:1"], "lengths must be"),
        (["--lengths", "64"], "length must leave room for the needles"),
        (["--streams", "0"], "streams must be from 1"),
        (["--seconds", "0"], "seconds must be a number above 0"),
        (["--rate", "nan"], "rate must be a number above 0"),
        (["--max-tokens", "0"], "max_tokens must be"),
        (["--tokenizer", "nowhere"], "tokenizer must be a folder with"),
        (["--set", "engines.default.dtype=x"], "set must only be given with serve"),
        (["--url", "127.0.0.1:8000"], "url must be http://"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_sent(argv, said, tmp_path, capsys):
    options = ["--url", "http://127.0.0.1:9", "--out", str(tmp_path), *argv]
    assert main(options) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_lengths_as_written():
    assert parse_lengths("512:0.6, 8192:0.4") == ((512, 0.6), (8192, 0.4))
    assert parse_lengths("2048") == ((2048, 1.0),)


def test_other_pages_have_no_gauges():
    assert gauges("<html>not found</html>") == {}
    assert gauges(METRICS) == {"kv_cache_bytes": 12.0}


async def test_the_process_behind_an_address_and_its_memory():
    async with Fake(well).server() as server:
        process = server_process(str(server.make_url("/")))
        assert process.pid == os.getpid()
        assert sum(memory_by_kind(process).values()) > 2**20
        assert server_process("http://192.0.2.1:80") is None
