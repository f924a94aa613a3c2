"""Reports from made-up results: the right numbers in every format, and a page that is safe to open."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from rich.console import Console

from jobs import report
from jobs.aligned import aligned
from jobs.disk import provenance
from jobs.disk.columns import LINE_FIELDS, SAMPLE_FIELDS
from jobs.disk.record import read_plan, read_rows
from jobs.report import write_report
from jobs.reporting import palette, plots, wording
from jobs.reporting.drilldown import drilldown
from jobs.reporting.facts import facts
from jobs.reporting.markdown import cell_text
from jobs.reporting.stats import holm, mean_interval, paired_difference
from jobs.reporting.summary import load
from jobs.reporting.tables import csv_text
from jobs.tasks import FAMILIES, get_task
from jobs.tasks.needle import NeedleTask
from spts.errors import ConfigError
from tests.jobs.made_up import change_plan, next_version, write_results
from tests.jobs.many_tasks import FAMILY, NAMES

VOID = {"meta", "img", "br", "link", "input", "hr"}
EVIL = '<script>alert("x")</script> <img src=x onerror=alert(1)> &amp; \x1b[31m |\n`'


class Page(HTMLParser):
    """Checks that tags nest, and collects what a page refers to and says."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href") and value]
        assert not [name for name, _ in attrs if name.startswith("on")], "no event handlers"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Four methods, two tasks, two lengths, 6 samples each; one evil answer, one failure."""
    folder = tmp_path_factory.mktemp("results") / "small"
    write_results(
        folder,
        tasks=("single", "multivalue"),
        lengths=(1024, 4096),
        count=6,
        answers={"spts/single-4096-0-3": EVIL},
        errors={"recency/single-4096-0-1": "internal: <b>rank</b> died\x07"},
    )
    write_report(load(folder))
    return folder


@pytest.fixture
def fresh(small, tmp_path):
    """A copy to spoil."""
    shutil.copytree(small, tmp_path / "copy")
    return tmp_path / "copy"


def scores(folder, label, **where):
    """Scores by question, straight from the files."""
    plan, rows = read_plan(folder), read_rows(folder)
    cells = {cell.id: cell for cell in plan.cells}
    found = {}
    for planned in plan.samples:
        cell, row = cells[planned.cell], rows.get(planned.key)
        if row is None or cell.label != label or any(cell.content[k] != v for k, v in where.items()):
            continue
        failed = row.error is not None
        found[planned.sample] = (
            0.0 if failed else get_task(cell.task).score(row.text or "", planned.references, planned.meta)
        )
    return found


def test_csv_holds_every_group_with_its_numbers(small):
    lines = list(csv.DictReader(io.StringIO((small / "report.csv").read_text())))
    groups = {(line["label"], line["task"], line["length_tokens"]): line for line in lines}
    assert len(lines) == len(groups) == 4 * (1 + 2 + 2 + 4)
    for (label, task, length), line in groups.items():
        where = {}
        if task != "all":
            where["task"] = task
        if length != "all":
            where["length"] = int(length)
        mine, dense = scores(small, label, **where), scores(small, "dense", **where)
        expected = mean_interval(list(mine.values()))
        assert float(line["score"]) == pytest.approx(expected.value, abs=1e-6)
        assert float(line["score_low"]) == pytest.approx(expected.low, abs=1e-6)
        assert line["interval"] == expected.interval
        assert (
            int(line["samples"])
            == len(mine)
            == 6 * (2 if task == "all" else 1) * (2 if length == "all" else 1)
        )
        if label == "dense":
            assert line["delta_vs_dense"] == ""
        else:
            delta = paired_difference(list(mine.values()), [dense[key] for key in mine])
            assert float(line["delta_vs_dense"]) == pytest.approx(delta.value, abs=1e-6)
            assert float(line["delta_high"]) == pytest.approx(delta.high, abs=1e-6)
    assert float(groups["spts", "all", "all"]["flop_share"]) == pytest.approx(0.44)
    assert float(groups["dense", "all", "all"]["flop_share"]) == 1.0
    assert float(groups["random", "all", "4096"]["kv_share"]) == pytest.approx(0.41, abs=1e-3)


def test_a_failure_counts_in_the_denominator(small):
    results = load(small)
    cell = results.models[0].cells["recency", "single", 4096]
    assert (cell.score.count, cell.failed) == (6, 1)
    assert scores(small, "recency", task="single", length=4096)["single-4096-0-1"] == 0.0
    assert [one.planned.sample for one in results.failed] == ["single-4096-0-1"]


def test_the_page_is_whole_safe_and_self_contained(small):
    text = (small / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert "<b>rank</b>" not in text
    assert page.sources, "it has plots"
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    assert "http://" not in text
    assert "https://" not in text
    assert "default-src 'none'" in text
    assert 'name="viewport"' in text
    assert "\x1b" not in text
    assert "\x07" not in text
    # What the model wrote is there to read, as text.
    assert wording.visible(EVIL).replace("  ", " ") in page.text
    assert "internal: <b>rank</b> died\N{REPLACEMENT CHARACTER}" in page.text


def test_the_page_says_what_the_numbers_say(small):
    page = Page((small / "report.html").read_text(encoding="utf-8"))
    (model,) = load(small).models
    for label in ("dense", "spts", "random", "recency"):
        line = model.overall[label]
        assert f"{100 * line.score.value:.1f}" in page.text
        assert wording.interval(line.score) in page.text
    spts = model.overall["spts"]
    ours, dense = 100 * spts.score.value, 100 * model.overall["dense"].score.value
    sentence = (
        f"spts scores {ours:.1f} % where dense scores {dense:.1f} %, with 44 % of the dense prefill FLOP and "
        f"41 % of the KV cache; its first token comes {spts.costs.speedup:.2f}× as fast."
    )
    assert sentence in page.text.replace("\N{NO-BREAK SPACE}", " ")
    assert "1 sample failed and counted as a score of 0." in page.text
    assert "0" * 40 in page.text, "the commit"
    assert "python -m jobs.sweep" in page.text
    assert "spts at 4096 tokens: dense before layer 4; 4-6: 2048 tokens, then keep 640; " in page.text
    assert page.text.count("the last 32 in every choice") == 6, "three methods at two lengths"


def test_the_page_is_the_same_every_time(small, fresh):
    write_report(load(fresh))
    first = (small / "report.html").read_text().replace("small/", "")
    assert (fresh / "report.html").read_text().replace("copy/", "") == first


def test_markdown_tables_have_as_many_cells_as_their_heads(small):
    text = (small / "report.md").read_text(encoding="utf-8")
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(tables) == 8, "scores, costs, tasks, lengths (all, two tasks), provenance, starts"
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table
    assert "| spts | **" in text
    assert "# Sweep demo" in text


def test_labels_cannot_break_a_table(fresh):
    change_plan(fresh, cell=lambda one: replace(one, label="re|cen<i>cy") if one.label == "recency" else one)
    write_report(load(fresh))
    assert "| re\\|cen&lt;i>cy |" in (fresh / "report.md").read_text()
    page = Page((fresh / "report.html").read_text())
    assert "i" not in page.tags
    assert "re|cen<i>cy" in page.text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("![i](http://a/b)", "![i]&#40;http://a/b)"),
        (r"\![i\](http://a/b)", r"\![i\]&#40;http://a/b)"),
        ("`a` <b>|", "&#96;a&#96; &lt;b>\\|"),
        ("−0.9 [−2.1, +0.3]", "−0.9 [−2.1, +0.3]"),
    ],
)
def test_text_in_markdown_is_no_markup(text, expected):
    assert cell_text(text) == expected


@pytest.mark.parametrize("label", ['=HYPERLINK("http://a")', "+1", "-1", "@x"])
def test_labels_are_no_formulas_of_a_spreadsheet(label, fresh):
    change_plan(fresh, cell=lambda one: replace(one, label=label) if one.label == "recency" else one)
    labels = {line["label"] for line in csv.DictReader(csv_text(load(fresh)).splitlines())}
    assert labels == {"dense", "spts", "random", f"'{label}"}


@pytest.mark.parametrize("label", [r"cost in $US_$ and $\foo$", "_^{}", r"a\b"])
def test_labels_are_never_formulas(label, fresh):
    change_plan(fresh, cell=lambda one: replace(one, label=label) if one.label == "recency" else one)
    write_report(load(fresh))
    assert label in Page((fresh / "report.html").read_text()).text


def test_the_terminal_table_fits_80_columns(small):
    out = io.StringIO()
    report.terminal(load(small), Console(width=80, file=out, force_terminal=False))
    printed = out.getvalue()
    assert max(map(len, printed.splitlines())) <= 80
    assert "…" not in printed.replace(" … ", ""), "no column is cut"
    for label in ("dense", "spts", "random", "recency"):
        assert len(re.findall(rf"^ +{label} +", printed, flags=re.MULTILINE)) == 3
    assert "1 sample failed" in printed


def test_an_unfinished_sweep_says_so(tmp_path):
    write_results(tmp_path, lengths=(1024,), count=3, unfinished=5)
    write_report(load(tmp_path))
    message = "Incomplete: 43 of 48 samples are done."
    assert message in Page((tmp_path / "report.html").read_text()).text
    assert message in (tmp_path / "report.md").read_text()


def test_a_sweep_without_dense_has_no_differences(tmp_path):
    write_results(tmp_path, methods=("spts", "random"), lengths=(1024,), count=3)
    write_report(load(tmp_path))
    (model,) = load(tmp_path).models
    assert model.baseline is None
    assert all(line.delta is None and line.costs.speedup is None for line in model.overall.values())
    Page((tmp_path / "report.html").read_text())


def test_one_method_alone(tmp_path):
    write_results(tmp_path, methods=("dense",), tasks=("single",), lengths=(1000,), count=1)
    page = write_report(load(tmp_path))
    assert "dense" in Page(page.read_text()).text


def test_everything_failed(tmp_path):
    errors = {f"{method}/single-64-0-{i}": "unavailable: x" for method in ("dense", "spts") for i in range(2)}
    write_results(
        tmp_path, methods=("dense", "spts"), tasks=("single",), lengths=(64,), count=2, errors=errors
    )
    write_report(load(tmp_path))
    line = load(tmp_path).models[0].overall["spts"]
    assert (line.score.value, line.failed, line.costs.flop_share, line.costs.ttft_s) == (0.0, 2, None, None)
    assert "4 samples failed" in Page((tmp_path / "report.html").read_text()).text


def test_another_version_of_a_task_is_refused(fresh):
    version = get_task("single").version
    change_plan(fresh, cell=next_version)
    with pytest.raises(
        ConfigError, match=f"must be {version} to be scored .*, got {version + 1} in the results"
    ):
        load(fresh)


def test_a_task_that_cannot_be_scored_leaves_the_others(fresh, monkeypatch, capsys):
    """As one of lm-eval whose data is gone."""
    before = load(fresh).models[0]
    score = NeedleTask.score

    def without_data(task, text, references, meta):
        if task.name == before.tasks[-1]:
            raise ConfigError("its data must be there, got none; restore it", field="tasks")
        return score(task, text, references, meta)

    monkeypatch.setattr(NeedleTask, "score", without_data)
    (model,) = load(fresh).models
    left = before.tasks[:-1]
    assert left
    for label in model.labels:
        for task in left:
            assert model.by_task[label, task] == before.by_task[label, task]
        assert (label, before.tasks[-1]) not in model.by_task
    assert report.main([str(fresh)]) == 2
    message = f"Task {before.tasks[-1]} is not scored and in no number: its data must be there"
    assert message in " ".join(capsys.readouterr().out.split())
    assert message in Page((fresh / "report.html").read_text()).text
    assert "Incomplete" not in (fresh / "report.md").read_text()
    monkeypatch.setattr(
        NeedleTask, "score", lambda *args: without_data(replace(args[0], name=before.tasks[-1]), *args[1:])
    )
    with pytest.raises(ConfigError, match="its data must be there"):
        load(fresh)


def test_rows_of_unequal_code_are_announced(fresh):
    rows = fresh / "rows" / "engine-0.jsonl"
    head, tail = rows.read_text().split("\n", 1)
    rows.write_text(head.replace('"run": "r0"', '"run": "r1"') + "\n" + tail)
    start = (fresh / "provenance.jsonl").read_text()
    second = start.replace('"run": "r0"', '"run": "r1"').replace("0" * 40, "1" * 40)
    (fresh / "provenance.jsonl").write_text(start + second)
    assert "The rows come from 2 starts with different code" in " ".join(wording.warnings(load(fresh)))
    unused = start.replace('"run": "r0"', '"run": "r2"').replace("0" * 40, "2" * 40)
    (fresh / "provenance.jsonl").write_text(start + second.replace("1" * 40, "0" * 40) + unused)
    assert not [w for w in wording.warnings(load(fresh)) if "different" in w]


def test_the_command_line(small, fresh, tmp_path, capsys):
    (fresh / "report.html").unlink()
    assert report.main([str(fresh)]) == 0
    assert capsys.readouterr().out.strip().endswith(f"report: {fresh / 'report.html'}")
    assert (fresh / "report.html").is_file()
    assert report.main([str(tmp_path / "nowhere")]) == 2
    assert "results must be a folder of jobs.sweep" in capsys.readouterr().err


@pytest.mark.parametrize("first", ["report.md", "compare.md"])
@pytest.mark.parametrize("full", [True, False], ids=["full disk", "folder in its place"])
def test_a_report_that_cannot_be_written_is_named(full, first, small, fresh, capsys):
    folders = [str(small), str(fresh)] if first == "compare.md" else [str(fresh)]
    if full:
        (fresh / f"{first}.new").symlink_to("/dev/full")
    else:
        (fresh / f"{first}.new").mkdir()
    assert report.main(folders) == 2
    why = "No space left on device" if full else "Is a directory"
    assert f"error: results must be written to {fresh / first}, got {why}" in capsys.readouterr().err


def test_pareto_front(small):
    (model,) = load(small).models
    front = plots.pareto_front(list(model.overall.values()), plots.flop_share)
    assert front[0].score.value == max(line.score.value for line in model.overall.values())
    for line in model.overall.values():
        best = [
            one.score.value for one in front if (one.costs.flop_share or 0) <= (line.costs.flop_share or 0)
        ]
        assert max(best) >= line.score.value, "each line is on the front or beaten by one that is"
    values = [line.score.value for line in front]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.0, "±0.0"), (-0.0004, "±0.0"), (0.021, "+2.1"), (-0.1, "−10.0"), (0.1, "+10.0")],
)
def test_points(value, expected):
    assert wording.points(value) == expected


def test_words_for_numbers():
    assert wording.percent(None) == wording.seconds(None) == wording.times(None) == wording.share(None) == "–"
    assert wording.seconds(0.0123) == "12 ms"
    assert wording.seconds(0.9996) == "1.00 s"
    assert wording.visible("a\tb\u202ec\nd") == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c⏎d"
    sizes = {3 * 2**30: "3.00 GiB", 300 * 2**10: "300 KiB", 1023.7 * 2**20: "1.00 GiB", 12: "12 B"}
    assert {size: wording.bytes_text(size) for size in sizes} == sizes
    assert aligned([("a", "10"), ("bc", "9")]) == ["a   10", "bc   9"]
    assert aligned([("", "word"), ("1", "a")], left=(1,)) == [" " + "  word", "1  a"]
    assert wording.short_length(4096) == "4K"
    assert wording.short_length(1000) == "1000"


def test_times_of_different_runs_are_not_compared(fresh):
    cells = {cell.id for cell in read_plan(fresh).cells if cell.label == "random"}
    (rows,) = (fresh / "rows").glob("*.jsonl")
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    for line in lines:
        line["run"] = "r1" if line["cell"] in cells else line["run"]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (model,) = load(fresh).models
    assert model.overall["random"].costs.speedup is None
    assert model.overall["spts"].costs.speedup is not None


def test_samples_that_share_a_context_are_resampled_together(tmp_path):
    write_results(tmp_path, tasks=("single",), lengths=(1024, 4096), count=20, per_context=5)
    (model,) = load(tmp_path).models
    line = model.overall["random"]
    assert (line.score.count, line.score.clusters, line.score.interval) == (40, 8, "bootstrap")
    names = [one.planned.context for one in model.scored if one.cell.label == "random"]
    expected = mean_interval([one.score for one in model.scored if one.cell.label == "random"], names)
    assert (line.score.low, line.score.high) == pytest.approx((expected.low, expected.high))
    assert line.delta is not None and line.delta.clusters == 8
    assert "come from only 8 contexts" in " ".join(wording.warnings(load(tmp_path)))


def test_prompts_that_reused_something_have_no_time_of_their_own(tmp_path):
    write_results(tmp_path, tasks=("single",), lengths=(1024,), count=8, per_context=4, reuse=True)
    (model,) = load(tmp_path).models
    own = [
        one.row.ttft_s or 0.0
        for one in model.scored
        if one.cell.label == "spts" and not one.row.reused_tokens
    ]
    costs = model.overall["spts"].costs
    assert len(own) == 2 and costs.reused == 6
    assert costs.ttft_s == pytest.approx(sum(own) / 2)
    assert costs.flop_share == pytest.approx(0.44)
    assert costs.done_share == pytest.approx(0.44 * (1 - 0.25 * 6 / 8), rel=1e-3)
    assert "6 of 8 with spts" in " ".join(wording.warnings(load(tmp_path)))
    write_report(load(tmp_path))
    assert "after reuse" in Page((tmp_path / "report.html").read_text()).text


def test_gains_from_shorter_answers_are_shown_as_such(tmp_path):
    tokens = {"dense": 101, "spts": 11}
    write_results(tmp_path, methods=("dense", "spts"), tasks=("single",), lengths=(1024,), count=6,
                  answer_tokens=tokens)  # fmt: skip
    (model,) = load(tmp_path).models
    costs = model.overall["spts"].costs
    # 0.01 s a token: dense takes its prefill + 1 s, spts its own + 0.1 s; at 101 tokens its own + 1 s.
    pairs: dict[str, dict[str, Any]] = {}
    for one in model.scored:
        pairs.setdefault(one.planned.sample, {})[one.cell.label] = one.row
    equal = sorted((p["dense"].ttft_s + 1.0) / (p["spts"].ttft_s + 1.0) for p in pairs.values())
    raw = sorted((p["dense"].ttft_s + 1.0) / (p["spts"].ttft_s + 0.1) for p in pairs.values())
    assert costs.equal_speedup == pytest.approx((equal[2] + equal[3]) / 2)
    assert costs.e2e_speedup == pytest.approx((raw[2] + raw[3]) / 2)
    assert costs.tpot_s == pytest.approx(0.01)
    assert costs.answer_ratio == pytest.approx(11 / 101)
    assert costs.lengths_differ
    assert "spts 89 % shorter" in " ".join(wording.warnings(load(tmp_path))).replace(
        "\N{NO-BREAK SPACE}", " "
    )
    page = Page((write_report(load(tmp_path))).read_text()).text
    assert "so a part of this is not speed" in page


def test_samples_that_follow_tokens_score_by_rank(tmp_path, monkeypatch):
    write_results(tmp_path, methods=("dense", "random"), tasks=("single",), lengths=(1024,), count=6,
                  follows=("single",))  # fmt: skip
    (model,) = load(tmp_path).models
    rows = [one for one in model.scored if one.cell.label == "random"]
    for one in rows:
        assert one.row.agreement is not None
        assert one.score == sum(rank == 1 for rank in one.row.agreement["rank"]) / 8
    ranks = [rank for one in rows for rank in (one.row.agreement or {})["rank"]]
    costs = model.overall["random"].costs
    assert costs.rank_mean == pytest.approx(sum(ranks) / 48)
    assert costs.kl_nats == pytest.approx(0.01 * sum(ranks) / 48)
    assert "KL, nats" in Page(write_report(load(tmp_path)).read_text()).text
    out = io.StringIO()
    report.terminal(load(tmp_path), Console(width=80, file=out))
    assert "agreement with dense" in out.getvalue()


def test_samples_that_follow_tokens_have_no_times(tmp_path):
    """Dense runs beside them, for every method: neither these times nor their ratios are the method's."""
    write_results(tmp_path, methods=("dense", "spts"), tasks=("single", "twohop"), lengths=(1024,), count=6,
                  follows=("single",))  # fmt: skip
    (model,) = load(tmp_path).models
    followed, answered = model.by_task["spts", "single"].costs, model.by_task["spts", "twohop"].costs
    for name in ("ttft_s", "tpot_s", "total_s", "speedup", "e2e_speedup", "equal_speedup"):
        assert getattr(followed, name) is None, name
        assert getattr(answered, name) > 0, name
        assert getattr(model.overall["spts"].costs, name) == getattr(answered, name), name
    assert followed.peak_memory_bytes is None
    assert followed.flop_share == pytest.approx(0.44)
    assert followed.rank_mean is not None
    write_report(load(tmp_path))


