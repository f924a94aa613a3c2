"""What a sweep leaves on disk: plan, rows, provenance. Plain files, read without a cluster.

    <results>/
        plan.jsonl         what the last start of the sweep asked for: a line with name and cells, a line per
                           sample, a line with their number
        rows/*.jsonl       raw answers, one JSON object a line, appended as soon as each is there
        provenance.jsonl   lines per start of the sweep: command, code, versions, hardware; how it ended
        prompts.bin        only while a sweep runs: the rendered prompts, token ids as int32
        README.md          this list, with every key and its unit
        report.*           written by jobs.report from plan, rows and provenance

A row is identified by its key, a hash of the cell (model, method, task, length, seed), the sample and its
rendered prompt. So a resumed sweep runs exactly the keys of the plan that no row has yet.

What can be lost: a process killed at any moment (kill -9) loses no row, and of the one that it was writing
the torn line is cut off at the next start. A power cut loses at most the rows of the last two seconds: a
background thread syncs every file of rows once a second. What is lost is simply done again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO, Self

from jobs.disk import columns, shapes
from jobs.disk.lines import DiskError, append, parsed, read_lines, repair_last_line, to_line, writing
from spts.errors import ConfigError

SCHEMA_VERSION = 2

# Tasks that score without any: by how a method agrees with dense, and by lm-eval's own documents.
_WITHOUT_REFERENCES = ("agreement", "lm_eval")

_ROWS = "rows"
_PLAN = "plan.jsonl"
_PLAN_OF_SCHEMA_1 = "plan.json"
_NUM_SAMPLES = "num_samples"


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
    prompt_sha256: str = _doc("hash of the rendered prompt's tokens, and of those to follow")
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
    attempts: int = _doc("times the sample was given to an engine, 1 or more")
    finished_unix_s: float = _doc("time of writing, seconds since 1970")
    error: str | None = _doc("why there is no answer; null for an answered sample", default=None)
    error_kind: str | None = _doc("kind of the error, one of cluster.protocol.ERROR_KINDS", default=None)
    prompt_tokens: int | None = _doc("tokens of the prompt as the engine counted them", default=None)
    text: str | None = _doc("the answer, as decoded, up to the task's stop strings", default=None)
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


class RowWriter:
    """Appends rows to one worker's file.

    A row handed to `write` outlives this process when the call returns, and a power cut once `sync` has
    returned. A last line torn by a kill or a full disk is repaired on opening: completed if only its newline
    was lost, else cut off. Raises DiskError when the file cannot be written.
    """

    def __init__(self, folder: Path, engine: str) -> None:
        self._path = folder / _ROWS / f"{engine}.jsonl"
        with writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = self._path.open("ab+", buffering=0)
            repair_last_line(self._file)
        self._synced = True

    def write(self, row: Row) -> None:
        """Appends one row."""
        line = to_line(vars(row))
        with writing(self._path):
            append(self._file, line)
        self._synced = False

    def sync(self) -> None:
        """Waits until all rows so far are on disk. May run in another thread than `write`."""
        if not self._synced:
            self._synced = True
            with writing(self._path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Syncs and closes the file."""
        try:
            self.sync()
        finally:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def iterate_rows(folder: Path) -> Iterator[Row]:
    """All rows of a results folder as they lie on disk; a key that was tried again comes again.

    Raises:
        ConfigError: a line that is no row, other than a torn last one: file and line are named.
    """
    known = {f.name for f in fields(Row)}
    for path in sorted((folder / _ROWS).glob("*.jsonl")):
        for number, value in enumerate(read_lines(path), 1):
            if unknown := sorted(set(value) ^ known):
                raise ConfigError(
                    f"rows of {path} must have the keys of schema {SCHEMA_VERSION}, got other {unknown}; "
                    "use them with the version of this package that wrote them, or choose another folder",
                    field=str(path),
                )
            yield _row(value, f"{path}:{number}")


def _row(value: dict[str, Any], where: str) -> Row:
    row = Row(**shapes.check(Row, value, where))
    if row.agreement is not None:
        found = shapes.check(shapes.Agreement, row.agreement, f"{where}: agreement")
        if not found["rank"] or len(found["kl"]) != len(found["rank"]):
            raise shapes.damaged(
                where,
                "agreement must have a kl and a rank for each of at least one token, got "
                f"{len(found['kl'])} and {len(found['rank'])}",
            )
    return row


def read_rows(folder: Path) -> dict[str, Row]:
    """All rows of a results folder by key. Where a key was retried, the row without an error counts.

    Raises ConfigError as `iterate_rows`.
    """
    rows: dict[str, Row] = {}
    for row in iterate_rows(folder):
        if row.key not in rows or rows[row.key].error is not None:
            rows[row.key] = row
    return rows


