"""What is kept, what goes first, and that bytes are counted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.kept import Kept


def test_worked_example():
    kept: Kept[str] = Kept(10)
    kept.put("a", "A", 4)
    kept.put("b", "B", 4)
    assert kept.get("a") == "A"
    kept.put("c", "C", 4)
    assert (kept.get("a"), kept.get("b"), kept.get("c"), kept.num_bytes) == ("A", None, "C", 8)
    kept.put("d", "D", 11)
    assert (kept.get("a"), kept.get("c"), kept.get("d"), kept.num_bytes) == ("A", "C", None, 8)


def test_nothing_fits_into_nothing():
    kept: Kept[str] = Kept(0)
    kept.put("a", "A", 1)
    assert (kept.get("a"), kept.num_bytes) == (None, 0)


@given(st.lists(st.integers(1, 25), max_size=40))
def test_the_latest_that_fit_are_there(sizes):
    kept: Kept[int] = Kept(20)
    for key, num_bytes in enumerate(sizes):
        kept.put(key, key, num_bytes)
    left, expected = 20, set()
    for key, num_bytes in reversed(list(enumerate(sizes))):
        if num_bytes > 20:
            continue
        if num_bytes > left:
            break
        expected.add(key)
        left -= num_bytes
    assert {key for key in range(len(sizes)) if kept.get(key) is not None} == expected
    assert kept.num_bytes == 20 - left


def test_a_value_put_again_takes_the_place_of_the_old_one():
    kept: Kept[str] = Kept(10)
    kept.put("a", "A", 6)
    kept.put("b", "B", 4)
    kept.put("a", "new", 5)
    assert (kept.get("a"), kept.get("b"), kept.num_bytes) == ("new", "B", 9)
