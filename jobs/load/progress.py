"""What a running load shows: a bar in a terminal, a line every few seconds anywhere else."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Self, TextIO

from jobs.load.record import Record
from jobs.load.settings import Settings
from jobs.load.summary import OUTCOMES
from jobs.sweeping.progress import Display, clock_time

SHOWN_WRONG = 3


class LoadProgress:
    """Counts requests, against those that are to be sent or the seconds that the load is to last.

    out, clock: see `jobs.sweeping.progress`. Use as a context manager: the terminal is left as it was.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        out: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._by_time = settings.requests is None
        self._total = settings.requests or max(2, round(settings.seconds or 0))
        self._out, self._clock = out, clock
        self._display: Display | None = None
        self._outcomes: Counter[str] = Counter()

    def start(self) -> Callable[[Record], None]:
        """The load begins: gives the function to call with each of its records."""
        display = self._display = Display(self._total, 0, self._out, self._clock)

        def on_record(record: Record) -> None:
            self._outcomes[record.outcome] += 1
            wrong = self._outcomes["error"] + self._outcomes["fault"]
            if record.outcome in ("error", "fault") and wrong <= SHOWN_WRONG:
                display.print(f"{record.outcome} at request {record.index}: {record.message}")
            if self._by_time:  # the last step is for the requests that are still read when the time is up
                display.done = min(display.total - 1, int(display.elapsed_s))
            else:
                display.done = self._outcomes.total()
            over = self._by_time and display.elapsed_s >= display.total
            text = f"{clock_time(display.elapsed_s)} elapsed, {self._counts()}"
            text += "; the time is up, reading the last" if over else ""
            display.show(lambda: text, lambda: text)

        return on_record

    def _counts(self) -> str:
        return ", ".join(f"{self._outcomes[outcome]} {outcome}" for outcome in OUTCOMES)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._display is not None:
            self._display.close()
