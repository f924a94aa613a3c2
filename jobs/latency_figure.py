"""The figure of one or more runs of jobs.latency: how much faster, and where the time goes.

python -m jobs.latency_figure jobs/results/llama-3.1-8b-*.json --out jobs/results/llama-3.1-8b-h200.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import cycle
from pathlib import Path
from types import UnionType
from typing import Any

from jobs.disk.lines import DiskError
from jobs.disk.record import write_file
from jobs.options import writable_file
from spts.errors import ConfigError, config_error

_INK, _FAINT, _GRID = "#39424e", "#7b8794", "#e6eaee"
_LINES = {
    "spts": ("SPTS", "#0072b2", "D"),
    "pap+ltp": ("PAP + LTP", "#009e73", "s"),
    "pap": ("PAP", "#b58900", "P"),
    "transformers": ("transformers", "#d55e00", "^"),
}
_SPARSE = "spts, density "  # and a share: how `jobs.timing.cases.plan` calls them
_SPARSE_COLOURS = ("#cc79a7", "#8e4585", "#4b2142")
# Kinds of operations from the bottom of a bar up; all that is not listed is summed as the last.
_KINDS = {
    "attention": ("attention", "#0072b2"),
    "gate and up": ("FFN products", "#3f4a56"),
    "down": ("FFN products", "#3f4a56"),
    "q and o": ("q, k, v, o", "#7b8794"),
    "k and v": ("q, k, v, o", "#7b8794"),
    "norms": ("norms, rotation, gate", "#b58900"),
    "rotation": ("norms, rotation, gate", "#b58900"),
    "gated product": ("norms, rotation, gate", "#b58900"),
    "probe": ("choosing tokens", "#d55e00"),
    "proxy": ("choosing tokens", "#d55e00"),
    "select": ("choosing tokens", "#d55e00"),
    "gather": ("choosing tokens", "#d55e00"),
    "scatter": ("choosing tokens", "#d55e00"),
}
_REST = ("all else", "#c5ccd3")
# What is read of each row and part of a report.
_KEYS: Mapping[str, Mapping[str, type | UnionType]] = {
    "rows": {
        "method": str,
        "length_tokens": int,
        "speedup_vs_fastest_dense_ratio": int | float,
        "predicted_speedup_ratio": int | float,
    },
    "parts": {"method": str, "length_tokens": int, "part": str, "seconds": int | float},
}


def draw(reports: Sequence[Mapping[str, Any]], path: Path, *, length: int) -> None:
    """Writes the figure: speed-up over the fastest dense by prompt length, beside the FLOP ratio; the time of
    one prefill of `length` tokens by kind of operation.

    Raises ConfigError when no report has parts for that length, DiskError.
    """
    from matplotlib.figure import Figure

    rows = sorted((row for each in reports for row in each["rows"]), key=lambda row: row["length_tokens"])
    parts = [part for each in reports for part in each["parts"] if part["length_tokens"] == length]
    if not parts:
        run = sorted({part["length_tokens"] for each in reports for part in each["parts"]})
        remedy = f"choose from {', '.join(map(str, run))}" if run else "run jobs.latency with --parts"
        raise config_error("length", "be one that was run with --parts", length, remedy)
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    sparse = sorted({row["method"] for row in rows if row["method"].startswith(_SPARSE)}, reverse=True)
    _ratios(left, rows, sparse)
    _times(right, parts, sparse)
    right.set_title(f"One prefill of {length // 1024}K tokens", loc="left", fontsize=10)
    for axes in (left, right):
        axes.grid(axis="y", color=_GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_INK)
    about = reports[0]
    figure.suptitle(f"{about['model'].split(':')[0]}; {about['hardware'].split(',')[0]}", fontsize=10)
    png = BytesIO()
    figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
    write_file(path, png.getvalue())


def _ratios(axes: Any, rows: Sequence[Mapping[str, Any]], sparse: Sequence[str]) -> None:
    shades = zip(sparse, cycle(_SPARSE_COLOURS))
    lines = {method: (method.replace("spts", "SPTS"), colour, "v") for method, colour in shades}
    labels: dict[float, list[float]] = {}
    for method, (label, colour, marker) in {**lines, **_LINES}.items():
        own = [row for row in rows if row["method"] == method]
        lengths = [row["length_tokens"] / 1024 for row in own]
        ratios = [row["speedup_vs_fastest_dense_ratio"] for row in own]
        axes.plot(lengths, ratios, color=colour, marker=marker, label=label)
        if method == "spts" or method in sparse:
            ideal = [row["predicted_speedup_ratio"] for row in own]
            axes.plot(lengths, ideal, color=colour, linestyle=":")
            for x, ratio in zip(lengths, ratios, strict=True):
                labels.setdefault(x, []).append(ratio)
    axes.plot([], [], color=_INK, linestyle=":", label="FLOP ratio")
    axes.axhline(1.0, color=_FAINT, linewidth=1)
    axes.set_xscale("log", base=2)
    ticks = sorted({row["length_tokens"] for row in rows})
    axes.set_xticks([tick / 1024 for tick in ticks], [f"{tick // 1024}K" for tick in ticks])
    axes.set(xlabel="prompt, tokens", ylabel="time to first token, × as fast as dense", ylim=(0, None))
    apart = axes.get_ylim()[1] / 15
    for x, ratios in labels.items():
        last = float("inf")
        for ratio in sorted(ratios, reverse=True):
            if last - ratio >= apart:  # else it would stand on the one above
                axes.annotate(f"{ratio:.2f}×", (x, ratio), (0, 8), textcoords="offset points", ha="center")
                last = ratio
    axes.set_title("Speed-up over the fastest dense", loc="left", fontsize=10)
    axes.legend(frameon=False, loc="upper left")


def _times(axes: Any, parts: Sequence[Mapping[str, Any]], sparse: Sequence[str]) -> None:
    bars = {"dense": "dense", "spts": "SPTS", **{name: name.replace(_SPARSE, "density\n") for name in sparse}}
    for place, method in enumerate(bars):
        spent: dict[tuple[str, str], float] = {}
        for part in parts:
            if part["method"] == method:
                kind = _KINDS.get(part["part"], _REST)
                spent[kind] = spent.get(kind, 0.0) + part["seconds"] * 1e3
        bottom = 0.0
        for kind in dict.fromkeys((*_KINDS.values(), _REST)):
            height = spent.get(kind, 0.0)
            axes.bar(place, height, 0.6, bottom=bottom, color=kind[1], label=kind[0] if not place else None)
            bottom += height
        axes.annotate(f"{bottom:,.0f} ms", (place, bottom), (0, 4), textcoords="offset points", ha="center")
    axes.set_xticks(range(len(bars)), list(bars.values()))
    axes.set(ylabel="ms", xlim=(-0.5, max(2.4, len(bars) - 0.5)))
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False, loc="upper right")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 for a file that is not there, is no report or cannot be written."""
    args = argparse.ArgumentParser(prog="python -m jobs.latency_figure", description=__doc__.split("\n")[0])
    args.add_argument("reports", type=Path, nargs="+", help="files that jobs.latency --out wrote")
    args.add_argument("--out", type=Path, required=True, help="the PNG to write")
    args.add_argument("--length", type=int, default=32768, help="the prompt whose parts are drawn")
    chosen = args.parse_args(argv)
    try:
        if chosen.out.suffix.lower() != ".png":
            raise config_error("out", "be a PNG file", chosen.out, "end its name in .png")
        writable_file(chosen.out)
        draw([_read(path) for path in chosen.reports], chosen.out, length=chosen.length)
    except (ConfigError, DiskError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _read(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        for key in ("model", "hardware"):
            _check(report[key], key, str)
        for key, kinds in _KEYS.items():
            _check(report[key], key, list)
            for each in report[key]:
                for name, kind in kinds.items():
                    _check(each[name], name, kind)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"reports must be files of jobs.latency --out, got {path} ({error!r}); choose others",
            field="reports",
        ) from None
    return dict(report)


def _check(value: object, name: str, kind: type | UnionType) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {value!r:.60}")


if __name__ == "__main__":
    sys.exit(main())
