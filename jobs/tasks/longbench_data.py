"""LongBench's rows, from the official JSON Lines files or from Parquet files, checked one by one.

A row has the official fields `input`, `context`, `answers`, `all_classes`, and for information `length`,
`language`, `_id` (github.com/THUDM/LongBench, README). The Parquet mirror Xnhyacinth/LongBench holds prompts
that are put together already: its `context` and `question` contain the official instructions and its
`answer_prefix` the last words (kvpress, evaluation/longbench/create_huggingface_dataset.py), so a row of it
brings its own prompt.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.tasks.scorers import CLASSIFIED, PARAGRAPH, paragraph_number
from spts.errors import ConfigError, check_keys, config_error

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One question.

    Attributes:
        number: its line in the file, or its row counted over the Parquet files, from 1.
        context: the long text.
        question: what is asked about it; may be empty.
        prompt: the whole prompt, where the data brings it; None = to be made from a template.
        answers: right answers, at least one.
        classes: what a classified set chooses from, else empty.
        info: `_id`, `language` and `original_length` (words, or characters of Chinese), as far as given.
    """

    number: int
    context: str
    question: str
    prompt: str | None
    answers: tuple[str, ...]
    classes: tuple[str, ...]
    info: Mapping[str, str | int]


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """The rows of a set in file order, and the SHA-256 of the bytes they came from."""

    rows: tuple[Row, ...]
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the data lies: a local folder, or a data set on the Hugging Face hub at one commit."""

    data: str | None
    hub: str | None
    revision: str | None

    @classmethod
    def parse(cls, where: str, params: Mapping[str, Any]) -> Source:
        """From {data} or {hub, revision}; reads nothing. Raises ConfigError."""
        check_keys(where, params, required=(), optional=("data", "hub", "revision"))
        for key, value in params.items():
            if not isinstance(value, str) or not value:
                raise config_error(f"{where}.{key}", "be a text that is not empty", repr(value), "correct it")
        if ("data" in params) == ("hub" in params):
            raise config_error(
                f"{where}.data",
                "be given, or hub and revision in its place",
                ", ".join(params) or "nothing",
                "name the folder of LongBench's files",
            )
        revision = params.get("revision")
        if ("hub" in params) != (revision is not None):
            raise config_error(
                f"{where}.revision", "be given with hub, and only then", repr(revision), "correct it"
            )
        if revision is not None and not _COMMIT.fullmatch(revision):
            raise config_error(
                f"{where}.revision",
                "be a commit of 40 hex digits",
                repr(revision),
                "a branch's or tag's data can change: pin its commit",
            )
        return cls(data=params.get("data"), hub=params.get("hub"), revision=revision)

    @property
    def params(self) -> dict[str, str]:
        """What `parse` read."""
        given = {"data": self.data, "hub": self.hub, "revision": self.revision}
        return {key: value for key, value in given.items() if value is not None}

    def folder(self, name: str) -> Path:
        """The local folder with set `name`, downloaded first if it is on the hub. Raises ConfigError."""
        if self.data is not None:
            # Path's own raise where there is no such user, and for a name that is too long.
            folder = Path(os.path.expanduser(self.data))
            if not os.path.isdir(folder):
                raise config_error("data", "be a folder", repr(self.data), "correct the path")
            return folder
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError

        patterns = [f"{name}.*", f"{name}/*", f"data/{name}.*", f"data/{name}/*", "*dataset2prompt.json"]
        try:
            return Path(
                snapshot_download(
                    str(self.hub), repo_type="dataset", revision=self.revision, allow_patterns=patterns
                )
            )
        except (OSError, ValueError, HfHubHTTPError) as error:
            raise config_error(
                "hub", "be a data set that can be read", f"{self.hub!r} ({error})", "give a folder as data"
            ) from error


def load(source: Source, name: str) -> DataSet:
    """Set `name`, read and checked whole.

    It is looked for as <name>.jsonl, <name>.parquet and <name>/*.parquet, in the folder and in its data/.

    Raises:
        ConfigError: no file, several that could be meant, or a malformed row: file and line are named.
    """
    files = _files(source.folder(name), name)
    digests = []
    rows: list[Row] = []
    for file in files:
        content = file.read_bytes()
        digests.append(hashlib.sha256(content).hexdigest())
        records = _json_lines(file, content) if file.suffix == ".jsonl" else _parquet(file, content)
        rows += [_row(name, place, record, len(rows) + i) for i, (place, record) in enumerate(records, 1)]
    if not rows:
        raise ConfigError(f"data must hold rows, got none in {files[0]}; get the file again", field="data")
    whole = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return DataSet(rows=tuple(rows), sha256=whole)


def only(paths: Sequence[Path], wanted: str) -> Path | None:
    """The one of `paths` that exists, None if none does. Raises ConfigError for several: which is meant?"""
    found = [path for path in paths if path.exists()]
    if len(found) > 1:
        both = " and ".join(str(path) for path in found)
        raise ConfigError(f"data must hold {wanted} once, got {both}; remove one", field="data")
    return found[0] if found else None


def _files(folder: Path, name: str) -> list[Path]:
    bases = (folder, folder / "data")
    candidates = [
        path for base in bases for path in (base / f"{name}.jsonl", base / f"{name}.parquet", base / name)
    ]
    found = only(candidates, f"the set {name!r}")
    files = sorted(found.glob("*.parquet")) if found is not None and found.is_dir() else [found]
    for file in files:
        if file is not None and not file.is_file():  # reading a pipe would wait for ever
            raise ConfigError(f"data must be regular files, got {file}; put a file there", field="data")
    if not files or files[0] is None:
        raise ConfigError(
            f"data must hold {name}.jsonl, {name}.parquet or {name}/*.parquet, got none of them in {folder}; "
            f"add the file, or name the sets that are there (sets: [...])",
            field="data",
        )
    return [file for file in files if file is not None]


def _json_lines(file: Path, content: bytes) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n"), 1):
        place = f"{file} line {number}"
        try:
            yield place, json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            raise _fault(place, "must be a JSON object in UTF-8", f"{_short(line)} ({error})") from None


def _parquet(file: Path, content: bytes) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        records = parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise _fault(str(file), "must be a Parquet file", str(error).splitlines()[0]) from None
    for number, record in enumerate(records, 1):
        yield f"{file} row {number}", record


def _row(name: str, place: str, record: Any, number: int) -> Row:
    if not isinstance(record, dict):
        raise _fault(place, "must be a JSON object", _short(record))
    context = _text(place, record, "context")
    answers = _texts(place, record, "answers")
    prompt = None
    if "input" in record:
        question = _text(place, record, "input")
    elif "answer_prefix" in record:
        question = _text(place, record, "question")
        prompt = _joined(context, question, _text(place, record, "answer_prefix"))
    else:
        raise _fault(f"{place}: input", "must be given", "no such field")
    word = PARAGRAPH.get(name)
    if word is not None and any(paragraph_number(answer, word) is None for answer in answers):
        raise _fault(f"{place}: answers", f"must hold {word!r} and a number", _short(answers))
    return Row(
        number=number,
        context=context,
        question=question,
        prompt=prompt,
        answers=answers,
        classes=_texts(place, record, "all_classes") if name in CLASSIFIED else (),
        info=_info(place, record),
    )


def _joined(context: str, question: str, prefix: str) -> str:
    """The mirror's prompt; where the question kept the last words (samsum), they are not said twice."""
    said = question.rstrip().endswith(prefix.rstrip())
    return context + question if said else context + question + prefix


def _info(place: str, record: Mapping[str, Any]) -> dict[str, str | int]:
    info: dict[str, str | int] = {}
    for key in ("_id", "language"):
        if record.get(key) is not None:
            info[key] = _text(place, record, key)
    length = record.get("length")
    if isinstance(length, str) and length.isdecimal() and len(length) < 20:
        length = int(length)
    if length is not None:
        if isinstance(length, bool) or not isinstance(length, int):
            raise _fault(f"{place}: length", "must be an integer", _short(length))
        info["original_length"] = length
    return info


def _text(place: str, record: Mapping[str, Any], key: str) -> str:
    if key not in record:
        raise _fault(f"{place}: {key}", "must be given", "no such field")
    value = record[key]
    if not is_text(value):
        raise _fault(f"{place}: {key}", "must be a text", _short(value))
    return str(value)


def _texts(place: str, record: Mapping[str, Any], key: str) -> tuple[str, ...]:
    if key not in record:
        raise _fault(f"{place}: {key}", "must be given", "no such field")
    value = record[key]
    if not isinstance(value, list) or not value or not all(is_text(each) for each in value):
        raise _fault(f"{place}: {key}", "must be a list of at least one text", _short(value))
    return tuple(value)


def is_text(value: object) -> bool:
    """A string, without the half of a surrogate pair, which has no bytes in UTF-8."""
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:80] + "…"


def _fault(what: str, rule: str, got: str) -> ConfigError:
    return ConfigError(f"{what} {rule}, got {got}; correct it or get the file again", field="data")
