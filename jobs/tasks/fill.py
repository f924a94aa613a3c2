"""How much of a haystack fits into a prompt: the most units, found with few tokenisations."""

from __future__ import annotations

from collections.abc import Callable

from jobs.tasks.base import Tokens
from spts.errors import ConfigError


def fill(
    render: Callable[[int], str],
    *,
    tokens: Tokens,
    room: int,
    fewest: int,
    guess: int,
) -> int | None:
    """The most units with which the rendered text has at most `room` tokens; None = not even the fewest fit.

    A text's tokens grow almost evenly with its units, so each try is drawn from a straight line through the
    tries before it: never more than eight times as far, and halving what is left where the line leads astray.
    With a good guess that is two or three tokenisations of the whole text, at any length.

    Args:
        render: the text with so many units.
        tokens: counts its tokens.
        room: tokens that the text may have.
        fewest: units that the text cannot do without.
        guess: where to look first, such as the answer for a text of the same kind.
    """

    # `encode` and not `count`: a count is remembered with its text, and these are as long as a prompt.
    def size(units: int) -> int:
        return len(tokens.encode(render(units)))

    smallest = size(fewest)
    if smallest > room:
        return None
    low, low_size, high, high_size = fewest, smallest, None, 0
    tried, num_tries = max(guess, fewest + 16), 0
    while high is None or high - low > 1:
        tried_size = size(tried)
        num_tries += 1
        if tried_size <= room:
            low, low_size = tried, tried_size
        else:
            high, high_size = tried, tried_size
        if high is None:
            per_unit = max((low_size - smallest) / (low - fewest), 1e-3)
            tried = min(low + max(1, int((room - low_size) / per_unit)), 8 * low)
        elif num_tries < 12:
            share = (room - low_size) / (high_size - low_size)
            tried = min(low + max(1, int(share * (high - low))), high - 1)
        else:
            tried = (low + high) // 2
    return low


def no_room(task: str, length: int, enough: int) -> ConfigError:
    """The error for a length that not even the smallest prompt of a task fits into."""
    return ConfigError(
        f"length must leave room for the smallest prompt of task {task!r}, got {length} tokens; "
        f"use at least {enough}",
        field="length",
    )