def test_parquet_holds_the_rows_and_the_lines(small):
    samples = pyarrow.parquet.read_table(small / "samples.parquet")
    rows = read_rows(small)
    assert samples.num_rows == len(rows)
    assert [field.name for field in samples.schema] == [field.name for field in SAMPLE_FIELDS]
    for one in samples.to_pylist():
        row = rows[one["key"]]
        assert (one["text"], one["error"], one["ttft_s"]) == (row.text, row.error, row.ttft_s)
        assert tuple(one["token_ids"] or ()) == (row.token_ids or ())
    found = {(o["label"], o["sample"]): o["score"] for o in samples.to_pylist()}
    assert {k: v for (label, k), v in found.items() if label == "spts"} == scores(small, "spts")
    lines = pyarrow.parquet.read_table(small / "report.parquet").to_pylist()
    table = list(csv.DictReader(io.StringIO((small / "report.csv").read_text())))
    assert len(lines) == len(table)
    for one, other in zip(lines, table, strict=True):
        assert one["score"] == pytest.approx(float(other["score"]), abs=1e-8)
        assert (one["label"], one["length_tokens"]) == (other["label"], other["length_tokens"])
    readme = (small / "README.md").read_text()
    for field in (*LINE_FIELDS, *SAMPLE_FIELDS):
        assert f"| {field.name} | {field.type} |" in readme


