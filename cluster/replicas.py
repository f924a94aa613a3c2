"""The replicas of an engine behind Serve: what each reports, and a handle that answers as one engine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import count
from typing import Any

import ray
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from cluster.balance import Balance, Placement
from cluster.protocol import Chunk, EngineError, EngineInfo, EngineStats, Request

logger = logging.getLogger(__name__)

# Seconds between two reports of a replica to all routers.
REPORT_PERIOD_S = 2.0
# Seconds that a replica may take to say how it is, less than `cluster.dispatch.ANSWER_S` for all of them.
REPLY_S = 3.0


class PlacedRequest:
    """A request on its way to a replica. In the router's process it has its placement with it; what a replica
    gets is the request alone."""

    def __init__(self, request: Request, placement: Placement) -> None:
        self.request = request
        self.placement = placement

    def __reduce__(self) -> tuple[Any, ...]:
        return replace, (self.request,)  # read back as what `dataclasses.replace` makes of it: the same again


def routing_stats(*, ready: bool, queued: Sequence[Request]) -> dict[str, Any]:
    """What a replica reports to every router. queued: the requests whose prefill has not ended."""
    tokens: dict[str, int] = {}
    for request in queued:
        router_id = request.request_id.partition("-")[0]
        tokens[router_id] = tokens.get(router_id, 0) + request.num_read_tokens
    return {"ready": ready, "queued": tokens}


def queued_by_others(stats: Mapping[str, Any], router_id: str) -> int | None:
    """The tokens that other routers than `router_id` have queued at a replica with these `routing_stats`;
    None when it is not ready. A replica that has not reported yet is new, and has nothing queued.

    >>> queued_by_others({"ready": True, "queued": {"a": 10, "b": 20, "c": 5}}, "a")
    25
    """
    if not stats.get("ready", True):
        return None
    return sum(tokens for other, tokens in stats.get("queued", {}).items() if other != router_id)


class ServeEngine:
    """`cluster.dispatch.EngineClient` over a handle to an engine's deployment, all its replicas as one."""

    def __init__(self, handle: DeploymentHandle, balance: Balance) -> None:
        self._handle = handle
        self._balance = balance
        self._sent = count()

    async def info(self) -> EngineInfo:
        """See `Engine.info`. Replicas may differ in their GPUs' memory: of those that answer, the one with
        most KV memory, as a request that others have no room for goes on to it."""
        with _engine_errors():
            first: EngineInfo = await self._handle.info.remote()  # waits until one is there
        answers = await asyncio.gather(*await self._everyone("info"))
        known = [first, *(answer for answer in answers if isinstance(answer, EngineInfo))]
        return max(known, key=lambda info: info.kv_bytes_limit)

    async def ready(self) -> bool:
        """See `Engine.ready`: whether any replica is."""
        for reply in asyncio.as_completed(await self._everyone("ready")):
            if await reply is True:
                return True  # nobody waits for a replica that hangs
        return False

    async def stats(self) -> EngineStats:
        """See `Engine.stats`: the sums over all replicas that answer."""
        answers = await asyncio.gather(*await self._everyone("stats"))
        known = [answer for answer in answers if isinstance(answer, EngineStats)]
        if not known:
            raise EngineError("unavailable", "the engine is not there; retry later")
        return total(known)

    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """See `Engine.generate`. Leaving the stream cancels it in the replica, which frees its cache. A
        replica that is full, or too small, passes the request on to one that may have room, each of them
        once."""
        placement = self._balance.open(request.token_ids, request.num_read_tokens)
        full: EngineError | None = None
        try:
            while True:
                # A second try may reach a replica that has yet to hear that the first one is over.
                request_id = f"{placement.router_id}-{request.request_id}-{next(self._sent)}"
                named = replace(request, request_id=request_id)
                chunks = self._handle.options(stream=True).generate.remote(PlacedRequest(named, placement))
                try:
                    with _engine_errors():
                        async for chunk in chunks:
                            placement.close()
                            yield chunk
                    return
                except EngineError as error:
                    if error.kind == "unavailable":
                        placement.fail()
                    # Placements count what is to be read; a replica may have its places taken by answers.
                    if error.kind not in ("overloaded", "context_length_exceeded"):
                        raise
                    if error.kind == "overloaded":
                        full = error
                    if not placement.refuse():
                        raise (full or error) from None  # who is full has room later, who is too small never
                finally:
                    chunks.cancel()
        finally:
            placement.close()

    async def _everyone(self, method: str) -> list[Coroutine[Any, Any, Any]]:
        """What each replica is going to answer; None if it does not."""
        with _engine_errors():
            # Serve's public `results_async` has one timeout for all of them: the slowest would hide the rest.
            results = await self._handle.broadcast(method)._fetch_replica_results_async()
        return [_reply(method, result) for result in results]


async def _reply(method: str, result: Any) -> Any:
    try:
        with _engine_errors():
            return await asyncio.wait_for(result.get_async(), REPLY_S)
    except EngineError:  # it has gone, or says so
        return None
    except Exception as error:
        logger.warning("a replica did not answer %s: %r", method, error)
        return None


def total(stats: Sequence[EngineStats]) -> EngineStats:
    """The sums, field by field; None where one does not know."""
    sums: dict[str, Any] = {}
    for field in fields(EngineStats):
        values = [getattr(each, field.name) for each in stats]
        sums[field.name] = None if None in values else sum(values)
    return EngineStats(**sums)


@contextmanager
def _engine_errors() -> Iterator[None]:
    """Serve's and Ray's failures as an engine's."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except (ray.exceptions.RayError, RayServeException) as error:
        raise EngineError("unavailable", "the engine is not there; retry later") from error
