"""The application that Serve deploys: a router in front of one deployment per engine, with its replicas.
Deployments are named here only.

    serve run ray_config.yaml       import_path: cluster.app:build, args: see cluster.config.AppConfig
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from starlette.types import ASGIApp

from cluster import placement
from cluster.admission import check_request
from cluster.autoscaling import QUEUED_PREFILL_TOKENS, QueuedPrefillPolicy
from cluster.balance import Balance
from cluster.config import AppConfig, EngineConfig, ServedEngineConfig, check_pools, parse_method
from cluster.engine import Engine
from cluster.keys import read_keys
from cluster.protocol import EngineError, Request
from cluster.replica_router import ReplicaRouter
from cluster.replicas import REPORT_PERIOD_S, ServeEngine, routing_stats
from cluster.router import Router
from cluster.strict import parse
from spts.errors import ConfigError

ROUTER = "Router"
# Requests that a replica may hold open. More than can come: the engine's own queue is what is bounded, and
# refuses with the right status, where Serve's would make requests wait in silence.
MAX_ONGOING = 10_000


# Seconds that a replica may take to end after the last request that it had.
GOODBYE_S = 30.0


class EngineDeployment(Engine):
    """An engine that is ready when its replica is. runs: what it has to be able to run, `methods` or not, by
    the keys of the configuration."""

    async def __init__(  # type: ignore[misc]  # Serve awaits constructors
        self, config: dict[str, Any], methods: list[dict[str, Any]], runs: dict[str, dict[str, Any]]
    ) -> None:
        log_as_serve_does()
        super().__init__(
            EngineConfig.model_validate(config), methods=[parse_method(method) for method in methods]
        )
        info = await self.start()
        for where, method in runs.items():  # of a hub id, only now is known what it can run
            shortest = Request(
                request_id=where, token_ids=(0,), method=parse_method(method), max_new_tokens=1
            )
            try:
                check_request(shortest, info)
            except EngineError as error:
                await self.shutdown()
                raise ConfigError(f"{where}: {error.message}", field=where) from None

    async def record_routing_stats(self) -> dict[str, Any]:
        """What `cluster.replica_router` is told; Serve asks."""
        queued = [flight.request for flight in self._flights.values() if flight.prefilled is None]
        return routing_stats(ready=await self.ready(), queued=queued)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `cluster.autoscaling` is told; Serve asks."""
        return {QUEUED_PREFILL_TOKENS: (await self.stats()).queued_prefill_tokens}


def build(args: Mapping[str, Any]) -> serve.Application:
    """The application that `args` describe. Raises ConfigError naming the key that is wrong."""
    config = parse(dict(args), AppConfig, source="args")
    check_pools(config)
    read_keys(config)  # a missing file is said here, where it ends the deployment, not in the replica's log
    engines = {
        name: _engine_deployment(name, engine, drain_s=config.request_timeout_s).bind(
            engine.model_dump(include=set(EngineConfig.model_fields)),
            # Pools of shorter prompts have no part in how long a prompt may be.
            [pool.method for pool in config.pools if pool.engine == name and pool.max_prompt_tokens is None],
            config.methods_on(name),
        )
        for name, engine in config.engines.items()
    }
    return _router_deployment(config).bind(*engines.values())


def engine_name(name: str) -> str:
    """The deployment of the engine that the configuration calls `name`."""
    return f"Engine-{name}"


def log_as_serve_does() -> None:
    """Send what this package logs to Serve's own logger, with its level, its files and its encoding."""
    logging.getLogger("cluster").parent = logging.getLogger("ray.serve")


def _engine_deployment(name: str, config: ServedEngineConfig, *, drain_s: float) -> serve.Deployment:
    return serve.deployment(
        EngineDeployment,
        name=engine_name(name),
        **_replicas(config),
        request_router_config=RequestRouterConfig(
            request_router_class=ReplicaRouter, request_routing_stats_period_s=REPORT_PERIOD_S
        ),
        ray_actor_options={"num_cpus": 0},
        placement_group_bundles=placement.bundles(
            world_size=config.tensor_parallel_size, device=config.device, num_threads=config.num_threads
        ),
        placement_group_strategy=placement.STRATEGY,
        max_ongoing_requests=MAX_ONGOING,
        max_constructor_retry_count=2,
        # A replica that is to end gets no new requests, and finishes those it has.
        graceful_shutdown_timeout_s=drain_s + GOODBYE_S,
    )


def _replicas(config: ServedEngineConfig) -> dict[str, Any]:
    """How many replicas, in the options of `serve.deployment`."""
    scaling = config.autoscaling
    if scaling is None:
        return {"num_replicas": config.replicas}
    policy = AutoscalingPolicy(
        policy_function=QueuedPrefillPolicy,
        policy_kwargs={"tokens_per_replica": scaling.queued_prefill_tokens},
    )
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=config.replicas,
            max_replicas=scaling.max_replicas,
            upscale_delay_s=scaling.upscale_delay_s,
            downscale_delay_s=scaling.downscale_delay_s,
            look_back_period_s=scaling.look_back_period_s,
            # How often replicas report: Serve's default for its default of the period, and in proportion.
            metrics_interval_s=scaling.look_back_period_s / 3,
            policy=policy,
        )
    }


def _router_deployment(config: AppConfig) -> serve.Deployment:
    args = config.model_dump(mode="json")

    def asgi_app() -> ASGIApp:
        log_as_serve_does()
        config = parse(args, AppConfig, source="args")
        engines = {
            name: ServeEngine(
                serve.get_deployment_handle(engine_name(name)),
                Balance(affinity_tokens=engine.affinity_tokens),
            )
            for name, engine in config.engines.items()
        }
        return Router(config, engines).app()

    return serve.deployment(
        serve.ingress(asgi_app)(),
        name=ROUTER,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=MAX_ONGOING,
        graceful_shutdown_timeout_s=config.request_timeout_s + GOODBYE_S,
    )
