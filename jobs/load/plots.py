"""The plots of a load, as SVG texts in the looks of `jobs.reporting.plots`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib

from jobs.load.record import Moment, Run
from jobs.load.summary import Line, Spread, Summary
from jobs.reporting import plots

COLOURS = {"dense": "#3f4a56", "spts": "#0072b2"}
_SPARE = ("#d55e00", "#009e73", "#b0579c", "#b58900", "#56b4e9")
_PERCENTILES = (("p50", "-", "o"), ("p90", "--", "s"), ("p99", ":", "^"))
_FEW_KINDS = 5


def all_plots(run: Run, summary: Summary) -> list[tuple[str, str, str]]:
    """(title, SVG, note) of every plot that the run has data for."""
    drawn = [
        (
            "Time to first token",
            _by_length(summary.lines, lambda line: line.ttft, "time to first token, s"),
            "From sending the request, its wait in the queue included.",
        ),
        (
            "Between tokens",
            _by_length(summary.lines, lambda line: line.itl, "between chunks, ms", 1000),
            "A chunk holds a token, or several where text was held back.",
        ),
        ("Answer tokens over time", _tokens(run), "From chunks and counts of complete answers."),
        ("Requests in the server", _gauges(run.moments), "As /metrics says."),
        ("Memory of the server", _memory(run.moments), "Resident less shared, by kind of process."),
        (
            "KV memory",
            _kv(run.moments),
            "As /metrics says, all engines: what requests hold, what they may take, and documents.",
        ),
    ]
    return [(title, svg, note) for title, svg, note in drawn if svg is not None]


def _by_length(
    lines: Sequence[Line], of: Callable[[Line], Spread | None], label: str, scale: float = 1
) -> str | None:
    known = [line for line in lines if of(line) is not None]
    if not known:
        return None
    with _drawn() as (figure, axes):
        methods = list(dict.fromkeys(line.method for line in known))
        for method, colour in zip(methods, _colours(methods), strict=True):
            own = [(line.length or 0, of(line)) for line in known if line.method == method]
            for name, style, marker in _PERCENTILES:
                axes.plot(
                    [length for length, _ in own],
                    [scale * getattr(found, name) for _, found in own],
                    linestyle=style, marker=marker, markersize=4.5, color=colour,
                    label=f"{method or 'all'} {name}",
                )  # fmt: skip
        plots.length_axis(axes, sorted({line.length or 0 for line in known}))
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
        axes.tick_params(axis="y", which="minor", labelsize=7)
        axes.set_ylabel(label)
        _legend(figure, axes)
        return plots.svg(figure)


def _tokens(run: Run) -> str | None:
    """Answer tokens per second in equal parts of the run, each answer's tokens spread over its chunks."""
    parts = max(1, min(60, round(run.wall_s / 2)))
    width_s = run.wall_s / parts
    counts = [0.0] * parts
    for record in run.records:
        for time_s in record.times_s:
            place = min(parts - 1, int((record.sent_s + time_s) / width_s))
            counts[place] += (record.completion_tokens or len(record.times_s)) / len(record.times_s)
    if not any(counts):
        return None
    with _drawn() as (_, axes):
        axes.stairs(
            [count / width_s for count in counts], [width_s * i for i in range(parts + 1)],
            fill=True, color=COLOURS["spts"], alpha=0.75,
        )  # fmt: skip
        _time_axis(axes, run.wall_s)
        axes.set_ylabel("answer tokens per second")
        return plots.svg(axes.figure)


def _gauges(moments: Sequence[Moment]) -> str | None:
    return _over_time(
        moments,
        {
            "running": [moment.gauges.get("num_requests_running") for moment in moments],
            "waiting": [moment.gauges.get("num_requests_waiting") for moment in moments],
        },
        "requests",
    )


def _kv(moments: Sequence[Moment]) -> str | None:
    names = {"held": "kv_cache_bytes", "reserved": "kv_reserved_bytes", "documents": "kv_document_bytes"}
    found = {text: [moment.gauges.get(name) for moment in moments] for text, name in names.items()}
    series = {text: [None if v is None else v / 2**20 for v in values] for text, values in found.items()}
    return _over_time(moments, series, "MiB")


def _memory(moments: Sequence[Moment]) -> str | None:
    most: dict[str, int] = {}
    for moment in moments:
        for kind, size in moment.memory.items():
            most[kind] = max(most.get(kind, 0), size)
    shown = sorted(most, key=lambda kind: -most[kind])[:_FEW_KINDS]
    known = [moment for moment in moments if moment.memory]
    series: dict[str, list[float | None]] = {
        "all": [sum(moment.memory.values()) / 2**20 for moment in known],
        **{kind: [moment.memory.get(kind, 0) / 2**20 for moment in known] for kind in shown},
    }
    return _over_time(known, series, "MiB")


def _over_time(moments: Sequence[Moment], series: dict[str, list[float | None]], label: str) -> str | None:
    if len(moments) < 2 or all(value is None for values in series.values() for value in values):
        return None
    with _drawn() as (figure, axes):
        for (name, values), colour in zip(series.items(), _colours([None] * len(series)), strict=True):
            known = [(moment.at_s, v) for moment, v in zip(moments, values, strict=True) if v is not None]
            axes.plot([at for at, _ in known], [v for _, v in known], color=colour, linewidth=1.4, label=name)
        _time_axis(axes, moments[-1].at_s)
        axes.set_ylim(bottom=0)
        axes.set_ylabel(label)
        if len(series) > 1:
            _legend(figure, axes)
        return plots.svg(figure)


def _time_axis(axes: Any, end_s: float) -> None:
    axes.set_xlim(0, end_s)
    axes.set_xlabel("seconds from the beginning of the load")


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3,
                  handlelength=1.8, columnspacing=1.2, fontsize=8.5)  # fmt: skip


def _colours(names: Sequence[str | None]) -> list[str]:
    spare = iter([*COLOURS.values(), *_SPARE] if not any(name in COLOURS for name in names) else _SPARE)
    return [COLOURS[name] if name in COLOURS else next(spare) for name in names]


@contextmanager
def _drawn() -> Iterator[tuple[Any, Any]]:
    with matplotlib.rc_context(plots.RC):
        yield plots.new_figure()
