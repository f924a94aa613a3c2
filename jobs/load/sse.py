"""Server-sent events, as the HTML standard defines them, read strictly: what is malformed is a fault."""

from __future__ import annotations

from collections.abc import Iterator

_OTHER_FIELDS = (b"event", b"id", b"retry")


class Fault(Exception):
    """What no endpoint may send: neither an answer, nor a refusal, nor an error in OpenAI's shape."""


class EventStream:
    """The data of each event, from a body that comes in any parts.

    Worked example: parts `b'data: {"a"'`, `b': 1}\\n'`, `b'\\ndata: [DONE]\\n\\n'` give nothing, nothing, and
    then '{"a": 1}' and "[DONE]".
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []

    def feed(self, part: bytes) -> Iterator[str]:
        """The events that this part of the body completes. Raises Fault for a line of another form."""
        *lines, self._rest = (self._rest + part).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if not line:
                if self._data:
                    data, self._data = "\n".join(self._data), []
                    yield data
                continue
            name, _, value = line.partition(b":")
            if name == b"data":
                try:
                    self._data.append(value.removeprefix(b" ").decode())
                except UnicodeDecodeError:
                    raise Fault(f"an event must be UTF-8, got {value[:60]!r}") from None
            elif name and name not in _OTHER_FIELDS:  # a line that begins with a colon is a comment
                raise Fault(f"a line of an event stream must be a field or a comment, got {line[:60]!r}")

    def close(self) -> None:
        """The body has ended. Raises Fault when it did so inside an event."""
        if self._rest or self._data:
            raise Fault(f"a stream must end after an event, got {(self._rest or b'data')[:60]!r} at its end")
