"""What replicas report, what a router makes of it, and an engine of several on a stub of Serve's handle."""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import ray
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import DeploymentUnavailableError

from cluster.balance import Balance
from cluster.config import EngineConfig
from cluster.protocol import Chunk, EngineError, EngineStats, Request
from cluster.replica_router import ReplicaRouter
from cluster.replicas import PlacedRequest, ServeEngine, queued_by_others, routing_stats, total
from spts.methods import Dense
from tests.cluster.conftest import REPOSITORY
from tests.fakes import info

# Ray's own models use what pydantic deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def request(request_id="r", num_tokens=10) -> Request:
    return Request(request_id=request_id, token_ids=(7,) * num_tokens, method=Dense(), max_new_tokens=2)


def test_a_replica_says_what_each_router_has_queued():
    queued = [request("one-a", 10), request("two-b", 20), request("one-c", 5), request("three-d", 3)]
    stats = routing_stats(ready=True, queued=queued)
    assert stats == {"ready": True, "queued": {"one": 15, "two": 20, "three": 3}}
    assert queued_by_others(stats, "one") == 23
    assert queued_by_others({}, "one") == 0, "it has just started"
    assert queued_by_others(routing_stats(ready=False, queued=[]), "one") is None


def test_a_replica_gets_the_request_alone():
    balance = Balance(affinity_tokens=0)
    sent = request()
    assert pickle.loads(pickle.dumps(PlacedRequest(sent, balance.open(sent.token_ids)))) == sent


def test_serves_copy_of_the_router_knows_this_processs_requests(tmp_path):
    """Serve takes the class apart and builds it again elsewhere; a class of its own module would differ."""
    config = RequestRouterConfig(request_router_class=ReplicaRouter)
    (tmp_path / "router").write_bytes(config.get_serialized_request_router_cls())
    script = """
import pickle, sys
copied = pickle.load(open(sys.argv[1], "rb"))
from cluster.replica_router import ReplicaRouter
from cluster.replicas import PlacedRequest
find = copied.choose_replicas.__globals__["_placement"]
print(copied is ReplicaRouter, find.__globals__["PlacedRequest"] is PlacedRequest)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "router")],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == "False True", done.stderr


def test_stats_are_summed():
    one = EngineStats(running=1, waiting=2, kv_bytes=3, kv_bytes_limit=10, queued_prefill_tokens=4)
    two = EngineStats(running=10, waiting=20, kv_bytes=30, kv_bytes_limit=100, queued_prefill_tokens=40)
    unknown = EngineStats(running=0, waiting=0, kv_bytes=0, kv_bytes_limit=None, queued_prefill_tokens=0)
    assert total([one, two]) == EngineStats(
        running=11, waiting=22, kv_bytes=33, kv_bytes_limit=110, queued_prefill_tokens=44
    )
    assert total([one, unknown]).kv_bytes_limit is None


class Stream:
    """Serve's answer to a streaming call: places the request at the first replica, then yields or raises as
    that one was told."""

    def __init__(self, placed: PlacedRequest, items: dict[str, list]) -> None:
        self.placed = placed
        self.cancelled = False
        self.replica = placed.placement.rank(dict.fromkeys(items, 0))[0]
        self.items = list(items[self.replica])

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not self.items:
            raise StopAsyncIteration
        item = self.items.pop(0)
        if isinstance(item, Exception):
            raise item
        return item

    def cancel(self) -> None:
        self.cancelled = True


class Asked:
    """One replica's method."""

    def __init__(self, answer) -> None:
        self._answer = answer

    async def remote(self):
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


HANGS = object()


class Handle:
    """Serve's handle to a deployment of the replicas a and b, or as many as there are answers, with given
    answers: the same of all, or by replica."""

    def __init__(self, items=(), broadcast=()) -> None:
        self._items = items if isinstance(items, dict) else {"a": items, "b": items}
        self._broadcast = broadcast
        self.generate = self
        self.info: Asked | None = None
        self.streams: list[Stream] = []

    @property
    def stream(self) -> Stream:
        return self.streams[-1]

    def options(self, **_):
        return self

    def remote(self, placed):
        self.streams.append(Stream(placed, self._items))
        return self.stream

    def broadcast(self, _method):
        if isinstance(self._broadcast, Exception):
            raise self._broadcast
        return self

    async def _fetch_replica_results_async(self):
        return [Reply(answer) for answer in self._broadcast]


