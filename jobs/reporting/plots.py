"""The plots of a report, as SVG texts that need nothing else: no fonts, no scripts, no files."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from jobs.reporting.palette import colours, numbered
from jobs.reporting.stats import Estimate
from jobs.reporting.summary import Line, ModelSummary
from jobs.reporting.wording import short_length

_INK, _FAINT, _GRID = "#39424e", "#7b8794", "#e6eaee"
RC = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "svg.fonttype": "path",
    "svg.hashsalt": "report",  # the same results give the same bytes
    "axes.edgecolor": "#c5ccd3",
    "axes.labelcolor": _INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": _GRID,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "legend.frameon": False,
    "text.parse_math": False,  # names are drawn as they are: a dollar sign begins no formula
}


def score_by_length(model: ModelSummary, task: str | None = None) -> str | None:
    """Mean score against prompt length, a line per method, with intervals; of one task, or over all."""
    if len(model.lengths) < 2:
        return None
    with matplotlib.rc_context(RC):
        figure, axes = new_figure()
        style = colours(model)
        for label in model.labels:
            lines = _along(model, label, task)
            if lines:
                places = [_dodged(model, label, line.length) for line in lines]
                _error_line(axes, places, [line.score for line in lines], label, style[label],
                            whiskers=not numbered(model))  # fmt: skip
        length_axis(axes, model.lengths)
        _score_axis(axes)
        _legend(figure, axes, model)
        return svg(figure)


def score_by_task(model: ModelSummary) -> str | None:
    """Mean score of each task over all lengths, a row per task and a mark per method, with intervals."""
    if len(model.tasks) < 2 or numbered(model):
        return None
    with matplotlib.rc_context(RC):
        figure, axes = new_figure(height=max(3.1, 1.1 + 0.27 * len(model.tasks)))
        for place, label in enumerate(model.labels):
            colour, marker = colours(model)[label]
            shift = 0.6 * ((place + 0.5) / len(model.labels) - 0.5)
            found = [(row, model.by_task.get((label, task))) for row, task in enumerate(model.tasks)]
            known = [(row + shift, line.score) for row, line in found if line is not None]
            axes.errorbar(
                [100 * score.value for _, score in known], [row for row, _ in known],
                xerr=_ends([score for _, score in known]), label=label, color=colour, marker=marker,
                markersize=5, linestyle="none", elinewidth=1, markeredgecolor="white", markeredgewidth=0.5,
            )  # fmt: skip
        axes.set_yticks(range(len(model.tasks)), model.tasks)
        axes.set_ylim(len(model.tasks) - 0.5, -0.5)
        axes.set_xlim(-3, 104)
        axes.set_xlabel("score, %")
        axes.grid(visible=False, axis="y")
        _legend(figure, axes, model)
        return svg(figure)


Cost = Callable[[Line], float | None]


def flop_share(line: Line) -> float | None:
    """Share of the dense prefill's FLOP, counted from the work really done."""
    return line.costs.flop_share


def kv_share(line: Line) -> float | None:
    """Share of the bytes in a dense KV cache, after the prefill."""
    return line.costs.kv_share


def ttft_share(line: Line) -> float | None:
    """Share of dense's time to first token, as measured on the same prompts."""
    return None if line.costs.speedup is None else 1 / line.costs.speedup


def score_by_cost(model: ModelSummary, cost: Cost, name: str) -> str | None:
    """Mean score against a measured cost: a mark per method over all samples, small ones per length, and the
    front of those that nothing beats in both. `cost` is a share of dense; None where no method has one."""
    with matplotlib.rc_context(RC):
        figure, axes = new_figure()
        style = colours(model)
        known = [line for line in model.overall.values() if cost(line) is not None]
        if not known:
            return None
        for label in model.labels:
            colour, marker = style[label]
            for line in [] if numbered(model) else _along(model, label, None):
                if (x := cost(line)) is not None:
                    axes.plot(
                        100 * x, 100 * line.score.value, marker, color=colour, markersize=3.5, alpha=0.3
                    )
            whole = model.overall.get(label)
            if whole is not None and (x := cost(whole)) is not None:
                _error_line(axes, [100 * x], [whole.score], label, style[label], markersize=7,
                            whiskers=not numbered(model))  # fmt: skip
                if numbered(model):
                    number = str(model.labels.index(label) + 1)
                    axes.annotate(number, (100 * x, 100 * whole.score.value), xytext=(4, 4),
                                  textcoords="offset points", fontsize=7, color=_INK)  # fmt: skip
        front = pareto_front(known, cost)
        if len(front) > 1:
            axes.plot([100 * (cost(line) or 0) for line in front], [100 * line.score.value for line in front],
                      "--", color=_FAINT, linewidth=1, zorder=1)  # fmt: skip
        axes.margins(x=0.08, y=0.1)
        axes.set_xlabel(name)
        axes.set_ylabel("score, %")
        _legend(figure, axes, model)
        return svg(figure)


