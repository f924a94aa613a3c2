"""Engines of a sweep as Ray actors: started side by side, brought back when they die, stopped at the end."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import ray

from cluster import placement
from cluster.config import EngineConfig
from cluster.engine import start_engine, stop_engine
from cluster.protocol import EngineError, EngineInfo, Request, Result
from spts.errors import ConfigError, SptsError

logger = logging.getLogger(__name__)

_POLL_S = 1.0


class RayEngine:
    """One engine actor, and a new one in its place if it dies. Use `start_engines`."""

    def __init__(self, name: str, config: EngineConfig, *, max_replacements: int = 2) -> None:
        self.name = name
        self._config = config
        self._handle: Any = None
        self._replacements_left = max_replacements
        self._recovering = asyncio.Lock()

    async def start(self) -> EngineInfo:
        """Loads the model. Raises SptsError or EngineError."""
        try:
            self._handle = await asyncio.to_thread(start_engine, self._config)
            info: EngineInfo = await self._handle.info.remote()
        except ray.exceptions.RayError as error:
            raise EngineError("unavailable", f"{self.name} died while it started: {_kind(error)}") from None
        return info

    async def run(self, request: Request) -> Result:
        """The whole answer. Raises EngineError, whatever happened to the actor."""
        async with self._recovering:  # while another request mends the engine there is nobody to ask
            handle = self._handle
        if handle is None:
            raise EngineError("unavailable", f"{self.name} is gone")
        try:
            result: Result = await handle.run.remote(request)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, EngineError):
                raise error.cause from None
            raise EngineError("internal", f"the engine raised {error.cause!r}") from None
        except ray.exceptions.RayError as error:
            raise EngineError("unavailable", f"the engine died: {_kind(error)}") from None
        return result

    async def recover(self) -> bool:
        """Waits while the engine restarts its ranks, replaces a dead engine. False = no more tries."""
        async with self._recovering:  # several requests of one engine fail together: one of them mends it
            patience_s = self._config.start_timeout_s
            while self._handle is not None and patience_s > 0:
                try:
                    if await self._handle.ready.remote():
                        return True
                    await self._handle.check_health.remote()
                except (ray.exceptions.RayError, EngineError) as death:
                    logger.warning("%s is dead (%s); starting another in its place", self.name, _kind(death))
                    break
                await asyncio.sleep(_POLL_S)
                patience_s -= _POLL_S
            return await self._replace()

    async def _replace(self) -> bool:
        while self._replacements_left:
            self._replacements_left -= 1
            await self.stop()
            try:
                await self.start()
            except (EngineError, SptsError) as fault:
                logger.warning("%s did not start again: %s", self.name, fault)
            else:
                return True
        return False

    async def stop(self) -> None:
        """Ends the actor and its ranks."""
        handle, self._handle = self._handle, None
        if handle is not None:
            await asyncio.to_thread(stop_engine, handle)


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
    """Starts `count` equal engines at once. If one fails, stops them all and raises its error."""
    engines = [RayEngine(f"engine-{index}", config) for index in range(count)]
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
