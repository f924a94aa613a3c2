"""Which colour and marker a method has in every plot and table, and when there are too many for a legend."""

from __future__ import annotations

import itertools

from jobs.reporting.summary import ModelSummary

# Okabe and Ito's palette first: told apart with any colour vision; every method also has its own marker.
_STYLE = {
    "dense": ("#3f4a56", "o"),
    "spts": ("#0072b2", "D"),
    "random": ("#d55e00", "^"),
    "recency": ("#b0579c", "v"),
}
_SPARE_COLOURS = ("#009e73", "#b58900", "#56b4e9", "#7a5195", "#8c564b", "#e377c2", "#4c9f38", "#c0392b",
                  "#17a2b8", "#a0a000", "#6b6ecf", "#e6842a", "#2f6f4f", "#ad494a", "#1f4e79",
                  "#9467bd", "#637939", "#d6616b", "#5b5b9a")  # fmt: skip
_SPARE_MARKERS = ("s", "P", "X", "*", "h", "p", "<", ">", "d")  # 19 and 9: pairs repeat after 171 methods
MANY = 8  # more methods than this are numbered, and whiskers would hide one another


def colours(model: ModelSummary) -> dict[str, tuple[str, str]]:
    """Colour and marker of each label; the same method has the same ones in every report."""
    spare = zip(itertools.cycle(_SPARE_COLOURS), itertools.cycle(_SPARE_MARKERS), strict=False)
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


def numbered(model: ModelSummary) -> bool:
    """Whether plots show numbers for methods, to be read in the page's own list, in place of a legend."""
    return len(model.labels) > MANY
