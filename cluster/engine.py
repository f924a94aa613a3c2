"""An engine: one model on a group of ranks, answering many requests at once. The same class is a plain Ray
actor in a sweep (`start_engine`) and a Serve deployment behind the router.

The step loop has three verbs: schedule (scheduler.py decides), run (every rank does the same), postprocess
(tokens go out). Compute happens in the ranks' processes, so this one's event loop is always free.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any, Literal

from cluster import warm_up
from cluster.admission import check_context, check_request, demand
from cluster.config import EngineConfig
from cluster.documents import Documents
from cluster.flight import Flight
from cluster.group import Group, RayGroup, placement_name
from cluster.pace import Pace
from cluster.protocol import (
    Chunk,
    EngineError,
    EngineInfo,
    EngineStats,
    Request,
    Result,
    Step,
    StepOutput,
    too_late,
)
from cluster.scheduler import Scheduler
from spts.errors import SptsError
from spts.methods import Method

logger = logging.getLogger(__name__)

State = Literal["starting", "ready", "failed", "stopped"]

_SHUTTING_DOWN = "the engine is shutting down; retry later"


class Engine:
    """Owns a group of ranks: start, step loop, streams, deadlines, restart. `start` comes before everything
    else.

    config: validated. group: the ranks; None = Ray actors of `cluster.shard.Shard`. methods: of which one
    request as long as the context has to fit into memory, beside a dense one.
    """

    def __init__(
        self, config: EngineConfig, group: Group | None = None, methods: Sequence[Method] = ()
    ) -> None:
        self._config = config
        self._methods = tuple(methods)
        self._group: Group = RayGroup(config) if group is None else group
        self._state: State = "starting"
        self._info: EngineInfo | None = None
        self._scheduler: Scheduler | None = None
        self._flights: dict[str, Flight] = {}
        self._stepping: dict[str, Flight] = {}
        self._release: list[str] = []
        self._pace = Pace()
        self._latest = StepOutput()
        self._lost = False
        self._wake = asyncio.Event()
        self._step_loop: asyncio.Task[None] | None = None
        self._watch_task: asyncio.Task[None] | None = None
        self._start_lock = asyncio.Lock()
        self._step_began: float | None = None
        self._restarts = 0

    async def start(self) -> EngineInfo:
        """Load the model, answer a few requests, and begin to serve. Again: only the info.

        Raises SptsError for the user's faults (ConfigError, ModelError, ProxyError) and EngineError for the
        rest.
        """
        async with self._start_lock:
            if self._info is None:
                try:
                    await self._start_group()
                    self._step_loop = asyncio.create_task(self._run_steps())
                except BaseException:  # a start that was cancelled leaves ranks behind too
                    await self.shutdown()
                    raise
            assert self._info is not None
            return self._info

    async def info(self) -> EngineInfo:
        """What this engine runs. Raises EngineError "unavailable" before `start` has ended."""
        if self._info is None:
            raise EngineError("unavailable", "the engine is loading its model; retry later")
        return self._info

    async def run(self, request: Request) -> Result:
        """The whole answer at once. Raises EngineError."""
        async with aclosing(self.generate(request)) as chunks:
            async for chunk in chunks:
                if chunk.result is not None:
                    return chunk.result
        raise AssertionError("a stream ends with a result or raises")

    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """Stream the answer. Raises EngineError, also after the first chunk. Leaving the stream aborts the
        request."""
        flight = self._admit(request)
        try:
            while True:
                item = await flight.out.get()
                if isinstance(item, EngineError):  # one fault may end many streams: each raises its own
                    raise EngineError(item.kind, item.message, item.param)
                yield item
                if item.result is not None:
                    return
        finally:
            if self._flights.get(request.request_id) is flight:  # not another's, which has the id by now
                self._drop(request.request_id)

    async def finish(self, request_id: str) -> None:
        """End a request with the tokens that it has: its stream ends with the result. Unknown ids are
        ignored: it may have ended. Raises EngineError "invalid_request" before its first token: it goes
        on."""
        flight = self._flights.get(request_id)
        if flight is None:
            return
        if flight.prefilled is None:
            raise EngineError(
                "invalid_request",
                f"request_id must be of a request that has its first token, got {request_id!r}; wait for it",
                "request_id",
            )
        self._drop(request_id)
        flight.finish()

    async def check_health(self) -> None:
        """Raise EngineError unless this engine serves, or is about to. Serve replaces the replica when it
        raises."""
        if self._state in ("failed", "stopped"):
            raise EngineError("unavailable", f"the engine has {self._state}; replace it")
        # A rank that hangs is restarted after step_timeout_s; this long means that the loop itself hangs.
        if self._stalled_s > self._config.step_timeout_s + self._config.heartbeat_timeout_s:
            raise EngineError("unavailable", "the engine's step loop stands still; replace it")

    async def ready(self) -> bool:
        """Whether a request sent now would be computed: the ranks are there, and the step loop turns."""
        return self._state == "ready" and self._stalled_s <= self._config.heartbeat_timeout_s

    async def stats(self) -> EngineStats:
        """What is running and waiting now, and what it takes."""
        info, scheduler, flights = self._info, self._scheduler, self._flights.values()
        if info is None or scheduler is None:
            return EngineStats(running=0, waiting=0, kv_bytes=0, kv_bytes_limit=None, queued_prefill_tokens=0)
        return EngineStats(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            kv_bytes=sum(flight.kv_bytes for flight in flights),
            kv_bytes_limit=info.kv_bytes_limit * info.world_size,
            queued_prefill_tokens=sum(
                flight.request.num_read_tokens for flight in flights if flight.prefilled is None
            ),
            reserved_bytes=scheduler.reserved_bytes * info.world_size,
            document_bytes=scheduler.document_bytes * info.world_size,
            held_requests=self._latest.held_requests,
            held_documents=self._latest.held_documents,
            restarts=self._restarts,
        )

    async def shutdown(self) -> None:
        """End the ranks; requests in flight fail with "unavailable". The engine does not start again."""
        self._state = "stopped"
        for task in (self._step_loop, self._watch_task):
            if task is not None:
                task.cancel()
        self._fail_all(EngineError("unavailable", _SHUTTING_DOWN))
        await self._group.stop()
        self._group.close()

    # -- admission -------------------------------------------------------------------------------------------

    def _admit(self, request: Request) -> Flight:
        if self._state != "ready" or self._info is None or self._scheduler is None:
            raise EngineError("unavailable", f"the engine must be ready, got {self._state}; retry later")
        check_request(request, self._info)
        if request.request_id in self._flights:
            raise EngineError(
                "invalid_request",
                f"request_id must be unique, got {request.request_id!r} while it is in flight; choose "
                "another",
                "request_id",
            )
        asked = demand(request, self._info)
        try:
            self._scheduler.admit(asked)
        except EngineError as error:
            wait_s = self._pace.wait_s(self._scheduler.queued_flops) if error.kind == "overloaded" else None
            raise EngineError(error.kind, error.message, error.param, wait_s) from None
        flight = Flight(request=request, arrived=time.perf_counter(), flops=asked.flops)
        self._flights[request.request_id] = flight
        if request.deadline_s is not None:
            flight.timer = asyncio.get_running_loop().call_later(
                request.deadline_s, self._fail, request.request_id, too_late(request.deadline_s)
            )
        self._wake.set()
        return flight

    def _drop(self, request_id: str) -> Flight | None:
        """Forget a request and free its cache, wherever it is."""
        flight = self._flights.pop(request_id, None)
        if flight is not None:
            if flight.timer is not None:
                flight.timer.cancel()
            if self._scheduler is not None:
                self._scheduler.release(request_id)
            if flight.started:
                self._release.append(request_id)
                self._wake.set()
        return flight

    def _fail(self, request_id: str, error: EngineError) -> None:
        flight = self._drop(request_id)
        if flight is not None:
            flight.out.put_nowait(error)

    def _fail_all(self, error: EngineError) -> None:
        for request_id in list(self._flights):
            self._fail(request_id, error)

    # -- the step loop ---------------------------------------------------------------------------------------

    @property
    def _stalled_s(self) -> float:
        """Age of the step that runs now; 0 between steps and while the ranks start."""
        return 0.0 if self._step_began is None else time.perf_counter() - self._step_began

    async def _run_steps(self) -> None:
        try:
            while True:
                step = None if self._lost else self._schedule()
                if self._lost:
                    await self._restart(EngineError("unavailable", "a rank of the engine died; retry later"))
                elif step is None:
                    self._wake.clear()
                    await self._wake.wait()
                else:
                    self._step_began = time.perf_counter()
                    try:
                        output = await self._group.step(step)
                    except EngineError as error:
                        self._step_began = None
                        await self._restart(error)
                    else:
                        self._postprocess(output)
                    self._step_began = None
        except asyncio.CancelledError:
            raise
        except Exception as error:  # the loop is the engine: whatever ends it must end the requests too
            self._state = "failed"
            logger.exception("the engine has failed")
            message = (
                str(error) if isinstance(error, EngineError) else "the step loop failed; see the engine's log"
            )
            self._fail_all(EngineError("unavailable", message))

    def _schedule(self) -> Step | None:
        assert self._scheduler is not None
        plan = self._scheduler.schedule()
        release, self._release = tuple(self._release), []
        if plan is None:
            return Step(release=release) if release else None
        ids = plan.decode if plan.advance is None else (*plan.decode, plan.advance)
        self._stepping = {request_id: self._flights[request_id] for request_id in ids}
        decode = tuple((request_id, self._flights[request_id].token_ids[-1]) for request_id in plan.decode)
        assert self._info is not None
        step = Step(
            release=release,
            forget=plan.forget,
            advance=None if plan.advance is None else (plan.advance, self._info.slice_flops),
            decode=decode,
        )
        if plan.start is None:
            return step
        flight = self._flights[plan.start.request_id]
        flight.started = time.perf_counter()
        return replace(step, start=flight.request, reuse=plan.start.reuse, keep=plan.start.keep)

    def _postprocess(self, output: StepOutput) -> None:
        assert self._info is not None and self._scheduler is not None
        now = time.perf_counter()
        self._latest = output
        for request_id, error in output.refused:
            if self._in_step(request_id):
                self._fail(request_id, error)
        if output.kept is not None:  # also when its request has gone meanwhile
            self._scheduler.kept(output.kept)
        done = output.prefilled
        if done is not None and self._in_step(done.request_id):
            flight = self._flights[done.request_id]
            flight.prefilled = done
            self._scheduler.prefilled(done.request_id)
            self._pace.note(flight.flops - done.reused_flops, now - flight.started)
        if output.peak_memory_bytes is not None:
            for flight in self._stepping.values():
                flight.note_peak(output.peak_memory_bytes)
        for token in output.tokens:
            if self._in_step(token.request_id):
                chunk = self._flights[token.request_id].accept(token, self._info.eos_token_ids, now)
                if chunk.result is not None:
                    self._drop(token.request_id)

    def _in_step(self, request_id: str) -> bool:
        """Whether the request is still the one the step ran for: not aborted, nor its id used again,
        meanwhile."""
        flight = self._flights.get(request_id)
        return flight is not None and flight is self._stepping.get(request_id)

    # -- start and restart -----------------------------------------------------------------------------------

    async def _start_group(self) -> None:
        config = self._config
        info = await self._group.start()
        check_context(info, self._methods)
        self._latest = await warm_up.run(self._group, info, config.max_running)
        if self._state == "stopped":  # meanwhile, when there may have been no ranks to end yet
            raise EngineError("unavailable", _SHUTTING_DOWN)
        self._info = info
        self._scheduler = Scheduler(
            shape=info.shape,
            documents=Documents(min(config.prefix_cache_bytes, info.kv_bytes_limit)),
            kv_bytes_limit=info.kv_bytes_limit,
            slice_flops=info.slice_flops,
            max_running=config.max_running,
            max_waiting=config.max_waiting,
            max_waiting_tokens=config.max_waiting_tokens,
        )
        self._release, self._lost, self._state = [], False, "ready"
        self._watch_task = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        await self._group.wait_lost()
        self._lost = True
        self._wake.set()

    async def _restart(self, reason: EngineError) -> None:
        """Fail what is in flight, then start the ranks anew. Raises EngineError after `max_restarts` failed
        tries."""
        self._state = "starting"
        self._fail_all(reason)
        if self._watch_task is not None:
            self._watch_task.cancel()
        for attempt in range(1, self._config.max_restarts + 1):
            logger.warning("restarting the ranks (try %d): %s", attempt, reason)
            await self._group.stop()
            try:
                await self._start_group()
            except (EngineError, SptsError) as error:
                reason = error if isinstance(error, EngineError) else EngineError("unavailable", str(error))
            else:
                self._restarts += 1
                return
        raise EngineError("unavailable", f"the ranks did not start again: {reason.message}")


def start_engine(config: EngineConfig, *, name: str | None = None) -> Any:
    """Start an engine as a Ray actor and wait until it serves; returns its handle.

        engine = start_engine(EngineConfig(model="jobs/demo_model"))
        result = ray.get(engine.run.remote(request))
        stop_engine(engine)

    Raises SptsError for the user's faults and EngineError for the rest. Whatever ends the wait, Ctrl-C too,
    ends the engine.
    """
    import ray

    actor = ray.remote(num_cpus=0, max_concurrency=10_000)(Engine)
    engine = actor.options(name=name).remote(config)
    try:
        ray.get(engine.start.remote())
    except BaseException as error:  # of a Ctrl-C the actor hears nothing
        stop_engine(engine)
        if isinstance(error, ray.exceptions.RayTaskError) and isinstance(
            error.cause, SptsError | EngineError
        ):
            raise error.cause from None
        raise
    return engine


def stop_engine(engine: Any) -> None:
    """End an engine from `start_engine` and its ranks. An engine that is already dead is fine."""
    import ray

    try:
        ray.get(engine.shutdown.remote(), timeout=60)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        logger.info("the engine was gone before it was stopped")
    finally:  # also when the wait was ended by another Ctrl-C
        ray.kill(engine)
        # Unless the engine gave its place back itself.
        with suppress(ValueError):
            left = ray.util.get_placement_group(placement_name(engine._actor_id.hex()))
            ray.util.remove_placement_group(left)
