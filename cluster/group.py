"""The ranks of one engine as Ray actors: placed, started, called together, watched, stopped."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster import placement
from cluster.config import EngineConfig
from cluster.protocol import EngineError, EngineInfo, Step, StepOutput
from cluster.shard import Shard
from spts.errors import SptsError

logger = logging.getLogger(__name__)

# After one rank fails, how long to wait for news that another one died: its peers may notice first, and then
# the death, not their broken collective, is the reason.
GRACE_S = 2.0


class Group(Protocol):
    """What an engine needs from its ranks; `RayGroup` for real, a fake in tests."""

    async def start(self) -> EngineInfo:
        """Load the model on every rank. Raises SptsError for the user's faults, EngineError "unavailable"."""

    async def step(self, step: Step) -> StepOutput:
        """Run `step` on every rank and return rank 0's answer. Raises EngineError: afterwards only `stop` is
        allowed.

        "unavailable": a rank died or hangs. "internal": a rank raised.
        """

    async def wait_lost(self) -> None:
        """Return when a rank has died, also while no step runs."""

    async def stop(self) -> None:
        """End every rank; `start` may follow. Allowed at any time, more than once."""

    def close(self) -> None:
        """Give back what outlives the ranks."""


class RayGroup:
    """`config.tensor_parallel_size` actors of `shard`, one per bundle of a placement group.

    Under Serve the replica's own placement group is used; elsewhere one is created, and goes with its
    creator.
    """

    def __init__(self, config: EngineConfig, shard: type[Shard] = Shard) -> None:
        self._config = config
        self._shard = shard
        self._ranks: list[Any] = []
        self._watches: list[asyncio.Future[None]] = []
        self._placement: PlacementGroup | None = None
        self._owns_placement = False

    async def start(self) -> EngineInfo:
        """Place and load the ranks; see `Group`."""
        config = self._config
        group = await self._place()
        resources = placement.rank_resources(device=config.device, num_threads=config.num_threads)
        actor = ray.remote(concurrency_groups={"watch": 1})(self._shard)
        self._ranks = [
            actor.options(
                num_cpus=resources["CPU"],
                num_gpus=resources.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=group, placement_group_bundle_index=rank
                ),
            ).remote(config, rank)
            for rank in range(config.tensor_parallel_size)
        ]
        self._watches = [asyncio.ensure_future(_until_dead(rank.watch.remote())) for rank in self._ranks]
        hosts = await self._together([rank.host.remote() for rank in self._ranks], config.start_timeout_s)
        meeting = self._ranks[0].meet.remote(placement.meeting_host(hosts))
        address = (await self._together([meeting], config.start_timeout_s))[0]
        infos = await self._together(
            [rank.load.remote(address) for rank in self._ranks], config.start_timeout_s
        )
        for info in infos:
            info.check_weights(infos[0].weights)
        # What one rank has no room for, none may begin.
        limit = min(info.kv_bytes_limit for info in infos)
        return replace(infos[0], kv_bytes_limit=limit, hosts=tuple(hosts))

    async def step(self, step: Step) -> StepOutput:
        """Call every rank; see `Group`."""
        calls = [rank.step.remote(step) for rank in self._ranks]
        try:
            answers = await self._together(calls, self._config.step_timeout_s)
        except SptsError as error:  # requests were checked: by now it is a bug of ours, not the user's fault
            raise EngineError("internal", f"a rank of the engine failed: {error}") from error
        return answers[0]

    async def wait_lost(self) -> None:
        """Return when a rank has died; see `Group`."""
        await asyncio.wait(self._watches, return_when=asyncio.FIRST_COMPLETED)

    async def stop(self) -> None:
        """Kill every rank and wait until they are gone; see `Group`."""
        ranks, self._ranks = self._ranks, []
        watches, self._watches = self._watches, []
        for rank in ranks:
            ray.kill(rank)
        if watches:  # a rank's memory and bundle are free only once it is gone
            await asyncio.wait(watches, timeout=30)

    def close(self) -> None:
        """Give back the placement group, if it is ours; see `Group`."""
        for rank in self._ranks:
            ray.kill(rank)
        if self._placement is not None and self._owns_placement:
            remove_placement_group(self._placement)
            self._placement = None

    async def _place(self) -> PlacementGroup:
        if self._placement is None:
            config = self._config
            self._placement = ray.util.get_current_placement_group()
            if self._placement is None:
                self._owns_placement = True
                bundles = placement.bundles(
                    world_size=config.tensor_parallel_size,
                    device=config.device,
                    num_threads=config.num_threads,
                )
                placement.check_fits(bundles, ray.cluster_resources())
                self._placement = placement_group(
                    bundles,
                    strategy=placement.STRATEGY,
                    name=placement_name(ray.get_runtime_context().get_actor_id()),
                )
            try:
                await asyncio.wait_for(_result(self._placement.ready()), config.start_timeout_s)
            except TimeoutError:
                raise EngineError(
                    "unavailable",
                    f"the cluster had no room for {self._placement.bundle_specs} within "
                    f"{config.start_timeout_s:g} s; end something else or add nodes",
                ) from None
        return self._placement

    async def _together(self, refs: Sequence[Any], timeout_s: float) -> list[Any]:
        """The results of one call on several ranks, or the reason why there are none."""
        calls = [asyncio.ensure_future(_result(ref)) for ref in refs]
        everyone = asyncio.gather(*calls)
        news: list[asyncio.Future[Any]] = [everyone, *self._watches]
        try:
            done, _ = await asyncio.wait(news, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if everyone in done and everyone.exception() is None:
                return everyone.result()
            if not done:
                raise EngineError("unavailable", f"a rank did not answer within {timeout_s:g} s; retry later")
            fault = everyone.exception() if everyone in done else None
            cause = getattr(fault, "cause", fault)
            if isinstance(cause, SptsError):
                raise cause
            if not any(watch.done() for watch in self._watches):
                await asyncio.wait(self._watches, timeout=GRACE_S, return_when=asyncio.FIRST_COMPLETED)
            if any(watch.done() for watch in self._watches) or isinstance(
                fault, ray.exceptions.RayActorError
            ):
                raise EngineError("unavailable", "a rank of the engine died; retry later")
            logger.error("a rank failed", exc_info=fault)
            raise EngineError("internal", "a rank of the engine failed; see the engine's log")
        finally:
            for call in calls:  # a rank that hangs must not hold its engine
                call.cancel()
            await asyncio.gather(everyone, *calls, return_exceptions=True)


def placement_name(actor_id: str | None) -> str:
    """Name of the placement group that an engine actor creates. Ray keeps it when the actor is killed, until
    the job ends; by this name whoever replaces the actor can give it back."""
    return "" if actor_id is None else f"ranks-of-{actor_id}"


async def _result(ref: Any) -> Any:
    return await ref


async def _until_dead(watch: Any) -> None:
    """Return when the actor behind `watch`, a call that never ends, is gone."""
    try:
        await watch
    except ray.exceptions.RayError as death:
        logger.info("a rank is gone: %s", type(death).__name__)
