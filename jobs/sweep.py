"""Methods × tasks × lengths over engines on a Ray cluster, with a report at the end.

    ray job submit --working-dir . -- \\
        python -m jobs.sweep --config jobs/configs/demo.yaml --out $PWD/results/demo

Every answer is on disk as soon as it is there: the same command again does only what is missing. Runs as well
without `ray job submit`; it then uses the cluster it finds, or one of its own.
"""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":

    def _interrupted(*_: object) -> None:
        print("interrupted: nothing was started", file=sys.stderr)
        sys.exit(130)

    signal.signal(signal.SIGINT, _interrupted)  # the imports below take seconds

import argparse
import asyncio
import secrets
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console

from cluster.protocol import EngineError
from jobs.disk import provenance
from jobs.disk.lines import DiskError
from jobs.disk.record import PlanWriter, check_schema, iterate_rows, locked
from jobs.options import interruptible
from jobs.sweeping import forecast
from jobs.sweeping.cells import ModelPlan, plan_models
from jobs.sweeping.progress import PromptProgress, SweepProgress, clock_time
from jobs.sweeping.prompts import PromptFile, Prompts
from jobs.sweeping.runner import EnginesLostError, Limits, Runner, Usage
from jobs.sweeping.spec import Sweep, load_sweep, output_folder
from jobs.sweeping.work import Fewer, Prepared, prepare
from spts.errors import SptsError


