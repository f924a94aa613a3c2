"""Values kept for later requests, up to a number of bytes: the least recently used goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Kept(Generic[Value]):
    """A mapping bounded in bytes. What it holds depends on its calls alone, so ranks that make the same
    calls hold the same.

    Worked example, max_bytes = 10: put a (4), put b (4), get a, put c (4) leaves a and c. A value of more
    than 10 bytes is not kept and costs no other its place.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._values: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()

    def get(self, key: Hashable) -> Value | None:
        """The value, now the most recently used; None when it is not there."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key][0]

    def put(self, key: Hashable, value: Value, num_bytes: int) -> None:
        """Keep `value` in place of any other under `key`, dropping the least recently used for it."""
        if num_bytes > self.max_bytes:
            return
        self._forget(key)
        while self.num_bytes + num_bytes > self.max_bytes:
            self._forget(next(iter(self._values)))
        self._values[key] = (value, num_bytes)
        self.num_bytes += num_bytes

    def _forget(self, key: Hashable) -> None:
        if key in self._values:
            self.num_bytes -= self._values.pop(key)[1]
