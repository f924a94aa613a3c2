"""What a sweep leaves on disk: plan, rows, provenance. Plain files, read without a cluster.

    <results>/
        plan.json          the cells and samples that the last start of the sweep asked for
        rows/*.jsonl       raw answers, one JSON object a line, appended and synced as soon as each is done
        provenance.jsonl   one line per start of the sweep: command, code, versions, hardware
        README.md          this list, with every key and its unit
        report.*           written by jobs.report from the three above

A row is identified by its key, a hash of the cell (model, method, task, length, seed), the sample and its
rendered prompt. So a resumed sweep runs exactly the keys of the plan that no row has yet.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO, Self

from jobs import columns
from spts.errors import ConfigError

SCHEMA_VERSION = 2

_ROWS = "rows"
_PLAN = "plan.json"


def _doc(text: str, **kwargs: Any) -> Any:
    """A dataclass field that carries its own documentation, unit included."""
    return field(metadata={"doc": text}, **kwargs)


@dataclass(frozen=True, kw_only=True)
class CellRecord:
    """One cell of the sweep: what was run, and under which label a report shows it."""

    id: str = _doc("hash of `content`")
    label: str = _doc("name of the method in reports; unique per model")
    model: str = _doc("name of the model in reports")
    content: Mapping[str, Any] = _doc("all that can change an answer: model, method, task, length, seed")
    task_spec: Mapping[str, Any] = _doc("the entry of `tasks` that makes this task, for scoring")

    @property
    def task(self) -> str:
        """Name of the task."""
        return str(self.content["task"])

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self.content["method"]["name"])

    @property
    def length(self) -> int:
        """Nominal prompt length, tokens."""
        return int(self.content["length"])


@dataclass(frozen=True, kw_only=True)
class PlannedSample:
    """One answer that the sweep wants."""

    key: str = _doc("hash of cell id, sample id and rendered prompt")
    cell: str = _doc("id of its cell")
    sample: str = _doc("id of the sample, the same for every method")
    prompt_tokens: int = _doc("tokens of the prompt")
    prompt_sha256: str = _doc("hash of the rendered prompt")
    question: str = _doc("the prompt's last characters, for reading")
    references: tuple[str, ...] = _doc("what a right answer contains")
    meta: Mapping[str, Any] = _doc("what the task says of the sample")
    context: str | None = _doc("name of the text that several samples begin with; null = its own text")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that a sweep asks for."""

    name: str
    cells: tuple[CellRecord, ...]
    samples: tuple[PlannedSample, ...]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One answered or failed sample, as the engine measured it; a failed one has only `error`."""

    key: str = _doc("key of the planned sample")
    cell: str = _doc("id of the cell")
    sample: str = _doc("id of the sample")
    engine: str = _doc("name of the engine that ran it")
    run: str = _doc("id of the start of the sweep that wrote the row, see provenance.jsonl")
    attempts: int = _doc("times the sample was tried, 1 or more")
    finished_unix_s: float = _doc("time of writing, seconds since 1970")
    error: str | None = _doc("why there is no answer; null for an answered sample", default=None)
    error_kind: str | None = _doc("kind of the error, one of cluster.protocol.ERROR_KINDS", default=None)
    prompt_tokens: int | None = _doc("tokens of the prompt as the engine counted them", default=None)
    text: str | None = _doc("the answer, as decoded, untouched", default=None)
    token_ids: tuple[int, ...] | None = _doc("the answer's tokens", default=None)
    finish_reason: str | None = _doc('"stop" or "length"', default=None)
    queue_s: float | None = _doc(
        "seconds from arrival at the engine to the start of the prefill", default=None
    )
    ttft_s: float | None = _doc("seconds from arrival to the first token", default=None)
    decode_s: float | None = _doc("seconds from the first token to the last", default=None)
    total_s: float | None = _doc("seconds from arrival to the last token", default=None)
    flops: float | None = _doc("operations of the prefill, from the work really done", default=None)
    dense_flops: float | None = _doc("the same for a dense prefill of this prompt", default=None)
    reused_tokens: int | None = _doc(
        "prompt tokens whose shallow layers came from a prompt before this one", default=None
    )
    reused_flops: float | None = _doc(
        "operations of `flops` that were not done again because of them; such a ttft_s is not a prompt's own",
        default=None,
    )
    peak_memory_bytes: int | None = _doc(
        "most device memory in use on rank 0 while the sample ran; null on a CPU", default=None
    )
    agreement: Mapping[str, Any] | None = _doc(
        "of a sample that follows given tokens, lists with one number per token: kl (nats, dense from "
        "method), rank (of dense's token in the method's distribution, 1 = first)",
        default=None,
    )
    kv_bytes: int | None = _doc("bytes of the KV cache after the prefill, all layers", default=None)
    dense_kv_bytes: int | None = _doc("the same for a dense prefill of this prompt", default=None)


def content_hash(content: Any) -> str:
    """First 20 hex digits of the sha256 of a JSON value, the same whatever the order of its keys."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:20]


