"""Files of JSON lines that outlive whoever writes them: a kill or a full disk tears the last line only, and
the next writer repairs it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from spts.errors import ConfigError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskError(RuntimeError):
    """The results cannot be written any more; what was written is intact."""

    def __init__(self, path: Path, error: OSError) -> None:
        what = "make room" if error.errno in _FULL else "mend that"
        super().__init__(
            f"results must be written to {path}, got {error.strerror}; all that was done before is kept: "
            f"{what} and run the same command again"
        )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError of a write to `path` into a DiskError."""
    try:
        yield
    except OSError as error:
        raise DiskError(path, error) from error


def to_line(value: Mapping[str, Any]) -> bytes:
    """One JSON object as a line; NaN and infinity are refused.

    Half of a surrogate pair, as a file's name in an error can hold, becomes a question mark: no report could
    be written of it.
    """
    line = json.dumps(value, ensure_ascii=True, allow_nan=False)
    if "\\ud" in line:
        line = json.dumps(json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")))
    return line.encode() + b"\n"


def append(file: BinaryIO, line: bytes) -> None:
    """Writes all of `line` to an unbuffered file, which by itself may write a part and not say so."""
    left = memoryview(line)
    while left:
        left = left[file.write(left) :]


def repair_last_line(file: BinaryIO) -> None:
    """Completes or cuts off a last line that a kill tore; `file` is open for reading and appending."""
    end = start = file.seek(0, os.SEEK_END)
    tail = b""
    while start and b"\n" not in tail:
        file.seek(start := max(0, start - 2**16))
        tail = file.read(end - start)
    tail = tail[tail.rfind(b"\n") + 1 :]
    if not tail:
        return
    if parsed(tail) is not None:
        append(file, b"\n")
    else:
        file.truncate(end - len(tail))
    os.fsync(file.fileno())


def parsed(line: bytes) -> dict[str, Any] | None:
    """The object that a line holds, if it holds one."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, the n-th of line n, without a torn last one.

    Raises:
        ConfigError: no file that can be read; another line that is no JSON object, or has half of a surrogate
            pair.
    """
    try:
        opened = path.open("rb")
    except OSError as error:
        raise ConfigError(
            f"{path} must be a file that can be read, got {error.strerror}; restore it", field=str(path)
        ) from None
    with opened as file:
        for number, line in enumerate(file, start=1):
            value = parsed(line)
            if value is not None:
                if (b"\\ud" in line.lower() or b"\xed" in line) and not _is_text(value):
                    raise ConfigError(
                        f"{path}:{number} must be text, got half of a surrogate pair; restore the file or "
                        "delete that line",
                        field=str(path),
                    )
                yield value
            elif line.endswith(b"\n"):  # the last one may be torn: its sample simply counts as not done yet
                raise ConfigError(
                    f"{path}:{number} must be one JSON object a line, got {line[:60]!r}; "
                    "restore the file or delete that line",
                    field=str(path),
                )


def _is_text(value: Mapping[str, Any]) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
