"""Where RULER's prompts come from: wording, words and question sets, refused by name when at fault."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from jobs.tasks import get_task
from jobs.tasks.ruler_qa_data import read_questions
from jobs.tasks.ruler_texts import FIELDS, ruler_texts, texts_hash
from jobs.tasks.ruler_words import ruler_words
from spts.errors import ConfigError
from tests.jobs.ruler_stand_ins import TEXTS, Words

ALL = tuple(FIELDS)


def test_a_file_of_templates_in_json_and_yaml(tmp_path):
    for name, text in (("a.json", json.dumps(TEXTS)), ("a.yaml", yaml.safe_dump(TEXTS))):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert ruler_texts(ALL, str(tmp_path / name)) == TEXTS


def test_a_checkout_of_ruler(tmp_path):
    """The layout of NVIDIA's scripts/data/synthetic, with words of our own."""
    tasks = {
        key: {"tokens_to_generate": 1, "template": TEXTS[name], "answer_prefix": TEXTS[f"{name}_answer"]}
        for name, key in {
            "niah": "niah",
            "vt": "variable_tracking",
            "cwe": "common_words_extraction",
            "fwe": "freq_words_extraction",
            "qa": "qa",
        }.items()
    }
    (tmp_path / "constants.py").write_text(f"TASKS = {tasks!r}\n", encoding="utf-8")
    (tmp_path / "niah.py").write_text(
        f"needle = {TEXTS['needle']!r}\n"
        "if essay:\n    haystack = open('x').read()\n"
        f"elif noise:\n    haystack = {TEXTS['noise']!r}\n"
        "elif needle:\n    haystack = needle\nraise SystemExit('never run')\n",
        encoding="utf-8",
    )
    (tmp_path / "qa.py").write_text(f"DOCUMENT_PROMPT = {TEXTS['document']!r}\n", encoding="utf-8")
    assert ruler_texts(ALL, str(tmp_path)) == TEXTS
    (tmp_path / "qa.py").write_text("DOCUMENT = 3\n", encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"no text 'DOCUMENT_PROMPT', in .*qa\.py; correct it, install lm-eval"
    ):
        ruler_texts(("qa", "document"), str(tmp_path))


def test_the_installed_lm_eval_has_every_text():
    pytest.importorskip("lm_eval")
    texts = ruler_texts(ALL, None)
    assert set(texts) == set(FIELDS)
    assert "".join(texts.values()).isascii()
    assert len(texts_hash(texts)) == 64


def test_lm_eval_is_not_imported_for_its_texts(monkeypatch):
    import sys

    for module in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, module)
    ruler_texts.cache_clear()
    ruler_texts(ALL, None)
    assert not [name for name in sys.modules if name.split(".")[0] == "lm_eval"]


def test_without_lm_eval(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    ruler_texts.cache_clear()
    with pytest.raises(
        ConfigError, match=r"templates must be given .* install the package lm-eval, or name a file"
    ):
        get_task("vt").content()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vt": None}, r"'vt' is None, not a text"),
        ({"vt": "no fields"}, r"'vt' with \[\], which needs \['context', 'query'\]"),
        ({"vt": "{context} {query} {other}"}, r"'vt' with \['context', 'other', 'query'\]"),
        ({"vt": "{context} {query"}, "'vt' that is no template"),
    ],
)
def test_a_template_at_fault(changes, message, tmp_path):
    file = tmp_path / "texts.json"
    file.write_text(json.dumps({**TEXTS, **changes}), encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"{message}.*texts\.json") as refused:
        ruler_texts(("vt",), str(file))
    assert refused.value.field == "templates"
    assert ruler_texts(("qa",), str(file))["qa"] == TEXTS["qa"]


@pytest.mark.parametrize("text", [None, "[1, 2]", "{", b"\xff\xff"])
def test_a_file_that_holds_no_templates(text, tmp_path):
    file = tmp_path / "texts.yaml"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=r"templates must hold the wording .*texts\.yaml"):
        ruler_texts(("vt",), str(file))


def test_shipped_words_are_enough_for_long_lists():
    words = ruler_words(None)
    assert len(words.single) == len(words.nouns) + len(words.adjectives) > 800
    assert all(word.isalpha() and word.islower() for word in words.single)
    assert len(words.nouns) * len(words.adjectives) > 150_000


def write_words(folder: Path, **changes: list[str]) -> str:
    lists = {
        "nounlist": [f"noun{i}" for i in range(100)],
        "adjectivelist": [f"adj{i}" for i in range(100)],
        "verblist": ["run", "noun1"],
        **changes,
    }
    for name, words in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(words) + "\n\n", encoding="utf-8")
    return str(folder)


def test_given_words(tmp_path):
    words = ruler_words(write_words(tmp_path))
    assert len(words.single) == 201
    assert words.content()["source"] == "given lists"
    assert words.content()["sha256"] != ruler_words(None).content()["sha256"]
    task = get_task({"name": "niah_multikey_1", "words": str(tmp_path)})
    assert task.content()["words"] == words.content()


