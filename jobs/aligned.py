"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def aligned(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """Rows of a table as lines: columns aligned on the right, those of `left` on the left.

    Worked example: [("a", "10"), ("bc", "9")] gives "a   10" and "bc   9".
    """
    last = len(rows[0]) - 1
    widths = [
        0 if column == last and column in left else max(len(row[column]) for row in rows)
        for column in range(last + 1)
    ]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
