"""Tables, Markdown, CSV and one self-contained HTML page, from the files of a results folder alone.

    python -m jobs.report results/demo

Needs no cluster, no model and no accelerator; run it again whenever the scoring or the looks change.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs import plots
from jobs.page import html
from jobs.record import write_file
from jobs.stats import Estimate
from jobs.summary import Line, ModelSummary, Results, load
from jobs.wording import headline, interval, percent, points, seconds, share, times, visible, warnings
from spts.errors import ConfigError

_CSV_COLUMNS = (
    "model", "label", "method", "task", "length_tokens", "samples", "failed",
    "score", "score_low", "score_high", "interval",
    "delta_vs_dense", "delta_low", "delta_high", "delta_interval",
    "flop_share", "kv_share", "ttft_median_s", "ttft_speedup_vs_dense", "answer_tokens_mean",
)  # fmt: skip


def write_report(folder: Path) -> Path:
    """Writes report.md, report.csv and report.html into a results folder and returns the path of the page.

    Raises:
        ConfigError: what `jobs.summary.load` refuses.
    """
    results = load(folder)
    write_file(folder / "report.md", markdown(results).encode())
    write_file(folder / "report.csv", csv_text(results).encode())
    page = folder / "report.html"
    write_file(page, html(results).encode())
    return page


def _delta_text(delta: Estimate | None) -> str:
    return "–" if delta is None else f"{points(delta.value)} [{points(delta.low)}, {points(delta.high)}]"


def terminal(results: Results, console: Console) -> None:
    """Prints two tables per model that fit 80 columns: scores by length, and what each method costs."""
    for model in results.models:
        labels = [label for label in model.labels if label in model.overall]
        scores = _table(f"{results.plan.name}, {model.model}: score in %, all tasks")
        for length in model.lengths:
            scores.add_column(plots.short_length(length), justify="right", no_wrap=True)
        for name in ("all", "95 %"):
            scores.add_column(name, justify="right", no_wrap=True)
        costs = _table("against dense on the same samples, in points; cost as a share of dense")
        for name in ("vs dense", "95 %", "FLOP", "KV", "TTFT", "speed-up"):
            costs.add_column(name, justify="right", no_wrap=True)
        for label in labels:
            line, delta = model.overall[label], model.overall[label].delta
            cells = [model.by_length.get((label, length)) for length in model.lengths]
            scores.add_row(
                Text(label),
                *(percent(cell.score.value) if cell else "–" for cell in cells),
                Text(percent(line.score.value), style="bold"),
                interval(line.score),
            )
            costs.add_row(
                Text(label),
                points(delta.value) if delta else "–",
                f"{points(delta.low)} … {points(delta.high)}" if delta else "–",
                share(line.flop_share),
                share(line.kv_share),
                seconds(line.ttft_s),
                times(line.speedup),
            )
        console.print(scores, costs)
    for warning in warnings(results):
        console.print(Text(warning, style="yellow"))


def _table(title: str) -> Table:
    table = Table(
        title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1)
    )
    table.add_column("method", no_wrap=True, min_width=8)
    return table


def _lines(model: ModelSummary) -> Iterator[Line]:
    """Totals first, then by length, by task, and the cells."""
    for group in (model.overall, model.by_length, model.by_task, model.cells):
        yield from group.values()


def csv_text(results: Results) -> str:
    """One line per method over all samples, per length, per task, and per cell."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_CSV_COLUMNS)
    for model in results.models:
        for line in _lines(model):
            score, delta = line.score, line.delta
            writer.writerow(
                [model.model, line.label, line.method, line.task or "all", line.length or "all", score.count,
                 line.failed, *_rounded(score.value, score.low, score.high), score.interval,
                 *((*_rounded(delta.value, delta.low, delta.high), delta.interval) if delta else ("",) * 4),
                 *_rounded(line.flop_share, line.kv_share, line.ttft_s, line.speedup, line.answer_tokens)]
            )  # fmt: skip
    return out.getvalue()


def _rounded(*values: float | None) -> list[float | str]:
    return ["" if value is None else round(value, 6) for value in values]


def markdown(results: Results) -> str:
    """The tables as GitHub Markdown."""
    parts = [f"# Sweep {results.plan.name}", ""]
    parts += [f"> {warning}\n" for warning in warnings(results)]
    for model in results.models:
        parts += [f"## {_cell_text(model.model)}", "", headline(model), "", *_overall_markdown(model), ""]
        for task in (None, *model.tasks):
            parts += [f"### Score by length: {task or 'all tasks'}", "", *_score_markdown(model, task), ""]
    start = results.starts[-1] if results.starts else {}
    parts += [
        "Scores in % with 95 % intervals; differences in points against dense on the same samples. "
        f"Code {start.get('code', {}).get('commit') or start.get('code', {}).get('sha256')}.",
        "",
    ]
    return "\n".join(parts)


def _overall_markdown(model: ModelSummary) -> Iterator[str]:
    yield "| method | score | 95 % | against dense | FLOP | KV | TTFT | speed-up | samples | failed |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    for label in model.labels:
        if line := model.overall.get(label):
            yield (
                f"| {_cell_text(label)} | **{percent(line.score.value)}** | {interval(line.score)} "
                f"| {_delta_text(line.delta)} | {share(line.flop_share)} | {share(line.kv_share)} "
                f"| {seconds(line.ttft_s)} | {times(line.speedup)} | {line.score.count} | {line.failed} |"
            )


def _score_markdown(model: ModelSummary, task: str | None) -> Iterator[str]:
    yield "| method | " + " | ".join(plots.short_length(length) for length in model.lengths) + " |"
    yield "|---|" + "---:|" * len(model.lengths)
    for label in model.labels:
        lines = [_at(model, label, task, length) for length in model.lengths]
        cells = [f"{percent(line.score.value)} ({interval(line.score)})" if line else "–" for line in lines]
        yield f"| {_cell_text(label)} | " + " | ".join(cells) + " |"


def _at(model: ModelSummary, label: str, task: str | None, length: int) -> Line | None:
    return model.by_length.get((label, length)) if task is None else model.cells.get((label, task, length))


def _cell_text(text: str) -> str:
    return visible(text).replace("|", "\\|").replace("<", "&lt;")


def main(argv: list[str] | None = None) -> int:
    """Writes the report of a results folder and prints its table."""
    parser = argparse.ArgumentParser(prog="python -m jobs.report", description=main.__doc__)
    parser.add_argument("results", type=Path, help="folder that jobs.sweep wrote")
    folder = parser.parse_args(argv).results
    try:
        page = write_report(folder)
        terminal(load(folder), Console())
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"report: {page.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
