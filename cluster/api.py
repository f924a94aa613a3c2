"""What a client may send: the bodies of /v1/completions and /v1/chat/completions, and the refusal of all
else.

A field that is not supported is refused by name unless its value asks for nothing; none is ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, field_validator, model_validator

from cluster.errors import ApiError
from cluster.strict import brief, explain
from spts.sampling import MAX_LOGPROBS

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_ACTIVITY_BINS = 512
# Of objects and lists within each other in a schedule, which has three: more could not be quoted in an error.
MAX_SCHEDULE_LEVELS = 8

# Fields of the OpenAI API that this server has not, and the values (besides null) that ask for nothing.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),  # about tools, of which there are none
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
FORMS = {
    "prompt": "text, token ids, or a list of either",
    "stop": "a string or a list of strings",
    "spts.schedule": "an object or a preset's name",
}
OBJECTS = frozenset({"spts", "stream_options"})

# Half of a surrogate pair, as JSON may write it.
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class FirstFault(FailFast):
    """Checks a list up to its first fault: all faults of a long one are seconds and gigabytes."""

    __hash__ = object.__hash__  # what a union asks of its members


Item = TypeVar("Item")
Listed = Annotated[list[Item], FirstFault()]


class Body(BaseModel):
    """Base of all bodies: unknown keys are errors, and a number is not a string.

    unsupported: fields that clients know and this server has not, with the values that ask for nothing.
    """

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def check(self) -> None:
        """Raise ApiError for fields that do not go together."""


class StreamOptions(Body):
    """include_usage: a last chunk with the usage, and no choices. continuous_usage_stats: the usage so far in
    every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class SptsOptions(Body):
    """Per-request choice of method, as the server is configured where it says nothing.

    method: its name. schedule: its numbers, or a preset's name. activity: ask usage for what each layer
    computed, in so many parts of the prompt.
    """

    method: str | None = None
    schedule: dict[str, Any] | str | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**32)
    activity: int | None = Field(default=None, ge=1, le=MAX_ACTIVITY_BINS)

    @field_validator("schedule")
    @classmethod
    def _schedule_is_flat(cls, value: dict[str, Any] | str | None) -> dict[str, Any] | str | None:
        if _has_more_levels(value, MAX_SCHEDULE_LEVELS):
            raise ValueError(
                f"schedule must be nested at most {MAX_SCHEDULE_LEVELS} levels deep, got "
                f"{brief(value)}; flatten it"
            )
        return value


class GenerationBody(Body):
    """Fields that both endpoints share; names, ranges and defaults are OpenAI's, `top_k` and `ignore_eos` are
    vLLM's, `spts` is ours.

    max_completion_tokens: the newer name of max_tokens. ignore_eos: go on after the model's end token, as in
    load tests. user: accepted and without effect, as it is there for the client's own records.
    """

    unsupported = UNSUPPORTED

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, lt=2**31)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    n: int | None = Field(default=None, ge=1)
    stop: str | Listed[str] | None = None
    ignore_eos: bool | None = None
    user: str | None = None
    spts: SptsOptions | None = None

    @field_validator("stop")
    @classmethod
    def _stop_is_short(cls, value: str | list[str] | None) -> str | list[str] | None:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > MAX_STOPS or any(not 0 < len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
            raise ValueError(
                f"stop must be at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARACTERS} characters, got "
                f"{brief(value)}; "
                "send fewer or shorter ones"
            )
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings, none or more."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def num_logprobs(self) -> int | None:
        """Alternatives to report per token; None = no log-probabilities at all."""
        raise NotImplementedError

    @property
    def echoed(self) -> list[str | None]:
        """The prompts that the answers begin with, None for one of token ids; empty = they do not."""
        return []

    def token_limit(self) -> int | None:
        """Most tokens to answer with; None = not said."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check(self) -> None:
        """See `Body`."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                "invalid_request",
                "stream_options must only be given with stream = true, got false; remove it",
                "stream_options",
            )
        if None not in (self.max_tokens, limit := self.max_completion_tokens) and self.max_tokens != limit:
            raise ApiError(
                "invalid_request",
                f"max_tokens must equal max_completion_tokens if both are given, got {self.max_tokens} and "
                f"{limit}; remove one",
                "max_tokens",
            )


