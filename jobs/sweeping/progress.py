"""What a running sweep shows: a bar in a terminal, a line every few seconds anywhere else."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from jobs.disk.record import PlannedSample, Row
from jobs.reporting.scoring import score_of
from jobs.reporting.wording import short_length
from jobs.sweeping.work import Work

LINE_EVERY_S = 5.0


class Display:
    """A count that grows to `total`: a bar if `out` is a terminal, else a line every few seconds."""

    def __init__(self, total: int, done: int, out: TextIO | None, clock: Callable[[], float]) -> None:
        self.total, self.done = total, done
        self._out = out if out is not None else sys.stdout
        self._clock = clock
        self._started = self._last_line = clock()
        self._bar: Progress | None = None
        if self._out.isatty():
            self._bar = Progress(
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                console=Console(file=self._out),
            )
            self._task = self._bar.add_task("starting", total=total, completed=done)
            self._bar.start()

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._started

    def show(self, bar: Callable[[], str], line: Callable[[], str]) -> None:
        """Shows the count, with `bar()` beside a bar or as `line()`; neither is called for nothing."""
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, description=bar())
            return
        now = self._clock()
        if now - self._last_line >= LINE_EVERY_S or self.done == self.total:
            self._last_line = now
            done = f"{self.done:{len(str(self.total))}}/{self.total}"
            self.print(f"[{done} {100 * self.done // self.total:3d}%] {line()}")

    def print(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self._out, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class PromptProgress:
    """Counts samples whose prompts were made. total: as many as the configuration asks for."""

    def __init__(
        self,
        total: int,
        *,
        out: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._display = Display(total, 0, out, clock)

    def on_prompt(self, num_samples: int) -> None:
        """Takes note of one prompt, made for so many samples."""
        display = self._display
        display.done += num_samples
        display.show(
            lambda: "making the prompts",
            lambda: f"{clock_time(display.elapsed_s)} elapsed, making the prompts",
        )

    def close(self) -> None:
        """Leaves the terminal as it was."""
        self._display.close()


class SweepProgress:
    """Counts rows, keeps a running score per method, and estimates the time left from the FLOP left.

    labels: of the methods. total: samples of the sweep; already: those done by an earlier start. flops: of
    what will be run now. planned: reads what the plan says of a piece of work. out: where to write; a bar if
    it is a terminal. clock: seconds.
    """

    def __init__(
        self,
        *,
        labels: Iterable[str],
        total: int,
        already: int,
        flops: float,
        planned: Callable[[Work], PlannedSample],
        out: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._display = Display(total, already, out, clock)
        self._planned = planned
        self._flops_total, self._flops_done = flops, 0.0
        self._scores = dict.fromkeys(labels, (0.0, 0))
        self._errors: dict[str, int] = defaultdict(int)
        # A long answer can take a second to score, in which engines would wait for their next prompts.
        self._scorer = ThreadPoolExecutor(max_workers=1)
        self._scoring: Future[None] | None = None

    def on_row(self, work: Work, row: Row) -> None:
        """Takes note of one row, and shows it if it is time to."""
        record, display = work.cell.record, self._display
        display.done += 1
        self._flops_done += work.flops
        self._scoring = self._scorer.submit(self._score, work, self._planned(work), row)
        if row.error is not None:
            self._say(str(row.error), f"failed: {work.sample} with {record.label}: {row.error}")
        if display.done == display.total:
            self._scoring.result()
        display.show(lambda: f"{self._left()} left · {self.scores()}", lambda: self._line(work, row))

    def _score(self, work: Work, planned: PlannedSample, row: Row) -> None:
        """Adds a row to its method's score. What a scorer raises ends no sweep: the answer is on disk, and
        the report scores it again."""
        label = work.cell.record.label
        try:
            score = score_of(work.cell.task, planned, row)
        except Exception as error:  # any fault of any scorer
            self._say(str(error), f"not scored yet: {work.sample} with {label}: {error}")
            return
        total, count = self._scores[label]
        self._scores[label] = (total + score, count + 1)

    def _say(self, kind: str, line: str) -> None:
        self._errors[kind] += 1
        if self._errors[kind] <= 3:  # the fourth of a kind says nothing new
            self._display.print(line)

    def _line(self, work: Work, row: Row) -> str:
        record = work.cell.record
        latest = f"{short_length(record.length)} {record.task} {record.label}"
        if row.ttft_s is not None:
            latest += f", first token {row.ttft_s:.2f} s"
        return (
            f"{clock_time(self._display.elapsed_s)} elapsed, {self._left()} left | "
            f"score so far: {self.scores()} | {latest}"
        )

    def scores(self) -> str:
        """Mean score in % of each method over its rows so far."""
        return ", ".join(
            f"{label} {100 * total / count:.0f}" for label, (total, count) in self._scores.items() if count
        )

    def _left(self) -> str:
        if not self._flops_done:
            return "?"
        elapsed_s = self._display.elapsed_s
        return clock_time(elapsed_s * (self._flops_total - self._flops_done) / self._flops_done)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        self._scorer.shutdown(cancel_futures=True)
        self._display.close()


def clock_time(seconds: float) -> str:
    """75.2 -> "1:15", 3725 -> "1:02:05"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
