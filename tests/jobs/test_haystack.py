"""The haystack: every file on one side of the split, clean lines only."""

from __future__ import annotations

import sysconfig

import pytest

from jobs.tasks.haystack import haystack, haystack_hash

PARTS = ("train", "held_out")


@pytest.fixture
def library(tmp_path, monkeypatch):
    """An empty standard library to write files into."""
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    return tmp_path


def read(part: str) -> tuple[str, ...]:
    return haystack.__wrapped__(part)


def test_every_file_is_in_one_part(library):
    for index in range(200):
        (library / f"module_{index}.py").write_text(f"first of {index}\nsecond of {index}\n")
    sides = [{line.split()[-1] for line in read(part)} for part in PARTS]
    assert sides[0] | sides[1] == {str(index) for index in range(200)}
    assert not sides[0] & sides[1]
    assert 5 <= len(sides[1]) <= 40
    assert sum(len(read(part)) for part in PARTS) == 400


def test_a_file_stays_where_its_name_puts_it(library):
    (library / "asyncio").mkdir()
    for name in ("argparse.py", "asyncio/tasks.py", "typing.py"):
        (library / name).write_text(name)
    before = [read(part) for part in PARTS]
    (library / "aaa_new.py").write_text("new")
    assert [tuple(line for line in read(part) if line != "new") for part in PARTS] == before


def test_lines_are_clean(library):
    text = "a\tb  \n\n\n\nc\nnaïve\n" + "x" * 161 + "\n" + "y" * 160 + "\n"
    (library / "module.py").write_text(text, encoding="utf-8")
    (library / "test").mkdir()
    (library / "test" / "other.py").write_text("never")
    assert read("train") + read("held_out") == ("a    b", "", "c", "y" * 160)


def test_the_real_one_splits_about_one_in_ten():
    train, held_out = (haystack(part) for part in PARTS)
    assert 0.05 < len(held_out) / (len(train) + len(held_out)) < 0.25
    long = [{line for line in part if len(line) >= 60} for part in (train, held_out)]
    assert len(long[0] & long[1]) < 0.02 * len(long[1])  # the same licence or idiom, not the same file
    assert haystack_hash("train") != haystack_hash("held_out")


def test_unknown_part():
    with pytest.raises(ValueError, match="part must be 'train' or 'held_out', got 'test'"):
        haystack("test")
