"""Gets the answers: a queue of work, engines that pull from it, rows on disk as soon as each is there.

The driver only moves requests and rows; all compute is in the engines. Which method runs is part of a
request, so a loaded engine serves every cell of its model.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cluster.protocol import EngineError, Request, Result
from jobs.record import Row, RowWriter
from jobs.work import Work
from spts.sampling import Sampling

# Kinds of errors that say nothing of the sample: another try, perhaps on another engine, may succeed.
_ENGINE_FAULTS = ("unavailable", "overloaded", "internal")


class SweepEngine(Protocol):
    """What the runner needs of an engine; `jobs.engines.RayEngine` for real, a fake in tests."""

    @property
    def name(self) -> str:
        """Names the engine's file of rows; unique in a sweep."""
        ...

    async def run(self, request: Request) -> Result:
        """The whole answer. Raises EngineError and nothing else."""
        ...

    async def recover(self) -> bool:
        """After an engine's fault: waits until it serves again. False = it is gone for good."""
        ...


class EnginesLostError(RuntimeError):
    """No engine is left and work is; what is done is on disk, and the same command does the rest."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """in_flight: prompts at a time per engine. timeout_s: per sample and try. attempts: tries per sample."""

    in_flight: int = 1
    timeout_s: float = 600.0
    attempts: int = 3


class Runner:
    """Runs work over engines and appends rows to `folder`, one file per engine.

    decode: from an answer's tokens to its text. run_id: written into every row. on_row: called after each row
    is on disk, for progress.
    """

    def __init__(
        self,
        *,
        folder: Path,
        run_id: str,
        limits: Limits,
        decode: Callable[[Iterable[int]], str],
        on_row: Callable[[Work, Row], None],
    ) -> None:
        self._folder = folder
        self._run_id = run_id
        self._limits = limits
        self._decode = decode
        self._on_row = on_row
        self._queue: deque[tuple[Work, int]] = deque()
        self._in_progress = 0
        self._changed = asyncio.Condition()
        self._numbers = itertools.count()

    async def run(self, work: Sequence[Work], engines: Sequence[SweepEngine]) -> None:
        """Returns when every piece of work has its row.

        Raises EnginesLostError when no engine is left before that, OSError when a row cannot be written.
        """
        self._queue.extend((one, 1) for one in work)
        try:
            async with asyncio.TaskGroup() as group:
                for engine in engines:
                    group.create_task(self._serve(engine))
        except BaseExceptionGroup as several:
            raise _first(several) from None
        if self._queue:
            raise EnginesLostError(
                f"engines must stay alive, got none left with {len(self._queue)} samples to do; "
                "run the same command again to do the rest"
            )

    async def _serve(self, engine: SweepEngine) -> None:
        with RowWriter(self._folder, engine.name) as writer:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._limits.in_flight):
                    group.create_task(self._lane(engine, writer))

    async def _lane(self, engine: SweepEngine, writer: RowWriter) -> None:
        while (taken := await self._take()) is not None:
            work, attempt = taken
            alive = True
            try:
                row = await self._answer(engine, work, attempt)
                if row is None:
                    self._queue.appendleft((work, attempt + 1))
                    alive = await engine.recover()
                else:
                    writer.write(row)
                    self._on_row(work, row)
            finally:
                await self._put_down()
            if not alive:
                return

    async def _take(self) -> tuple[Work, int] | None:
        """The next piece of work; waits while others may still give one back. None = all is done."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._queue or not self._in_progress)
            if not self._queue:
                return None
            self._in_progress += 1
            return self._queue.popleft()

    async def _put_down(self) -> None:
        async with self._changed:
            self._in_progress -= 1
            self._changed.notify_all()

    async def _answer(self, engine: SweepEngine, work: Work, attempt: int) -> Row | None:
        """The sample's row; None when the engine was at fault and the sample may be tried again."""
        request = Request(
            request_id=f"{work.planned.key}-{next(self._numbers)}",
            token_ids=work.token_ids,
            method=work.method,
            max_new_tokens=work.max_new_tokens,
            sampling=Sampling(),
            deadline_s=self._limits.timeout_s,
        )
        try:
            # The engine keeps the deadline itself; the second clock is for one that does not answer at all.
            result = await asyncio.wait_for(engine.run(request), self._limits.timeout_s + 30)
        except TimeoutError:
            fault = EngineError(
                "unavailable", f"the engine gave no sign within {self._limits.timeout_s + 30:g} s"
            )
        except EngineError as error:
            fault = error
        else:
            return self._row(engine, work, attempt, **self._measured(result))
        if fault.kind in _ENGINE_FAULTS and attempt < self._limits.attempts:
            return None
        return self._row(engine, work, attempt, error=str(fault))

    def _row(self, engine: SweepEngine, work: Work, attempt: int, **outcome: Any) -> Row:
        planned = work.planned
        return Row(
            key=planned.key,
            cell=planned.cell,
            sample=planned.sample,
            engine=engine.name,
            run=self._run_id,
            attempts=attempt,
            finished_unix_s=round(time.time(), 3),
            **outcome,
        )

    def _measured(self, result: Result) -> dict[str, Any]:
        """The part of a row that an answered sample has."""
        return {
            "prompt_tokens": result.prompt_tokens,
            "text": self._decode(result.token_ids),
            "token_ids": tuple(result.token_ids),
            "finish_reason": result.finish_reason,
            "queue_s": result.queue_s,
            "ttft_s": result.ttft_s,
            "decode_s": result.decode_s,
            "total_s": result.total_s,
            "flops": float(result.flops),
            "dense_flops": float(result.dense_flops),
            "kv_bytes": result.kv_bytes,
            "dense_kv_bytes": result.dense_kv_bytes,
        }


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error inside nested groups: task groups wrap one fault as many times as they are nested."""
    inner = group.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner
