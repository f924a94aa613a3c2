"""A run in a terminal, as Markdown, as JSON and as one self-contained page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.text import Text

from jobs.disk.record import write_file
from jobs.load.plots import all_plots
from jobs.load.record import Run
from jobs.load.summary import Line, Spread, Summary
from jobs.options import write_json
from jobs.reporting import facts
from jobs.reporting.markdown import cell_text, table
from jobs.reporting.page import environment
from jobs.reporting.terminal import new_table
from jobs.reporting.wording import bytes_text, number, percent, seconds, short_length

HEAD = ("prompt", "method", "n", "TTFT p50", "p90", "p99", "gap p50", "p90", "p99", "longest",
        "e2e p50", "p90", "p99", "score, %")  # fmt: skip
# Columns of the tables in a terminal, which is not as wide as a page.
_TABLES = (
    ("from sending a request to the first text of its answer", (0, 1, 2, 3, 4, 5, 13)),
    ("between two chunks of an answer", (0, 1, 2, 6, 7, 8, 9)),
    ("from sending a request to the end of its answer", (0, 1, 2, 10, 11, 12)),
)
_FEW = 100
_LATE_S = 0.05


def print_report(run: Run, summary: Summary, console: Console) -> None:
    """Prints outcomes, times by prompt length and method, and what to know of them."""
    console.print(Text(headline(run, summary), style="bold green" if summary.clean else "bold red"))
    for title, columns in _TABLES:
        made = new_table(title, *(HEAD[column] for column in columns))
        for row in rows(summary):
            made.add_row(*(Text(row[column]) for column in columns))
        console.print(made)
    for name, value in figures(run, summary):
        console.print(Text(f"{name}: {value}"))
    for warning in warnings(run, summary):
        console.print(Text(warning, style="yellow"))


def write_report(run: Run, summary: Summary, folder: Path) -> Path:
    """Writes report.md, report.json and report.html into the run's folder; returns the path of the page."""
    write_file(folder / "report.md", "\n".join([*_markdown(run, summary), ""]).encode())
    write_json(
        folder / "report.json", {"settings": asdict(run.settings), "wall_s": run.wall_s, **asdict(summary)}
    )
    page = folder / "report.html"
    text = environment().get_template("load.html.j2").render(
        run=run, summary=summary, headline=headline(run, summary), head=HEAD, rows=rows(summary),
        figures=figures(run, summary), warnings=warnings(run, summary), plots=all_plots(run, summary),
        messages=summary.messages, provenance=_provenance(run),
    )  # fmt: skip
    write_file(page, text.encode())
    return page


def headline(run: Run, summary: Summary) -> str:
    """How all requests ended, and the throughput."""
    sent = len(run.records)
    return (
        f"{sent} requests in {run.wall_s:.1f} s: {summary.outcomes['complete']} complete, "
        f"{summary.outcomes['refused']} refused, {summary.outcomes['error']} errors, "
        f"{summary.outcomes['fault']} faults; {summary.requests_per_s:.2f} requests/s, "
        f"{summary.tokens_per_s:.1f} answer tokens/s, {summary.prompt_tokens_per_s:.0f} prompt tokens/s"
    )


def rows(summary: Summary) -> list[list[str]]:
    """The cells of each line, in the order of HEAD; the last line is of all requests."""
    return [_row(line) for line in (*summary.lines, summary.total)]


def figures(run: Run, summary: Summary) -> list[tuple[str, str]]:
    """(name, value) of what stands in no table."""
    found: list[tuple[str, str]] = []
    if summary.total.itl is not None:
        found.append(("longest gap in any stream", seconds(summary.total.itl.most)))
    if (both := summary.while_long) is not None and both.ttft is not None:
        text = f"TTFT p50 {seconds(both.ttft.p50)}, p99 {seconds(both.ttft.p99)} ({both.ttft.count} requests)"
        if both.itl is not None:
            text += f"; gap p99 {seconds(both.itl.p99)}, longest {seconds(both.itl.most)} ({both.itl.count})"
        name = (
            f"prompts of {short_length(both.short)} while one of {short_length(both.long)} waits for its "
            "first token"
        )
        found.append((name, text))
    if (memory := summary.memory) is not None:
        text = (
            f"{bytes_text(memory.first)} at first, {bytes_text(memory.most)} at most, "
            f"{bytes_text(memory.last)} at the end; {_signed(memory.growth)} from the second third of the "
            "load to the last"
        )
        if memory.growth_less_documents is not None:
            text += f", {_signed(memory.growth_less_documents)} less the documents that it keeps"
        found.append(("memory of the server's processes", text))
    if summary.kv_left_bytes is not None:
        found.append(("KV memory reserved after the load", f"{summary.kv_left_bytes:.0f} bytes"))
    if summary.held is not None:
        found.append(("requests whose caches are there after the load", f"{summary.held:.0f}"))
    found.append(("this client was late by at most", seconds(run.lag_s)))
    return found


