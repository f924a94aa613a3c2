"""A search for the schedule that agrees best with the dense model.

Optuna proposes points of a `Space`, ask and tell, in the driver; a `Pool` measures them. Every measurement is
a line of a file as soon as it is there, and a search that is started again begins with what the file holds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.disk.lines import append, read_lines, repair_last_line, to_line, writing
from jobs.tuning.pool import Measured, Pool, Prompt
from jobs.tuning.space import CostModel, Space
from spts.schedule import Schedule

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A schedule with its predicted speed-up over dense, and how well it agrees on the calibration set."""

    schedule: Schedule
    speedup: float
    measured: Measured


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What is best: the lowest KL at a given cost, or the fastest that loses at most `max_drop` of agreement.

    max_drop: share of tokens (0 to 1) that may differ from dense's; None = the cost is given.
    """

    max_drop: float | None = None

    def values(self, speedup: float, measured: Measured) -> tuple[float, ...]:
        """What the search minimises: the KL; where the cost is free, the share of dense's FLOP and the KL.

        Both and not `loss`, so that it learns from schedules that lose too much, too, and finds the front.
        """
        return (measured.mean_kl,) if self.max_drop is None else (1 / speedup, measured.mean_kl)

    def loss(self, speedup: float, measured: Measured) -> float:
        """By what the best is chosen, the lowest. Under `max_drop`: of those that keep it the share of
        dense's FLOP; of the others, all above 1, what they lose too much."""
        if self.max_drop is None:
            return measured.mean_kl
        excess = 1 - measured.mean_agreement - self.max_drop
        return 1 / speedup if excess <= 1e-9 else 1 + excess

    def met(self, candidate: Candidate) -> bool:
        """Whether a candidate keeps `max_drop`."""
        return self.max_drop is None or self.loss(candidate.speedup, candidate.measured) <= 1


class TrialLog:
    """The measurements of one search, a JSON line each, in a file that several searches may share.

    search: hash of all that can change a measurement or a proposal; lines of other searches are left alone.

    Raises ConfigError for a line that is no JSON object, other than a last one torn by a kill.
    """

    def __init__(self, path: Path, search: str) -> None:
        self._path, self._search = path, search
        self.measured: dict[tuple[str, Schedule], Measured] = {}
        self.points: list[tuple[dict[str, float], Schedule]] = []
        with path.open("ab+", buffering=0) as file:
            repair_last_line(file)
        for line in read_lines(path):
            if line.get("search") == search:
                measured = Measured(agreement=tuple(line["agreement"]), kl=tuple(line["kl_nats"]))
                self._add(line["set"], Schedule.from_dict(line["schedule"]), measured, line["point"])

    def write(
        self,
        name: str,
        schedule: Schedule,
        measured: Measured,
        *,
        speedup: float,
        point: Mapping[str, float] | None = None,
    ) -> None:
        """Appends what `schedule` gave on the prompts of set `name`. point: where in the space it lies, if
        the search proposed it. Raises DiskError."""
        line = {
            "search": self._search,
            "set": name,
            "point": None if point is None else dict(point),
            "schedule": schedule.to_dict(),
            "speedup": speedup,
            "agreement": measured.agreement,
            "kl_nats": measured.kl,
            "finished_unix_s": round(time.time(), 3),
        }
        with writing(self._path), self._path.open("ab", buffering=0) as file:
            append(file, to_line(line))
        self._add(name, schedule, measured, point)

    def _add(
        self, name: str, schedule: Schedule, measured: Measured, point: Mapping[str, float] | None
    ) -> None:
        self.measured[name, schedule] = measured
        if point is not None:
            self.points.append((dict(point), schedule))


