"""Engines of a sweep as Ray actors: started side by side, brought back when they die, stopped at the end."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

from cluster import placement
from cluster.config import EngineConfig, resolve_path
from cluster.engine import start_engine, stop_engine
from cluster.protocol import EngineError, EngineInfo, Request, Result
from spts import loading
from spts.errors import ConfigError, SptsError

logger = logging.getLogger(__name__)

_POLL_S = 1.0
_SIGN_OF_LIFE_S = 30.0  # an actor that answers nothing for so long is dead, whatever its process does


@contextmanager
def connected() -> Iterator[None]:
    """A connection to Ray: the one that is there, else one of its own: to the cluster that the environment
    names (in a job: the job's), or to a new one on this machine."""
    if ray.is_initialized():
        yield
        return
    # Engines log to files of their own; in a job's output they would hide the progress.
    ray.init(logging_level=logging.WARNING, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


class RayEngine:
    """One engine actor, and a new one in its place if it dies. Use `start_engines`.

    Ray itself neither restarts the actor nor retries its calls (its default for actors): only the runner's
    leases do. weights: what it has to run (`EngineInfo.weights`), wherever it starts; None = anything.
    max_deaths: actors in a row that may die without an answer in between. max_failed_starts: actors in a row
    that may fail to start. After either the engine is given up.
    """

    def __init__(
        self,
        name: str,
        config: EngineConfig,
        *,
        weights: tuple[str, str | None] | None = None,
        max_deaths: int = 9,
        max_failed_starts: int = 3,
    ) -> None:
        self.name = name
        self._config = config
        self._weights = weights
        self._handle: Any = None
        self._max_deaths = max_deaths
        self._max_failed_starts = max_failed_starts
        self._deaths = 0
        self._recovering = asyncio.Lock()

    async def start(self) -> EngineInfo:
        """Loads the model. Raises SptsError or EngineError."""
        try:
            self._handle = await asyncio.to_thread(start_engine, self._config)
            info: EngineInfo = await self._handle.info.remote()
        except ray.exceptions.RayError as error:
            raise EngineError("unavailable", f"{self.name} died while it started: {_kind(error)}") from None
        if self._weights is not None:
            info.check_weights(self._weights)
        return info

    async def run(self, request: Request, until: Callable[[int], bool] | None = None) -> Result:
        """The whole answer, or up to the token for which `until` is true. Raises EngineError, whatever
        happened to the actor."""
        async with self._recovering:  # while another request mends the engine there is nobody to ask
            handle = self._handle
        if handle is None:
            raise EngineError("unavailable", f"{self.name} is gone")
        try:
            if until is None:
                result: Result = await handle.run.remote(request)
            else:
                result = await _stream(handle, request, until)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, EngineError):
                raise error.cause from None
            raise EngineError("internal", f"the engine raised {error.cause!r}") from None
        except ray.exceptions.RayError as error:
            raise EngineError("unavailable", f"the engine died: {_kind(error)}") from None
        self._deaths = 0
        return result

    def forgive(self) -> None:
        """The deaths so far were a sample's doing, and it has been given up: they do not count."""
        self._deaths = 0

    async def recover(self) -> bool:
        """Waits while the engine restarts its ranks, replaces a dead engine. False = no more tries."""
        async with self._recovering:  # several requests of one engine fail together: one of them mends it
            patience_s = self._config.start_timeout_s
            while self._handle is not None and patience_s > 0:
                try:
                    if await asyncio.wait_for(_call(self._handle.ready), _SIGN_OF_LIFE_S):
                        return True
                    await asyncio.wait_for(_call(self._handle.check_health), _SIGN_OF_LIFE_S)
                except (ray.exceptions.RayError, EngineError, TimeoutError) as death:
                    logger.warning("%s is dead (%s); starting another in its place", self.name, _kind(death))
                    break
                await asyncio.sleep(_POLL_S)
                patience_s -= _POLL_S
            return await self._replace()

    async def _replace(self) -> bool:
        self._deaths += 1
        if self._deaths > self._max_deaths:
            logger.warning("%s died %d times without an answer: given up", self.name, self._max_deaths)
            await self.stop()
            return False
        for _ in range(self._max_failed_starts):
            await self.stop()
            try:
                await self.start()
            except (EngineError, SptsError) as fault:
                logger.warning("%s did not start again: %s", self.name, fault)
            else:
                return True
        await self.stop()
        return False

    async def stop(self) -> None:
        """Ends the actor and its ranks."""
        handle, self._handle = self._handle, None
        if handle is not None:
            await asyncio.to_thread(stop_engine, handle)


async def _call(method: Any) -> Any:
    return await method.remote()


async def _stream(handle: Any, request: Request, until: Callable[[int], bool]) -> Result:
    """An answer that is ended at the token for which `until` is true."""
    seen, end = 0, None
    async for chunk_ref in handle.generate.options(num_returns="streaming").remote(request):
        chunk = await chunk_ref
        for token_id in chunk.token_ids:
            seen += 1
            if end is None and until(token_id):
                end = seen
                await handle.finish.remote(request.request_id)
        if chunk.result is not None:
            return chunk.result if end is None else shortened(chunk.result, end)
    raise EngineError("internal", "the engine's stream ended without a result")


def shortened(result: Result, num_tokens: int) -> Result:
    """`result` as it was after its first `num_tokens` tokens. An engine runs on until it is told to stop;
    the time of those tokens is taken off, each as long as the others."""
    steps = len(result.token_ids) - 1
    decode_s = result.decode_s * (num_tokens - 1) / steps if steps else 0.0
    return dataclasses.replace(
        result,
        token_ids=result.token_ids[:num_tokens],
        logprobs=None if result.logprobs is None else result.logprobs[:num_tokens],
        finish_reason="stop",
        decode_s=decode_s,
        total_s=result.total_s - result.decode_s + decode_s,
    )


def _kind(error: Exception) -> str:
    """Ray's errors carry pages of advice; the first line says what happened."""
    return (
        f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        if str(error)
        else type(error).__name__
    )


def check_capacity(config: EngineConfig, count: int) -> None:
    """Raises ConfigError if the cluster can never hold the engines, instead of waiting for room."""
    bundles = placement.bundles(
        world_size=config.tensor_parallel_size, device=config.device, num_threads=config.num_threads
    )
    try:
        placement.check_fits(count * bundles, ray.cluster_resources())
    except ConfigError as error:
        raise ConfigError(f"engine.count x {error}", field="engine") from None


async def start_engines(config: EngineConfig, count: int) -> tuple[list[RayEngine], EngineInfo]:
    """Starts `count` equal engines at once, of the weights that lie here. If one fails, stops them all and
    raises its error."""
    folder = loading.resolve(resolve_path(config.model))
    proxies = None if config.proxies is None else resolve_path(config.proxies)
    weights = loading.weights(folder, proxies)
    engines = [RayEngine(f"engine-{index}", config, weights=weights) for index in range(count)]
    started = await asyncio.gather(*(engine.start() for engine in engines), return_exceptions=True)
    for outcome in started:
        if isinstance(outcome, BaseException):
            await stop_engines(engines)
            raise outcome
    info = started[0]
    assert isinstance(info, EngineInfo)
    return engines, info


async def stop_engines(engines: list[RayEngine]) -> None:
    """Ends all engines."""
    await asyncio.gather(*(engine.stop() for engine in engines))
