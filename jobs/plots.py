"""The plots of a report, as SVG texts that need nothing else: no fonts, no scripts, no files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from jobs.stats import Estimate
from jobs.summary import DEPTH_BINS, Line, ModelSummary

# Okabe and Ito's palette: told apart with any colour vision; every method has a marker of its own as well.
_STYLE = {
    "dense": ("#3f4a56", "o"),
    "spts": ("#0072b2", "D"),
    "random": ("#d55e00", "^"),
    "recency": ("#b0579c", "v"),
}
_SPARE = (("#009e73", "s"), ("#b58900", "P"), ("#56b4e9", "X"), ("#7a5195", "*"), ("#8c564b", "h"))
_INK, _FAINT, _GRID = "#39424e", "#7b8794", "#e6eaee"
_RC = {
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
}


def colours(model: ModelSummary) -> dict[str, tuple[str, str]]:
    """Colour and marker of each label; the same method has the same ones in every report."""
    spare = iter(_SPARE * len(model.labels))
    taken: set[str] = set()
    chosen = {}
    for label in model.labels:
        method = model.methods[label]
        if method in _STYLE and method not in taken:
            chosen[label] = _STYLE[method]
            taken.add(method)
        else:
            chosen[label] = next(spare)
    return chosen


def short_length(length: int) -> str:
    """1024 -> "1K", 1000 -> "1000"."""
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def score_by_length(model: ModelSummary, task: str | None = None) -> str:
    """Mean score against prompt length, a line per method, with intervals; of one task, or over all."""
    with matplotlib.rc_context(_RC):
        figure, axes = _figure()
        style = colours(model)
        for label in model.labels:
            lines = _along(model, label, task)
            if lines:
                places = [_dodged(model, label, line.length) for line in lines]
                _error_line(axes, places, [line.score for line in lines], label, style[label])
        _length_axis(axes, model.lengths)
        _score_axis(axes)
        _legend(figure, axes)
        return _svg(figure)


def score_by_cost(model: ModelSummary) -> str:
    """Mean score against the measured share of dense FLOP: a mark per method and length, one overall."""
    with matplotlib.rc_context(_RC):
        figure, axes = _figure()
        style = colours(model)
        for label in model.labels:
            colour, marker = style[label]
            for line in _along(model, label, None):
                if line.flop_share is not None:
                    axes.plot(
                        100 * line.flop_share,
                        100 * line.score.value,
                        marker,
                        color=colour,
                        markersize=4,
                        alpha=0.35,
                    )
            whole = model.overall.get(label)
            if whole is not None and whole.flop_share is not None:
                _error_line(axes, [100 * whole.flop_share], [whole.score], label, style[label], markersize=8)
        front = pareto_front([line for line in model.overall.values() if line.flop_share is not None])
        if len(front) > 1:
            xs = [100 * (line.flop_share or 0) for line in front]
            axes.plot(
                xs, [100 * line.score.value for line in front], "--", color=_FAINT, linewidth=1, zorder=1
            )
        axes.set_xlim(0, 108)
        axes.set_xlabel("prefill FLOP, % of dense (measured)")
        _score_axis(axes)
        _legend(figure, axes)
        return _svg(figure)


def cost_by_length(model: ModelSummary) -> str:
    """Measured share of dense FLOP against prompt length, a line per method."""
    with matplotlib.rc_context(_RC):
        figure, axes = _figure()
        for label in model.labels:
            lines = [line for line in _along(model, label, None) if line.flop_share is not None]
            colour, marker = colours(model)[label]
            shares = [100 * (line.flop_share or 0) for line in lines]
            axes.plot([line.length for line in lines], shares, color=colour, marker=marker, markersize=5,
                      linewidth=1.8, label=label)  # fmt: skip
        _length_axis(axes, model.lengths)
        axes.set_ylim(0, 108)
        axes.set_ylabel("prefill FLOP, % of dense")
        _legend(figure, axes)
        return _svg(figure)


def ttft_by_length(model: ModelSummary) -> str | None:
    """Median time to the first token against prompt length; None where no sample has a time."""
    with matplotlib.rc_context(_RC):
        figure, axes = _figure()
        drawn = False
        for label in model.labels:
            lines = [line for line in _along(model, label, None) if line.ttft_s]
            if lines:
                colour, marker = colours(model)[label]
                xs, ys = [line.length for line in lines], [line.ttft_s for line in lines]
                axes.plot(xs, ys, color=colour, marker=marker, markersize=5, linewidth=1.8, label=label)
                drawn = True
        if not drawn:
            return None
        _length_axis(axes, model.lengths)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
        axes.tick_params(axis="y", which="minor", labelsize=7)
        axes.set_ylabel("time to first token, s (median)")
        _legend(figure, axes)
        return _svg(figure)


def depth_map(model: ModelSummary, label: str) -> str | None:
    """Mean score by the place of the answer and prompt length; None where tasks do not say the place."""
    cells = {(length, row): value for (name, length, row), value in model.depth.items() if name == label}
    if not cells:
        return None
    grid = [[cells.get((length, row), float("nan")) for length in model.lengths] for row in range(DEPTH_BINS)]
    with matplotlib.rc_context({**_RC, "axes.grid": False}):
        figure, axes = _figure(width=3.1, height=2.5)
        axes.imshow(grid, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        for row, values in enumerate(grid):
            for column, value in enumerate(values):
                if value == value:
                    axes.text(
                        column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8,
                        color="white" if value > 0.55 else _INK,
                    )  # fmt: skip
        axes.set_xticks(range(len(model.lengths)), [short_length(length) for length in model.lengths])
        step = 100 // DEPTH_BINS
        axes.set_yticks(range(DEPTH_BINS), [f"{step * i}-{step * (i + 1)}" for i in range(DEPTH_BINS)])
        axes.tick_params(length=0)
        axes.set_ylabel("place, % of prompt")
        for spine in axes.spines.values():
            spine.set_visible(False)
        return _svg(figure)


def pareto_front(lines: Sequence[Line]) -> list[Line]:
    """Those that no other line beats in both score and cost, by falling cost."""
    front: list[Line] = []
    for line in sorted(lines, key=lambda one: (one.flop_share or 0.0, -one.score.value)):
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
    step = model.labels.index(label) - (len(model.labels) - 1) / 2
    return (length or 0) * 1.035**step


def _figure(width: float = 4.6, height: float = 3.1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _error_line(
    axes: Any,
    xs: Sequence[float],
    scores: Sequence[Estimate],
    label: str,
    style: tuple[str, str],
    markersize: float = 5,
) -> None:
    colour, marker = style
    values = [100 * score.value for score in scores]
    below = [100 * max(0.0, score.value - score.low) for score in scores]
    above = [100 * max(0.0, score.high - score.value) for score in scores]
    axes.errorbar(
        xs, values, yerr=[below, above], label=label, color=colour, marker=marker, markersize=markersize,
        linewidth=1.8, elinewidth=1.1, capsize=2.5, markeredgecolor="white", markeredgewidth=0.7,
    )  # fmt: skip


def _length_axis(axes: Any, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(lengths), [short_length(length) for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel("prompt length, tokens")


def _score_axis(axes: Any) -> None:
    axes.set_ylim(-3, 104)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("score, %")


def _legend(figure: Figure, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        handles = [handle[0] if isinstance(handle, tuple) else handle for handle in handles]  # no whiskers
        figure.legend(handles, labels, loc="outside upper left", ncols=min(4, len(labels)), handlelength=1.6,
                      columnspacing=1.2, fontsize=8.5)  # fmt: skip


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue()
