"""Long real text that every machine with Python has: its standard library's sources, docstrings included.

Files are split once and for all, by a hash of their name, into a part to train on and a held-out part to
evaluate on.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "encodings",
    "__pycache__",
}
_MAX_LINE_CHARS = 160
_HELD_OUT_SHARE = 0.1


def _is_held_out(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] < 256 * _HELD_OUT_SHARE


def _files() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not _SKIPPED_FOLDERS.intersection(name.parts):
            yield name.as_posix(), path


@cache
def haystack(part: str) -> tuple[str, ...]:
    """The lines of one part of the standard library, in file order.

    Args:
        part: "train" or "held_out". No file is in both.

    Returns:
        Lines of plain ASCII text without trailing space, tabs as four spaces; never two empty ones in a row,
        none longer than 160 characters (tables of data are no text to read).

    Raises:
        ValueError: another part.
    """
    if part not in ("train", "held_out"):
        raise ValueError(f"part must be 'train' or 'held_out', got {part!r}")
    lines: list[str] = []
    for name, path in _files():
        if _is_held_out(name) != (part == "held_out"):
            continue
        for raw in path.read_text(encoding="utf-8", errors="replace").splitlines():
            line = raw.rstrip().replace("\t", "    ")
            if (
                line.isascii()
                and line.isprintable()
                and len(line) <= _MAX_LINE_CHARS
                and (line or (lines and lines[-1]))
            ):
                lines.append(line)
    return tuple(lines)


@cache
def haystack_hash(part: str) -> str:
    """SHA-256 of a part's lines: two machines with the same value generate the same samples."""
    return hashlib.sha256("\n".join(haystack(part)).encode()).hexdigest()