@interruptible("the same command again goes on from here")
def main(argv: list[str] | None = None) -> int:
    """Runs a sweep.

    Exit status: 0 done, 1 stopped early or nothing answered, 2 a fault in the request, 130 Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="python -m jobs.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="the sweep, a YAML file")
    parser.add_argument("--out", help="folder of the results; default: the configuration's output")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check the configuration, print the plan, run and write nothing",
    )
    parser.add_argument("--retry-failed", action="store_true", help="also run again what failed before")
    parser.add_argument("--commit", help="git commit of the code, where it runs from a copy without .git")
    options = parser.parse_args(argv)
    try:
        return _main(options)
    except SptsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (EngineError, EnginesLostError, DiskError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _main(options: argparse.Namespace) -> int:
    sweep = load_sweep(options.config)
    plans = plan_models(sweep)
    if options.dry_run:
        with (
            tempfile.TemporaryDirectory() as nowhere,
            PromptFile(Path(nowhere)) as file,
            _plan_file(Path(nowhere), sweep, plans) as plan_file,
        ):
            prepared, _ = _prepare(sweep, plans, file, plan_file)
        _say_costs(prepared, *forecast.measured_flops(sweep.engine))
        return 0
    folder = output_folder(sweep, options.out)
    with locked(folder):
        check_schema(folder)
        done = {
            row.key for row in iterate_rows(folder) if row.error is None or not options.retry_failed
        }  # fmt: skip
        with PromptFile(folder) as file, _plan_file(folder, sweep, plans) as plan_file:
            prepared, prompts = _prepare(sweep, plans, file, plan_file)
            _say_costs(prepared)
            start = _Start(
                sweep=sweep,
                folder=folder,
                file=file,
                plan_file=plan_file,
                prompts=prompts,
                commit=options.commit,
            )
            return _run_all(start, prepared, done)


def _plan_file(folder: Path, sweep: Sweep, plans: Sequence[ModelPlan]) -> PlanWriter:
    cells = [cell.record for plan in plans for cell in plan.cells]
    return PlanWriter(folder, name=sweep.name, cells=cells)


def _prepare(
    sweep: Sweep, plans: Sequence[ModelPlan], file: PromptFile, plan_file: PlanWriter
) -> tuple[list[Prepared], dict[str, Prompts]]:
    """All work of a sweep, and each model's tokenizer by the model's name."""
    started = time.perf_counter()
    _say(f"sweep {sweep.name}: making the prompts")
    prompts = {plan.name: Prompts(plan.folder) for plan in plans}
    progress = PromptProgress(sum(cell.count for plan in plans for cell in plan.cells))
    prepared: list[Prepared] = []
    fewer: dict[Fewer, None] = {}  # which samples fit depends on the tokenizer, so on the model
    try:
        for name in prompts:
            of_model, short = prepare(
                [plan for plan in plans if plan.name == name],
                prompts[name],
                file=file,
                plan_file=plan_file,
                on_prompt=progress.on_prompt,
            )
            prepared += of_model
            fewer |= dict.fromkeys(short)
    finally:
        progress.close()
    for less in fewer:
        _say(f"{less.task} at {less.length} tokens has {less.got} samples, {less.wanted} were asked for")
    num_samples = sum(one.num_samples for one in prepared)
    _say(f"{num_samples} samples in {clock_time(time.perf_counter() - started)}")
    return prepared, prompts


@dataclass(frozen=True, kw_only=True)
class _Start:
    """One start of a sweep: where it reads and writes. prompts: the tokenizers by the name of the model."""

    sweep: Sweep
    folder: Path
    file: PromptFile
    plan_file: PlanWriter
    prompts: Mapping[str, Prompts]
    commit: str | None


def _run_all(start: _Start, prepared: Sequence[Prepared], done: set[str]) -> int:
    left = [_left(one, done) for one in prepared]
    total = sum(one.num_samples for one in prepared)
    number = sum(one.num_samples for one in left)
    _say(f"results: {start.folder} ({total - number} of {total} samples there, {number} to do)")
    with _cluster(start.sweep, [one.plan for one in left if one.groups]):
        start.plan_file.commit()
        try:
            for one, whole in zip(left, prepared, strict=True):
                if one.groups:
                    asyncio.run(_run(start, one, already=whole.num_samples - one.num_samples))
        except (EngineError, EnginesLostError, KeyboardInterrupt):
            _report(start.folder)  # of what is there
            raise
        return 1 if _report(start.folder) == total else 0


def _left(prepared: Prepared, done: set[str]) -> Prepared:
    """What of the work is not done; a group keeps its prefix, so that its answers are computed the same
    way: what is reused of a prefix equals what would be computed but for rounding."""
    groups = []
    for group in prepared.groups:
        members = tuple(work for work in group.members if work.key not in done)
        if members:
            groups.append(replace(group, members=members))
    return Prepared(plan=prepared.plan, groups=groups, costs=prepared.costs)


def _report(folder: Path) -> int:
    """Writes the report of what is there, prints its table, and returns the number of failed samples."""
    from jobs.report import terminal, write_report
    from jobs.reporting.summary import load

    results = load(folder)
    if not results.done:
        return 0
    page = write_report(results)
    terminal(results, Console(width=None if sys.stdout.isatty() else 100))
    _say(f"report: {page}")
    return len(results.failed)


@contextmanager
def _cluster(sweep: Sweep, plans: Sequence[ModelPlan]) -> Iterator[None]:
    """A connection to Ray for as long as there are `plans` to run, seen to have room for their engines."""
    if not plans:
        yield
        return
    from jobs.engines import check_capacity, connected

    with connected():
        for plan in plans:
            check_capacity(plan.engine_config(sweep), sweep.engine.count)
        yield


async def _run(start: _Start, work: Prepared, *, already: int) -> None:
    """One model: its engines up, its work done, its engines down. already: samples done by earlier starts."""
    from jobs.engines import start_engines, stop_engines

    sweep, plan, folder = start.sweep, work.plan, start.folder
    _say(f"starting {sweep.engine.count} engine(s) with {plan.title}")
    config = plan.engine_config(sweep, prefix_bytes=work.prefix_bytes)
    engines, info = await start_engines(config, sweep.engine.count)
    try:
        run_id = secrets.token_hex(4)
        entry = provenance.collect(
            command=[Path(sys.executable).name, "-m", "jobs.sweep", *sys.argv[1:]],
            config=sweep.model_dump(mode="json"),
            commit=start.commit,
        )
        about = {"proxies": plan.proxies, "tokenizer": plan.tokenizer, "chat_template": plan.chat_template}
        provenance.append(folder, {"run": run_id, **entry, "engine": asdict(info), **about})
        progress = SweepProgress(
            labels=dict.fromkeys(cell.record.label for cell in plan.cells),
            total=already + work.num_samples,
            already=already,
            flops=sum(group.flops for group in work.groups),
            planned=lambda one: start.plan_file.sample(one.planned),
        )
        runner = Runner(
            folder=folder,
            run_id=run_id,
            limits=Limits(
                in_flight=sweep.engine.in_flight,
                timeout_s=sweep.sample_timeout_s,
                attempts=sweep.attempts,
            ),
            prompts=start.prompts[plan.name],
            file=start.file,
            on_row=progress.on_row,
        )
        try:
            await runner.run(work.groups, engines)
        finally:
            progress.close()
            _say_usage(runner.usage)
            provenance.finish(folder, run_id, runner.usage.to_dict())
    finally:
        await stop_engines(engines)


def _say_usage(usage: Usage) -> None:
    end = usage.to_dict()
    busy = ", ".join(f"{name} {100 * one['utilisation']:.1f}%" for name, one in end["engines"].items())
    _say(
        f"{usage.samples} samples in {clock_time(usage.wall_s)}: {end['samples_per_s']:.3g} samples/s, "
        f"{end['prompt_tokens_per_s']:.4g} prompt tokens/s; busy: {busy}"
    )


def _say_costs(
    prepared: Sequence[Prepared], flops_per_s: float | None = None, how: str | None = None
) -> None:
    """What the cost model expects, before anything is measured."""
    for one in prepared:
        _say(f"{one.plan.title}: predicted cost")
        for line in forecast.table(one, flops_per_s=flops_per_s):
            _say(f"  {line}")
    _say(forecast.total(prepared, flops_per_s=flops_per_s))
    if how is not None:
        _say(how)


def _say(line: str) -> None:
    print(line, flush=True)  # a job's output is a pipe: without flush nothing is seen until the end


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
