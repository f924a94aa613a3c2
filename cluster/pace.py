"""How fast an engine gets through its prefills, so that it can say when to come back."""

from __future__ import annotations

from math import ceil

# What a prefill counts for once another has ended: the pace follows the load within a few of them.
_MEMORY = 0.8
_MOST_S = 60


class Pace:
    """FLOP per second of the latest prefills, by their size: a few short ones do not hide a long one."""

    def __init__(self) -> None:
        self._flops = 0.0
        self._seconds = 0.0

    def note(self, flops: float, seconds: float) -> None:
        """A prefill of `flops` has ended, `seconds` after it began."""
        self._flops = _MEMORY * self._flops + flops
        self._seconds = _MEMORY * self._seconds + seconds

    def wait_s(self, flops: float) -> int:
        """Whole seconds, 1 to 60, until `flops` of prefills are done; 1 before there is a measure.

        Example: one prefill of 10 GFLOP took 2 s; 24 GFLOP will take 5.
        """
        if not self._flops:
            return 1
        return min(_MOST_S, max(1, ceil(flops * self._seconds / self._flops)))
