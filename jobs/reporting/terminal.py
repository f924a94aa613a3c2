"""The tables of a report in a terminal: never wider than 80 columns unless a name is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.reporting.summary import ModelSummary, Results
from jobs.reporting.wording import (
    corrected,
    interval,
    nats,
    number,
    percent,
    points,
    probability,
    seconds,
    share,
    short_length,
    times,
    warnings,
)

T = TypeVar("T")

_LENGTHS_A_TABLE = 5
_LABELS_A_TABLE = 5
_MANY_TASKS = 4


def terminal(results: Results, console: Console) -> None:
    """Prints scores by length, by task if there are many, the differences, and what each method costs."""
    for model in results.models:
        for table in _tables(results.plan.name, model):
            console.print(table)
        if sentence := corrected(model):
            console.print(Text(sentence))
    for warning in warnings(results):
        console.print(Text(warning, style="yellow"))


def _tables(name: str, model: ModelSummary) -> Iterator[Table]:
    labels = [label for label in model.labels if label in model.overall]
    for lengths in _parts(model.lengths, _LENGTHS_A_TABLE):
        yield _scores(f"{name}, {model.model}: score in %, all tasks", model, labels, lengths)
    if len(model.tasks) > _MANY_TASKS:
        for some in _parts(labels, _LABELS_A_TABLE):
            yield _by_task(f"{name}, {model.model}: score in % by task", model, some)
    yield _differences(model, labels)
    yield _costs(model, labels)
    if any(model.overall[label].costs.rank_mean is not None for label in labels):
        yield _agreement(model, labels)


def _scores(title: str, model: ModelSummary, labels: Sequence[str], lengths: Sequence[int]) -> Table:
    table = new_table(title, "method", *map(short_length, lengths), "all", "95 %", "failed")
    for label in labels:
        line = model.overall[label]
        cells = [model.by_length.get((label, length)) for length in lengths]
        table.add_row(
            Text(label),
            *(percent(cell.score.value) if cell else "–" for cell in cells),
            Text(percent(line.score.value), style="bold"),
            interval(line.score),
            str(line.failed),
        )
    return table


def _by_task(title: str, model: ModelSummary, labels: Sequence[str]) -> Table:
    table = new_table(title, "task", *labels)
    for task in model.tasks:
        lines = [model.by_task.get((label, task)) for label in labels]
        table.add_row(Text(task), *(percent(line.score.value) if line else "–" for line in lines))
    for family in dict.fromkeys(family for _, family in model.families):
        means = [model.families.get((label, family)) for label in labels]
        table.add_row(
            Text(f"mean of {family}", style="bold"),
            *(Text(percent(mean.score.value) if mean else "–", style="bold") for mean in means),
        )
    return table


def _differences(model: ModelSummary, labels: Sequence[str]) -> Table:
    baseline = model.baseline or "dense"
    table = new_table(f"against {baseline} on the same samples, in points", "method", "difference",
                      "95 %", "p", "p (Holm)", "samples", "contexts")  # fmt: skip
    for label in labels:
        line, test = model.overall[label], model.comparisons.get(label)
        delta = line.delta
        table.add_row(
            Text(label),
            points(delta.value) if delta else "–",
            f"{points(delta.low)} … {points(delta.high)}" if delta else "–",
            *((probability(test.p), probability(test.holm)) if test else ("–", "–")),
            str(line.score.count),
            str(line.score.clusters),
        )
    return table


def _costs(model: ModelSummary, labels: Sequence[str]) -> Table:
    title = "measured cost; FLOP and KV as a share of dense, × as fast as dense"
    table = new_table(title, "method", "FLOP", "KV",
                   "TTFT", "×", "TPOT", "e2e", "×", "equal", "tokens")  # fmt: skip
    for label in labels:
        costs = model.overall[label].costs
        table.add_row(
            Text(label),
            share(costs.flop_share),
            share(costs.kv_share),
            seconds(costs.ttft_s),
            times(costs.speedup),
            seconds(costs.tpot_s),
            seconds(costs.total_s),
            times(costs.e2e_speedup) + ("*" if costs.lengths_differ else ""),
            times(costs.equal_speedup),
            number(costs.answer_tokens),
        )
    if any(model.overall[label].costs.lengths_differ for label in labels):
        table.caption = "* answers differ in length by more than 5 %; equal: at as many tokens as dense"
    return table


def _agreement(model: ModelSummary, labels: Sequence[str]) -> Table:
    table = new_table("agreement with dense, per token", "method", "KL, nats", "mean rank", "median rank")
    for label in labels:
        costs = model.overall[label].costs
        table.add_row(Text(label), nats(costs.kl_nats), number(costs.rank_mean), number(costs.rank_median))
    return table


def new_table(title: str, first: str, *columns: str) -> Table:
    """A table without rows: the first column to the left, the others to the right."""
    table = Table(
        title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0), caption_justify="left",
    )  # fmt: skip
    table.add_column(first, overflow="fold", min_width=8)
    for name in columns:
        table.add_column(Text(name), justify="right", no_wrap=len(name) < 10, overflow="fold")
    return table


def _parts(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]
