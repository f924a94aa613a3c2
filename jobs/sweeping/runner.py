"""Gets the answers: a queue of groups, engines that lease them one by one, rows on disk as soon as each is
there.

The driver only moves requests and rows; all compute is in the engines. Which method runs is part of a
request, so a loaded engine serves every cell of its model.

A group is leased whole. When its engine dies, errs or gives no sign, what is unanswered of it goes back to
the front of the queue. A sample counts as tried only when it was itself with the engine, and is alone with
the engine when it is tried again: so a sample that kills every engine ends as a row with its error, and no
other one with it.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cluster.protocol import EngineError, Request, Result
from jobs.disk.record import Row, RowWriter
from jobs.sweeping.prompts import PromptFile, Prompts
from jobs.sweeping.work import Group, Work

# Kinds of errors that say nothing of the sample: another try, perhaps on another engine, may succeed.
_ENGINE_FAULTS = ("unavailable", "overloaded", "internal")
# The engine keeps deadlines itself; this much later it is taken for one that does not answer at all.
_GRACE_S = 30.0
_SYNC_EVERY_S = 1.0


class SweepEngine(Protocol):
    """What the runner needs of an engine; `jobs.engines.RayEngine` for real, a fake in tests."""

    @property
    def name(self) -> str:
        """Names the engine's file of rows; unique in a sweep."""
        ...

    async def run(self, request: Request, until: Callable[[int], bool] | None = None) -> Result:
        """The whole answer; or up to and with the token for which `until`, given them one by one, is true.

        Raises EngineError and nothing else.
        """
        ...

    def forgive(self) -> None:
        """Told when a sample is given up: what it did to the engine does not count against the engine."""
        ...

    async def recover(self) -> bool:
        """After an engine's fault: waits until it serves again. False = it is gone for good."""
        ...


class EnginesLostError(RuntimeError):
    """No engine is left and work is; what is done is on disk, and the same command does the rest."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """in_flight: groups at a time per engine. timeout_s: per sample and try. attempts: tries per sample."""

    in_flight: int = 1
    timeout_s: float = 600.0
    attempts: int = 3


@dataclass(kw_only=True)
class Usage:
    """What a run took. wall_s: from its start to the last row. busy_s: per engine, seconds of these in which
    it had a request to answer. Tokens: of the answered samples."""

    wall_s: float = 0.0
    busy_s: dict[str, float] = field(default_factory=dict)
    samples: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The numbers as they go into provenance, with shares and rates."""
        wall = self.wall_s or 1.0
        return {
            "wall_s": round(self.wall_s, 3),
            "samples": self.samples,
            "failed": self.failed,
            "samples_per_s": round(self.samples / wall, 4),
            "prompt_tokens_per_s": round(self.prompt_tokens / wall, 2),
            "new_tokens_per_s": round(self.new_tokens / wall, 2),
            "engines": {
                name: {"busy_s": round(busy, 3), "utilisation": round(busy / wall, 4)}
                for name, busy in self.busy_s.items()
            },
        }


@dataclass(kw_only=True)
class _Lease:
    """A group on its way: what of it is unanswered, and how often each sample was tried."""

    group: Group
    left: deque[Work]
    tries: Counter[str] = field(default_factory=Counter)


class _Seat:
    """An engine and its file of rows, as its lanes share them."""

    def __init__(self, engine: SweepEngine, writer: RowWriter) -> None:
        self.engine = engine
        self.writer = writer
        self.busy_s = 0.0
        self._since = 0.0
        self._running = 0
        self._alone = False
        self._want_alone = 0
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def turn(self, *, alone: bool) -> AsyncIterator[None]:
        """Time with the engine, for several at once or for one alone; who wants it alone goes first."""
        async with self._changed:
            self._want_alone += alone
            try:
                await self._changed.wait_for(
                    lambda: not self._alone and not (self._running if alone else self._want_alone)
                )
            finally:
                self._want_alone -= alone
            if not self._running:
                self._since = time.perf_counter()
            self._running += 1
            self._alone = alone
        try:
            yield
        finally:
            async with self._changed:
                self._running -= 1
                self._alone = False
                if not self._running:
                    self.busy_s += time.perf_counter() - self._since
                self._changed.notify_all()


