"""How a report words its numbers, what it says of them in a sentence, and what it warns of."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobs.reporting.stats import Estimate
    from jobs.reporting.summary import Line, ModelSummary, Results

_PER_CENT = "\N{NO-BREAK SPACE}%"  # a number never stands on one line and its sign on the next
_FEW_METHODS = 4
_FEW_CONTEXTS = 10


def short_length(length: int) -> str:
    """1024 -> "1K", 1000 -> "1000"."""
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def percent(value: float | None) -> str:
    """0.9349 -> "93.5"; nothing -> an en dash."""
    return "–" if value is None else f"{100 * value:.1f}"


def share(value: float | None) -> str:
    """0.441 -> "44 %"."""
    return "–" if value is None else f"{100 * value:.0f}{_PER_CENT}"


def points(value: float) -> str:
    """-0.021 -> "−2.1", with its sign."""
    return f"{100 * value:+.1f}".replace("-", "−").replace("+0.0", "±0.0").replace("−0.0", "±0.0")


def seconds(value: float | None) -> str:
    """0.00123 -> "1.2 ms", 0.0123 -> "12 ms", 1.234 -> "1.23 s"."""
    if value is None:
        return "–"
    if value < 0.00995:
        return f"{1000 * value:.1f} ms"
    return f"{1000 * value:.0f} ms" if value < 0.9995 else f"{value:.2f} s"


def times(value: float | None) -> str:
    """2.283 -> "2.28×"."""
    return "–" if value is None else f"{value:.2f}×"


def number(value: float | None) -> str:
    """12.34 -> "12.3"."""
    return "–" if value is None else f"{value:.1f}"


def nats(value: float | None) -> str:
    """0.01234 -> "0.0123"."""
    return "–" if value is None else f"{value:.4f}"


def bytes_text(value: float | None) -> str:
    """3 * 2**30 -> "3.00 GiB", 5.25 * 2**20 -> "5.25 MiB", 300 * 2**10 -> "300 KiB"."""
    if value is None:
        return "–"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 999.5 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.{0 if value >= 99.95 or unit == 'B' else 1 if value >= 9.995 else 2}f} {unit}"


def probability(value: float) -> str:
    """A p-value: 0.0213 -> "0.021", 0.00002 -> "< 0.001"."""
    return "<\N{NO-BREAK SPACE}0.001" if value < 0.001 else f"{value:.3f}"


def visible(text: str | None) -> str:
    """A model's output on one line, with nothing in it that a terminal or a page could obey."""
    return "".join(map(_visible, text or ""))


def _visible(c: str) -> str:
    if c.isprintable() or unicodedata.category(c) == "Zs":  # spaces of all widths only take room
        return c
    return "⏎" if c == "\n" else "\N{REPLACEMENT CHARACTER}"


def interval(estimate: Estimate) -> str:
    """Ends of an interval, in percent: "90.7–96.0"."""
    return f"{percent(estimate.low)}–{percent(estimate.high)}"


def difference(delta: Estimate | None) -> str:
    """A paired difference with its interval, in points: "−0.9 [−2.1, +0.3]"."""
    return "–" if delta is None else f"{points(delta.value)} [{points(delta.low)}, {points(delta.high)}]"


def headline(model: ModelSummary) -> str:
    """What the numbers say, in two or three sentences."""
    others = [
        model.overall[label] for label in model.labels if label != model.baseline and label in model.overall
    ]
    if not others:
        return ""
    base = model.overall.get(model.baseline) if model.baseline else None
    if len(others) > _FEW_METHODS:
        return " ".join(_many(others, base, model))
    first, *rest = sorted(others, key=lambda line: line.method != "spts")
    text = f"{first.label} scores {percent(first.score.value)}{_PER_CENT}"
    text += f" where {base.label} scores {percent(base.score.value)}{_PER_CENT}" if base else ""
    text += f", with {share(first.costs.flop_share)} of the dense prefill FLOP"
    text += f" and {share(first.costs.kv_share)} of the KV cache"
    speedup = first.costs.speedup
    text += f"; its first token comes {times(speedup)} as fast." if speedup else "."
    if rest:
        parts = [
            f"{line.label} scores {percent(line.score.value)}{_PER_CENT} with {share(line.costs.flop_share)}"
            for line in rest
        ]
        text += f" For comparison, {'; '.join(parts)} of the FLOP."
    return text