def test_words_at_fault(tmp_path):
    with pytest.raises(ConfigError, match=r"words must be a folder with nounlist\.txt, adjectivelist\.txt"):
        ruler_words(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"words must have at least 100 nouns, got 2 in .*nounlist\.txt"):
        ruler_words(write_words(tmp_path, nounlist=["a", "b", "a"]))


SQUAD = {
    "data": [
        {
            "title": "t",
            "paragraphs": [
                {
                    "context": "Zebras are striped.",
                    "qas": [
                        {
                            "question": "What are zebras?",
                            "answers": [{"text": "striped"}, {"text": "striped."}],
                            "is_impossible": False,
                        },
                        {"question": "What are lions?", "answers": [], "is_impossible": True},
                    ],
                },
                {"context": "Ants are small.", "qas": []},
            ],
        }
    ]
}
HOTPOT = [
    {"question": "q", "answer": "yes", "context": [["B", ["One. ", "Two."]], ["A", ["Three."]]]},
]


def write(path: Path, data: object) -> str:
    path.write_text(json.dumps(data), encoding="utf-8")
    return str(path)


def test_the_two_data_sets(tmp_path):
    squad = read_questions("squad", write(tmp_path / "s.json", SQUAD))
    assert squad.documents == ("Ants are small.", "Zebras are striped.")
    (question,) = squad.questions
    assert (question.answers, question.documents, question.close) == (("striped", "striped."), (1,), (0,))
    hotpot = read_questions("hotpotqa", write(tmp_path / "h.json", HOTPOT))
    assert hotpot.documents == ("A\nThree.", "B\nOne. Two.")
    (question,) = hotpot.questions
    assert (question.answers, question.documents, question.close) == (("yes",), (1, 0), ())


def test_fewer_questions_than_samples_asked_for(tmp_path):
    file = tmp_path / "texts.json"
    templates = write(file, TEXTS)
    task = get_task({"name": "qa_1", "templates": templates, "squad": write(tmp_path / "s.json", SQUAD)})
    (sample,) = task.samples(Words(), length=1000, count=7, seed=0)
    # Two documents are all there are: the prompt repeats them to fill the length.
    assert sample.prompt.count("Zebras are striped.") > 50
    assert abs(sample.prompt.count("Zebras are striped.") - sample.prompt.count("Ants are small.")) <= 1
    assert sample.references == ("striped", "striped.")


def squad_with(paragraph: object) -> dict[str, object]:
    return {"data": [{"title": "t", "paragraphs": [paragraph]}]}


@pytest.mark.parametrize(
    ("form", "data", "message"),
    [
        ("squad", [], r"squad must have a list 'data' that is not empty at the file"),
        ("squad", {"data": [3]}, r"at data\[0\]"),
        (
            "squad",
            squad_with({"context": ""}),
            r"str 'context' that is not empty at data\[0\].paragraphs\[0\]",
        ),
        (
            "squad",
            squad_with({"context": "c", "qas": [{"question": "q", "answers": []}]}),
            r"answers.*qas\[0\]",
        ),
        ("squad", squad_with({"context": "c", "qas": [3]}), r"qas\[0\]"),
        ("squad", squad_with({"context": "c", "qas": 3}), r"list 'qas'.*paragraphs\[0\]"),
        ("squad", squad_with({"context": "c", "qas": []}), "hold a question with an answer"),
        (
            "squad",
            squad_with({"context": "c", "qas": [{"question": "q", "answers": [{"text": ""}]}]}),
            r"str 'text' .*qas\[0\]",
        ),
        ("hotpotqa", {}, "be a list of entries at the file, got dict"),
        ("hotpotqa", [*HOTPOT, {"question": "q"}], r"str 'answer' that is not empty at entry 1, got None"),
        (
            "hotpotqa",
            [{**HOTPOT[0], "context": [["A"]]}],
            r"\[title, sentences\] pairs at entry 0, got \['A'\]",
        ),
        ("hotpotqa", [{**HOTPOT[0], "context": [["A", "text"]]}], r"entry 0"),
        ("hotpotqa", [], "hold a question"),
    ],
)
def test_a_data_set_at_fault(form, data, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as refused:
        read_questions(form, write(tmp_path / "set.json", data))
    assert refused.value.field == form
    assert "set.json" in str(refused.value)


@pytest.mark.parametrize("text", [f"[{'9' * 5000}]", "[" * 100_000], ids=["digits", "brackets"])
def test_a_data_set_that_python_cannot_read(text, tmp_path):
    (tmp_path / "set.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="squad must be a readable JSON file"):
        read_questions("squad", str(tmp_path / "set.json"))


def test_a_data_set_that_is_no_json(tmp_path):
    file = tmp_path / "set.json"
    file.write_text('{"data": [\n  {oops\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"squad must be a readable JSON file, got .*set\.json.*line 2"):
        read_questions("squad", str(file))
