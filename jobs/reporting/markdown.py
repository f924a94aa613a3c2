"""A report as GitHub Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from jobs.reporting.facts import STARTS_HEAD, facts, starts_table
from jobs.reporting.summary import Line, ModelSummary, Results
from jobs.reporting.wording import (
    bytes_text,
    corrected,
    difference,
    headline,
    interval,
    nats,
    number,
    percent,
    probability,
    seconds,
    share,
    short_length,
    times,
    visible,
    warnings,
)

_MANY_TASKS = 6


def markdown(results: Results) -> str:
    """All tables of a report."""
    parts = [f"# Sweep {cell_text(results.plan.name)}", ""]
    parts += [f"> {cell_text(warning)}\n" for warning in warnings(results)]
    for model in results.models:
        parts += [f"## {cell_text(model.model)}", "", *_model(model)]
    parts += ["## Provenance", "", *table(("what", "value"), facts(results)), ""]
    parts += [*table(STARTS_HEAD, starts_table(results)), ""]
    parts += [
        "Scores in % with 95 % intervals (Wilson, or bootstrap over contexts; MOVER for means of tasks); "
        "differences in points against dense on the same samples. Failed samples count as 0. The page "
        "report.html explains every number.",
        "",
    ]
    return "\n".join(parts)


def _model(model: ModelSummary) -> Iterator[str]:
    for sentence in (headline(model), corrected(model)):
        if sentence:
            yield cell_text(sentence)
            yield ""
    yield from _scores(model)
    yield from ("", "### Measured cost", "")
    yield from _costs(model)
    yield from ("", "### Score by task", "")
    yield from _by_task(model)
    tasks: list[str | None] = [None]
    if len(model.lengths) > 1 and len(model.tasks) <= _MANY_TASKS:
        tasks += model.tasks
    for task in tasks:
        yield from ("", f"### Score by length: {cell_text(task or 'all tasks')}", "")
        yield from _by_length(model, task)
    yield ""


def _scores(model: ModelSummary) -> Iterator[str]:
    rows = []
    for label in model.labels:
        if line := model.overall.get(label):
            test = model.comparisons.get(label)
            rows.append([
                label, f"**{percent(line.score.value)}**", interval(line.score), difference(line.delta),
                *((probability(test.p), probability(test.holm)) if test else ("–", "–")),
                str(line.score.count), str(line.score.clusters), str(line.failed),
            ])  # fmt: skip
    yield from table(("method", "score", "95 %", f"against {model.baseline or 'dense'}", "p", "p (Holm)",
                      "samples", "contexts", "failed"), rows)  # fmt: skip


def _costs(model: ModelSummary) -> Iterator[str]:
    lines = [line for label in model.labels if (line := model.overall.get(label))]
    columns: list[tuple[str, list[str]]] = [
        ("method", [line.label for line in lines]),
        ("FLOP", [share(line.costs.flop_share) for line in lines]),
        ("KV", [share(line.costs.kv_share) for line in lines]),
        ("TTFT", [seconds(line.costs.ttft_s) for line in lines]),
        ("TTFT ×", [times(line.costs.speedup) for line in lines]),
        ("TPOT", [seconds(line.costs.tpot_s) for line in lines]),
        ("end to end", [seconds(line.costs.total_s) for line in lines]),
        (
            "end to end ×",
            [times(line.costs.e2e_speedup) + "\\*" * line.costs.lengths_differ for line in lines],
        ),
        ("× at equal tokens", [times(line.costs.equal_speedup) for line in lines]),
        ("answer tokens", [number(line.costs.answer_tokens) for line in lines]),
    ]
    if any(line.costs.reused for line in lines):
        columns.append(("FLOP after reuse", [share(line.costs.done_share) for line in lines]))
    if any(line.costs.peak_memory_bytes for line in lines):
        columns.append(("peak memory", [bytes_text(line.costs.peak_memory_bytes) for line in lines]))
    if any(line.costs.rank_mean is not None for line in lines):
        columns.append(("KL, nats", [nats(line.costs.kl_nats) for line in lines]))
        columns.append(("mean rank", [number(line.costs.rank_mean) for line in lines]))
        columns.append(("median rank", [number(line.costs.rank_median) for line in lines]))
    yield from table([name for name, _ in columns], zip(*(values for _, values in columns), strict=True))
    yield ""
    yield (
        "FLOP, KV: share of a dense prefill. ×: as fast as dense, median over samples. \\*: answers are more "
        "than 5 % longer or shorter than dense's."
    )


def _by_task(model: ModelSummary) -> Iterator[str]:
    labels = [label for label in model.labels if label in model.overall]
    rows = [[task, *(_score(model.by_task.get((label, task))) for label in labels)] for task in model.tasks]
    for family in dict.fromkeys(family for _, family in model.families):
        means = [model.families.get((label, family)) for label in labels]
        rows.append([
            f"**mean of {family}**",
            *(f"**{percent(one.score.value)}** ({interval(one.score)})" if one else "–" for one in means),
        ])  # fmt: skip
    yield from table(("task", *labels), rows)


def _by_length(model: ModelSummary, task: str | None) -> Iterator[str]:
    rows = []
    for label in model.labels:
        lines = [
            model.by_length.get((label, length)) if task is None else model.cells.get((label, task, length))
            for length in model.lengths
        ]
        rows.append([label, *map(_score, lines)])
    yield from table(("method", *map(short_length, model.lengths)), rows)


def _score(line: Line | None) -> str:
    return f"{percent(line.score.value)} ({interval(line.score)})" if line else "–"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """The lines of a table, its first column to the left and the others to the right."""
    yield "| " + " | ".join(map(cell_text, head)) + " |"
    yield "|---|" + "---:|" * (len(head) - 1)
    for row in rows:
        yield "| " + " | ".join(map(cell_text, row)) + " |"


def cell_text(text: str) -> str:
    """Text that can neither end a cell nor begin a tag, a link, an image or code.

    Entities where the text may bring its own backslash, which would undo one of ours.
    """
    text = visible(text).replace("|", "\\|").replace("<", "&lt;")
    return text.replace("](", "]&#40;").replace("`", "&#96;")