def test_a_report_names_what_stands_when_many_are_compared(small):
    (model,) = load(small).models
    assert set(model.comparisons) == {"spts", "random", "recency"}
    assert [test.holm for test in model.comparisons.values()] == holm(
        [test.p for test in model.comparisons.values()]
    )
    sentence = wording.corrected(model)
    assert sentence.startswith("3 methods are compared with dense. After Holm's correction")
    page = Page((small / "report.html").read_text(encoding="utf-8"))
    assert sentence.replace("\N{NO-BREAK SPACE}", " ") in page.text


@pytest.fixture
def bench(monkeypatch):
    """A family of 21 tasks, as large as LongBench."""
    families = {**FAMILIES, **FAMILY}
    monkeypatch.setattr("jobs.tasks.FAMILIES", families)
    monkeypatch.setattr("jobs.reporting.scoring.FAMILIES", families)


def test_many_tasks_have_a_table_and_a_mean(bench, tmp_path):
    write_results(tmp_path, tasks=NAMES[1:], lengths=(8192,), count=4)
    write_report(load(tmp_path))
    (model,) = load(tmp_path).models
    means = [model.by_task["spts", task].score.value for task in NAMES[1:]]
    family = model.families["spts", "bench"]
    assert family.tasks == 21
    assert family.score.value == pytest.approx(sum(means) / 21)
    assert family.delta is not None
    dense = model.families["dense", "bench"]
    assert dense.delta is None
    assert family.delta.value == pytest.approx(family.score.value - dense.score.value)
    for text in ((tmp_path / "report.md").read_text(), Page((tmp_path / "report.html").read_text()).text):
        assert "mean of bench" in text
        assert "set_21" in text
    out = io.StringIO()
    report.terminal(load(tmp_path), Console(width=80, file=out))
    assert max(map(len, out.getvalue().splitlines())) <= 80
    assert "mean of bench" in out.getvalue()


