"""Files that survive a kill at any byte, and readers that say which file is damaged."""

from __future__ import annotations

import dataclasses
import json

import pytest

from jobs.disk import provenance, record
from jobs.disk.record import Row, RowWriter, read_plan, read_rows, write_plan
from spts.errors import ConfigError
from tests.jobs.made_up import write_results


def row(key: str, **changes) -> Row:
    fields = {
        "cell": "c",
        "sample": "s",
        "engine": "engine-0",
        "run": "r",
        "attempts": 1,
        "finished_unix_s": 1.5,
    }
    return Row(key=key, **{**fields, "text": "a\nb é 😀", "token_ids": (1, 2), **changes})


def write(folder, rows, engine="engine-0"):
    with RowWriter(folder, engine) as writer:
        for one in rows:
            writer.write(one)


def test_what_is_written_is_read(tmp_path):
    rows = [row("a"), row("b", text=None, token_ids=None, error="deadline: late"), row("c", flops=1e18)]
    write(tmp_path, rows)
    assert read_rows(tmp_path) == {one.key: one for one in rows}


def test_a_file_cut_at_any_byte_loses_only_the_row_that_was_being_written(tmp_path):
    rows = [row("a"), row("b"), row("c")]
    write(tmp_path, rows)
    path = tmp_path / "rows" / "engine-0.jsonl"
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        # A row is there as soon as its last brace is, its newline or not.
        expected = [one.key for one, end in zip(rows, ends, strict=True) if cut >= end - 1]
        assert list(read_rows(tmp_path)) == expected
        write(tmp_path, [row("d")])
        assert list(read_rows(tmp_path)) == [*expected, "d"]
        assert path.read_bytes().endswith(b"}\n")


def test_a_torn_line_longer_than_what_is_read_at_once(tmp_path):
    write(tmp_path, [row("a", text="x" * 200_000)])
    path = tmp_path / "rows" / "engine-0.jsonl"
    path.write_bytes(path.read_bytes() + b'{"key": "' + b"y" * 150_000)
    write(tmp_path, [row("b")])
    assert list(read_rows(tmp_path)) == ["a", "b"]


def test_a_row_can_be_read_when_write_returns(tmp_path):
    with RowWriter(tmp_path, "engine-0") as writer:
        writer.write(row("a"))
        assert list(read_rows(tmp_path)) == ["a"]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    write(tmp_path, [row("a"), row("b")])
    path = tmp_path / "rows" / "engine-0.jsonl"
    path.write_bytes(b'{"key": \n' + path.read_bytes())
    with pytest.raises(ConfigError, match=r"engine-0.jsonl:1 must be one JSON object a line"):
        read_rows(tmp_path)


def test_rows_of_another_schema_are_refused(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "x.jsonl").write_text(json.dumps({"key": "a", "colour": "red"}) + "\n")
    with pytest.raises(ConfigError, match=r"keys of schema 2, got other .*'colour'"):
        read_rows(tmp_path)


def test_a_retried_sample_counts_once_and_without_its_error(tmp_path):
    write(tmp_path, [row("a", error="x", text=None)], "engine-0")
    write(tmp_path, [row("a")], "engine-1")
    write(tmp_path, [row("b")], "engine-0")
    write(tmp_path, [row("b", error="later")], "engine-1")
    assert {key: one.error for key, one in read_rows(tmp_path).items()} == {"a": None, "b": None}


def change_line(path, number, change):
    """Line `number` of a file of JSON lines, an object that `change` is put into, or another text."""
    lines = path.read_text().splitlines()
    value = json.loads(lines[number - 1])
    lines[number - 1] = change if isinstance(change, str) else json.dumps({**value, **change})
    path.write_text("\n".join(lines) + "\n")


DAMAGED_ROWS = [
    ({"text": 5}, "text must be a valid string, got 5"),
    ({"token_ids": 5}, "token_ids must be a valid tuple, got 5"),
    ({"token_ids": ["a"]}, "token_ids.0 must be a valid integer, got 'a'"),
    ({"token_ids": [2**63]}, "token_ids.0 must be less than 9223372036854775808"),
    ({"ttft_s": "x"}, "ttft_s must be a valid number, got 'x'"),
    ({"ttft_s": float("nan")}, "ttft_s must be a finite number, got nan"),
    ({"key": [5]}, r"key must be a valid string, got \[5\]"),
    ({"agreement": {}}, "agreement: kl must be given, got nothing"),
    ({"agreement": {"kl": [], "rank": []}}, "agreement must have a kl and a rank .*, got 0 and 0"),
    ({"agreement": {"kl": [0.5], "rank": [1, 1]}}, "agreement must have a kl and a rank .*, got 1 and 2"),
    ({"agreement": {"kl": [0.5], "rank": ["1"]}}, "agreement: rank.0 must be a valid integer, got '1'"),
    ({"peak_memory_bytes": 10**30}, "peak_memory_bytes must be less than 9223372036854775808"),
    ({"text": "\ud800"}, "must be text, got half of a surrogate pair"),
    ("[" * 100_000, "must be one JSON object a line"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGED_ROWS, ids=[str(row[0])[:40] for row in DAMAGED_ROWS])
def test_a_damaged_row_is_named(change, message, tmp_path):
    write(tmp_path, [row("a"), row("b"), row("c")])
    change_line(tmp_path / "rows" / "engine-0.jsonl", 2, change)
    with pytest.raises(ConfigError, match=rf"engine-0\.jsonl:2:? {message}.*; restore the file or delete"):
        read_rows(tmp_path)


def test_a_folder_in_the_place_of_rows_is_named(tmp_path):
    (tmp_path / "rows" / "x.jsonl").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"x\.jsonl must be a file that can be read, got Is a directory"):
        read_rows(tmp_path)


