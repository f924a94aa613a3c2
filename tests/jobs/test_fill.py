"""The most units that fit: compared with trying every number of units."""

from __future__ import annotations

import random
from itertools import accumulate

import pytest

from jobs.tasks.fill import fill, no_room


class Characters:
    """A token a character; counts the texts that it was given."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def count(self, text: str) -> int:
        raise AssertionError("a count is remembered with its text: not for whole prompts")

    def encode(self, text: str) -> list[int]:
        self.sizes.append(len(text))
        return list(range(len(text)))

    def decode(self, token_ids) -> str:
        raise NotImplementedError


@pytest.mark.parametrize("guess", [0, 17, 400])
@pytest.mark.parametrize("fewest", [0, 1, 5])
def test_it_is_the_largest_of_all(fewest, guess):
    rng = random.Random(fewest)
    for room in (0, 5, 63, 500, 1000, 20_000):
        sizes = [rng.choice([1, 2, 3, 40, 200]) for _ in range(30_000)]
        ends = [0, *accumulate(sizes)]

        def render(units: int, ends: list[int] = ends) -> str:
            return "x" * ends[units]

        found = fill(render, tokens=Characters(), room=room, fewest=fewest, guess=guess)
        best = max((n for n in range(fewest, len(ends)) if ends[n] <= room), default=None)
        assert found == best


@pytest.mark.parametrize("first", [0, 1, 30])
def test_it_reads_few_whole_texts(first):
    """Also after units that are much shorter than the rest: what is read in all is a few prompts."""

    def render(units: int) -> str:
        return "x" * (units + 60 * max(0, units - first))

    tokens, room = Characters(), 100_000
    units = fill(render, tokens=tokens, room=room, fewest=0, guess=0)
    assert units is not None
    assert sum(tokens.sizes) < 6 * room
    tokens.sizes.clear()
    assert fill(render, tokens=tokens, room=room, fewest=0, guess=units) == units
    assert sum(tokens.sizes) < 2.1 * room


def test_no_room_names_the_length_that_is_enough():
    error = no_room("vt", 9, 400)
    assert str(error) == (
        "length must leave room for the smallest prompt of task 'vt', got 9 tokens; use at least 400"
    )
    assert error.field == "length"