class PlanWriter:
    """Writes a plan sample by sample, so that it need not be held in memory.

    The folder keeps its old plan until `commit` puts the new one in its place, and has the old one still if
    that is never called. Samples are read back by the place that `add` gave. Raises DiskError.
    """

    def __init__(self, folder: Path, *, name: str, cells: Sequence[CellRecord]) -> None:
        self._path = folder / _PLAN
        self._new = folder / f"{_PLAN}.new"
        head = {"schema": SCHEMA_VERSION, "name": name, "cells": [asdict(cell) for cell in cells]}
        with writing(self._path):
            self._file = self._new.open("wb")
            self._end = self._file.write(to_line(head))
        self._num = 0
        self._reader: BinaryIO | None = None

    def add(self, sample: PlannedSample) -> int:
        """Adds a sample and returns its place."""
        place = self._end
        with writing(self._path):
            self._end += self._file.write(to_line(vars(sample)))
        self._num += 1
        return place

    def sample(self, place: int) -> PlannedSample:
        """The sample at a place that `add` returned; once the plan is committed."""
        assert self._reader is not None, "samples are read from a plan that is complete"
        self._reader.seek(place)
        return _planned(json.loads(self._reader.readline()))

    def commit(self) -> None:
        """Replaces the folder's plan at one stroke, and writes the folder's README beside it."""
        path = self._path
        with writing(path):
            self._file.write(to_line({_NUM_SAMPLES: self._num}))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._new.replace(path)
            self._reader = path.open("rb")
            write_file(path.with_name("README.md"), describe().encode())

    def close(self) -> None:
        """Ends reading and writing; a plan that was not committed is gone."""
        with suppress(OSError):  # what a full disk did not take is said already
            self._file.close()
        if self._reader is not None:
            self._reader.close()
        self._new.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_plan(folder: Path, plan: Plan) -> None:
    """Replaces the plan at one stroke, and writes the folder's README beside it."""
    with PlanWriter(folder, name=plan.name, cells=plan.cells) as writer:
        for sample in plan.samples:
            writer.add(sample)
        writer.commit()


def check_schema(folder: Path) -> None:
    """Raises ConfigError if a results folder holds a plan of another version."""
    path = folder / _PLAN
    if path.is_file():
        with path.open("rb") as file:
            head = parsed(file.readline()) or {}
    elif (path := folder / _PLAN_OF_SCHEMA_1).is_file():
        head = parsed(path.read_bytes()) or {}
    else:
        return
    if head.get("schema") != SCHEMA_VERSION:
        raise ConfigError(
            f"{path} must have schema {SCHEMA_VERSION}, got {head.get('schema')!r}; use it with the version "
            "of this package that wrote it, or choose another folder",
            field="results",
        )


def read_plan(folder: Path) -> Plan:
    """The plan of a results folder.

    Raises:
        ConfigError: no plan there, one of another schema, one that is not whole, or one with a damaged line:
            file and line are named.
    """
    check_schema(folder)
    path = folder / _PLAN
    if not path.is_file():
        raise ConfigError(
            f"results must be a folder of jobs.sweep, got {folder} without {_PLAN}; run the sweep first",
            field="results",
        )
    head_line, *lines = read_lines(path)
    head = shapes.check(shapes.PlanHead, head_line, f"{path}:1", more=True)
    cells = {cell.id: cell for cell in _cells(head["cells"], f"{path}:1")}
    end = lines.pop() if lines else {}
    samples = tuple(_sample(line, cells, f"{path}:{number}") for number, line in enumerate(lines, 2))
    if end != {_NUM_SAMPLES: len(lines)} or len({sample.key for sample in samples}) < len(samples):
        raise ConfigError(
            f"{path} must hold each sample once and end with their number, got {len(lines)} samples and the "
            f"end {str(end)[:60]}; restore the file, or run the sweep again (answers that are there stay)",
            field="results",
        )
    return Plan(
        name=head["name"],
        cells=tuple(cells.values()),
        samples=samples,
    )


def _cells(values: Sequence[Mapping[str, Any]], where: str) -> Iterator[CellRecord]:
    if not values:
        raise shapes.damaged(where, "cells must hold at least one, got []")
    for index, value in enumerate(values):
        at = f"{where}: cells.{index}"
        cell = CellRecord(**shapes.check(CellRecord, value, at))
        shapes.check(shapes.Named, cell.task_spec, f"{at}.task_spec", more=True)
        content = shapes.check(shapes.Content, cell.content, f"{at}.content", more=True)
        shapes.check(shapes.Named, content["method"], f"{at}.content.method", more=True)
        yield cell


def _sample(value: Mapping[str, Any], cells: Mapping[str, CellRecord], where: str) -> PlannedSample:
    sample = PlannedSample(**shapes.check(PlannedSample, value, where))
    cell = cells.get(sample.cell)
    if cell is None:
        raise shapes.damaged(where, f"cell must be one of the plan's, got {sample.cell!r}")
    if not sample.references and cell.task_spec["name"] not in _WITHOUT_REFERENCES:
        raise shapes.damaged(where, "references must hold at least one, got []")
    return sample


def _planned(line: dict[str, Any]) -> PlannedSample:
    return PlannedSample(**{**line, "references": tuple(line["references"])})


def write_file(path: Path, content: bytes) -> None:
    """Replaces a file at one stroke: readers see the old one or the new one, whole. Raises DiskError."""
    temporary = path.with_name(path.name + ".new")
    with writing(path):
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
        DiskError: the folder cannot be locked.
    """
    path = folder / ".lock"
    with writing(path):
        file = path.open("w")
    with file:
        try:
            with writing(path):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except DiskError as error:
            if not isinstance(error.__cause__, BlockingIOError):
                raise
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
    tables = {"plan.jsonl: cells": CellRecord, "plan.jsonl: samples": PlannedSample, "rows/*.jsonl": Row}
    for title, cls in tables.items():
        parts += [f"## {title}", "", "| key | meaning |", "|---|---|"]
        parts += [f"| {f.name} | {f.metadata['doc']} |" for f in fields(cls)]
        parts.append("")
    return "\n".join([*parts, columns.describe()])
