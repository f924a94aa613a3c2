"""What a sweep costs beside its engines: the driver's memory over time, and the time engines wait for it.

    python -m jobs.overhead --samples 10000 --engines 2 --answer-ms 20

Everything is the real thing but the engines, which sleep for the time of an answer: prompts of the needle
tasks made with the demo model's tokenizer, plan, prompts, rows and syncs on disk, the queue, the progress. An
engine's time is the one it was told to sleep, so whatever the driver adds counts against it, late wake-ups
too. Prints the memory as it goes, then a summary; the last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.protocol import Request, Result
from jobs.disk.record import PlanWriter, read_rows
from jobs.sweeping.cells import plan_models
from jobs.sweeping.progress import SweepProgress
from jobs.sweeping.prompts import PromptFile, Prompts
from jobs.sweeping.runner import Limits, Runner
from jobs.sweeping.spec import Sweep
from jobs.sweeping.work import prepare
from spts.errors import ConfigError, config_error, require_int

_ANSWER_TOKENS = 8
_MEMORY_LINES = 12
_METHODS: tuple[dict[str, Any], ...] = (
    {"name": "dense"},
    {"name": "spts", "schedule": {"preset": "demo-12l", "scaled": True}},
)


class SleepingEngine:
    """Answers after `answer_s` seconds with tokens that mean nothing, and does no other work."""

    def __init__(self, name: str, answer_s: float) -> None:
        self.name = name
        self.answers = 0
        self._answer_s = answer_s
        self._tokens = random.Random(name)

    async def run(self, request: Request, until: Callable[[int], bool] | None = None) -> Result:
        """A made-up answer to any request."""
        await asyncio.sleep(self._answer_s)
        self.answers += 1
        return Result(
            request_id=request.request_id,
            token_ids=tuple(self._tokens.choices(range(100, 6000), k=_ANSWER_TOKENS)),
            finish_reason="length",
            prompt_tokens=len(request.token_ids),
            queue_s=0.0,
            ttft_s=self._answer_s,
            decode_s=0.0,
            total_s=self._answer_s,
            work=(),
            kv_tokens=0,
            kv_bytes=0,
            flops=1.0,
            dense_flops=1.0,
            dense_kv_bytes=1,
        )

    def forgive(self) -> None:
        """It never errs."""

    async def recover(self) -> bool:
        """Never needed."""
        return True


def memory_bytes() -> int:
    """Memory of this process that is in use now (resident set)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(*, samples: int, engines: int, answer_s: float, length: int, folder: Path) -> dict[str, Any]:
    """One sweep of `samples` answers; the numbers of the last line."""
    per_task = samples // (4 * len(_METHODS))
    sweep = Sweep.model_validate(
        {
            "name": "overhead",
            "model": "jobs/demo_model",
            "methods": _METHODS,
            "tasks": ["needle"],
            "lengths": [length],
            "samples": per_task,
            "output": str(folder),
        }
    )
    plans = plan_models(sweep)
    prompts = Prompts(plans[0].folder)
    cells = [cell.record for plan in plans for cell in plan.cells]
    with PromptFile(folder) as file, PlanWriter(folder, name=sweep.name, cells=cells) as plan_file:
        started = time.perf_counter()
        (work,), _ = prepare(plans, prompts, file=file, plan_file=plan_file)
        plan_file.commit()
        prepare_s = time.perf_counter() - started
        print(
            f"{work.num_samples} samples of up to {length} tokens prepared in {prepare_s:.1f} s", flush=True
        )
        progress = SweepProgress(
            labels=[method["name"] for method in _METHODS],
            total=work.num_samples,
            already=0,
            flops=sum(group.flops for group in work.groups),
            planned=lambda one: plan_file.sample(one.planned),
        )
        memory: list[tuple[float, int]] = []
        runner = Runner(
            folder=folder,
            run_id="overhead",
            limits=Limits(),
            prompts=prompts,
            file=file,
            on_row=progress.on_row,
        )

        async def watch() -> None:
            expected_s = work.num_samples * answer_s / engines
            begin = time.perf_counter()
            while True:
                memory.append((time.perf_counter() - begin, memory_bytes()))
                print(f"driver memory at {memory[-1][0]:5.0f} s: {memory[-1][1] / 2**20:.1f} MiB", flush=True)
                await asyncio.sleep(expected_s / _MEMORY_LINES)

        async def run() -> None:
            watching = asyncio.create_task(watch())
            await runner.run(work.groups, [SleepingEngine(f"engine-{i}", answer_s) for i in range(engines)])
            watching.cancel()
            memory.append((runner.usage.wall_s, memory_bytes()))

        cpu_s = time.process_time()
        asyncio.run(run())
        progress.close()
        cpu_s = time.process_time() - cpu_s
    assert len(read_rows(folder)) == work.num_samples, "every sample has its row"
    wall_s = runner.usage.wall_s
    early = memory[1][1]  # the first measurement is from before anything ran
    return {
        "samples": work.num_samples,
        "length_tokens": length,
        "engines": engines,
        "answer_ms": 1000 * answer_s,
        "prepare_s": round(prepare_s, 2),
        "wall_s": round(wall_s, 2),
        "driver_cpu_ms_per_sample": round(1000 * cpu_s / work.num_samples, 3),
        "outside_engines_share": round(1 - work.num_samples * answer_s / engines / wall_s, 4),
        "memory_first_mib": round(early / 2**20, 1),
        "memory_last_mib": round(memory[-1][1] / 2**20, 1),
        "memory_growth_bytes_per_sample": round((memory[-1][1] - early) / work.num_samples, 1),
    }


def main(argv: list[str] | None = None) -> int:
    """Command line; exit status 0, or 2 for options that cannot be."""
    parser = argparse.ArgumentParser(prog="python -m jobs.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=10_000, help="answers of the sweep (default: 10000)")
    parser.add_argument("--engines", type=int, default=2, help="engines (default: 2)")
    parser.add_argument("--answer-ms", type=float, default=20.0, help="an engine's time per answer")
    parser.add_argument("--length", type=int, default=256, help="tokens of a prompt (default: 256)")
    options = parser.parse_args(argv)
    least = 4 * len(_METHODS)  # a sample of each of the needle tasks
    try:
        require_int("samples", options.samples, minimum=least)
        require_int("engines", options.engines, minimum=1)
        require_int("length", options.length, minimum=1)
        if not options.answer_ms > 0:
            raise config_error("answer_ms", "be above 0", options.answer_ms, "give milliseconds")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{options.engines} engine(s) that answer in {options.answer_ms:g} ms; real queue, rows and prompts",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        found = measure(
            samples=options.samples,
            engines=options.engines,
            answer_s=options.answer_ms / 1000,
            length=options.length,
            folder=Path(folder),
        )
    print(
        f"{found['wall_s']:.1f} s of wall time, {100 * found['outside_engines_share']:.1f}% of it outside "
        f"the engines; {found['driver_cpu_ms_per_sample']:.2f} ms of the driver's CPU per sample; "
        f"memory {found['memory_first_mib']:.0f} -> {found['memory_last_mib']:.0f} MiB"
    )
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
