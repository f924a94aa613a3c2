"""Two runs compared: equal ones are equal, and whatever makes others unequal is said."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from jobs import report
from jobs.disk.record import Row
from jobs.reporting.compare import compare, same_answer
from jobs.reporting.compare_report import print_comparison
from jobs.reporting.stats import paired_difference
from jobs.reporting.summary import load
from jobs.tasks import get_task
from spts.errors import ConfigError
from tests.jobs.made_up import change_plan, next_version, write_results

SMALL: dict[str, Any] = {"tasks": ("single", "multivalue"), "lengths": (1024, 4096), "count": 5}


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "before"
    write_results(folder, **SMALL)
    return folder


@pytest.fixture
def after(before, tmp_path):
    """A copy to change."""
    shutil.copytree(before, tmp_path / "after")
    return tmp_path / "after"


def change_rows(folder, change):
    (path,) = (folder / "rows").glob("*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(one) + "\n" for line in lines if (one := change(line)) is not None))


def test_a_run_equals_its_copy_whatever_its_times(before, after, capsys):
    change_rows(after, lambda row: {**row, "ttft_s": 2 * row["ttft_s"], "run": "r0", "engine": "engine-7"})
    found = compare(load(before), load(after))
    assert found.equal
    assert (found.shared, found.reasons, found.changes, found.differing) == (80, (), (), ())
    assert found.verdict == "Equal: both runs have the same 80 samples and the same answer to each."
    assert report.main([str(before), str(after)]) == 0
    assert "Equal: both runs" in capsys.readouterr().out
    assert "Equal: both runs" in (after / "compare.md").read_text()
    assert "Equal: both runs" in (after / "compare.html").read_text()


def test_other_answers_are_counted_shown_and_scored(before, after):
    changed = {"spts": 0}
    cells = {cell.id: cell for cell in load(after).plan.cells}

    def spoil(row):
        cell = cells[row["cell"]]
        if cell.label == "spts" and cell.task == "single":
            changed["spts"] += 1
            return {**row, "text": " granite.", "token_ids": [9]}
        return row

    change_rows(after, spoil)
    first, second = load(before), load(after)
    found = compare(first, second)
    assert found.reasons == ("10 of 80 samples in both have different answers, references or scores",)
    assert len(found.differing) == changed["spts"] == 10
    spts = next(pair for pair in found.methods if pair.name == "spts")
    scores = [
        {one.question: one.score for one in results.models[0].scored if one.cell.label == "spts"}
        for results in (first, second)
    ]
    expected = paired_difference([scores[1][key] for key in scores[0]], list(scores[0].values()))
    assert (spts.samples, spts.same) == (20, 10)
    assert (spts.delta.value, spts.delta.low) == (expected.value, expected.low)
    assert report.main([str(before), str(after)]) == 1
    assert (after / "compare.md").read_text().count("granite.") >= 10
    assert found.changes == ()
    assert "Nothing that was recorded differs" in (after / "compare.md").read_text()


def test_missing_and_added_samples_make_runs_unequal(before, after, tmp_path):
    dropped = iter(range(80))
    change_rows(after, lambda row: row if next(dropped) >= 3 else None)
    assert compare(load(before), load(after)).reasons == ("3 samples of the second run are not done",)
    write_results(tmp_path / "more", **{**SMALL, "lengths": (1024, 4096, 8192)})
    found = compare(load(before), load(tmp_path / "more"))
    assert "40 samples are asked for in the second run only" in found.reasons
    assert [len(cells) for cells in found.cells] == [16, 0, 8]
    assert "dense, single, 8192 tokens, seed 0" in found.cells[2]


def test_what_is_recorded_differently_is_listed(before, tmp_path):
    write_results(tmp_path / "bf16", **SMALL, dtype="bfloat16", in_flight=3)
    path = tmp_path / "bf16" / "provenance.jsonl"
    start = json.loads(path.read_text())
    start["code"]["commit"] = "1" * 40
    start["versions"]["numpy"] = "0.1"
    path.write_text(json.dumps(start) + "\n")
    found = compare(load(before), load(tmp_path / "bf16"))
    changes = {change.where: (change.first, change.second) for change in found.changes}
    assert changes["code"] == ("0" * 40, "1" * 40)
    assert changes["versions.numpy"][1] == "0.1"
    assert changes["config.engine.in_flight"] == ("1", "3")
    assert changes["dtype of 16 of 16 cells"] == ("float32", "bfloat16")
    assert found.equal, "other cells, the same samples and answers"
    out = io.StringIO()
    print_comparison(found, Console(width=80, file=out))
    assert "config.engine.in_flight" in out.getvalue()
    assert max(map(len, out.getvalue().splitlines())) <= 80


def test_other_prompts_under_the_same_name_are_no_shared_samples(before, after):
    change_plan(
        after,
        sample=lambda one: replace(one, prompt_sha256="0" * 64) if one.sample == "single-1024-0-0" else one,
    )
    found = compare(load(before), load(after))
    assert found.reasons == ("4 samples of the same name have different prompts",)
    assert found.shared == 76


def test_the_same_tokens_with_other_references_or_text_are_not_equal(before, after):
    change_plan(after, sample=lambda one: replace(one, references=("granite",)))
    assert not compare(load(before), load(after)).equal
    shutil.copytree(before, after, dirs_exist_ok=True)
    assert compare(load(before), load(after)).equal
    change_rows(after, lambda row: {**row, "text": "granite"})
    assert not compare(load(before), load(after)).equal


def test_versions_of_a_task_do_not_mix(before, after, monkeypatch, capsys):
    version = get_task("single").version
    change_plan(after, cell=next_version)
    assert report.main([str(before), str(after)]) == 2
    error = capsys.readouterr().err
    assert f"must be {version} to be scored" in error
    assert str(after) in error
    second = load(before)
    for cell in second.plan.cells:
        assert isinstance(cell.content, dict)
        cell.content["task_version"] += 1
    with pytest.raises(ConfigError, match=f"same in both runs, got {version} and {version + 1}"):
        compare(load(before), second)


def row(**values):
    start = {"key": "k", "cell": "c", "sample": "s", "engine": "e", "run": "r", "attempts": 1}
    return Row(**{**start, "finished_unix_s": 0.0, **values})


def test_the_same_answer():
    assert same_answer(row(text="a", token_ids=(1,)), row(text="a", token_ids=(1,)))
    assert not same_answer(row(text="a", token_ids=(1,)), row(text="a", token_ids=(2,)))
    assert same_answer(row(text="a"), row(text="a", token_ids=(1,)))
    assert not same_answer(row(text="a"), row(error="deadline: late", error_kind="deadline"))
    late, lost = (row(error=f"{kind}: x", error_kind=kind) for kind in ("deadline", "unavailable"))
    assert not same_answer(late, lost)
    assert same_answer(late, row(error="deadline: after 3 s", error_kind="deadline"))

    def follows(kl, rank):
        return row(text="a", token_ids=(1, 2), agreement={"kl": kl, "rank": rank})

    assert same_answer(follows([0.1, 0.2], [1, 1]), follows([0.1 + 1e-8, 0.2], [1, 1]))
    assert not same_answer(follows([0.1, 0.2], [1, 1]), follows([0.1, 0.2], [1, 2]))
    assert not same_answer(follows([0.1, 0.2], [1, 1]), follows([0.1], [1, 1]))
