"""Reports from made-up results: the right numbers in every format, and a page that is safe to open."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from rich.console import Console

from jobs import plots, report, wording
from jobs.record import read_plan, read_rows
from jobs.report import write_report
from jobs.stats import mean_interval, paired_difference
from jobs.summary import load
from jobs.tasks import get_task
from spts.errors import ConfigError
from tests.jobs.made_up import write_results

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
    write_report(folder)
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
        f"41 % of the KV cache; its first token comes {spts.speedup:.2f}× as fast."
    )
    assert sentence in page.text.replace("\N{NO-BREAK SPACE}", " ")
    assert "1 sample failed and counted as a score of 0." in page.text
    assert "0" * 40 in page.text, "the commit"
    assert "python -m jobs.sweep" in page.text
    assert "spts at 4096 tokens: dense before layer 4; 4-6: 2048 tokens, then keep 640; " in page.text
    assert page.text.count("the last 32 in every choice") == 6, "three methods at two lengths"


def test_the_page_is_the_same_every_time(small, fresh):
    write_report(fresh)
    first = (small / "report.html").read_text().replace("small/", "")
    assert (fresh / "report.html").read_text().replace("copy/", "") == first


def test_markdown_tables_have_as_many_cells_as_their_heads(small):
    text = (small / "report.md").read_text(encoding="utf-8")
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(tables) == 4
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table
    assert "| spts | **" in text
    assert "# Sweep demo" in text


def test_labels_cannot_break_a_table(fresh):
    plan = (fresh / "plan.json").read_text()
    (fresh / "plan.json").write_text(plan.replace('"label": "recency"', '"label": "re|cen<i>cy"'))
    write_report(fresh)
    assert "| re\\|cen&lt;i>cy |" in (fresh / "report.md").read_text()
    page = Page((fresh / "report.html").read_text())
    assert "i" not in page.tags
    assert "re|cen<i>cy" in page.text


def test_the_terminal_table_fits_80_columns(small):
    out = io.StringIO()
    report.terminal(load(small), Console(width=80, file=out, force_terminal=False))
    printed = out.getvalue()
    assert max(map(len, printed.splitlines())) <= 80
    assert "…" not in printed.replace(" … ", ""), "no column is cut"
    for label in ("dense", "spts", "random", "recency"):
        assert len(re.findall(rf"^ +{label} +", printed, flags=re.MULTILINE)) == 2
    assert "1 sample failed" in printed


def test_an_unfinished_sweep_says_so(tmp_path):
    write_results(tmp_path, lengths=(1024,), count=3, unfinished=5)
    write_report(tmp_path)
    message = "Incomplete: 43 of 48 samples are done."
    assert message in Page((tmp_path / "report.html").read_text()).text
    assert message in (tmp_path / "report.md").read_text()


def test_a_sweep_without_dense_has_no_differences(tmp_path):
    write_results(tmp_path, methods=("spts", "random"), lengths=(1024,), count=3)
    write_report(tmp_path)
    (model,) = load(tmp_path).models
    assert model.baseline is None
    assert all(line.delta is None and line.speedup is None for line in model.overall.values())
    Page((tmp_path / "report.html").read_text())


def test_one_method_alone(tmp_path):
    write_results(tmp_path, methods=("dense",), tasks=("single",), lengths=(1000,), count=1)
    page = write_report(tmp_path)
    assert "dense" in Page(page.read_text()).text


def test_everything_failed(tmp_path):
    errors = {f"{method}/single-64-0-{i}": "unavailable: x" for method in ("dense", "spts") for i in range(2)}
    write_results(
        tmp_path, methods=("dense", "spts"), tasks=("single",), lengths=(64,), count=2, errors=errors
    )
    write_report(tmp_path)
    line = load(tmp_path).models[0].overall["spts"]
    assert (line.score.value, line.failed, line.flop_share, line.ttft_s) == (0.0, 2, None, None)
    assert "4 samples failed" in Page((tmp_path / "report.html").read_text()).text


def test_another_version_of_a_task_is_refused(fresh):
    plan = (fresh / "plan.json").read_text()
    version = get_task("single").version
    changed = plan.replace(f'"task_version": {version}', f'"task_version": {version + 1}')
    assert changed != plan
    (fresh / "plan.json").write_text(changed)
    with pytest.raises(
        ConfigError, match=f"must be {version} to be scored .*, got {version + 1} in the results"
    ):
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


def test_pareto_front(small):
    (model,) = load(small).models
    front = plots.pareto_front(list(model.overall.values()))
    assert front[0].score.value == max(line.score.value for line in model.overall.values())
    for line in model.overall.values():
        best = [one.score.value for one in front if (one.flop_share or 0) <= (line.flop_share or 0)]
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
    assert plots.short_length(4096) == "4K"
    assert plots.short_length(1000) == "1000"


def test_times_of_different_runs_are_not_compared(fresh):
    plan = json.loads((fresh / "plan.json").read_text())
    cells = {cell["id"] for cell in plan["cells"] if cell["label"] == "random"}
    (rows,) = (fresh / "rows").glob("*.jsonl")
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    for line in lines:
        line["run"] = "r1" if line["cell"] in cells else line["run"]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (model,) = load(fresh).models
    assert model.overall["random"].speedup is None
    assert model.overall["spts"].speedup is not None
