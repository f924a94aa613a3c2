"""Engines that measure schedules against the dense model.

An engine measures a whole schedule, all prompts one after the other: as many schedules are measured at a time
as there are engines, and each engine keeps the dense model's distributions of all prompts.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from cluster.protocol import EngineError, Request, Result
from jobs.sweeping.runner import EnginesLostError, SweepEngine
from spts.methods import Dense, Method, Spts
from spts.schedule import Schedule

_ATTEMPTS = 3
_TIMEOUT_S = 600.0
# Kinds of errors that say nothing of the schedule: another try, perhaps on another engine, may succeed.
_ENGINE_FAULTS = ("unavailable", "overloaded", "internal")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt to measure on.

    follow: the tokens after it at which distributions are compared; empty = the dense model's own answer,
    which is still to be asked for. max_new_tokens: its length, at most. kept: an engine keeps what is the
    same under every schedule, the layers before skipping starts, for the next schedule.
    """

    id: str
    task: str
    token_ids: tuple[int, ...]
    follow: tuple[int, ...]
    max_new_tokens: int
    kept: bool = False


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A schedule against the dense model, one number per prompt: the mean over its followed tokens.

    agreement: share of tokens whose most likely token is dense's, 0 to 1. kl: KL(dense || schedule), nats.
    """

    agreement: tuple[float, ...]
    kl: tuple[float, ...]

    @property
    def mean_agreement(self) -> float:
        """Mean over the prompts."""
        return sum(self.agreement) / len(self.agreement)

    @property
    def mean_kl(self) -> float:
        """Mean over the prompts."""
        return sum(self.kl) / len(self.kl)

    def joined(self, other: Measured) -> Measured:
        """The same schedule's on more prompts."""
        return Measured(agreement=self.agreement + other.agreement, kl=self.kl + other.kl)

    def in_words(self) -> str:
        """Both means, with their units."""
        return f"agreement {100 * self.mean_agreement:.1f} %, KL {self.mean_kl:.4f} nats"


@dataclass(kw_only=True)
class Pool:
    """Engines that measure schedules, each one at a time."""

    engines: Sequence[SweepEngine]
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    async def measure(
        self,
        schedules: Iterator[Schedule],
        prompts: Sequence[Prompt],
        done: Callable[[Schedule, Measured], None],
    ) -> None:
        """Pulls schedules as engines are free and calls `done` with each and what it gave.

        Raises EnginesLostError when all engines are gone before the last one is measured, EngineError when
        one refuses a prompt.
        """
        idle, waiting = list(self.engines), deque[Schedule]()
        running: dict[asyncio.Task[Measured | None], tuple[SweepEngine, Schedule]] = {}
        try:
            while True:
                while idle and (schedule := waiting.popleft() if waiting else next(schedules, None)):
                    engine = idle.pop(0)
                    task = asyncio.create_task(self._measure(engine, schedule, prompts))
                    running[task] = engine, schedule
                if not running:
                    break
                finished, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in finished:
                    engine, schedule = running.pop(task)
                    measured = task.result()
                    if measured is None:
                        waiting.append(schedule)
                    else:
                        idle.append(engine)
                        done(schedule, measured)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        if not idle:
            raise EnginesLostError(
                "engines must stay alive, got none left in the middle of the search; "
                "run the same command again to do the rest"
            )

    async def answered(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts, each that has nothing to follow with the dense model's own answer.

        Raises as `measure` does.
        """

        async def answer(prompt: Prompt, engine: SweepEngine) -> Prompt:
            result = await self._run(engine, prompt, Dense())
            if result is None:
                raise EnginesLostError(f"{engine.name} must stay alive, got lost; run the same command again")
            return replace(prompt, follow=tuple(result.token_ids))

        async def lane(number: int) -> dict[int, Prompt]:
            mine = range(number, len(prompts), len(self.engines))
            return {
                index: await answer(prompts[index], self.engines[number])
                for index in mine
                if not prompts[index].follow
            }

        lanes = await asyncio.gather(*(lane(number) for number in range(len(self.engines))))
        asked = {index: prompt for each in lanes for index, prompt in each.items()}
        return [asked.get(index, prompt) for index, prompt in enumerate(prompts)]

    async def _measure(
        self, engine: SweepEngine, schedule: Schedule, prompts: Sequence[Prompt]
    ) -> Measured | None:
        """None when the engine is gone."""
        agreement, kl = [], []
        for prompt in prompts:
            result = await self._run(engine, prompt, Spts(schedule=schedule))
            if result is None:
                return None
            assert result.agreement, "an engine compares every followed token"
            agreement.append(sum(each.rank == 1 for each in result.agreement) / len(result.agreement))
            kl.append(sum(each.kl for each in result.agreement) / len(result.agreement))
        return Measured(agreement=tuple(agreement), kl=tuple(kl))

    async def _run(self, engine: SweepEngine, prompt: Prompt, method: Method) -> Result | None:
        for attempt in itertools.count(1):
            request = Request(
                request_id=f"{prompt.id}-{next(self._numbers)}",
                token_ids=prompt.token_ids,
                method=method,
                max_new_tokens=len(prompt.follow) or prompt.max_new_tokens,
                follow=prompt.follow,
                # All but the last token: one has to be left. A dense prefill would keep all its layers.
                prefix_tokens=len(prompt.token_ids) - 1 if prompt.kept and prompt.follow else 0,
                deadline_s=_TIMEOUT_S,
            )
            try:
                return await engine.run(request)
            except EngineError as error:
                if error.kind not in _ENGINE_FAULTS or attempt == _ATTEMPTS:
                    raise
                if not await engine.recover():
                    return None
        raise AssertionError("the loop has no end")