def sample_key(cell_id: str, sample_id: str, prompt_sha256: str) -> str:
    """The identity of one answer: another cell, sample or prompt gives another key."""
    return content_hash([cell_id, sample_id, prompt_sha256])


def to_line(value: Mapping[str, Any]) -> bytes:
    """One JSON object as a line; NaN and infinity are refused."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False).encode() + b"\n"


class RowWriter:
    """Appends rows to one worker's file; a row handed to `write` is on disk when the call returns.

    A last line torn by a kill is repaired on opening: completed if only its newline was lost, else cut off.
    """

    def __init__(self, folder: Path, engine: str) -> None:
        path = folder / _ROWS / f"{engine}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = path.open("ab+", buffering=0)
        repair_last_line(self._file)

    def write(self, row: Row) -> None:
        """Appends one row and waits until it is on disk."""
        self._file.write(to_line(asdict(row)))
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def repair_last_line(file: BinaryIO) -> None:
    """Completes or cuts off a last line that a kill tore; `file` is open for reading and appending."""
    file.seek(0)
    text = file.read()
    end = text.rfind(b"\n") + 1
    tail = text[end:]
    if not tail:
        return
    if _parsed(tail) is not None:
        file.write(b"\n")
    else:
        file.truncate(end)
    os.fsync(file.fileno())


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, without a torn last one.

    Raises:
        ConfigError: another line that is no JSON object.
    """
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        value = _parsed(line)
        if value is not None:
            yield value
        elif number < len(lines):  # the last one may be torn: its sample simply counts as not done yet
            raise ConfigError(
                f"{path}:{number} must be one JSON object a line, got {line[:60]!r}; "
                "restore the file or delete that line",
                field=str(path),
            )


def read_rows(folder: Path) -> dict[str, Row]:
    """All rows of a results folder by key. Where a key was retried, the row without an error counts.

    Raises:
        ConfigError: a line that is no row, other than a torn last one.
    """
    known = {f.name for f in fields(Row)}
    rows: dict[str, Row] = {}
    for path in sorted((folder / _ROWS).glob("*.jsonl")):
        for value in read_lines(path):
            if unknown := sorted(set(value) ^ known):
                raise ConfigError(
                    f"rows of {path} must have the keys of schema {SCHEMA_VERSION}, got other {unknown}; "
                    "report them with the version of this package that wrote them",
                    field=str(path),
                )
            if value["token_ids"] is not None:
                value["token_ids"] = tuple(value["token_ids"])
            row = Row(**value)
            if row.key not in rows or rows[row.key].error is not None:
                rows[row.key] = row
    return rows


def write_plan(folder: Path, plan: Plan) -> None:
    """Replaces the plan at one stroke, and writes the folder's README beside it."""
    write_file(folder / _PLAN, json.dumps({"schema": SCHEMA_VERSION, **asdict(plan)}, indent=1).encode())
    write_file(folder / "README.md", describe().encode())


def read_plan(folder: Path) -> Plan:
    """The plan of a results folder.

    Raises:
        ConfigError: no plan there, or one of another schema.
    """
    path = folder / _PLAN
    if not path.is_file():
        raise ConfigError(
            f"results must be a folder of jobs.sweep, got {folder} without {_PLAN}; run the sweep first",
            field="results",
        )
    value = json.loads(path.read_bytes())
    if value.get("schema") != SCHEMA_VERSION:
        raise ConfigError(
            f"{path} must have schema {SCHEMA_VERSION}, got {value.get('schema')!r}; "
            "report it with the version of this package that wrote it",
            field="results",
        )
    return Plan(
        name=value["name"],
        cells=tuple(CellRecord(**cell) for cell in value["cells"]),
        samples=tuple(PlannedSample(**{**s, "references": tuple(s["references"])}) for s in value["samples"]),
    )


def write_file(path: Path, content: bytes) -> None:
    """Replaces a file at one stroke: readers see the old one or the new one, whole."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a results folder for one sweep.

    Raises:
        ConfigError: another sweep is writing there.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"output must not be in use by another sweep, got {folder}; "
                "wait for that one or choose another folder",
                field="output",
            ) from None
        yield


def describe() -> str:
    """The results folder's README: its files, every key and its unit."""
    assert __doc__ is not None
    parts = ["# Results of a sweep", "", *__doc__.splitlines(), ""]
    tables = {"plan.json: cells": CellRecord, "plan.json: samples": PlannedSample, "rows/*.jsonl": Row}
    for title, cls in tables.items():
        parts += [f"## {title}", "", "| key | meaning |", "|---|---|"]
        parts += [f"| {f.name} | {f.metadata['doc']} |" for f in fields(cls)]
        parts.append("")
    return "\n".join([*parts, columns.describe()])
