"""What a running sweep shows: a bar in a terminal, a line every few seconds anywhere else."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from jobs.plots import short_length
from jobs.record import Row
from jobs.tasks import get_task
from jobs.work import Work

LINE_EVERY_S = 5.0


class SweepProgress:
    """Counts rows, keeps a running score per method, and estimates the time left from the FLOP left.

    work: what will be run now. already: samples done by an earlier start. out: where to write; a bar if it is
    a terminal. clock: seconds.
    """

    def __init__(
        self,
        work: Sequence[Work],
        *,
        already: int = 0,
        out: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._out = out if out is not None else sys.stdout
        self._clock = clock
        self._total, self._done = already + len(work), already
        self._flops_total, self._flops_done = sum(one.flops for one in work), 0.0
        self._scores: dict[str, list[float]] = {one.cell.label: [] for one in work}
        self._errors: dict[str, int] = defaultdict(int)
        self._started = self._last_line = clock()
        self._bar: Progress | None = None
        if self._out.isatty():
            self._bar = Progress(
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                console=Console(file=self._out),
            )
            self._task = self._bar.add_task("starting", total=self._total, completed=already)
            self._bar.start()

    def on_row(self, work: Work, row: Row) -> None:
        """Takes note of one row, and shows it if it is time to."""
        self._done += 1
        self._flops_done += work.flops
        failed = row.error is not None or row.text is None
        score = (
            0.0
            if failed
            else get_task(work.cell.task_spec).score(
                row.text or "", work.planned.references, work.planned.meta
            )
        )
        self._scores[work.cell.label].append(score)
        now = self._clock()
        if failed:
            self._errors[str(row.error)] += 1
            if self._errors[str(row.error)] <= 3:  # the fourth of a kind says nothing new
                self._print(f"failed: {work.planned.sample} with {work.cell.label}: {row.error}")
        latest = f"{short_length(work.cell.length)} {work.cell.task} {work.cell.label}"
        if row.ttft_s is not None:
            latest += f", first token {row.ttft_s:.2f} s"
        if self._bar is not None:
            self._bar.update(
                self._task, completed=self._done, description=f"{self._left()} left · {self.scores()}"
            )
        elif now - self._last_line >= LINE_EVERY_S or self._done == self._total:
            self._last_line = now
            share = 100 * self._done // self._total
            done = f"{self._done:{len(str(self._total))}}/{self._total}"
            self._print(
                f"[{done} {share:3d}%] {clock_time(now - self._started)} elapsed, "
                f"{self._left()} left | score so far: {self.scores()} | {latest}"
            )

    def scores(self) -> str:
        """Mean score in % of each method over its rows so far."""
        parts = [
            f"{label} {100 * sum(values) / len(values):.0f}"
            for label, values in self._scores.items()
            if values
        ]
        return ", ".join(parts)

    def _left(self) -> str:
        elapsed = self._clock() - self._started
        if not self._flops_done:
            return "?"
        return clock_time(elapsed * (self._flops_total - self._flops_done) / self._flops_done)

    def _print(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self._out, flush=True)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def clock_time(seconds: float) -> str:
    """75.2 -> "1:15", 3725 -> "1:02:05"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