def test_many_methods_are_numbered_and_told_apart(tmp_path):
    methods = ("dense", *(f"spts, skips from layer {number}" for number in range(1, 20)))
    write_results(tmp_path, methods=methods, tasks=("single",), lengths=(1024, 2048), count=3)
    text = Page(write_report(load(tmp_path)).read_text()).text
    (model,) = load(tmp_path).models
    chosen = list(palette.colours(model).values())
    assert len({colour for colour, _ in chosen}) == 20, "no two share a colour"
    assert palette.numbered(model)
    assert "20 spts, skips from layer 19" in text
    assert "19 methods beside dense" in text
    out = io.StringIO()
    report.terminal(load(tmp_path), Console(width=100, file=out))
    assert max(map(len, out.getvalue().splitlines())) <= 100


def test_depths_are_exact_where_they_are_few(tmp_path):
    depths = (0.0, 0.25, 0.5, 0.75, 1.0)
    write_results(
        tmp_path / "grid", tasks=("single", "twohop"), lengths=(1024, 2048), count=10, depths=depths
    )
    (grid,) = load(tmp_path / "grid").models[0].depths
    assert grid.rows == ("0", "25", "50", "75", "100")
    assert grid.tasks == ("single", "twohop")
    model = load(tmp_path / "grid").models[0]
    expected = [one.score for one in model.scored if one.cell.label == "random" and one.cell.length == 2048
                and one.planned.meta["depth"] == 0.75]  # fmt: skip
    assert len(expected) == 4
    assert grid.scores["random", 2048, 3] == pytest.approx(sum(expected) / 4)
    write_results(tmp_path / "free", tasks=("single",), lengths=(1024, 2048), count=10)
    (free,) = load(tmp_path / "free").models[0].depths
    assert free.rows == ("0–20", "20–40", "40–60", "60–80", "80–100")


