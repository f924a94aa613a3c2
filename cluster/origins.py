"""Which other sites' pages may ask: origins as browsers write them into the header Origin."""

from __future__ import annotations

import re
from collections.abc import Sequence

_ORIGIN = re.compile(
    r"(https?)://"
    r"(?:[a-z0-9_-]+(?:\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\])"  # a name, an address, or an IPv6 address
    r"(?::([1-9][0-9]{0,4}))?"
)
_DEFAULT_PORTS = {"http": 80, "https": 443}


def check_origins(origins: Sequence[str]) -> None:
    """Raise ValueError unless `origins` is "*" alone, or of origins that a browser could send.

    A browser writes scheme, name in lower case, and the port unless it is the scheme's own. What is written
    in any other way would never be equal to it, and nobody would be told.

    >>> check_origins(["https://chat.example.org", "http://localhost:3000"])
    >>> check_origins(["https://chat.example.org/"])
    Traceback (most recent call last):
    ValueError: cors_origins must hold origins like https://chat.example.org or http://localhost:3000 ...
    """
    for origin in origins:
        if origin == "*":
            if len(origins) > 1:
                raise ValueError(
                    f"cors_origins must hold '*' alone, got it among {len(origins)}; remove the others, or it"
                )
        elif not _is_origin(origin):
            raise ValueError(
                "cors_origins must hold origins like https://chat.example.org or http://localhost:3000 "
                "(lower case, no path, no port that is the scheme's own), or '*' alone, "
                f"got {origin!r}; correct it"
            )


def _is_origin(text: str) -> bool:
    match = _ORIGIN.fullmatch(text)
    if match is None:
        return False
    scheme, port = match.groups()
    return port is None or (int(port) < 2**16 and int(port) != _DEFAULT_PORTS[scheme])