class Reply:
    """What Serve has of one replica's answer; HANGS never comes."""

    def __init__(self, answer) -> None:
        self._answer = answer

    async def get_async(self):
        if self._answer is HANGS:
            await asyncio.Event().wait()
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


FIRST = Chunk(request_id="r", token_ids=(1,))


async def test_a_prompt_counts_until_its_first_token():
    balance = Balance(affinity_tokens=0)
    handle = Handle([FIRST, FIRST])
    stream = ServeEngine(handle, balance).generate(request())
    chunks = [await anext(stream)]
    assert balance._ahead == {}
    chunks += [chunk async for chunk in stream]
    assert chunks == [FIRST, FIRST]
    assert handle.stream.cancelled
    assert handle.stream.placed.request.request_id.partition("-")[0] == balance.router_id


async def test_tokens_to_follow_are_ahead_of_a_replica_too():
    balance = Balance(affinity_tokens=0)
    handle = Handle([FIRST])
    await anext(ServeEngine(handle, balance).generate(replace(request(), follow=(7,) * 600)))
    assert handle.stream.placed.placement.num_tokens == 609
    assert len(balance._readers) == 0, "of these nothing is kept"


async def test_a_second_try_has_an_id_of_its_own():
    handle = Handle([FIRST])
    engine = ServeEngine(handle, Balance(affinity_tokens=0))
    names = set()
    for _ in range(2):
        await anext(engine.generate(request()))
        names.add(handle.stream.placed.request.request_id)
    assert len(names) == 2


async def test_a_client_that_leaves_takes_its_prompt_with_it():
    balance = Balance(affinity_tokens=0)
    handle = Handle([FIRST])
    stream = ServeEngine(handle, balance).generate(request())
    await anext(stream)
    await stream.aclose()
    assert handle.stream.cancelled
    assert balance._ahead == {}


GONE = ray.exceptions.RayActorError()
RESTARTING = ray.exceptions.RayTaskError("generate", "", EngineError("unavailable", "its ranks start again"))
FULL = ray.exceptions.RayTaskError("generate", "", EngineError("overloaded", "one more than it takes"))
SMALL = ray.exceptions.RayTaskError("generate", "", EngineError("context_length_exceeded", "it never fits"))


@pytest.mark.parametrize("fault", [GONE, RESTARTING], ids=["gone", "restarting"])
async def test_a_replica_that_is_lost_is_avoided(fault):
    balance = Balance(affinity_tokens=2**15)
    with pytest.raises(EngineError) as raised:
        await anext(ServeEngine(Handle([fault]), balance).generate(request(num_tokens=600)))
    assert raised.value.kind == "unavailable"
    assert balance._ahead == {}
    again = balance.open((7,) * 600)
    assert again.rank({"a": 0, "b": 0})[0] == "b"


async def test_a_full_replica_passes_a_request_on_to_one_that_has_room():
    balance = Balance(affinity_tokens=2**15)
    handle = Handle({"a": [FULL], "b": [FULL], "c": [FIRST]})
    chunks = [chunk async for chunk in ServeEngine(handle, balance).generate(request(num_tokens=600))]
    assert chunks == [FIRST]
    assert [stream.replica for stream in handle.streams] == ["a", "b", "c"]
    assert len({stream.placed.request.request_id for stream in handle.streams}) == 3
    assert all(stream.cancelled for stream in handle.streams)
    assert balance._ahead == {}
    assert balance.open((7,) * 600).rank({"a": 0, "b": 0, "c": 0})[0] == "c", "it has read the prompt"


@pytest.mark.parametrize("replicas", ["a", "ab", "abc"])
async def test_when_all_replicas_are_full_each_was_asked_once(replicas):
    balance = Balance(affinity_tokens=0)
    handle = Handle({name: [FULL] for name in replicas})
    with pytest.raises(EngineError) as raised:
        await anext(ServeEngine(handle, balance).generate(request()))
    assert raised.value.kind == "overloaded"
    assert "".join(stream.replica for stream in handle.streams) == replicas
    assert balance._ahead == {}