def warnings(run: Run, summary: Summary) -> list[str]:
    """What a reader must know before the numbers."""
    found = [f"{count} × {message}" for message, count in summary.messages]
    if not summary.outcomes["complete"]:
        found.append("No request was answered.")
    if summary.kv_left_bytes or summary.held:
        found.append("After the load the server still has memory of requests: a leak, or another client's.")
    if summary.kv_left_bytes is None and any("kv_reserved_bytes" in each.gauges for each in run.moments):
        found.append("After the load the server did not say what memory requests have.")
    few = [line for line in summary.lines if line.count < _FEW]
    if few:
        found.append(
            f"Of fewer than {_FEW} requests, the p99 of TTFT and e2e is little else than the largest."
        )
    if summary.total.cached:
        found.append(f"{summary.total.cached} prompts began like an earlier one, and were not read in full.")
    if summary.late:
        found.append(
            f"{summary.late} requests were due before a stream was free: the endpoint was behind the rate."
        )
    if run.lag_s > _LATE_S:
        found.append(
            f"This client was late by up to {seconds(run.lag_s)}: no gap is known to better than that."
        )
    return found


def _row(line: Line) -> list[str]:
    return [
        "all" if line.length is None else short_length(line.length),
        line.method or "–",
        str(line.count),
        *_cells(line.ttft),
        *_cells(line.itl),
        seconds(line.itl.most if line.itl else None),
        *_cells(line.e2e),
        percent(line.score),
    ]


def _cells(found: Spread | None) -> Sequence[str]:
    return [seconds(value) for value in ((None,) * 3 if found is None else (found.p50, found.p90, found.p99))]


def _signed(size: int) -> str:
    return f"{'−' if size < 0 else '+'}{abs(size) / 2**20:.1f} MiB"


def _markdown(run: Run, summary: Summary) -> Iterator[str]:
    yield from ("# Load", "", headline(run, summary), "")
    for warning in warnings(run, summary):
        yield from (f"> {cell_text(warning)}", "")
    yield from (*table(HEAD, rows(summary)), "")
    yield "TTFT, e2e: from sending a request to its first text, to its end. gap: between two chunks."
    yield from ("", *table(("what", "value"), figures(run, summary)), "")
    yield from ("## Provenance", "", *table(("what", "value"), _provenance(run)))


def _provenance(run: Run) -> list[tuple[str, str]]:
    settings, start = run.settings, run.provenance
    hardware = start.get("hardware", {})
    shown = [
        ("started", facts.day(start.get("started_unix_s"))),
        ("command", " ".join(map(str, start.get("command", ())))),
        ("code", facts.commit(start)),
        ("this machine", f"{hardware.get('cpu')}, {hardware.get('cpu_cores')} cores" if hardware else ""),
        ("server", str(start.get("config", {}).get("serve") or settings.url)),
        ("changed in its configuration", ", ".join(start.get("config", {}).get("set") or ())),
        ("prompts", f"{settings.lengths_text} (tokens:share), seed {settings.seed}, {settings.path}"),
        ("streams", str(settings.streams)),
        ("rate", "as streams are free" if settings.rate is None else f"{number(settings.rate)} requests/s"),
        ("answers", f"at most {settings.max_tokens} tokens{', not ended before' * settings.ignore_eos}"),
        ("method", settings.method or "chosen by the endpoint"),
    ]
    return [(name, value) for name, value in shown if value]
