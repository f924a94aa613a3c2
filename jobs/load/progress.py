"""What a running load shows: a bar in a terminal, a line every few seconds anywhere else."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import TextIO

from jobs.load.record import Record
from jobs.load.settings import Settings
from jobs.progress import Display, clock_time

SHOWN_WRONG = 3


class LoadProgress:
    """Counts requests, against the seconds or the requests that the load is to last. out, clock: see
    `jobs.progress`."""

    def __init__(
        self,
        settings: Settings,
        *,
        out: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._settings = settings
        by_time = settings.requests is None
        self._by_time = by_time
        total = max(1, round(settings.seconds or 0)) if by_time else settings.requests or 1
        self._display = Display(total, 0, out, clock)
        self._outcomes: Counter[str] = Counter()

    def on_record(self, record: Record) -> None:
        """Takes note of one request, and says at once what was wrong with it, up to a few."""
        self._outcomes[record.outcome] += 1
        wrong = self._outcomes["error"] + self._outcomes["fault"]
        if record.outcome in ("error", "fault") and wrong <= SHOWN_WRONG:
            self._display.print(f"{record.outcome} at request {record.index}: {record.message}")
        done = self._display.elapsed_s if self._by_time else self._outcomes.total()
        self._display.done = min(self._display.total, int(done))
        self._display.show(self._text, self._text)

    def _text(self) -> str:
        over = self._by_time and self._display.done >= self._display.total
        counts = ", ".join(
            f"{self._outcomes[outcome]} {outcome}" for outcome in ("complete", "refused", "error", "fault")
        )
        return (
            f"{clock_time(self._display.elapsed_s)} elapsed, {counts}{'; reading the last' if over else ''}"
        )

    def close(self) -> None:
        """Leaves the terminal as it was."""
        self._display.close()
