"""A haystack's units, joined, are its text in any script; needles stand where they are said to."""

from __future__ import annotations

import hashlib
import json

import pytest

from jobs.tasks.document import SHIPPED, document, place, put
from jobs.tasks.haystack import haystack
from spts.errors import ConfigError

TEXTS = {
    "latin": 'It rained. "Did it?" she asked. It did!  Nobody\nsaw\tit… Then a line without an end',
    "chinese": "昨天下雨了。你看见了吗？没有人看见！“真的吗？”她问。",
    "arabic": "هل أمطرت؟ نعم أمطرت. لم يرها أحد",
    "hindi": "कल बारिश हुई। किसी ने नहीं देखी।",
    "thai": "เมื่อวานฝนตก ไม่มีใครเห็น",
    "endless": "字" * 1001,
    "spaced": "word " * 300,
}
NUM_UNITS = {"latin": 6, "chinese": 5, "arabic": 3, "hindi": 2, "thai": 1, "endless": 26, "spaced": 38}


@pytest.mark.parametrize("name", TEXTS)
def test_units_joined_are_the_text(name, tmp_path):
    (tmp_path / "text.txt").write_text(TEXTS[name], encoding="utf-8")
    made = document(str(tmp_path))
    text = " ".join(TEXTS[name].split())
    assert "".join(made.units) == text + " "
    assert all(0 < len(unit) <= 400 for unit in made.units)
    assert len(made.units) == NUM_UNITS[name]
    assert made.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert made.content() == {"source": "given text", "sha256": made.sha256}


def test_files_in_order_of_name_and_rulers_own_json(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "b.txt").write_text("Second.", encoding="utf-8")
    (folder / "a.txt").write_text("First.\n", encoding="utf-8")
    (folder / "c.md").write_text("Not this.", encoding="utf-8")
    essays = tmp_path / "essays.json"
    essays.write_text(json.dumps({"text": "First.\n\nSecond."}), encoding="utf-8")
    assert document(str(folder)).units == ("First. ", "Second. ")
    assert document(str(essays)) == document(str(folder))


def test_shipped_text_keeps_its_lines():
    made = document(None)
    assert made.source == SHIPPED
    assert [unit.removesuffix("\n") for unit in made.units] == list(haystack("held_out"))


def test_take_goes_round(tmp_path):
    (tmp_path / "a.txt").write_text("One. Two. Three.", encoding="utf-8")
    assert document(str(tmp_path)).take(5, 2) == ["Three. ", "One. ", "Two. ", "Three. ", "One. "]


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (None, "name one that is there"),
        (b"   \n", "without any"),
        (b"\xff\xfe\xfa", "UnicodeDecodeError"),
    ],
)
def test_a_folder_that_is_no_haystack(content, got, tmp_path):
    folder = tmp_path / "folder"
    if content is not None:
        folder.mkdir()
        (folder / "a.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=got) as refused:
        document(str(folder))
    assert refused.value.field == "haystack"
    assert "folder" in str(refused.value)


@pytest.mark.parametrize("text", ["{}", "[", '{"text": 3}', "[1]"])
def test_a_json_file_that_is_no_haystack(text, tmp_path):
    file = tmp_path / "essays.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"haystack must be readable UTF-8 text, got .*essays\.json"):
        document(str(file))


def test_place_of_the_docstring():
    units = ["x" * size for size in (10, 10, 20, 10)]
    assert place(units, 0.5) == 2
    assert (place(units, 0.0), place(units, 1.0)) == (0, 4)
    assert place([], 0.3) == 0


def test_put_of_the_docstring():
    assert put(["One. ", "Two. "], {1: ["Needle."]}) == "One. Needle. Two. "
    assert put(["甲。", "乙。"], {0: ["针。"], 2: ["线。"]}) == "针。甲。乙。线。"
    assert put(["a\n", "b\n"], {1: ["x", "y"]}) == "a\nx\ny\nb\n"
    assert put([], {0: ["x", "y"]}) == "x y "
