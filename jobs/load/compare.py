"""Two runs of a load side by side: what was set differently, and the times of both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from jobs.disk.record import write_file
from jobs.load.record import Run
from jobs.load.report import headline
from jobs.load.summary import Spread, Summary
from jobs.reporting.markdown import cell_text, table
from jobs.reporting.page import environment
from jobs.reporting.terminal import new_table
from jobs.reporting.wording import seconds, short_length, times

HEAD = ("what", "n 1", "n 2", "p50 1", "p50 2", "p99 1", "p99 2", "longest 1", "longest 2", "p99 1 / 2")
CHANGES_HEAD = ("set differently", "1", "2")
# Columns for a terminal, which is not as wide as a page.
_NARROW = (0, 1, 2, 5, 6, 7, 8, 9)
_NOT_COMPARED = ("url", "tokenizer")


@dataclass(frozen=True, kw_only=True)
class Loads:
    """Two runs and their summaries."""

    runs: tuple[Run, Run]
    summaries: tuple[Summary, Summary]
    folders: tuple[Path, Path]

    @property
    def changes(self) -> list[list[str]]:
        """Settings and configuration keys that differ, with both values."""
        first, second = (_set(run) for run in self.runs)
        return [
            [name, first.get(name, "–"), second.get(name, "–")]
            for name in dict.fromkeys((*first, *second))
            if first.get(name) != second.get(name)
        ]

    @property
    def rows(self) -> list[list[str]]:
        """Times of both runs in the order of HEAD: short prompts while long ones wait, then by length."""
        one, two = (_spreads(summary) for summary in self.summaries)
        return [_row(name, one.get(name), two.get(name)) for name in dict.fromkeys((*one, *two))]

    @property
    def headlines(self) -> list[str]:
        """How each run went."""
        return [
            f"{number}: {headline(run, summary)} ({folder})"
            for number, run, summary, folder in zip(
                (1, 2), self.runs, self.summaries, self.folders, strict=True
            )
        ]


def print_loads(found: Loads, console: Console) -> None:
    """Prints both runs, what differs in their settings, and their times."""
    for line in found.headlines:
        console.print(Text(line))
    tables = [
        ("settings", CHANGES_HEAD, found.changes),
        (
            "times; their medians are in the report",
            [HEAD[column] for column in _NARROW],
            [[row[column] for column in _NARROW] for row in found.rows],
        ),
    ]
    for title, head, rows in tables:
        made = new_table(title, *head)
        for row in rows:
            made.add_row(*map(Text, row))
        if rows:
            console.print(made)


def write_loads(found: Loads) -> Path:
    """Writes compare.md and compare.html into the second run's folder; returns the path of the page."""
    folder = found.folders[1]
    write_file(folder / "compare.md", "\n".join([*_markdown(found), ""]).encode())
    page = folder / "compare.html"
    text = (
        environment()
        .get_template("load_compare.html.j2")
        .render(found=found, head=HEAD, changes_head=CHANGES_HEAD)
    )
    write_file(page, text.encode())
    return page


def _markdown(found: Loads) -> Iterator[str]:
    yield from ("# Two loads compared", "")
    for line in found.headlines:
        yield f"- {cell_text(line)}"
    yield from ("", *table(CHANGES_HEAD, found.changes), "", *table(HEAD, found.rows))


def _set(run: Run) -> dict[str, str]:
    config: Mapping[str, Any] = run.provenance.get("config", {})
    changed = dict(str(each).split("=", 1) for each in config.get("set") or ())
    settings = {name: str(value) for name, value in asdict(run.settings).items() if name not in _NOT_COMPARED}
    return {**settings, "serve": str(config.get("serve")), **changed}


def _spreads(summary: Summary) -> dict[str, Spread | None]:
    found: dict[str, Spread | None] = {}
    if (both := summary.while_long) is not None:
        where = f"{short_length(both.short)} while {short_length(both.long)} waits"
        found |= {f"TTFT, {where}": both.ttft, f"gap, {where}": both.itl}
    for line in (*summary.lines, summary.total):
        name = "all" if line.length is None else short_length(line.length)
        if line.method is not None:
            name += f" {line.method}"
        found |= {f"TTFT, {name}": line.ttft, f"gap, {name}": line.itl, f"e2e, {name}": line.e2e}
    return found


def _row(name: str, one: Spread | None, two: Spread | None) -> list[str]:
    both = (one, two)
    ratio = one.p99 / two.p99 if one is not None and two is not None and two.p99 > 0 else None
    return [
        name,
        *(str(each.count if each else 0) for each in both),
        *(seconds(getattr(each, key) if each else None) for key in ("p50", "p99", "most") for each in both),
        times(ratio),
    ]