def test_half_a_surrogate_pair_is_written_as_a_question_mark(tmp_path):
    write(tmp_path, [row("a", error="no file /tmp/\udcff", text=r"\ud800 😀")])
    assert read_rows(tmp_path)["a"].error == "no file /tmp/?"
    assert read_rows(tmp_path)["a"].text == r"\ud800 😀"


CELL = {"id": "i", "label": "l", "model": "m", "content": {}, "task_spec": {"name": "single"}}
DAMAGED_PLANS = [
    (1, '{"schema": 2, "cells": []}', "name must be given, got nothing"),
    (1, '{"schema": 2, "name": "x"}', "cells must be given, got nothing"),
    (1, {"name": 5}, "name must be a valid string, got 5"),
    (1, {"cells": None}, "cells must be a valid tuple, got None"),
    (1, {"cells": []}, r"cells must hold at least one, got \[\]"),
    (1, {"cells": [5]}, "cells.0 must be a valid dictionary, got 5"),
    (1, {"cells": [{}]}, "cells.0: id must be given, got nothing"),
    (1, {"cells": [{**CELL, "task_spec": {}}]}, "cells.0.task_spec: name must be given, got nothing"),
    (1, {"cells": [CELL]}, "cells.0.content: task must be given, got nothing"),
    (2, {"colour": "red"}, "colour must be a known key, got 'red'"),
    (2, {"meta": None}, "meta must be a valid dictionary, got None"),
    (2, {"references": None}, "references must be a valid tuple, got None"),
    (2, {"references": []}, r"references must hold at least one, got \[\]"),
    (2, {"cell": "other"}, "cell must be one of the plan's, got 'other'"),
    (2, {"prompt_tokens": "x"}, "prompt_tokens must be a valid integer, got 'x'"),
    (2, '{"key": "k"}', "cell must be given, got nothing"),
    (2, "[" * 100_000, "must be one JSON object a line"),
]


@pytest.mark.parametrize(
    ("line", "change", "message"), DAMAGED_PLANS, ids=[str(one[1])[:40] for one in DAMAGED_PLANS]
)
def test_a_damaged_plan_is_named(line, change, message, tmp_path):
    write_results(tmp_path, methods=("dense",), tasks=("single",), lengths=(64,), count=2)
    change_line(tmp_path / "plan.jsonl", line, change)
    match = rf"plan\.jsonl:{line}:? {message}.*; restore the file or delete that line"
    with pytest.raises(ConfigError, match=match):
        read_plan(tmp_path)


DAMAGED_STARTS = [
    ("{}", "run must be given, got nothing"),
    ({"run": 5}, "run must be a valid string, got 5"),
    ({"engine": None}, "engine must be a valid dictionary, got None"),
    ({"config": None}, "config must be a valid dictionary, got None"),
    ({"config": {"engine": None}}, "config: engine must be a valid dictionary, got None"),
    ({"config": {"engine": {"in_flight": "2"}}}, "config.engine: in_flight must be a valid integer, got '2'"),
    ({"end": {"engines": [1]}}, r"end: engines must be a valid dictionary, got \[1\]"),
    ({"command": "python"}, "command must be a valid tuple, got 'python'"),
    ({"started_unix_s": "today"}, "started_unix_s must be a valid number, got 'today'"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGED_STARTS, ids=[str(one[0]) for one in DAMAGED_STARTS])
def test_a_damaged_start_is_named(change, message, tmp_path):
    provenance.append(tmp_path, {"run": "1"})
    change_line(tmp_path / "provenance.jsonl", 1, change)
    with pytest.raises(ConfigError, match=rf"provenance\.jsonl:1: {message}; restore the file or delete"):
        provenance.read(tmp_path)


def test_nan_is_refused_before_anything_is_written(tmp_path):
    with RowWriter(tmp_path, "engine-0") as writer, pytest.raises(ValueError, match="JSON"):
        writer.write(row("a", flops=float("nan")))
    assert read_rows(tmp_path) == {}


def test_plan_round_trip(tmp_path):
    plan = write_results(tmp_path, lengths=(64,), count=2)
    assert read_plan(tmp_path) == plan


def test_a_folder_without_a_plan_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"results must be a folder of jobs.sweep, got .* without plan.jsonl"
    ):
        read_plan(tmp_path)


