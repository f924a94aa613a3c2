"""One streamed answer, held to OpenAI's protocol chunk by chunk; and what an endpoint may say instead."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from jobs.load.sse import EventStream, Fault

Outcome = Literal["complete", "refused", "error", "fault"]

_REASONS = ("stop", "length")
_ERROR_KEYS = {"message", "type", "param", "code"}


class Answer:
    """The answer of one choice with its usage.

    chat: chunks are those of /v1/chat/completions. max_tokens: asked for. times_s: when each chunk with text
    or the end came, on the caller's clock. error: the endpoint's own, if the stream ended with one.
    """

    def __init__(self, *, chat: bool, max_tokens: int) -> None:
        self._chat = chat
        self._max_tokens = max_tokens
        self._events = EventStream()
        self._id: str | None = None
        self._done = False
        self.text = ""
        self.times_s: list[float] = []
        self.finish_reason: str | None = None
        self.usage: Mapping[str, Any] | None = None
        self.error: str | None = None

    def feed(self, part: bytes, now_s: float) -> None:
        """Take in a part of the body. Raises Fault."""
        for data in self._events.feed(part):
            if self._done or self.error is not None:
                raise Fault(f"nothing may follow the end of a stream, got {data[:80]!r}")
            if data == "[DONE]":
                self._end()
            else:
                self._chunk(_object(data), now_s)

    def close(self) -> Outcome:
        """The body has ended: "complete" or "error". Raises Fault for a stream that has no end of its own."""
        self._events.close()
        if self.error is not None:
            return "error"
        if not self._done:
            raise Fault("a stream must end with [DONE] or an error, got neither")
        return "complete"

    def _chunk(self, chunk: Mapping[str, Any], now_s: float) -> None:
        if "error" in chunk:
            self.error = error_text(chunk)
            return
        if self._id is None:
            self._id = str(chunk.get("id"))
        choices = chunk.get("choices")
        if chunk.get("id") != self._id or not isinstance(choices, list):
            raise Fault(f"a chunk must have the stream's id and choices, got {_brief(chunk)}")
        if chunk.get("usage") is not None:
            self.usage = _usage(chunk["usage"])
        if not choices:
            if self.usage is None:
                raise Fault(f"a chunk must have a choice or the usage, got {_brief(chunk)}")
            return
        choice = choices[0]
        if len(choices) > 1 or not isinstance(choice, dict) or choice.get("index") != 0:
            raise Fault(f"a chunk must be of choice 0, got {_brief(chunk)}")
        if self.finish_reason is not None:
            raise Fault(f"no chunk may follow a finish_reason, got {_brief(chunk)}")
        text, reason = self._text(choice), choice.get("finish_reason")
        if reason is not None and reason not in _REASONS:
            raise Fault(f"finish_reason must be one of {', '.join(_REASONS)}, got {reason!r}")
        self.text += text
        self.finish_reason = reason
        if text or reason is not None:
            self.times_s.append(now_s)

    def _text(self, choice: Mapping[str, Any]) -> str:
        if not self._chat:
            text = choice.get("text")
        elif isinstance(choice.get("delta"), dict):
            text = choice["delta"].get("content") or ""
        else:
            text = None
        if not isinstance(text, str):
            raise Fault(f"a choice must have text, got {_brief(choice)}")
        return text

    def _end(self) -> None:
        if self.finish_reason is None:
            raise Fault("[DONE] must follow a finish_reason, got none")
        if self.usage is None:
            raise Fault("a stream must have the usage that was asked for, got none")
        said = self.usage["completion_tokens"]
        if said > self._max_tokens or (self.finish_reason == "length" and said != self._max_tokens):
            raise Fault(
                f"an answer that ends by {self.finish_reason} must have "
                f"{'' if self.finish_reason == 'length' else 'at most '}{self._max_tokens} tokens, got {said}"
            )
        self._done = True


def refusal(status: int, retry_after: str | None, body: bytes) -> tuple[Outcome, str]:
    """What an answer without a stream is, and its message: "refused" by a 503 that says when to come again,
    else "error". Raises Fault for one that is not in OpenAI's shape."""
    message = error_text(_object(body.decode("utf-8", "replace")))
    if status != 503:
        return "error", f"{status}: {message}"
    if retry_after is None or not retry_after.isdecimal():
        raise Fault(f"a 503 must have a Retry-After in seconds, got {retry_after!r}: {message}")
    return "refused", message


def error_text(body: Mapping[str, Any]) -> str:
    """The message of an error object. Raises Fault for another shape than OpenAI's."""
    error = body.get("error")
    if (
        not isinstance(error, dict)
        or not error.keys() >= _ERROR_KEYS
        or not isinstance(error["message"], str)
    ):
        raise Fault(f"an error must be {{error: {{message, type, param, code}}}}, got {_brief(body)}")
    return f"{error['message']} ({error['code'] or error['type']})"


def _usage(usage: object) -> Mapping[str, Any]:
    if isinstance(usage, dict):
        counts = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
        if all(isinstance(count, int) and count >= 0 for count in counts):
            return usage
    raise Fault(f"usage must have prompt_tokens and completion_tokens, got {_brief(usage)}")


def _object(data: str) -> Mapping[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise Fault(f"an answer must be a JSON object, got {data[:80]!r}")
    return found


def _brief(value: object) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 200 else text[:200] + " …"
