"""The application that Serve deploys: a router in front of one deployment per engine. Deployments are named
here only.

    serve run ray_config.yaml       import_path: cluster.app:build, args: see cluster.config.AppConfig
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from cluster import placement
from cluster.config import AppConfig, EngineConfig, check_pools, parse
from cluster.engine import Engine
from cluster.keys import read_keys
from cluster.protocol import Chunk, EngineError, EngineInfo, EngineStats, Request
from cluster.router import Router

ROUTER = "Router"
# Requests that a replica may hold open. More than can come: the engine's own queue is what is bounded, and
# refuses with the right status, where Serve's would make requests wait in silence.
MAX_ONGOING = 10_000


# Seconds that a replica may take to end after the last request that it had.
GOODBYE_S = 30.0


class EngineDeployment(Engine):
    """An engine that is ready when its replica is."""

    async def __init__(self, config: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits constructors
        log_as_serve_does()
        super().__init__(EngineConfig.model_validate(config))
        await self.start()


class ServeEngine:
    """`cluster.dispatch.EngineClient` over a handle to an engine's deployment."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def info(self) -> EngineInfo:
        """See `Engine.info`."""
        return await _answer(self._handle.info.remote())

    async def ready(self) -> bool:
        """See `Engine.ready`."""
        return await _answer(self._handle.ready.remote())

    async def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        return await _answer(self._handle.stats.remote())

    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """See `Engine.generate`. Leaving the stream cancels it in the replica, which frees its cache."""
        chunks = self._handle.options(stream=True).generate.remote(request)
        try:
            while True:
                try:
                    yield await _answer(anext(chunks))
                except StopAsyncIteration:
                    return
        finally:
            chunks.cancel()


async def _answer(call: Any) -> Any:
    try:
        return await call
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except (ray.exceptions.RayError, RayServeException) as error:
        raise EngineError("unavailable", "the engine is not there; retry later") from error


def build(args: Mapping[str, Any]) -> serve.Application:
    """The application that `args` describe. Raises ConfigError naming the key that is wrong."""
    config = parse(dict(args), AppConfig, source="args")
    check_pools(config)
    read_keys(config)  # a missing file is said here, where it ends the deployment, not in the replica's log
    engines = {
        name: _engine_deployment(name, engine, drain_s=config.request_timeout_s).bind(engine.model_dump())
        for name, engine in config.engines.items()
    }
    return _router_deployment(config).bind(*engines.values())


def engine_name(name: str) -> str:
    """The deployment of the engine that the configuration calls `name`."""
    return f"Engine-{name}"


def log_as_serve_does() -> None:
    """Send what this package logs to Serve's own logger, with its level, its files and its encoding."""
    logging.getLogger("cluster").parent = logging.getLogger("ray.serve")


def _engine_deployment(name: str, config: EngineConfig, *, drain_s: float) -> serve.Deployment:
    return serve.deployment(
        EngineDeployment,
        name=engine_name(name),
        ray_actor_options={"num_cpus": 0},
        placement_group_bundles=placement.bundles(
            world_size=config.tensor_parallel_size, device=config.device, num_threads=config.num_threads
        ),
        placement_group_strategy=placement.strategy(device=config.device),
        max_ongoing_requests=MAX_ONGOING,
        max_constructor_retry_count=2,
        # A replica that is to end gets no new requests, and finishes those it has.
        graceful_shutdown_timeout_s=drain_s + GOODBYE_S,
    )


def _router_deployment(config: AppConfig) -> serve.Deployment:
    args = config.model_dump(mode="json")

    def asgi_app() -> ASGIApp:
        log_as_serve_does()
        engines = {
            name: ServeEngine(serve.get_deployment_handle(engine_name(name))) for name in args["engines"]
        }
        return Router(parse(args, AppConfig, source="args"), engines).app()

    return serve.deployment(
        serve.ingress(asgi_app)(),
        name=ROUTER,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=MAX_ONGOING,
        graceful_shutdown_timeout_s=config.request_timeout_s + GOODBYE_S,
    )