def test_of_too_many_samples_the_most_telling_are_shown(small):
    (model,) = load(small).models
    everything = drilldown(model)
    assert everything.shown == everything.total == 24
    assert sum(map(len, everything.by_task.values())) == 24
    some = drilldown(model, max_answers=40)
    assert (some.shown, some.total) == (10, 24)
    shown = [question for questions in some.by_task.values() for question in questions]
    assert any("failed" in question.tags for question in shown)
    hidden = {q.one.planned.sample for qs in everything.by_task.values() for q in qs}
    hidden -= {question.one.planned.sample for question in shown}
    assert all("differ" in question.tags for question in shown)
    assert len(hidden) == 14


def test_provenance_is_told(small):
    text = Page((small / "report.html").read_text(encoding="utf-8")).text
    for part in ("weights ffffffffffffffffffff", "dtype float32", "1 prompt(s) in flight in each", "97 %",
                 "12.8 samples/s", "haystack", "seeds 0", "cpu, 1 rank(s) an engine",
                 "made-up attention"):  # fmt: skip
        assert part in text.replace("\N{NO-BREAK SPACE}", " "), part


def test_provenance_tells_of_every_start_that_has_rows(fresh):
    rows = fresh / "rows" / "engine-0.jsonl"
    head, tail = rows.read_text().split("\n", 1)
    rows.write_text(head.replace('"run": "r0"', '"run": "r1"') + "\n" + tail)
    (start,) = provenance.read(fresh)
    engine = {**start["engine"], "device": "cuda", "accelerator": "a large accelerator"}
    versions = {**start["versions"], "torch": "0.0.1"}
    provenance.append(fresh, {**start, "run": "r1", "engine": engine, "versions": versions})
    told = dict(facts(load(fresh)))
    first, second = told["versions"].split("; ")
    assert f"torch {start['versions']['torch']}" in first
    assert "torch 0.0.1" in second
    scorers = ", ".join(
        f"{name} {version(name)}" for name in ("jieba", "rouge", "rapidfuzz", "lm_eval", "datasets")
    )
    assert scorers in told["scored by"]
    assert scorers in first
    root = Path(report.__file__).parents[1]
    assert f"sources {provenance.code_hash(root)}" in told["scored by"]
    assert told["device"] == "cpu, 1 rank(s) an engine; a large accelerator, 1 rank(s) an engine"
    assert "different hardware" in " ".join(wording.warnings(load(fresh)))


@pytest.mark.parametrize("line", [{"end": {"wall_s": 3}}, {}, {"started_unix_s": 1e30}], ids=str)
def test_a_start_of_which_little_is_known_is_told(line, fresh):
    (fresh / "provenance.jsonl").write_text(json.dumps({"run": "r0", **line}))
    write_report(load(fresh))
    assert "| – | r0 | – | sources unknown |" in (fresh / "report.md").read_text()


def test_predicted_time_is_dense_time_by_flop_share(small):
    (model,) = load(small).models
    line, dense = model.by_length["spts", 4096], model.by_length["dense", 4096]
    assert dense.costs.ttft_s is not None
    assert plots.predicted_ttft(model, line) == pytest.approx(0.44 * dense.costs.ttft_s)
    assert plots.predicted_ttft(model, dense) == pytest.approx(dense.costs.ttft_s)