def test_a_plan_of_another_schema_is_refused(tmp_path):
    write_results(tmp_path, lengths=(64,), count=1)
    head, *samples = (tmp_path / "plan.jsonl").read_text().splitlines()
    (tmp_path / "plan.jsonl").write_text(
        "\n".join([json.dumps({**json.loads(head), "schema": 99}), *samples])
    )
    with pytest.raises(ConfigError, match=r"plan.jsonl must have schema 2, got 99"):
        read_plan(tmp_path)


def test_the_first_schemas_plan_is_known(tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps({"schema": 1, "name": "x", "cells": [], "samples": []}))
    for reader in (read_plan, record.check_schema):
        with pytest.raises(ConfigError, match=r"plan.json must have schema 2, got 1; use it with"):
            reader(tmp_path)


@pytest.mark.parametrize("kept", [slice(0, 1), slice(0, -1), slice(0, -2), [0, 1, 1, -1]])
def test_a_plan_that_is_not_whole_is_refused(tmp_path, kept):
    """A report over a part of the samples would look complete."""
    write_results(tmp_path, lengths=(64,), count=2)
    lines = (tmp_path / "plan.jsonl").read_text().splitlines(keepends=True)
    left = lines[kept] if isinstance(kept, slice) else [lines[i] for i in kept]
    (tmp_path / "plan.jsonl").write_text("".join(left))
    with pytest.raises(ConfigError, match="must hold each sample once and end with their number, got"):
        read_plan(tmp_path)


def test_a_plan_that_was_not_finished_leaves_the_old_one(tmp_path):
    plan = write_results(tmp_path, lengths=(64,), count=1)
    with record.PlanWriter(tmp_path, name="new", cells=()) as writer:
        writer.add(plan.samples[0])
    assert read_plan(tmp_path) == plan
    assert not list(tmp_path.glob("*.new"))


def test_only_one_sweep_at_a_time(tmp_path):
    with (
        record.locked(tmp_path),
        pytest.raises(ConfigError, match="output must not be in use"),
        record.locked(tmp_path),
    ):
        pass
    with record.locked(tmp_path):
        pass


def test_the_folder_explains_every_key(tmp_path):
    write_plan(tmp_path, record.Plan(name="x", cells=(), samples=()))
    readme = (tmp_path / "README.md").read_text()
    for field in (*dataclasses.fields(Row), *dataclasses.fields(record.PlannedSample)):
        assert f"| {field.name} |" in readme


def test_keys_name_the_whole_content():
    base = {"method": {"name": "spts", "schedule": {"stages": [1, 2]}}, "length": 5}
    same = {"length": 5, "method": {"schedule": {"stages": [1, 2]}, "name": "spts"}}
    assert record.content_hash(base) == record.content_hash(same)
    other = {"method": {"name": "spts", "schedule": {"stages": [1, 3]}}, "length": 5}
    assert record.content_hash(base) != record.content_hash(other)
    keys = {
        record.sample_key(*parts)
        for parts in [("a", "b", "c"), ("x", "b", "c"), ("a", "x", "c"), ("a", "b", "x")]
    }
    assert len(keys) == 4


def test_provenance_survives_a_torn_line(tmp_path):
    provenance.append(tmp_path, {"run": "1"})
    with (tmp_path / "provenance.jsonl").open("ab") as file:
        file.write(b'{"run": "2", "comm')
    assert provenance.read(tmp_path) == [{"run": "1"}]
    provenance.append(tmp_path, {"run": "3"})
    assert provenance.read(tmp_path) == [{"run": "1"}, {"run": "3"}]
    provenance.finish(tmp_path, "1", {"wall_s": 2.0})
    assert provenance.read(tmp_path) == [{"run": "1", "end": {"wall_s": 2.0}}, {"run": "3"}]


def test_provenance_says_where_results_come_from():
    found = provenance.collect(command=["a", "b"], config={"x": 1}, commit=None)
    assert found["command"] == ["a", "b"]
    assert found["versions"]["torch"]
    assert found["hardware"]["cpu_cores"] >= 1
    assert len(found["code"]["sha256"]) == 20
    assert provenance.collect(command=[], config={}, commit="abc")["code"]["commit"] == "abc"


def test_code_hash_follows_the_sources(tmp_path):
    (tmp_path / "jobs").mkdir()
    file = tmp_path / "jobs" / "a.py"
    file.write_text("x = 1\n")
    before = provenance.code_hash(tmp_path)
    file.write_text("x = 2\n")
    assert provenance.code_hash(tmp_path) != before
