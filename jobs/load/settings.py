"""What a load is: its settings, checked before anything is sent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from urllib.parse import urlsplit

from spts.errors import ConfigError, require_int

MAX_STREAMS = 4096


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A load.

    url: of the endpoint, without /v1. model: None = the one that it serves. lengths: (prompt tokens, share of
    the requests) each. streams: requests in flight at most. seconds, requests: no request begins after so
    many of either. rate: requests begin at the times of a Poisson process with so many per second; None = as
    soon as a stream is free. max_tokens: of an answer. ignore_eos: answers do not end before that. method:
    asked for in every request; None = the endpoint chooses. chat: through /v1/chat/completions. timeout_s: of
    a request; one that takes longer is a fault. tokenizer: folder of the model's tokenizer.json.

    Raises ConfigError for what cannot be run.
    """

    url: str
    tokenizer: str
    lengths: tuple[tuple[int, float], ...]
    model: str | None = None
    streams: int = 64
    seconds: float | None = None
    requests: int | None = None
    rate: float | None = None
    max_tokens: int = 32
    ignore_eos: bool = False
    method: str | None = None
    chat: bool = False
    seed: int = 0
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise _error("url", "be http://HOST:PORT or https://…", self.url, "correct it")
        if not 1 <= self.streams <= MAX_STREAMS:
            raise _error("streams", f"be from 1 to {MAX_STREAMS}", self.streams, "choose another number")
        if self.seconds is None and self.requests is None:
            raise _error("seconds", "be given where requests is not", None, "say when the load ends")
        for name in ("seconds", "rate", "timeout_s"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise _error(name, "be a number above 0", value, "correct it")
        for name in ("requests", "max_tokens"):
            if getattr(self, name) is not None:
                require_int(name, getattr(self, name), minimum=1)
        for length, share in self.lengths:
            require_int("lengths", length, minimum=1)
            if not (math.isfinite(share) and share > 0):
                raise _error("lengths", "have shares above 0", f"{share:g} for {length}", "correct it")
        if len({length for length, _ in self.lengths}) < len(self.lengths):
            raise _error("lengths", "name each length once", self.lengths_text, "add up its shares")
        total = sum(share for _, share in self.lengths)
        if abs(total - 1) > 0.001:
            raise _error("lengths", "have shares that sum to 1", f"{total:g}", "correct them")

    @property
    def path(self) -> str:
        """The route that is asked."""
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    @property
    def longest(self) -> int:
        """Tokens of the longest prompts."""
        return max(length for length, _ in self.lengths)

    @property
    def lengths_text(self) -> str:
        """As on the command line: "512:0.6,8192:0.4"."""
        return ",".join(f"{length}:{share:g}" for length, share in self.lengths)


def parse_lengths(text: str) -> tuple[tuple[int, float], ...]:
    """ "512:0.6,8192:0.4" -> ((512, 0.6), (8192, 0.4)); one length needs no share. Raises ConfigError."""
    parts = [part.strip().partition(":") for part in text.split(",")]
    try:
        if len(parts) == 1 and not parts[0][1]:
            return ((int(parts[0][0]), 1.0),)
        return tuple((int(length), float(share)) for length, _, share in parts)
    except ValueError:
        raise _error("lengths", "be LENGTH:SHARE,…", repr(text), "for example 512:0.6,8192:0.4") from None


def _error(name: str, rule: str, value: object, what_to_do: str) -> ConfigError:
    return ConfigError(f"{name} must {rule}, got {value}; {what_to_do}", field=name)
