"""One exception type per kind of fault. Every message names the field, the rule, the value and what to do."""

from __future__ import annotations

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
