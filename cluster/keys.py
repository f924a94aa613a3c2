"""API keys: who may ask. Keys are read from a file or an environment variable where the router runs; they are
in no configuration, no argument, no log and no answer."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from cluster import page
from cluster.config import AppConfig
from cluster.errors import ApiError, error_response
from cluster.metrics import Metrics
from spts.errors import ConfigError

# What a probe and a browser ask for before anyone could give a key.
OPEN_PATHS = frozenset({"/health", "/ready", *page.FILES})


class ApiKeys:
    """A set of keys that a request's key is compared with, all of them each time, in constant time."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def admits(self, authorization: bytes) -> bool:
        """Whether the value of an Authorization header is "Bearer" and one of the keys."""
        scheme, _, key = authorization.partition(b" ")
        given = _digest(key.strip())
        # Digests, so that not even a key's length decides how long a comparison takes.
        found = False
        for digest in self._digests:
            found |= hmac.compare_digest(given, digest)
        return found and scheme.lower() == b"bearer"


def read_keys(config: AppConfig) -> ApiKeys | None:
    """The keys of `api_keys_file` and `api_keys_env` together; None when the configuration asks for neither.

    Raises ConfigError naming the key of the configuration whose source is missing, empty or faulty.
    """
    keys: list[str] = []
    if config.api_keys_file is not None:
        path = Path(config.api_keys_file)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "bytes that are no UTF-8"
            raise ConfigError(
                f"api_keys_file must be a readable text file, got {reason} for {path}; check path and rights",
                field="api_keys_file",
            ) from None
        keys += _checked([line.partition("#")[0] for line in lines], "api_keys_file", "line")
    if config.api_keys_env is not None:
        value = os.environ.get(config.api_keys_env, "")
        keys += _checked(value.replace(",", "\n").splitlines(), "api_keys_env", "entry")
    if config.api_keys_file is None and config.api_keys_env is None:
        return None
    return ApiKeys(keys)


class Guard:
    """ASGI middleware: 401 for every path but the open ones unless the request brings a key."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, metrics: Metrics) -> None:
        self._app = app
        self._keys = keys
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it without reading it."""
        if scope["type"] != "http" or _path(scope) in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if self._keys.admits(given):
            await self._app(scope, receive, send)
            return
        self._metrics.fail("invalid_api_key")
        refusal = error_response(
            ApiError(
                "invalid_api_key",
                "the Authorization header must be 'Bearer KEY' with a valid key, got "
                f"{'another one' if given else 'none'}; ask the operator for a key",
            )
        )
        await refusal(scope, receive, send)


def _checked(entries: list[str], field: str, unit: str) -> list[str]:
    """The keys among `entries`, those left empty aside. An error says where a faulty one is, never what."""
    keys = []
    for number, entry in enumerate(entries, start=1):
        key = entry.strip()
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(
                f"{field} must hold keys of visible ASCII characters without spaces, got another one in "
                f"{unit} {number}; correct it",
                field=field,
            )
        if key:
            keys.append(key)
    if not keys:
        raise ConfigError(
            f"{field} must hold at least one key, got none; add one, or remove {field} to serve without keys",
            field=field,
        )
    return keys


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _path(scope: Scope) -> str:
    """The path below where the application is mounted; Serve puts its route prefix into root_path."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "").rstrip("/")) or "/"
