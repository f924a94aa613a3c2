"""An engine of a sweep that dies while several requests are on it; the actors are stand-ins."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import ray

import jobs.engines
from cluster.config import EngineConfig
from cluster.protocol import EngineError, Request
from jobs.engines import RayEngine
from spts.methods import Dense

CONFIG = EngineConfig(model="fake")
REQUEST = Request(request_id="a", token_ids=(1,), method=Dense(), max_new_tokens=1)


class Call:
    """An actor's method: `call.remote(...)` can be awaited."""

    def __init__(self, outcome: Any) -> None:
        self._outcome = outcome

    async def remote(self, *_: Any) -> Any:
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


class Actor:
    """An engine's handle; a dead one answers nothing."""

    def __init__(self, name: str, *, dead: bool) -> None:
        death = ray.exceptions.RayActorError()
        self.info = Call(name)
        self.run = Call(death if dead else f"answer of {name}")
        self.ready = Call(death if dead else True)


@pytest.fixture
def may_start(monkeypatch) -> threading.Event:
    """Engines start one after the other: the first is dead at once, the next starts when this is set."""
    gate = threading.Event()
    gate.set()
    names = iter(["first", "second"])

    def start(config: EngineConfig) -> Actor:
        assert gate.wait(10)
        name = next(names)
        return Actor(name, dead=name == "first")

    monkeypatch.setattr(jobs.engines, "start_engine", start)
    monkeypatch.setattr(jobs.engines, "stop_engine", lambda handle: None)
    return gate


async def test_a_request_waits_while_another_one_mends_its_engine(may_start):
    engine = RayEngine("engine-0", CONFIG)
    await engine.start()
    with pytest.raises(EngineError, match="the engine died") as died:
        await engine.run(REQUEST)
    assert died.value.kind == "unavailable"
    may_start.clear()
    mended = asyncio.create_task(engine.recover())
    await asyncio.sleep(0.05)
    late = asyncio.create_task(engine.run(REQUEST))
    await asyncio.sleep(0.05)
    assert not late.done()
    may_start.set()
    assert await mended
    answer: Any = await late
    assert answer == "answer of second"


async def test_an_engine_that_is_gone_for_good_says_so(may_start):
    engine = RayEngine("engine-0", CONFIG, max_deaths=0)
    await engine.start()
    assert not await engine.recover()
    await engine.stop()
    with pytest.raises(EngineError, match="engine-0 is gone") as gone:
        await engine.run(REQUEST)
    assert gone.value.kind == "unavailable"
    assert not await engine.recover()
