"""One exception type per kind of fault. Every message names the field, the rule, the value and what to do."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial


class SptsError(ValueError):
    """Base of every error this library raises for its user; `field` names the faulty input, if any."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ConfigError(SptsError):
    """A schedule, a method or a configuration that breaks a rule."""


class ModelError(SptsError):
    """A model folder that cannot be used: architecture not supported, no safetensors, not a model."""


class ProxyError(SptsError):
    """Low-rank proxies that are missing, or that belong to another model."""


class RequestError(SptsError):
    """A request that cannot be computed; `code` is the kind of fault, the same under HTTP and in a sweep."""

    def __init__(self, message: str, *, code: str, field: str | None = None) -> None:
        super().__init__(message, field=field)
        self.code = code

    def __reduce__(self) -> tuple[partial[RequestError], tuple[object, ...]]:
        # Exceptions are rebuilt from their positional arguments alone, and `code` is not one of them.
        return partial(type(self), code=self.code, field=self.field), self.args


def config_error(field: str, rule: str, got: object, remedy: str) -> ConfigError:
    """The house's error sentence: "<field> must <rule>, got <got>; <remedy>"."""
    return ConfigError(f"{field} must {rule}, got {got}; {remedy}", field=field)


def require_int(field: str, value: object, *, minimum: int) -> None:
    """Raise ConfigError unless `value` is an integer (a bool is not) of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise config_error(field, f"be an integer of at least {minimum}", repr(value), "correct it")


def check_keys(
    where: str, data: object, *, required: Collection[str], optional: Collection[str] = ()
) -> None:
    """Raise ConfigError unless `data` is a mapping with all `required` keys, and no others but `optional`."""
    known = (*required, *optional)
    if not isinstance(data, Mapping):
        raise config_error(where, f"be a mapping with the keys {', '.join(known)}", repr(data), "correct it")
    for key in data:
        if key not in known:
            raise config_error(
                f"{where}.{key}",
                f"be a known key ({', '.join(known)})",
                repr(key),
                "remove it or correct its name",
            )
    for key in required:
        if key not in data:
            raise config_error(f"{where}.{key}", "be given", "nothing", "add it")
