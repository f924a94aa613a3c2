"""Who runs in the next step. Pure Python: no torch, no ray, no clock.

First come, first served; one prefill at a time, in slices of layers, so that running requests get a token
between two slices; every running request decodes in every step. A request is waiting, then in prefill, then
running.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from cluster.protocol import EngineError


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One step. start: the request whose prefill begins with it. advance: (request in prefill, layers to
    run).

    decode: running requests, in the order they were admitted.
    """

    start: str | None
    advance: tuple[str, int] | None
    decode: tuple[str, ...]


class Scheduler:
    """Admits, plans and releases requests.

    num_layers: of the model. layers_per_step: size of a prefill's slice. max_running: requests in prefill or
    running at once. max_waiting: requests that may queue beyond them; one more is refused.
    """

    def __init__(self, *, num_layers: int, layers_per_step: int, max_running: int, max_waiting: int) -> None:
        self._num_layers = num_layers
        self._layers_per_step = layers_per_step
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._waiting: deque[str] = deque()
        self._prefill: str | None = None
        self._layers_done = 0
        self._running: list[str] = []

    @property
    def num_waiting(self) -> int:
        """Requests admitted whose prefill has not begun."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests in prefill or running."""
        return len(self._running) + (self._prefill is not None)

    def admit(self, request_id: str) -> None:
        """Queue a new request. Raises EngineError "overloaded" when max_running + max_waiting are in
        flight."""
        limit = self._max_running + self._max_waiting
        if self.num_running + self.num_waiting >= limit:
            raise EngineError(
                "overloaded",
                f"requests in flight must be at most {limit} ({self._max_running} running and "
                f"{self._max_waiting} "
                f"waiting), got one more; retry later",
            )
        self._waiting.append(request_id)

    def release(self, request_id: str) -> None:
        """Forget a request wherever it is: finished, aborted or failed. Unknown ids are ignored."""
        if request_id == self._prefill:
            self._prefill = None
        elif request_id in self._running:
            self._running.remove(request_id)
        elif request_id in self._waiting:
            self._waiting.remove(request_id)

    def schedule(self) -> Plan | None:
        """The next step, or None when there is nothing to do. The caller carries it out before asking again.

        Worked example: 8 layers, slices of 4, requests a and b admitted, no end in sight for either.

            step 1: start a, advance (a, 4)                  step 3: start b, advance (b, 4), decode (a)
            step 2: advance (a, 4); a's first token          step 4: advance (b, 4), decode (a); b's first
            token
                                                             step 5: decode (a, b)
        """
        decode = tuple(self._running)
        start = None
        if self._prefill is None and self._waiting and len(self._running) < self._max_running:
            start = self._prefill = self._waiting.popleft()
            self._layers_done = 0
        advance = None
        if self._prefill is not None:
            num_layers = min(self._layers_per_step, self._num_layers - self._layers_done)
            advance = (self._prefill, num_layers)
            self._layers_done += num_layers
            if self._layers_done == self._num_layers:
                self._running.append(self._prefill)
                self._prefill = None
        if advance is None and not decode:
            return None
        return Plan(start=start, advance=advance, decode=decode)