def flops_by_length(model: ModelSummary) -> str | None:
    """Measured share of dense FLOP against prompt length, a line per method."""
    if len(model.lengths) < 2:
        return None
    with matplotlib.rc_context(RC):
        figure, axes = new_figure()
        for label in model.labels:
            lines = [line for line in _along(model, label, None) if line.costs.flop_share is not None]
            shares = [100 * (line.costs.flop_share or 0) for line in lines]
            _line(axes, [line.length or 0 for line in lines], shares, label, colours(model)[label])
        length_axis(axes, model.lengths)
        axes.set_ylim(0, 108)
        axes.set_ylabel("prefill FLOP, % of dense")
        _legend(figure, axes, model)
        return svg(figure)


def ttft_by_length(model: ModelSummary) -> str | None:
    """Median time to the first token against prompt length, beside what the cost model predicts (dotted).

    The prediction is dense's time measured at that length times the method's share of dense FLOP, so a solid
    line above its dotted one is time that no matrix product accounts for. None where no sample has a time.
    """
    if len(model.lengths) < 2:
        return None
    with matplotlib.rc_context(RC):
        figure, axes = new_figure()
        measured = {label: [line for line in _along(model, label, None) if line.costs.ttft_s]
                    for label in model.labels}  # fmt: skip
        if not any(measured.values()):
            return None
        for label, lines in measured.items():
            style = colours(model)[label]
            _line(axes, [line.length or 0 for line in lines], [line.costs.ttft_s or 0 for line in lines],
                  label, style)  # fmt: skip
            expected = [
                (line.length or 0, time)
                for line in _along(model, label, None)
                if label != model.baseline and (time := predicted_ttft(model, line)) is not None
            ]
            axes.plot([x for x, _ in expected], [y for _, y in expected], ":", color=style[0], linewidth=1.2)
        length_axis(axes, model.lengths)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
        axes.tick_params(axis="y", which="minor", labelsize=7)
        axes.set_ylabel("time to first token, s (median)")
        _legend(figure, axes, model)
        return svg(figure)


def predicted_ttft(model: ModelSummary, line: Line) -> float | None:
    """Seconds that a method's FLOP alone would take: dense's measured time × the share of dense FLOP."""
    dense = model.by_length.get((model.baseline or "", line.length or 0))
    if dense is None or dense.costs.ttft_s is None or line.costs.flop_share is None:
        return None
    return dense.costs.ttft_s * line.costs.flop_share


def pareto_front(lines: Sequence[Line], cost: Cost) -> list[Line]:
    """Those that no other line beats in both score and cost, by falling cost."""
    front: list[Line] = []
    for line in sorted(lines, key=lambda one: (cost(one) or 0.0, -one.score.value)):
        if not front or line.score.value > front[-1].score.value:
            front.append(line)
    return front[::-1]


def _along(model: ModelSummary, label: str, task: str | None) -> list[Line]:
    found = [
        model.by_length.get((label, length)) if task is None else model.cells.get((label, task, length))
        for length in model.lengths
    ]
    return [line for line in found if line is not None]


def _dodged(model: ModelSummary, label: str, length: int | None) -> float:
    """A little beside the true length, so that intervals of different methods do not hide one another."""
    step = 0.0 if numbered(model) else model.labels.index(label) - (len(model.labels) - 1) / 2
    return (length or 0) * 1.035**step


def new_figure(width: float = 4.6, height: float = 3.1) -> tuple[Figure, Any]:
    """A figure and its axes, inches; to be drawn under `RC`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _line(axes: Any, xs: Sequence[float], ys: Sequence[float], label: str, style: tuple[str, str]) -> None:
    axes.plot(xs, ys, color=style[0], marker=style[1], markersize=5, linewidth=1.6, label=label)


def _error_line(
    axes: Any,
    xs: Sequence[float],
    scores: Sequence[Estimate],
    label: str,
    style: tuple[str, str],
    *,
    markersize: float = 5,
    whiskers: bool = True,
) -> None:
    axes.errorbar(
        xs, [100 * score.value for score in scores], yerr=_ends(scores) if whiskers else None, label=label,
        color=style[0], marker=style[1], markersize=markersize, linewidth=1.8 if whiskers else 1.2,
        elinewidth=1.1, capsize=2.5, markeredgecolor="white", markeredgewidth=0.7,
    )  # fmt: skip


def _ends(scores: Sequence[Estimate]) -> list[list[float]]:
    below = [100 * max(0.0, score.value - score.low) for score in scores]
    above = [100 * max(0.0, score.high - score.value) for score in scores]
    return [below, above]


def length_axis(axes: Any, lengths: Sequence[int]) -> None:
    """Prompt lengths along the bottom, doubling by equal steps."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(lengths), [short_length(length) for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel("prompt length, tokens")


def _score_axis(axes: Any) -> None:
    axes.set_ylim(-3, 104)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("score, %")


def _legend(figure: Figure, axes: Any, model: ModelSummary) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if labels and not numbered(model):
        handles = [handle[0] if isinstance(handle, tuple) else handle for handle in handles]  # no whiskers
        columns = max(1, min(4, len(labels), 52 // (max(map(len, labels)) + 5)))
        figure.legend(handles, labels, loc="outside upper left", ncols=columns,
                      handlelength=1.6, columnspacing=1.2, fontsize=8.5)  # fmt: skip


def svg(figure: Figure) -> str:
    """A figure as the text of an SVG file that needs nothing else."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue()