class CompletionBody(GenerationBody):
    """POST /v1/completions. prompt: text or token ids, or a list of either. echo: the answer begins with the
    prompt, whose tokens have log-probabilities too if there are any."""

    unsupported = {name: neutral for name, neutral in UNSUPPORTED.items() if name != "echo"}

    prompt: str | Listed[int] | Listed[str] | Listed[Listed[int]]
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None

    def num_logprobs(self) -> int | None:
        """See `GenerationBody`."""
        return self.logprobs

    def token_limit(self) -> int | None:
        """16 by default, as in the OpenAI API."""
        return super().token_limit() or 16

    @property
    def echoed(self) -> list[str | None]:
        """See `GenerationBody`."""
        texts = [prompt if isinstance(prompt, str) else None for prompt in self.prompts]
        return texts if self.echo else []

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts of a batch; one for a single prompt."""
        prompt = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            return list(prompt)
        return [prompt]  # type: ignore[list-item]  # and what is left is text or token ids


class TextPart(Body):
    """One part of a message's content."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One turn of a conversation. name: accepted and without effect, chat templates have no place for it.

    Clients send an answer's message back as the next request's history, with its nulls.
    """

    nulls: ClassVar[frozenset[str]] = frozenset(
        {"annotations", "audio", "function_call", "refusal", "tool_calls"}
    )

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Listed[TextPart]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None or key not in cls.nulls}

    @property
    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Listed[Message] = Field(min_length=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    def num_logprobs(self) -> int | None:
        """See `GenerationBody`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        """See `Body`."""
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(
                "invalid_request",
                f"top_logprobs must only be given with logprobs = true, got {self.top_logprobs}; add "
                "logprobs",
                "top_logprobs",
            )


def turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    """The messages as chat templates expect them; "developer" is the newer name of "system"."""
    return [
        {"role": "system" if message.role == "developer" else message.role, "content": message.text}
        for message in messages
    ]


AnyBody = TypeVar("AnyBody", bound=Body)


def parse_body(raw: bytes, model: type[AnyBody]) -> AnyBody:
    """A request's body, checked. Raises ApiError naming the first field at fault."""
    data = _json(raw)
    if not isinstance(data, dict):
        raise ApiError("invalid_request", f"body must be a JSON object, got {type(data).__name__}; send one")
    for name, neutral in model.unsupported.items():
        value = data.pop(name, None)
        if value is not None and value not in neutral:
            raise ApiError(
                "unsupported_parameter",
                f"{name} must not be given, got {brief(value)}; this server does not support it",
                name,
            )
    try:
        body = model.model_validate(data)
    except ValidationError as error:
        raise _first_fault(error, model) from None
    body.check()
    return body


def _json(raw: bytes) -> object:
    """What a body says. Raises ApiError also for what JSON allows and nothing behind it could take."""
    try:
        text = raw.decode("utf-8-sig")
        data = json.loads(text)
        if SURROGATE.search(
            text
        ):  # half a pair is no character: no tokenizer takes it, no answer could quote it
            json.dumps(data, ensure_ascii=False).encode()
    except RecursionError:
        raise ApiError(
            "invalid_request", "body must not be nested this deep, got too many levels; flatten it"
        ) from None
    except ValueError as error:  # also a UnicodeError
        raise ApiError("invalid_request", f"body must be JSON in UTF-8, got {error}; correct it") from None
    return data


def _first_fault(error: ValidationError, model: type[Body]) -> ApiError:
    faults = [dict(fault) for fault in error.errors()]
    unknown = next((fault for fault in faults if fault["type"] == "extra_forbidden"), None)
    if unknown is not None:
        return ApiError("unsupported_parameter", explain(unknown, model), _param(unknown))
    fault = faults[0]
    param = _param(fault)
    if param in FORMS and fault["type"] not in ("missing", "value_error"):
        # A union: pydantic lists one fault per member, and no single one tells what the field may be.
        got = brief(fault["input"])
        return ApiError("invalid_request", f"{param} must be {FORMS[param]}, got {got}; correct it", param)
    return ApiError("invalid_request", explain(fault, model), param)


def _has_more_levels(value: object, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_has_more_levels(each, levels - 1) for each in inner)


def _param(fault: Mapping[str, Any]) -> str | None:
    """The field at fault; of an object in the body, which one of its fields."""
    loc = fault["loc"]
    parts = loc[:2] if loc and loc[0] in OBJECTS else loc[:1]
    return ".".join(str(part) for part in parts) or None