class Runner:
    """Runs groups over engines and appends rows to `folder`, one file per engine.

    prompts, file: the tokenizer and the token ids that the work was prepared with. run_id: written into every
    row. on_row: called with each row that was written, for progress.
    """

    def __init__(
        self,
        *,
        folder: Path,
        run_id: str,
        limits: Limits,
        prompts: Prompts,
        file: PromptFile,
        on_row: Callable[[Work, Row], None],
    ) -> None:
        self._folder = folder
        self._run_id = run_id
        self._limits = limits
        self._prompts = prompts
        self._file = file
        self._on_row = on_row
        self._queue: deque[_Lease] = deque()
        self._leased = 0
        self._changed = asyncio.Condition()
        self._numbers = itertools.count()
        self.usage = Usage()

    async def run(self, groups: Iterable[Group], engines: Sequence[SweepEngine]) -> None:
        """Returns when every sample has its row; `usage` says what it took, whatever happened.

        Raises EnginesLostError when no engine is left before that, DiskError when a row cannot be written.
        """
        self._queue.extend(_Lease(group=group, left=deque(group.members)) for group in groups)
        started = time.perf_counter()
        with ExitStack() as files:
            seats = [
                _Seat(engine, files.enter_context(RowWriter(self._folder, engine.name))) for engine in engines
            ]
            try:
                async with asyncio.TaskGroup() as tasks:
                    syncing = tasks.create_task(self._sync(seats))
                    async with asyncio.TaskGroup() as lanes:
                        for seat in seats:
                            for _ in range(self._limits.in_flight):
                                lanes.create_task(self._lane(seat))
                    syncing.cancel()
            except BaseExceptionGroup as several:
                raise _first(several) from None
            finally:
                self.usage.wall_s = time.perf_counter() - started
                self.usage.busy_s = {seat.engine.name: seat.busy_s for seat in seats}
        if self._queue:
            left = sum(len(lease.left) for lease in self._queue)
            raise EnginesLostError(
                f"engines must stay alive, got none left with {left} samples to do; "
                "run the same command again to do the rest"
            )

    async def _sync(self, seats: Sequence[_Seat]) -> None:
        """Takes rows to the disk in a thread of its own: a slow disk keeps no engine waiting."""
        while True:
            await asyncio.sleep(_SYNC_EVERY_S)
            for seat in seats:
                await asyncio.to_thread(seat.writer.sync)

    async def _lane(self, seat: _Seat) -> None:
        alive = True
        while alive and (lease := await self._take()) is not None:
            try:
                sound = await self._work_off(seat, lease)
            finally:
                await self._give_back(lease)
            if not sound:
                alive = await seat.engine.recover()

    async def _take(self) -> _Lease | None:
        """The next lease; waits while others may still give one back. None = all is done."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._queue or not self._leased)
            if not self._queue:
                return None
            self._leased += 1
            return self._queue.popleft()

    async def _give_back(self, lease: _Lease) -> None:
        async with self._changed:
            if lease.left:
                self._queue.appendleft(lease)
            self._leased -= 1
            self._changed.notify_all()

    async def _work_off(self, seat: _Seat, lease: _Lease) -> bool:
        """Answers what is left of a lease. False = the engine was at fault, and the rest is left as it is."""
        while lease.left:
            work = lease.left[0]
            async with seat.turn(alone=lease.tries[work.key] > 0):
                outcome = await self._answer(seat.engine, lease.group, work)
            lease.tries[work.key] += 1
            at_fault = isinstance(outcome, EngineError) and outcome.kind in _ENGINE_FAULTS
            if not at_fault or lease.tries[work.key] >= self._limits.attempts:
                self._write(seat, work, lease.tries.pop(work.key), outcome)
                lease.left.popleft()
                if at_fault:
                    seat.engine.forgive()
            if at_fault:
                return False
        return True

    async def _answer(self, engine: SweepEngine, group: Group, work: Work) -> Result | EngineError:
        token_ids = self._file.read(work.prompt, work.num_tokens + work.num_follow)
        task = work.cell.task
        stop = () if work.num_follow else task.stop
        request = Request(
            request_id=f"{work.key}-{next(self._numbers)}",
            token_ids=tuple(token_ids[: work.num_tokens]),
            method=work.cell.method,
            max_new_tokens=work.num_follow or task.max_new_tokens,
            sampling=self._prompts.sampling(stop),
            deadline_s=self._limits.timeout_s,
            prefix_tokens=group.prefix_tokens,
            follow=tuple(token_ids[work.num_tokens :]),
        )
        until = self._prompts.stopping(stop) if stop else None
        patience_s = self._limits.timeout_s + _GRACE_S
        try:
            return await asyncio.wait_for(engine.run(request, until), patience_s)
        except TimeoutError:
            return EngineError("unavailable", f"the engine gave no sign within {patience_s:g} s")
        except EngineError as error:
            return error

    def _write(self, seat: _Seat, work: Work, attempts: int, outcome: Result | EngineError) -> None:
        row = self._row(seat, work, attempts, outcome)
        try:
            seat.writer.write(row)
        except ValueError:  # JSON has no NaN and no infinity
            broken = EngineError("internal", "the engine gave a number that is not finite")
            row = self._row(seat, work, attempts, broken)
            seat.writer.write(row)
        self.usage.samples += 1
        self.usage.failed += row.error is not None
        self.usage.prompt_tokens += row.prompt_tokens or 0
        self.usage.new_tokens += len(row.token_ids or ())
        self._on_row(work, row)

    def _row(self, seat: _Seat, work: Work, attempts: int, outcome: Result | EngineError) -> Row:
        if isinstance(outcome, EngineError):
            measured: dict[str, Any] = {"error": str(outcome), "error_kind": outcome.kind}
        else:
            measured = self._measured(work, outcome)
        return Row(
            key=work.key,
            cell=work.cell.record.id,
            sample=work.sample,
            engine=seat.engine.name,
            run=self._run_id,
            attempts=attempts,
            finished_unix_s=round(time.time(), 3),
            **measured,
        )

    def _measured(self, work: Work, result: Result) -> dict[str, Any]:
        """The part of a row that an answered sample has."""
        agreement = None
        if result.agreement is not None:
            agreement = {
                "kl": [one.kl for one in result.agreement],
                "rank": [one.rank for one in result.agreement],
            }
        return {
            "prompt_tokens": result.prompt_tokens,
            "text": self._prompts.answer(result.token_ids, work.cell.task.stop),
            "token_ids": tuple(result.token_ids),
            "finish_reason": result.finish_reason,
            "queue_s": result.queue_s,
            "ttft_s": result.ttft_s,
            "decode_s": result.decode_s,
            "total_s": result.total_s,
            "flops": float(result.flops),
            "dense_flops": float(result.dense_flops),
            "reused_tokens": result.reused_tokens,
            "reused_flops": float(result.reused_flops),
            "peak_memory_bytes": result.peak_memory_bytes,
            "agreement": agreement,
            "kv_bytes": result.kv_bytes,
            "dense_kv_bytes": result.dense_kv_bytes,
        }


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error inside nested groups: task groups wrap one fault as many times as they are nested."""
    inner = group.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner
