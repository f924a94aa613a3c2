"""The comparison of two runs in a terminal, as Markdown and as one self-contained page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.disk.record import Row, write_file
from jobs.reporting.compare import MethodPair, RunComparison
from jobs.reporting.markdown import cell_text, table
from jobs.reporting.page import environment
from jobs.reporting.wording import difference, percent, seconds, share, visible

MAX_SAMPLES = 20
SCORE_HEAD = ("method", "samples", "same answer", "score 1", "score 2", "difference, points", "95 %")
COST_HEAD = ("method", "FLOP 1", "FLOP 2", "KV 1", "KV 2", "TTFT 1", "TTFT 2", "TPOT 1", "TPOT 2")
UNEXPLAINED = (
    "Nothing that was recorded differs between the two. Where several prompts run at a time, greedy answers "
    "may depend on which ran together."
)


def print_comparison(found: RunComparison, console: Console) -> None:
    """Prints the verdict, what is different, the scores on shared samples and the first other answers."""
    console.print(Text(f"1: {found.first.folder}\n2: {found.second.folder}"))
    console.print(Text(found.verdict, style="bold green" if found.equal else "bold red"))
    if found.changes:
        console.print(_table("recorded differently", ("what", "1", "2"), _changes(found)))
    elif not found.equal:
        console.print(Text(UNEXPLAINED))
    both, first, second = map(len, found.cells)
    console.print(Text(f"cells: {both} in both, {first} only in 1, {second} only in 2"))
    if found.methods:
        console.print(_table("scores on shared samples", SCORE_HEAD, map(score_row, found.methods)))
        console.print(_table("measured cost on shared samples", COST_HEAD, map(cost_row, found.methods)))
    for one, other in islice(found.differing, MAX_SAMPLES):
        console.print(Text(f"{one.cell.label} · {one.planned.sample}", style="bold"))
        console.print(Text(f"  1: {said(one.row)}\n  2: {said(other.row)}"))
    if len(found.differing) > MAX_SAMPLES:
        console.print(Text(f"and {len(found.differing) - MAX_SAMPLES} more"))


def write_comparison(found: RunComparison) -> Path:
    """Writes compare.md and compare.html into the second run's folder; returns the path of the page."""
    folder = found.second.folder
    write_file(folder / "compare.md", "\n".join([*_markdown(found), ""]).encode())
    page = folder / "compare.html"
    text = environment().get_template("compare.html.j2").render(
        found=found, max_samples=MAX_SAMPLES, score_head=SCORE_HEAD, cost_head=COST_HEAD,
        score_rows=[score_row(pair) for pair in found.methods], said=said,
        cost_rows=[cost_row(pair) for pair in found.methods], unexplained=UNEXPLAINED,
    )  # fmt: skip
    write_file(page, text.encode())
    return page


def score_row(pair: MethodPair) -> list[str]:
    """One method's scores in both runs, in the order of SCORE_HEAD."""
    value, _, ends = difference(pair.delta).partition(" ")
    return [pair.name, str(pair.samples), str(pair.same), percent(pair.first.value),
            percent(pair.second.value), value, ends]  # fmt: skip


def cost_row(pair: MethodPair) -> list[str]:
    """One method's costs in both runs, in the order of COST_HEAD."""
    a, b = pair.first_costs, pair.second_costs
    return [pair.name, share(a.flop_share), share(b.flop_share), share(a.kv_share), share(b.kv_share),
            seconds(a.ttft_s), seconds(b.ttft_s), seconds(a.tpot_s), seconds(b.tpot_s)]  # fmt: skip


def said(row: Row) -> str:
    """What a row answers, on one line."""
    if row.error is not None:
        return f"failed: {visible(row.error)}"
    if row.agreement is not None:
        return f"ranks {' '.join(map(str, row.agreement['rank']))}"
    return visible(row.text)


def _changes(found: RunComparison) -> list[list[str]]:
    return [[change.where, change.first, change.second] for change in found.changes]


def _table(title: str, head: tuple[str, ...], rows: Iterable[Sequence[str]]) -> Table:
    made = Table(title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
                 padding=(0, 1, 0, 0))  # fmt: skip
    for index, name in enumerate(head):
        made.add_column(name, justify="right" if index and len(head) > 3 else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(visible(value)) for value in row))
    return made


def _markdown(found: RunComparison) -> Iterator[str]:
    yield f"# {cell_text(found.first.plan.name)} (1) and {cell_text(found.second.plan.name)} (2)"
    yield from (
        "",
        f"1: {cell_text(str(found.first.folder))}  ",
        f"2: {cell_text(str(found.second.folder))}",
        "",
    )
    yield from (f"**{cell_text(found.verdict)}**", "")
    if found.changes:
        yield from table(("recorded differently", "1", "2"), _changes(found))
        yield ""
    elif not found.equal:
        yield from (UNEXPLAINED, "")
    both, first, second = found.cells
    yield from (f"Cells: {len(both)} in both, {len(first)} only in 1, {len(second)} only in 2.", "")
    for name, only in (("1", first), ("2", second)):
        if only:
            yield from (f"Only in {name}:", "", *(f"- {cell_text(cell)}" for cell in only), "")
    if found.methods:
        yield from (*table(SCORE_HEAD, map(score_row, found.methods)), "")
        yield from (*table(COST_HEAD, map(cost_row, found.methods)), "")
        yield from (
            "Difference: 2 less 1 on the same samples. Times of different machines do not compare.",
            "",
        )
    if found.differing:
        rows = [[one.cell.label, one.planned.sample, said(one.row), said(other.row)]
                for one, other in found.differing[:MAX_SAMPLES]]  # fmt: skip
        number = f"{len(rows)} of {len(found.differing)}"
        yield from (f"## Different answers: {number}, those first whose score changed most", "")
        yield from table(("method", "sample", "1", "2"), rows)
