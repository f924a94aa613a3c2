"""A sweep's work and its engines as the runner sees them, without a cluster: for every test of the queue."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.config import EngineConfig
from cluster.protocol import EngineError, Request, Result
from jobs.disk.record import PlanWriter, Row, read_rows
from jobs.engines import shortened
from jobs.sweeping.cells import ModelPlan, plan_models
from jobs.sweeping.prompts import PromptFile, Prompts
from jobs.sweeping.runner import Limits, Runner
from jobs.sweeping.spec import load_sweep
from jobs.sweeping.work import Group, Prepared, Work, prepare
from tests.fakes import FakeEngine

# Measured: by whom, when, and what of a shared context the engine still had at the time.
UNMEASURED = {"engine", "run", "attempts", "finished_unix_s", "queue_s", "ttft_s", "decode_s", "total_s",
              "reused_tokens", "reused_flops"}  # fmt: skip


class SweptEngine:
    """A FakeEngine as the runner sees it. `script`: errors to raise, one a request, None = answer.

    deaths_left: recoveries that work before the engine is gone for good. poison: prompts that kill it, and
    whatever else is on it at the time.
    """

    def __init__(
        self,
        name: str = "engine-0",
        *,
        script: Sequence[EngineError | None] = (),
        deaths_left: int = 99,
        step_s: float = 0.0,
        poison: Sequence[tuple[int, ...]] = (),
    ) -> None:
        self.name = name
        self.script = list(script)
        self.deaths_left = deaths_left
        self.poison = set(poison)
        self.requests: list[Request] = []
        self.in_flight = self.most_in_flight = self.forgiven = 0
        self._engine = FakeEngine(EngineConfig(model="fake"), step_s=step_s)
        self._killed = asyncio.Event()

    async def run(self, request: Request, until: Callable[[int], bool] | None = None) -> Result:
        await self._engine.start()
        self.requests.append(request)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            error = self.script.pop(0) if self.script else None
            if error is not None:
                raise error
            if self.poison:
                await self._or_die(request)
            return await self._answer(request, until)
        finally:
            self.in_flight -= 1

    async def _answer(self, request: Request, until: Callable[[int], bool] | None) -> Result:
        seen, end = 0, None
        async for chunk in self._engine.generate(request):
            for token_id in chunk.token_ids:
                seen += 1
                if until is not None and end is None and until(token_id):
                    end = seen
                    await self._engine.finish(request.request_id)
            if chunk.result is not None:
                return chunk.result if end is None else shortened(chunk.result, end)
        raise AssertionError("a stream ends with a result")

    async def _or_die(self, request: Request) -> None:
        if request.token_ids in self.poison:
            await asyncio.sleep(0.01)
            self._killed.set()
        try:
            await asyncio.wait_for(self._killed.wait(), 0.02)
        except TimeoutError:
            return
        raise EngineError("unavailable", "the engine died")

    def forgive(self) -> None:
        self.forgiven += 1

    async def recover(self) -> bool:
        self._killed.clear()
        self.deaths_left -= 1
        return self.deaths_left >= 0

    async def stop(self) -> None:
        await self._engine.shutdown()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """A sweep's work over one model, its prompts on disk."""

    plans: tuple[ModelPlan, ...]
    prepared: list[Prepared]
    groups: list[Group]
    prompts: Prompts
    file: PromptFile
    plan_file: PlanWriter

    @property
    def work(self) -> list[Work]:
        """All samples, in the order of the groups."""
        return [work for group in self.groups for work in group.members]

    def token_ids(self, work: Work) -> tuple[int, ...]:
        """The prompt of a sample."""
        return tuple(self.file.read(work.prompt, work.num_tokens))

    def left(self, folder: Path) -> list[Group]:
        """The groups without what `folder` has rows of."""
        done = read_rows(folder)
        rest = [
            dataclasses.replace(group, members=tuple(w for w in group.members if w.key not in done))
            for group in self.groups
        ]
        return [group for group in rest if group.members]


@contextmanager
def made(config: Path, folder: Path) -> Iterator[Made]:
    """The work of a configuration; `folder` gets the plan and the file of prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    plans = plan_models(load_sweep(config))
    cells = [cell.record for plan in plans for cell in plan.cells]
    prompts = Prompts(plans[0].folder)
    with PromptFile(folder) as file, PlanWriter(folder, name="x", cells=cells) as plan_file:
        prepared, _ = prepare(plans, prompts, file=file, plan_file=plan_file)
        plan_file.commit()
        groups = [group for one in prepared for group in one.groups]
        yield Made(
            plans=plans,
            prepared=prepared,
            groups=groups,
            prompts=prompts,
            file=file,
            plan_file=plan_file,
        )


def run(
    folder: Path,
    made: Made,
    engines: Sequence[SweptEngine],
    *,
    groups: Sequence[Group] | None = None,
    on_row: Callable[[Work, Row], None] = lambda work, row: None,
    **limits: Any,
) -> Runner:
    """Runs the work over the engines and stops them."""
    runner = Runner(
        folder=folder,
        run_id="r",
        limits=Limits(**limits),
        prompts=made.prompts,
        file=made.file,
        on_row=on_row,
    )

    async def all_of_it() -> None:
        try:
            await runner.run(made.groups if groups is None else groups, engines)
        finally:
            for engine in engines:
                await engine.stop()

    asyncio.run(all_of_it())
    return runner


def answers(folder: Path) -> dict[str, dict[str, Any]]:
    """What must not depend on when, where and in how many goes the rows came."""
    rows = {key: dataclasses.asdict(row) for key, row in read_rows(folder).items()}
    return {key: {k: v for k, v in row.items() if k not in UNMEASURED} for key, row in rows.items()}


def num_lines(folder: Path) -> int:
    """Rows on disk, doubled ones counted twice."""
    return sum(path.read_bytes().count(b"\n") for path in (folder / "rows").glob("*.jsonl"))
