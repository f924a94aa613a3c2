"""An engine of a sweep that dies while several requests are on it; the actors are stand-ins."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
import ray

import jobs.engines
from cluster.config import EngineConfig
from cluster.local import local_ray
from cluster.protocol import EngineError, Request
from jobs.engines import RayEngine, start_engines, stop_engines
from spts.methods import Dense, Method, Spts
from tests.cluster.tiny import SCHEDULE

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


async def test_an_engine_that_dies_again_and_again_is_given_up_but_an_answer_forgives(monkeypatch):
    """Each actor answers one request and then dies; without that answer, two deaths are the end."""
    answers_left = 0

    class Mortal(Actor):
        @property
        def run(self) -> Call:
            nonlocal answers_left
            answers_left -= 1
            return Call("answer" if answers_left >= 0 else ray.exceptions.RayActorError())

        @run.setter
        def run(self, call: Call) -> None: ...

    monkeypatch.setattr(jobs.engines, "start_engine", lambda config: Mortal("mortal", dead=True))
    monkeypatch.setattr(jobs.engines, "stop_engine", lambda handle: None)
    engine = RayEngine("engine-0", CONFIG, max_deaths=2)
    await engine.start()
    for _ in range(10):  # ten kills in one sweep
        answers_left = 1
        await engine.run(REQUEST)
        with pytest.raises(EngineError, match="the engine died"):
            await engine.run(REQUEST)
        assert await engine.recover()
    for _ in range(4):  # four samples that kill it, each of them given up after the second time
        engine.forgive()
        assert await engine.recover()
        assert await engine.recover()
    engine.forgive()
    assert await engine.recover()
    assert await engine.recover()
    assert not await engine.recover()


async def test_an_engine_that_cannot_start_again_is_given_up(monkeypatch):
    starts = iter([Actor("first", dead=True)])
    tried = []

    def start(config: EngineConfig) -> Actor:
        tried.append(config)
        try:
            return next(starts)
        except StopIteration:
            raise EngineError("unavailable", "no room for the ranks") from None

    monkeypatch.setattr(jobs.engines, "start_engine", start)
    monkeypatch.setattr(jobs.engines, "stop_engine", lambda handle: None)
    engine = RayEngine("engine-0", CONFIG, max_failed_starts=3)
    await engine.start()
    assert not await engine.recover()
    assert len(tried) == 1 + 3


async def test_an_actor_that_gives_no_sign_of_life_is_replaced(monkeypatch):
    class Hanging(Call):
        async def remote(self, *_: Any) -> Any:
            await asyncio.sleep(3600)

    def start(config: EngineConfig) -> Actor:
        actor = Actor("one", dead=False)
        if not started:
            actor.ready = Hanging(None)
        started.append(actor)
        return actor

    started: list[Actor] = []
    monkeypatch.setattr(jobs.engines, "start_engine", start)
    monkeypatch.setattr(jobs.engines, "stop_engine", lambda handle: None)
    monkeypatch.setattr(jobs.engines, "_SIGN_OF_LIFE_S", 0.02)
    engine = RayEngine("engine-0", CONFIG)
    await engine.start()
    assert await engine.recover()
    assert len(started) == 2


class Until:
    """True at a token; keeps what it was given."""

    def __init__(self, end: int) -> None:
        self.tokens: list[int] = []
        self._end = end

    def __call__(self, token_id: int) -> bool:
        self.tokens.append(token_id)
        return token_id == self._end


@pytest.mark.slow
@pytest.mark.real
def test_a_real_engine_stops_where_it_is_told_and_shares_what_prompts_begin_with(tiny_model, monkeypatch):
    prompts = [tuple(range(5, 295)) + tail for tail in ((7, 8, 9), (40, 41), (5,) * 9)]
    schedule = SCHEDULE.scaled(num_tokens=300, reference_tokens=400)

    def request(prompt: tuple[int, ...], method: Method, **more: Any) -> Request:
        name = f"{method.name}-{len(prompt)}-{len(more)}"
        return Request(request_id=name, token_ids=prompt, method=method, max_new_tokens=12, **more)

    async def all_of_it() -> None:
        engines, _ = await start_engines(EngineConfig(model=str(tiny_model)), 1)
        try:
            (engine,) = engines
            for method in (Dense(), Spts(schedule=schedule)):
                alone = [await engine.run(request(prompt, method)) for prompt in prompts]
                shared = [await engine.run(request(prompt, method, prefix_tokens=290)) for prompt in prompts]
                assert [one.token_ids for one in shared] == [one.token_ids for one in alone]
                assert [one.reused_tokens for one in shared] == [0, 290, 290]
                assert [one.reused_tokens for one in alone] == [0, 0, 0]

                end = alone[0].token_ids[4]
                seen = Until(end)
                stopped = await engine.run(request(prompts[0], method, deadline_s=60.0), seen)
                until = alone[0].token_ids.index(end) + 1
                assert stopped.token_ids == alone[0].token_ids[:until] == tuple(seen.tokens)
                assert stopped.finish_reason == "stop"
                assert stopped.flops == alone[0].flops
                assert 0 < stopped.ttft_s < stopped.total_s
        finally:
            await stop_engines(engines)

    with local_ray(num_cpus=2) as env, monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
            patch.setenv(name, env[name])
        ray.init(address=env["RAY_ADDRESS"], log_to_driver=False)
        try:
            asyncio.run(all_of_it())
        finally:
            ray.shutdown()
