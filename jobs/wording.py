"""How a report words its numbers, what it says of them in a sentence, and what it warns of."""

from __future__ import annotations

from jobs.stats import Estimate
from jobs.summary import ModelSummary, Results

_PER_CENT = "\N{NO-BREAK SPACE}%"  # a number never stands on one line and its sign on the next


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
    """0.0123 -> "12 ms", 1.234 -> "1.23 s"."""
    if value is None:
        return "–"
    return f"{1000 * value:.0f} ms" if value < 0.9995 else f"{value:.2f} s"


def times(value: float | None) -> str:
    """2.283 -> "2.28×"."""
    return "–" if value is None else f"{value:.2f}×"


def visible(text: str | None) -> str:
    """A model's output on one line, with nothing in it that a terminal or a page could obey."""
    return "".join(
        c if c.isprintable() else "⏎" if c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text or ""
    )


def interval(estimate: Estimate) -> str:
    """Ends of an interval, in percent: "90.7–96.0"."""
    return f"{percent(estimate.low)}–{percent(estimate.high)}"


def headline(model: ModelSummary) -> str:
    """What the numbers say, in two sentences."""
    others = [
        model.overall[label] for label in model.labels if label != model.baseline and label in model.overall
    ]
    if not others:
        return ""
    first, *rest = sorted(others, key=lambda line: line.method != "spts")
    base = model.overall.get(model.baseline) if model.baseline else None
    text = f"{first.label} scores {percent(first.score.value)}{_PER_CENT}"
    text += f" where {base.label} scores {percent(base.score.value)}{_PER_CENT}" if base else ""
    text += f", with {share(first.flop_share)} of the dense prefill FLOP"
    text += f" and {share(first.kv_share)} of the KV cache"
    text += f"; its first token comes {times(first.speedup)} as fast." if first.speedup else "."
    if rest:
        parts = [
            f"{line.label} scores {percent(line.score.value)}{_PER_CENT} with {share(line.flop_share)}"
            for line in rest
        ]
        text += f" For comparison, {'; '.join(parts)} of the FLOP."
    return text


def warnings(results: Results) -> list[str]:
    """What a reader must know before the numbers: missing and failed samples, rows of unequal origin."""
    found = []
    if results.done < results.planned:
        found.append(
            f"Incomplete: {results.done} of {results.planned} samples are done. "
            "Run the same command again to add the rest."
        )
    if results.failed:
        number = len(results.failed)
        found.append(f"{number} sample{'s' if number > 1 else ''} failed and counted as a score of 0.")
    used = {one.row.run for model in results.models for one in model.scored}
    starts = [start for start in results.starts if start.get("run") in used]
    for key, what in (("code", "code"), ("versions", "package versions"), ("hardware", "hardware")):
        if len({repr(start.get(key)) for start in starts}) > 1:
            found.append(
                f"The rows come from {len(starts)} starts with different {what}; see the provenance."
            )
    return found