async def test_a_request_that_a_replica_is_too_small_for_goes_on_to_a_larger_one():
    handle = Handle({"a": [SMALL], "b": [FIRST]})
    assert [each async for each in ServeEngine(handle, Balance(affinity_tokens=0)).generate(request())] == [
        FIRST
    ]
    assert [stream.replica for stream in handle.streams] == ["a", "b"]


@pytest.mark.parametrize(
    ("faults", "kind"),
    [
        ([SMALL, SMALL], "context_length_exceeded"),
        ([SMALL, FULL], "overloaded"),
        ([FULL, SMALL], "overloaded"),
        ([SMALL, GONE], "unavailable"),
    ],
)
async def test_only_when_all_replicas_are_too_small_it_never_fits(faults, kind):
    handle = Handle({name: [fault] for name, fault in zip("ab", faults, strict=True)})
    with pytest.raises(EngineError) as raised:
        await anext(ServeEngine(handle, Balance(affinity_tokens=0)).generate(request()))
    assert raised.value.kind == kind
    assert len(handle.streams) == 2


async def test_the_replica_with_most_memory_says_what_fits(monkeypatch):
    monkeypatch.setattr("cluster.replicas.REPLY_S", 0.05)
    balance = Balance(affinity_tokens=0)
    small, large = (info(EngineConfig(model="any", kv_cache_bytes=size)) for size in (2**20, 2**30))
    handle = Handle(broadcast=[small, GONE, large, HANGS, small])
    handle.info = Asked(small)
    assert await ServeEngine(handle, balance).info() == large
    handle = Handle(broadcast=[RESTARTING])
    handle.info = Asked(small)
    assert await ServeEngine(handle, balance).info() == small
    handle.info = Asked(RESTARTING)
    with pytest.raises(EngineError, match="its ranks start again"):
        await ServeEngine(handle, balance).info()


async def test_an_answer_that_has_begun_goes_nowhere_else():
    handle = Handle([FIRST, FULL])
    stream = ServeEngine(handle, Balance(affinity_tokens=0)).generate(request())
    await anext(stream)
    with pytest.raises(EngineError, match="overloaded"):
        await anext(stream)
    assert len(handle.streams) == 1


async def test_one_full_and_one_lost_is_for_the_caller_to_try_elsewhere():
    handle = Handle({"a": [FULL], "b": [GONE]})
    with pytest.raises(EngineError, match="unavailable"):
        await anext(ServeEngine(handle, Balance(affinity_tokens=0)).generate(request()))
    assert [stream.replica for stream in handle.streams] == ["a", "b"]


async def test_ready_is_any_stats_are_those_that_answer():
    stats = EngineStats(running=1, waiting=0, kv_bytes=0, kv_bytes_limit=None, queued_prefill_tokens=5)
    balance = Balance(affinity_tokens=0)
    assert await ServeEngine(Handle(broadcast=[False, GONE, True]), balance).ready()
    assert not await ServeEngine(Handle(broadcast=[False, GONE]), balance).ready()
    assert await ServeEngine(Handle(broadcast=[GONE, stats, stats]), balance).stats() == total([stats, stats])
    for nothing in ([GONE], DeploymentUnavailableError(None)):
        with pytest.raises(EngineError) as raised:
            await ServeEngine(Handle(broadcast=nothing), balance).stats()
        assert raised.value.kind == "unavailable"


async def test_a_replica_that_hangs_hides_no_other(monkeypatch, caplog):
    balance = Balance(affinity_tokens=0)
    stats = EngineStats(running=1, waiting=0, kv_bytes=0, kv_bytes_limit=None, queued_prefill_tokens=5)
    async with asyncio.timeout(60):  # a replica that hangs may take longer: nobody waits for it
        monkeypatch.setattr("cluster.replicas.REPLY_S", 600)
        assert await ServeEngine(Handle(broadcast=[HANGS, GONE, True]), balance).ready()
        monkeypatch.setattr("cluster.replicas.REPLY_S", 0.05)
        assert not await ServeEngine(Handle(broadcast=[HANGS, False]), balance).ready()
        assert await ServeEngine(Handle(broadcast=[HANGS, stats]), balance).stats() == stats
    assert "a replica did not answer stats: TimeoutError()" in caplog.text
    caplog.clear()
    assert await ServeEngine(Handle(broadcast=[RESTARTING, GONE, stats]), balance).stats() == stats
    assert caplog.text == "", "that is no fault of the code"
