"""A comparison of methods at one prompt length: timed runs in turns, rows of a table.

Knows neither torch nor Ray: who is timed is a `Contestant`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

from jobs.aligned import aligned
from jobs.timing.cases import Case
from spts.cost import LayerWork, ModelShape


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One run of a prompt.

    ttft_s: prompt to its next token. tpot_s: mean per token decoded after that, None without one. kv_bytes:
    of the prompt, in use. answer: what it predicts, for comparison between contestants of one kind. work: by
    layer, None where unknown. cpu_s: processor time of the prefill, all threads; None where it says nothing.
    peak_bytes: of a GPU's memory during the run, above what was taken before it; None where unknown.
    """

    ttft_s: float
    tpot_s: float | None
    kv_bytes: int
    answer: Any
    work: tuple[LayerWork, ...] | None
    cpu_s: float | None = None
    peak_bytes: int | None = None


class Contestant(Protocol):
    """Something that can be timed. `follow`: the tokens to decode after the prompt, whatever it predicts."""

    name: str

    def run(self, prompt: Sequence[int], follow: Sequence[int]) -> Timed: ...


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of one method at one length; ratios are medians over rounds of interleaved runs.

    first_ttft_s: of the run before, which compiles what a length is the first to need. end_to_end: first
    token and all later ones. fastest dense: of this library's dense and its rivals the one with the lowest
    median. The ratios by processor time are what other programs on the machine disturb least.
    predicted_peak_bytes: on a rank, None of what is not this library's. attention_density: share of their
    pairs of a query and a key that layers with sparse attention read; 1.0 without any.
    """

    method: str
    length_tokens: int
    repeats: int
    ttft_median_s: float
    ttft_min_s: float
    ttft_max_s: float
    first_ttft_s: float
    tpot_median_s: float | None
    end_to_end_median_s: float
    peak_bytes: int | None
    predicted_peak_bytes: int | None
    kv_bytes: int
    predicted_kv_bytes: int
    predicted_flop: int
    predicted_speedup_ratio: float
    attention_density: float
    achieved_flop_per_s: float
    speedup_vs_dense_ratio: float
    speedup_vs_fastest_dense_ratio: float
    speedup_vs_transformers_ratio: float | None
    end_to_end_speedup_vs_fastest_dense_ratio: float
    prefill_cpu_median_s: float | None
    cpu_speedup_vs_dense_ratio: float | None
    cpu_speedup_vs_transformers_ratio: float | None


@dataclass(frozen=True, kw_only=True)
class Part:
    """Time of one kind of operation in the layers of one stage, in one prefill: "other" is what no kind has.

    layers: "0-9", the first and last of a stage or of the layers before or after all. calls: 0 for "other".
    """

    method: str
    length_tokens: int
    layers: str
    part: str
    seconds: float
    calls: int


def measure(
    case: Case,
    contestants: Sequence[Contestant],
    *,
    warm: Mapping[str, Timed],
    prompt: Sequence[int],
    follow: Sequence[int],
    repeats: int,
    progress: Callable[[], object],
) -> list[Row]:
    """Times every contestant on one prompt, in turns. warm: the run of each that came before."""
    runs = interleave(contestants, prompt, follow, repeats=repeats, progress=progress)
    fastest = min(
        (name for name in runs if name == "dense" or name not in case.flops),
        key=lambda name: median(run.ttft_s for run in runs[name]),
    )
    return [_row(case, name, runs, warm[name], fastest, len(follow)) for name in runs]


def _ratio(
    runs: Mapping[str, Sequence[Timed]], baseline: str, name: str, seconds: Callable[[Timed], float | None]
) -> float | None:
    """How many times faster `name` is, round by round; None without the baseline or the figure."""
    ratios = [
        slow_s / fast_s
        for slow, fast in zip(runs.get(baseline, ()), runs[name], strict=False)
        if (slow_s := seconds(slow)) and (fast_s := seconds(fast))
    ]
    return median(ratios) if ratios else None


def _wall(run: Timed) -> float:
    return run.ttft_s


def _cpu(run: Timed) -> float | None:
    return run.cpu_s


def _row(
    case: Case, name: str, runs: Mapping[str, Sequence[Timed]], warm: Timed, fastest: str, decoded: int
) -> Row:
    def whole(run: Timed) -> float:
        return run.ttft_s + decoded * (run.tpot_s or 0.0)

    timed = runs[name]
    own = name if name in case.flops else "dense"  # rivals compute what dense does
    ttfts = [run.ttft_s for run in timed]
    cpus = [run.cpu_s for run in timed if run.cpu_s is not None]
    speedup, speedup_fastest = _ratio(runs, "dense", name, _wall), _ratio(runs, fastest, name, _wall)
    end_to_end = _ratio(runs, fastest, name, whole)
    assert speedup is not None and speedup_fastest is not None and end_to_end is not None, "dense is timed"
    peaks = [run.peak_bytes for run in timed if run.peak_bytes is not None]
    tpots = [run.tpot_s for run in timed if run.tpot_s is not None]
    return Row(
        method=name,
        length_tokens=case.length,
        repeats=len(timed),
        ttft_median_s=median(ttfts),
        ttft_min_s=min(ttfts),
        ttft_max_s=max(ttfts),
        first_ttft_s=warm.ttft_s,
        tpot_median_s=median(tpots) if tpots else None,
        end_to_end_median_s=median(whole(run) for run in timed),
        peak_bytes=max(peaks) if peaks else None,
        predicted_peak_bytes=None if timed[0].work is None else case.peak_bytes[own],
        kv_bytes=timed[0].kv_bytes,
        predicted_kv_bytes=case.kv_bytes[own],
        predicted_flop=case.flops[own],
        predicted_speedup_ratio=case.flops["dense"] / case.flops[own],
        attention_density=case.pairs_share[own],
        achieved_flop_per_s=case.flops[own] / median(ttfts),
        speedup_vs_dense_ratio=speedup,
        speedup_vs_fastest_dense_ratio=speedup_fastest,
        speedup_vs_transformers_ratio=_ratio(runs, "transformers", name, _wall),
        end_to_end_speedup_vs_fastest_dense_ratio=end_to_end,
        prefill_cpu_median_s=median(cpus) if cpus else None,
        cpu_speedup_vs_dense_ratio=_ratio(runs, "dense", name, _cpu),
        cpu_speedup_vs_transformers_ratio=_ratio(runs, "transformers", name, _cpu),
    )


def work_faults(case: Case, timed: Mapping[str, Timed], shape: ModelShape) -> list[str]:
    """Faults of a run: work or KV bytes that differ from what was predicted. Empty = none."""
    faults = []
    for name, method in case.methods.items():
        run = timed[name]
        expected = method.planned_work(shape.num_layers, case.length)
        if list(run.work or ()) != expected:
            faults.append(f"{name} did other work than its schedule says")
        if run.kv_bytes != case.kv_bytes[name]:
            faults.append(f"{name} keeps {run.kv_bytes} KV bytes, predicted {case.kv_bytes[name]}")
    return faults


def interleave(
    contestants: Sequence[Contestant],
    prompt: Sequence[int],
    follow: Sequence[int],
    *,
    repeats: int,
    progress: Callable[[], object],
) -> dict[str, list[Timed]]:
    """Every contestant `repeats` times, in turns, each round starting with another: drift hits all alike."""
    runs: dict[str, list[Timed]] = {each.name: [] for each in contestants}
    for round_ in range(repeats):
        first = round_ % len(contestants)
        for each in (*contestants[first:], *contestants[:first]):
            runs[each.name].append(each.run(prompt, follow))
            progress()
    return runs


def table(rows: Sequence[Row]) -> str:
    """The rows, aligned. A speed-up is over the fastest dense; `of ideal`: the one over this library's dense,
    as a share of the FLOP ratio; `all`: end to end; `at most`: what `peak GiB` was predicted not to exceed.

    CPU: the same ratios by processor time instead of the clock.
    """
    header = ["tokens", "method", "TTFT s", "min - max", "speed-up", "of ideal", "all", "TFLOP/s"]
    header += ["vs transformers", "CPU: speed-up", "CPU: vs transformers", "TPOT ms", "KV MiB", "predicted"]
    header += ["peak GiB", "at most"]
    lines = [header]
    for row in rows:
        rival, tpot = row.speedup_vs_transformers_ratio, row.tpot_median_s
        by_cpu = (row.cpu_speedup_vs_dense_ratio, row.cpu_speedup_vs_transformers_ratio)
        lines.append(
            [
                str(row.length_tokens),
                row.method,
                f"{row.ttft_median_s:.3f}",
                f"{row.ttft_min_s:.3f} - {row.ttft_max_s:.3f}",
                f"{row.speedup_vs_fastest_dense_ratio:.2f}x",
                f"{row.speedup_vs_dense_ratio / row.predicted_speedup_ratio:.0%}",
                f"{row.end_to_end_speedup_vs_fastest_dense_ratio:.2f}x",
                f"{row.achieved_flop_per_s / 1e12:.3g}",
                "" if rival is None else f"{rival:.2f}x",
                *("" if each is None else f"{each:.2f}x" for each in by_cpu),
                "" if tpot is None else f"{tpot * 1e3:.2f}",
                f"{row.kv_bytes / 2**20:.1f}",
                f"{row.predicted_kv_bytes / 2**20:.1f}",
                *(
                    "" if each is None else f"{each / 2**30:.2f}"
                    for each in (row.peak_bytes, row.predicted_peak_bytes)
                ),
            ]
        )
    return "\n".join(aligned(lines, left=()))


def parts_table(parts: Sequence[Part]) -> str:
    """Milliseconds by kind of operation and stage, a block for each method, aligned."""
    lines: list[list[str]] = []
    for method in dict.fromkeys(part.method for part in parts):
        own = [part for part in parts if part.method == method]
        spans = list(dict.fromkeys(part.layers for part in own))
        spent = {(part.layers, part.part): part.seconds for part in own}
        total = sum(spent.values())
        lines.append([f"{own[0].length_tokens} tokens, {method}, ms", *spans, "all", "share"])
        for kind in dict.fromkeys(part.part for part in own):
            row = [spent.get((span, kind), 0.0) for span in spans]
            lines.append([kind, *(f"{each * 1e3:.2f}" for each in row), f"{sum(row) * 1e3:.2f}"])
            lines[-1].append(f"{sum(row) / total:.1%}")
    columns = max(len(line) for line in lines)
    widths = [max(len(line[i]) if i < len(line) else 0 for line in lines) for i in range(columns)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=False)) for line in lines
    )