def _many(others: list[Line], base: Line | None, model: ModelSummary) -> Iterator[str]:
    best, worst = (pick(others, key=lambda line: line.score.value) for pick in (max, min))
    yield f"{len(others)} methods" + (
        f" beside {base.label}, which scores {percent(base.score.value)}{_PER_CENT}." if base else "."
    )
    for what, line in (("highest", best), ("lowest", worst)):
        yield (
            f"The {what} score is {percent(line.score.value)}{_PER_CENT}, of {line.label}, "
            f"with {share(line.costs.flop_share)} of the dense prefill FLOP."
        )


def corrected(model: ModelSummary) -> str:
    """Which differences stand when all methods of a report are tested at once; "" for fewer than two."""
    from jobs.reporting.summary import SIGNIFICANT

    if len(model.comparisons) < 2:
        return ""
    below: list[str] = []
    above: list[str] = []
    open_ones: list[str] = []
    for label, test in model.comparisons.items():
        delta = model.overall[label].delta
        assert delta is not None, "a test has a difference to test"
        stands = test.holm <= SIGNIFICANT
        (open_ones if not stands else below if delta.value < 0 else above).append(label)
    told = [
        f"{_listed(labels)} {'scores' if len(labels) == 1 else 'score'} {where} {model.baseline}"
        for labels, where in ((below, "below"), (above, "above"))
        if labels
    ]
    if open_ones:
        told.append(f"no difference is shown for {_listed(open_ones)}")
    return (
        f"{len(model.comparisons)} methods are compared with {model.baseline}. After Holm's correction for "
        f"that (5{_PER_CENT} for all together), {'; '.join(told)}."
    )


def _listed(parts: list[str]) -> str:
    """All of a few, the first of many."""
    left_out = len(parts) - _FEW_METHODS
    return ", ".join(parts[:_FEW_METHODS]) + (f" and {left_out} more" if left_out > 0 else "")


def warnings(results: Results) -> list[str]:
    """What a reader must know before the numbers: missing and failed samples, rows of unequal origin."""
    found = []
    if results.done < results.planned:
        found.append(
            f"Incomplete: {results.done} of {results.planned} samples are done. "
            "Run the same command again to add the rest."
        )
    for task, why in results.unscored.items():
        found.append(f"Task {task} is not scored and in no number: {why}.")
    if results.failed:
        number = len(results.failed)
        found.append(f"{number} sample{'s' if number > 1 else ''} failed and counted as a score of 0.")
    used = {one.row.run for model in results.models for one in model.scored}
    starts = [start for start in results.starts if start.get("run") in used]
    for what, recorded in (
        ("code", [start.get("code") for start in starts]),
        ("package versions", [(start.get("versions"), _engine(start, "versions")) for start in starts]),
        ("hardware", [(start.get("hardware"), _engine(start, "accelerator")) for start in starts]),
    ):
        if len(set(map(repr, recorded))) > 1:
            found.append(
                f"The rows come from {len(starts)} starts with different {what}; see the provenance."
            )
    in_flight = max(
        (start.get("config", {}).get("engine", {}).get("in_flight", 1) for start in starts), default=1
    )
    if in_flight > 1:
        found.append(
            f"Each engine answered up to {in_flight} prompts at a time: "
            "times include waiting for one another."
        )
    for model in results.models:
        found += _of_model(model)
    return found


def _engine(start: Mapping[str, Any], key: str) -> Any:
    return (start.get("engine") or {}).get(key)


def _of_model(model: ModelSummary) -> Iterator[str]:
    lines = list(model.overall.values())
    others = [
        f"{line.label} {abs(100 * (line.costs.answer_ratio - 1)):.0f}{_PER_CENT} "
        f"{'shorter' if line.costs.answer_ratio < 1 else 'longer'}"
        for line in lines
        if line.costs.lengths_differ and line.costs.answer_ratio is not None
    ]
    if others:
        yield (
            f"Answers are not as long as those of {model.baseline} to the same samples: {_listed(others)}. "
            "Compare whole times at equal tokens, not as they came."
        )
    reused = [
        f"{line.costs.reused} of {line.score.count} with {line.label}" for line in lines if line.costs.reused
    ]
    if reused:
        yield (
            f"Prompts that began with a text kept from a prompt before: {_listed(reused)}. They have no time "
            "to first token of their own and are left out of times and speed-ups."
        )
    few = min((line.score.clusters for line in lines if line.score.clusters < line.score.count), default=None)
    if few is not None and few < _FEW_CONTEXTS:
        yield (
            f"The samples of {model.model} come from only {few} contexts: intervals from so few are too "
            "narrow."
        )
