"""Methods × tasks × lengths over engines on a Ray cluster, with a report at the end.

    ray job submit --working-dir . -- \\
        python -m jobs.sweep --config jobs/configs/demo.yaml --out $PWD/results/demo

Every answer is on disk as soon as it is there: the same command again does only what is missing. Runs as well
without `ray job submit`; it then uses the cluster it finds, or one of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from cluster.protocol import EngineError
from jobs import provenance
from jobs.cells import ModelPlan, plan_models
from jobs.progress import SweepProgress, clock_time
from jobs.record import Plan, locked, read_rows, write_plan
from jobs.report import terminal, write_report
from jobs.runner import EnginesLostError, Limits, Runner
from jobs.spec import Sweep, load_sweep, output_folder
from jobs.summary import load
from jobs.work import Prompts, Work, prepare
from spts.cost import dense_flops
from spts.errors import SptsError


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
    except (EngineError, EnginesLostError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command again goes on from here", file=sys.stderr)
        return 130


def _main(options: argparse.Namespace) -> int:
    sweep = load_sweep(options.config)
    plans = plan_models(sweep)
    started = time.perf_counter()
    _say(f"sweep {sweep.name}: making the prompts")
    prompts = {plan.name: Prompts(plan.folder) for plan in plans}
    work = {plan.name: prepare(plan, prompts[plan.name]) for plan in plans}
    _say(f"{sum(map(len, work.values()))} samples in {clock_time(time.perf_counter() - started)}")
    _say_costs(plans, work)
    if options.dry_run:
        return 0
    folder = output_folder(sweep, options.out)
    with locked(folder):
        rows = read_rows(folder)
        done = {key for key, row in rows.items() if row.error is None or not options.retry_failed}
        left = {plan.name: [one for one in work[plan.name] if one.planned.key not in done] for plan in plans}
        total, number = sum(map(len, work.values())), sum(map(len, left.values()))
        _say(f"results: {folder} ({total - number} of {total} samples there, {number} to do)")
        with _cluster(sweep, [plan for plan in plans if left[plan.name]]):
            _write_plan(folder, sweep, plans, work)
            try:
                for plan in plans:
                    if left[plan.name]:
                        already = len(work[plan.name]) - len(left[plan.name])
                        asyncio.run(
                            _run(sweep, plan, left[plan.name], already, prompts[plan.name], folder, options)
                        )
            finally:
                failed = _report(folder)
    return 1 if failed == total else 0


def _write_plan(
    folder: Path, sweep: Sweep, plans: Sequence[ModelPlan], work: Mapping[str, list[Work]]
) -> None:
    cells = tuple(cell.record for plan in plans for cell in plan.cells)
    samples = tuple(one.planned for plan in plans for one in work[plan.name])
    write_plan(folder, Plan(name=sweep.name, cells=cells, samples=samples))


def _report(folder: Path) -> int:
    """Writes the report of what is there, prints its table, and returns the number of failed samples."""
    results = load(folder)
    if not results.done:
        return 0
    page = write_report(folder)
    terminal(results, Console(width=None if sys.stdout.isatty() else 100))
    _say(f"report: {page}")
    return len(results.failed)


@contextmanager
def _cluster(sweep: Sweep, plans: Sequence[ModelPlan]) -> Iterator[None]:
    """A connection to Ray for as long as there are `plans` to run, seen to have room for their engines."""
    if not plans:
        yield
        return
    import ray

    from jobs.engines import check_capacity

    own = not ray.is_initialized()
    if own:
        # Engines log to files of their own; in a job's output they would hide the progress.
        ray.init(logging_level=logging.WARNING, log_to_driver=False)
    try:
        for plan in plans:
            check_capacity(plan.engine_config(sweep), sweep.engine.count)
        yield
    finally:
        if own:
            ray.shutdown()


async def _run(
    sweep: Sweep,
    plan: ModelPlan,
    work: list[Work],
    already: int,
    prompts: Prompts,
    folder: Path,
    options: argparse.Namespace,
) -> None:
    """One model: its engines up, its work done, its engines down."""
    from jobs.engines import start_engines, stop_engines

    _say(f"starting {sweep.engine.count} engine(s) with {plan.name}")
    engines, info = await start_engines(plan.engine_config(sweep), sweep.engine.count)
    progress = SweepProgress(work, already=already)
    try:
        run_id = secrets.token_hex(4)
        entry = provenance.collect(
            command=[Path(sys.executable).name, "-m", "jobs.sweep", *sys.argv[1:]],
            config=sweep.model_dump(mode="json"),
            commit=options.commit,
        )
        provenance.append(
            folder, {"run": run_id, **entry, "engine": asdict(info), "tokenizer": plan.tokenizer}
        )
        limits = Limits(
            in_flight=sweep.engine.in_flight, timeout_s=sweep.sample_timeout_s, attempts=sweep.attempts
        )
        runner = Runner(
            folder=folder, run_id=run_id, limits=limits, decode=prompts.decode, on_row=progress.on_row
        )
        await runner.run(work, engines)
    finally:
        progress.close()
        await stop_engines(engines)


def _say_costs(plans: tuple[ModelPlan, ...], work: dict[str, list[Work]]) -> None:
    """What the cost model expects, before anything is measured."""
    for plan in plans:
        _say(f"{plan.name}: predicted prefill FLOP, % of dense")
        groups: dict[tuple[str, int], list[Work]] = {}
        for one in work[plan.name]:
            groups.setdefault((one.cell.label, one.cell.length), []).append(one)
        lengths = sorted({length for _, length in groups})
        _say("  " + "".join(f"{length:>9}" for length in ["tokens", *lengths]))
        for label in dict.fromkeys(label for label, _ in groups):
            cells = []
            for length in lengths:
                group = groups[label, length]
                dense = sum(dense_flops(plan.shape, len(one.token_ids)).total for one in group)
                cells.append(f"{100 * sum(one.flops for one in group) / dense:8.1f}%")
            _say(f"  {label:>9}" + "".join(cells))


def _say(line: str) -> None:
    print(line, flush=True)  # a job's output is a pipe: without flush nothing is seen until the end


if __name__ == "__main__":
    sys.exit(main())