class Search:
    """Proposes schedules until `num_trials` have been measured, those of the log among them.

    starts: schedules to try first, where they lie in the space. TPE is the sampler because the space mixes
    integers with ranges, a hundred trials are few, and it proposes while others are still being measured; it
    serves one objective and two.
    """

    def __init__(
        self,
        space: Space,
        goal: Goal,
        log: TrialLog,
        *,
        num_trials: int,
        seed: int,
        starts: Sequence[Schedule] = (),
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space, self.goal, self.num_trials = space, goal, num_trials
        self._log = log
        self._ranges = space.distributions()
        self._asked: dict[Schedule, list[optuna.trial.Trial]] = {}
        # Not the same draws again where a search goes on.
        sampler = optuna.samplers.TPESampler(seed=seed + len(log.points))
        minimize = optuna.study.StudyDirection.MINIMIZE
        directions = [minimize] * (1 if goal.max_drop is None else 2)
        self._study = optuna.create_study(directions=directions, sampler=sampler)
        for point, schedule in log.points:
            values = self._values(schedule)
            self._study.add_trial(
                optuna.trial.create_trial(params=point, distributions=self._ranges, values=values)
            )
        for start in starts:
            point = space.point(start)
            if ("calibration", space.schedule(point)) not in log.measured:
                self._study.enqueue_trial(point)

    @property
    def num_done(self) -> int:
        """Trials measured."""
        return len(self._log.points)

    @property
    def candidates(self) -> list[Candidate]:
        """Every schedule of the calibration set in the log, as measured, in order of measurement."""
        return [
            Candidate(schedule=schedule, speedup=self.space.costs.speedup(schedule), measured=measured)
            for (name, schedule), measured in self._log.measured.items()
            if name == "calibration"
        ]

    @property
    def ranking(self) -> list[Candidate]:
        """The different schedules of all trials, the lowest loss first, of equals the first measured."""
        proposed = {schedule for _, schedule in self._log.points}
        trials = [candidate for candidate in self.candidates if candidate.schedule in proposed]
        return sorted(trials, key=lambda one: self.goal.loss(one.speedup, one.measured))

    def proposals(self) -> Iterator[Schedule]:
        """Schedules to measure; ends when `num_trials` are done or on their way."""
        while self.num_done + sum(map(len, self._asked.values())) < self.num_trials:
            trial = self._study.ask(self._ranges)
            schedule = self.space.schedule(trial.params)
            self._asked.setdefault(schedule, []).append(trial)
            known = self._log.measured.get(("calibration", schedule))
            if known is not None:  # several points can stand for one schedule
                self.tell(schedule, known)
            elif len(self._asked[schedule]) == 1:  # else it is being measured
                yield schedule

    def tell(self, schedule: Schedule, measured: Measured) -> None:
        """What a proposed schedule gave on the calibration set."""
        for trial in self._asked.pop(schedule):
            self._log.write(
                "calibration",
                schedule,
                measured,
                speedup=self.space.costs.speedup(schedule),
                point=trial.params,
            )
            self._study.tell(trial, self._values(schedule))

    def _values(self, schedule: Schedule) -> tuple[float, ...]:
        measured = self._log.measured["calibration", schedule]
        return self.goal.values(self.space.costs.speedup(schedule), measured)


async def measure_missing(
    pool: Pool,
    log: TrialLog,
    costs: CostModel,
    name: str,
    schedules: Sequence[Schedule],
    prompts: Sequence[Prompt],
) -> list[Measured]:
    """What each schedule gives on the prompts of set `name`, from the log or else measured now."""
    missing = [each for each in dict.fromkeys(schedules) if (name, each) not in log.measured]
    if missing:
        await pool.measure(
            iter(missing),
            await pool.answered(prompts),
            lambda each, measured: log.write(name, each, measured, speedup=costs.speedup(each)),
        )
    return [log.measured[name, each] for each in schedules]


def front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other beats in speed-up (to a hundredth) and KL, fastest last; of equals the first."""
    kept: list[Candidate] = []
    for one in sorted(candidates, key=lambda one: (-round(one.speedup, 2), one.measured.mean_kl)):
        if not kept or one.measured.mean_kl < kept[-1].measured.mean_kl:
            kept.append(one)
    return kept[::-1]
