"""What a line of a results folder must hold, so that damage is named where it is read and not met later."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache, reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

from spts.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import BaseModel


@dataclass(frozen=True, kw_only=True)
class PlanHead:
    """The first line of a plan."""

    name: str
    cells: tuple[dict[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class Content:
    """What reports read of a cell's content."""

    task: str
    task_version: int
    method: dict[str, Any]
    length: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Named:
    """A method, or a task's entry."""

    name: str


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What a row says of followed tokens: a number for each."""

    kl: tuple[float | None, ...]
    rank: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Start:
    """What reports read of a line of provenance. A start has several lines: only `run` is in each."""

    run: str
    started_unix_s: float = 0.0
    command: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    code: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    end: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Engine:
    """`engine` of a start."""

    versions: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Config:
    """`config` of a start."""

    engine: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EngineChoice:
    """`engine` of a start's configuration."""

    count: int = 1
    in_flight: int = 1


@dataclass(frozen=True, kw_only=True)
class End:
    """`end` of a start."""

    engines: dict[str, dict[str, float]] = field(default_factory=dict)


def check(shape: type, value: Mapping[str, Any], where: str, *, more: bool = False) -> dict[str, Any]:
    """The values of a dataclass `shape` in an object that was read from `where`, its lists as tuples.

    more: other keys may be there, and are left out. Integers must fit into 64 bits, numbers be finite.
    Raises ConfigError as `damaged`, about the first fault.
    """
    from pydantic import ValidationError

    try:
        return vars(_model(shape, more).model_validate(value))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        rule = fault["msg"].replace("Input should be ", "be ").replace("Input should have ", "have ")
        rule = {"missing": "be given", "extra_forbidden": "be a known key"}.get(fault["type"], rule)
        got = "nothing" if fault["type"] == "missing" else reprlib.repr(fault["input"])
        key = ".".join(map(str, fault["loc"]))
        raise damaged(where, f"{key} must {rule[0].lower()}{rule[1:]}, got {got}") from None


def damaged(where: str, fault: str) -> ConfigError:
    """The error about a line that is not what was written. where: file:line."""
    return ConfigError(f"{where}: {fault}; restore the file or delete that line", field=where)


@cache
def _model(shape: type, more: bool) -> type[BaseModel]:
    from pydantic import ConfigDict, create_model

    strict = ConfigDict(strict=True, extra="ignore" if more else "forbid", allow_inf_nan=False)
    hints = get_type_hints(shape)
    known: dict[str, Any] = {}
    for one in fields(shape):
        required = one.default is one.default_factory is MISSING
        known[one.name] = (_stored(hints[one.name]), ... if required else None)
    return create_model(shape.__name__, __config__=strict, **known)


def _stored(hint: Any) -> Any:
    """A type as a file of JSON and a column of Arrow hold it: tuples are lists, integers have 64 bits."""
    from pydantic import Field

    if hint is int:
        return Annotated[int, Field(ge=-(2**63), lt=2**63)]
    args = tuple(map(_stored, get_args(hint)))
    if get_origin(hint) is tuple:
        return Annotated[tuple[args], Field(strict=False)]  # type: ignore[valid-type]
    return reduce(or_, args) if type(None) in args else hint
