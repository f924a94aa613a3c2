"""Finds the schedule that agrees best with the dense model at a given cost, by a parallel search on Ray.

    python -m jobs.tune --model jobs/demo_model --target-speedup 2.5 --task needle --out results/tune
    python -m jobs.tune --model MODEL --max-drop 1.0 --texts FILES… --out results/tune

It measures on windows of text, or along the dense model's own answers to a task's questions. Cost is counted
in FLOP, which budgets fix before a prompt runs; the paper's measured speed-up is 95 % of that. Writes
schedule.yaml, the schedule found, and trials.jsonl, every measurement, into --out. The same command again
goes on where it was.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from cluster.config import EngineConfig
from cluster.protocol import EngineError
from jobs.disk.lines import DiskError
from jobs.disk.record import content_hash, locked, write_file
from jobs.options import describe_schedule, interruptible
from jobs.sweeping.progress import clock_time
from jobs.sweeping.runner import EnginesLostError
from jobs.tuning.findings import Contest, front_table, preset_file
from jobs.tuning.inputs import Model, Samples, check_numbers, engine_config, parser, results_folder
from jobs.tuning.pool import Measured, Pool
from jobs.tuning.search import Candidate, Goal, Search, TrialLog, front, measure_missing
from jobs.tuning.space import CostModel, Space
from spts.errors import SptsError
from spts.schedule import PRESETS, Schedule

BASELINE = "llama-3.1-8b"
# So many of the best are measured on more samples: the very best of a search is partly luck.
_FINALISTS = 8
# Other costs, as shares of the target, for which the schedule found is measured too: the front.
_OTHER_COSTS = (0.5, 0.7, 0.85, 1.05, 1.1, 1.15)


@interruptible("the same command again goes on from here")
def main(argv: Sequence[str] | None = None) -> int:
    """Runs a search.

    Exit status: 0 done, 1 stopped early or nothing keeps --max-drop, 2 a fault in the request, 130 Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = parser(__doc__).parse_args(argv)
    try:
        return tune(args, command=shlex.join(["python", "-m", "jobs.tune", *argv]))
    except SptsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (EngineError, EnginesLostError, DiskError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def tune(args: argparse.Namespace, *, command: str) -> int:
    """The whole job; its exit status. What can be refused is refused before Ray starts."""
    check_numbers(args)
    model = Model.read(args.model, args.proxies)
    costs = CostModel(shape=model.shape, proxy=model.proxy, num_tokens=args.length)
    space = Space(costs=costs, first_layer=model.first_layer, target=args.target_speedup)
    samples = Samples.draw(args, model)
    config = engine_config(args, model, samples)
    folder = results_folder(args.out)
    _say(
        f"model      {args.model}: {model.shape.num_layers} layers, {args.dtype} on {args.device}; "
        f"skipping can start at layer {model.first_layer}, the first one with a proxy"
    )
    _say(
        f"goal       {_goal(args)}, at {args.length} tokens; "
        f"the limit there is {costs.limit(model.first_layer):.2f}x"
    )
    _say(
        f"search     {args.trials} schedules on {len(samples.calibration)} samples of "
        f"{', '.join(args.task)}; then the best {_FINALISTS} on {len(samples.selection)} others, and one of "
        f"them against {BASELINE} on {len(samples.held_out)} more"
    )
    identity = {
        "model": model.fingerprint,
        "proxies": model.proxies_sha256,
        "engine": [args.dtype, args.device, args.tensor_parallel_size, args.threads],
        "seed": args.seed,
        "samples": content_hash(asdict(samples)),
        "length": args.length,
        "target_speedup": args.target_speedup,
        "max_drop": args.max_drop,
    }
    with locked(folder):
        log = TrialLog(folder / "trials.jsonl", content_hash(identity))
        presets = [
            Schedule.preset(name, num_layers=model.shape.num_layers, num_tokens=args.length)
            for name in PRESETS
        ]
        search = Search(
            space,
            Goal(max_drop=None if args.max_drop is None else args.max_drop / 100),
            log,
            num_trials=args.trials,
            seed=args.seed,
            starts=[preset for preset in presets if preset.stages],
        )
        with _cluster(config, args.engines):
            kept = samples.kept(config, model)
            outcome = asyncio.run(_run(search, log, config, args.engines, kept))
        return _conclude(args, search, outcome, folder=folder, command=command)


def _goal(args: argparse.Namespace) -> str:
    if args.max_drop is None:
        return f"the best agreement at {args.target_speedup:g}x fewer FLOP than dense"
    return f"the fewest FLOP with at most {args.max_drop:g} points of agreement lost"


@contextmanager
def _cluster(config: EngineConfig, count: int) -> Iterator[None]:
    """A connection to Ray, seen to have room for the engines."""
    from jobs.engines import check_capacity, connected

    with connected():
        check_capacity(config, count)
        yield


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """found: the best of the search, with all that was measured of it before the end. baseline: None when it
    cannot be as fast. contest: None without a baseline, or when the goal is not met."""

    found: Candidate
    baseline: Schedule | None
    contest: Contest | None


async def _run(
    search: Search, log: TrialLog, config: EngineConfig, num_engines: int, samples: Samples
) -> _Outcome:
    """The search, the choice among its best, the front's other costs, the contest with the baseline."""
    from jobs.engines import start_engines, stop_engines

    costs, target = search.space.costs, search.space.target
    _say(f"starting {num_engines} engine(s)")
    engines, _ = await start_engines(config, num_engines)
    try:
        pool = Pool(engines=engines)
        calibration = await pool.answered(samples.calibration)
        measure = partial(measure_missing, pool, log, costs)
        _say(f"{search.num_done} of {search.num_trials} schedules measured before")
        await pool.measure(search.proposals(), calibration, _Progress(search).done)

        finalists = search.ranking[:_FINALISTS]
        _say(f"the best {len(finalists)} on {len(samples.selection)} other samples")
        more = await measure("selection", [each.schedule for each in finalists], samples.selection)
        found = min(
            (
                replace(each, measured=each.measured.joined(other))
                for each, other in zip(finalists, more, strict=True)
            ),
            key=lambda each: search.goal.loss(each.speedup, each.measured),
        )
        if target is not None:  # all trials had this one cost
            _say("the best of them, sized to other costs")
            sized = (
                costs.sized(found.schedule, share * target, reference_tokens=costs.num_tokens)
                for share in _OTHER_COSTS
                if share * target > 1
            )
            await measure("calibration", [each for each in sized if each], calibration)
        baseline = costs.sized(
            Schedule.preset(BASELINE, num_layers=costs.shape.num_layers),
            found.speedup if target is None else target,
            reference_tokens=PRESETS[BASELINE].reference_tokens,
        )
        if baseline is None or not search.goal.met(found):
            return _Outcome(found=found, baseline=baseline, contest=None)
        await measure("calibration", [baseline], calibration)
        _say(f"against {BASELINE} on {len(samples.held_out)} held-out samples")
        last, preset = await measure("held_out", [found.schedule, baseline], samples.held_out)
        tasks = tuple(prompt.task for prompt in samples.held_out)
        contest = Contest(baseline=BASELINE, tasks=tasks, found=last, preset=preset)
        return _Outcome(found=found, baseline=baseline, contest=contest)
    finally:
        await stop_engines(engines)


class _Progress:
    """A line whenever there is something better, and at every tenth of the way."""

    def __init__(self, search: Search) -> None:
        self._search = search
        self._best = search.ranking[:1]
        self._already = search.num_done
        self._started = time.perf_counter()

    def done(self, schedule: Schedule, measured: Measured) -> None:
        """To be called with every schedule measured."""
        search = self._search
        search.tell(schedule, measured)
        done, best = search.num_done, search.ranking[:1]
        if best == self._best and done % max(1, search.num_trials // 10):
            return
        each_s = (time.perf_counter() - self._started) / (done - self._already)
        left = clock_time(each_s * (search.num_trials - done))
        better = "better" if best != self._best else "best  "
        self._best = best
        width = len(str(search.num_trials))
        _say(
            f"[{done:>{width}}/{search.num_trials}] {better} {best[0].speedup:.3f}x, "
            f"{best[0].measured.in_words()}; {left} left"
        )


def _conclude(
    args: argparse.Namespace, search: Search, outcome: _Outcome, *, folder: Path, command: str
) -> int:
    """Prints what was found and writes the preset; the exit status."""
    found, contest = outcome.found, outcome.contest
    kept = search.goal.met(found)
    marks = {found.schedule: "found" if kept else "nearest"}
    if outcome.baseline is not None:
        marks.setdefault(outcome.baseline, BASELINE)
    best = front(search.candidates)
    shown = [each for each in search.candidates if each in best or each.schedule in marks]
    _say("\nfront, on the samples of the search:")
    for line in front_table(sorted(shown, key=lambda one: one.speedup), marks):
        _say(line)
    if not kept:
        print(
            f"error: no schedule of {search.num_done} loses at most {args.max_drop:g} points of agreement; "
            "allow more trials or a larger drop",
            file=sys.stderr,
        )
        return 1
    comments = [
        f"Found by: {command}",
        f"{found.speedup:.3f}x fewer FLOP than dense at {args.length} tokens.",
        f"On the {len(found.measured.kl)} samples it was chosen by: {found.measured.in_words()}.",
    ]
    if contest is None:
        _say(f"\n{BASELINE} cannot be as fast on this model, so there is nothing to compare with")
    else:
        _say(f"\nheld-out samples, {found.speedup:.3f}x:")
        for line in contest.lines():
            _say(line)
        comments.append(f"Held-out samples, {contest.lines()[-1]}.")
    path = folder / "schedule.yaml"
    text = preset_file(found.schedule, reference_tokens=args.length, comments=comments)
    write_file(path, text.encode())
    _say(f"\nfound      {describe_schedule(found.schedule)}")
    _say(f"written to {path}")
    _say(json.dumps(_summary(args, search, found, contest, path)))
    return 0


def _summary(
    args: argparse.Namespace, search: Search, found: Candidate, contest: Contest | None, path: Path
) -> dict[str, object]:
    def means(measured: Measured) -> dict[str, float]:
        return {"agreement": measured.mean_agreement, "kl_nats": measured.mean_kl}

    return {
        "model": args.model,
        "length_tokens": args.length,
        "target_speedup": args.target_speedup,
        "max_drop_points": args.max_drop,
        "num_trials": search.num_done,
        "speedup": found.speedup,
        "chosen_by": {"num_samples": len(found.measured.kl), **means(found.measured)},
        "held_out": contest
        and {
            "num_samples": len(contest.tasks),
            "found": means(contest.found),
            BASELINE: means(contest.preset),
            "agreement_difference": asdict(contest.agreement_difference()),
        },
        "schedule": found.schedule.to_dict(),
        "file": str(path),
    }


def _say(line: str) -> None:
    print(line, flush=True)  # a job's output is a pipe: without flush nothing is seen until the end


if __name__ == "__main__":
    sys.exit(main())
