"""Needle grids: every depth once, the needle where it is said to stand, in any script, within the length."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from jobs.tasks import get_task, make_tasks
from jobs.tasks.tokens import PlainTokens
from spts.errors import ConfigError

CHINESE = {
    "needle": "灯塔的密码是七二一。",
    "question": "灯塔的密码是什么？",
    "answers": ["七二一"],
}
QUESTIONS = [
    {"needle": f"The {thing} is in room {room}.", "question": f"Where is the {thing}?", "answers": [room]}
    for thing, room in (("clock", "four"), ("harp", "nine"), ("globe", "twelve"))
]


class Bytes:
    """A token a byte: the longest that a text can be."""

    def count(self, text: str) -> int:
        return len(text.encode())

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids) -> str:
        return bytes(token_ids).decode()


@pytest.fixture(scope="module")
def tokens() -> PlainTokens:
    return PlainTokens(Tokenizer.from_file(str(Path(__file__).parents[2] / "jobs/demo_model/tokenizer.json")))


@pytest.fixture
def chinese(tmp_path) -> str:
    lines = (f"第{i}天下雨，没有人出门，街上只有风的声音。" for i in range(400))
    (tmp_path / "text.txt").write_text("".join(lines), encoding="utf-8")
    return str(tmp_path)


def measured(prompt: str, needle: str) -> float:
    document = prompt[: prompt.rindex("\n\nQuestion:")]
    assert document.count(needle) == 1
    return document.index(needle) / (len(document) - len(needle))


@pytest.mark.parametrize("text", ["天地玄黄宇宙洪荒" * 2000, "ไม่มีเครื่องหมายวรรคตอน" * 800])
def test_needles_have_places_in_text_without_marks(tokens, tmp_path, text):
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    task = get_task({"name": "grid", "haystack": str(tmp_path)})
    samples = list(task.samples(tokens, length=4096, count=11, seed=0))
    needle = "The code of lantern is walnut."
    for sample in samples:
        assert measured(sample.prompt, needle) == pytest.approx(sample.meta["depth"], abs=0.03)


def test_a_length_with_fewer_places_than_depths_is_refused(tokens):
    with pytest.raises(ConfigError, match=r"got 100 tokens; use at least (\d+)") as refused:
        list(get_task("grid").samples(tokens, length=100, count=11, seed=0))
    enough = int(str(refused.value).rpartition(" ")[2])
    (sample,) = get_task("grid").samples(tokens, length=enough, count=1, seed=0)
    assert len(tokens.encode(sample.prompt)) <= enough


def test_a_grid_has_every_depth_as_often(tokens):
    task = get_task("grid")
    samples = list(task.samples(tokens, length=2000, count=22, seed=0))
    assert Counter(sample.meta["depth"] for sample in samples) == {i / 10: 2 for i in range(11)}
    assert [sample.meta["depth"] for sample in samples[:11]] == [i / 10 for i in range(11)]
    for sample in samples:
        assert measured(sample.prompt, "The code of lantern is walnut.") == pytest.approx(
            sample.meta["depth"], abs=0.02
        )
        assert sample.prompt.endswith("\n\nQuestion: What is the code of lantern?\nAnswer:")
        assert sample.context is None
        assert 2000 - 160 < tokens.count(sample.prompt) <= 2000
    assert len({sample.prompt for sample in samples}) == 22
    # A haystack that two depths shared would make their samples dependent, and no name says so.
    assert len({sample.prompt.replace("The code of lantern is walnut.", "")[:200] for sample in samples}) > 15


@pytest.mark.parametrize("length", [700, 5000])
def test_any_script_and_the_longest_tokens(length, chinese):
    task = get_task(
        {"name": "grid", "label": "chinese", "depths": [0, 50, 100], "haystack": chinese, **CHINESE}
    )
    for sample in task.samples(Bytes(), length=length, count=3, seed=1):
        assert measured(sample.prompt, str(CHINESE["needle"])) == pytest.approx(sample.meta["depth"], abs=0.1)
        assert length - 80 < len(sample.prompt.encode()) <= length
        end_to_start = "。 第0天"  # the one space, where the text is over and begins again
        assert " " not in sample.prompt.partition("\n\n")[0].replace(end_to_start, "")
        assert task.score("答案：七二一。", sample.references, sample.meta) == 1.0
        assert task.score("七二", sample.references, sample.meta) == 0.0


def test_questions_share_a_text(tokens):
    task = get_task({"name": "grid", "depths": 6, "questions": QUESTIONS})
    samples = list(task.samples(tokens, length=1500, count=18, seed=0))
    for text in range(6):
        group = samples[3 * text : 3 * text + 3]
        (context,) = {sample.context for sample in group}
        assert context is not None
        (document,) = {sample.prompt[: sample.prompt.rindex("\n\nQuestion:")] for sample in group}
        for number, sample in enumerate(group):
            asked = QUESTIONS[number]
            assert sample.prompt == f"{document}\n\nQuestion: {asked['question']}\nAnswer:"
            assert sample.references == tuple(asked["answers"])
            assert sample.meta["question"] == number
            assert measured(sample.prompt, str(asked["needle"])) == pytest.approx(
                sample.meta["depth"], abs=0.06
            )
            assert tokens.count(sample.prompt) <= 1500
        assert len({sample.meta["depth"] for sample in group}) == 3
    for number in range(3):
        assert sorted(sample.meta["depth"] for sample in samples[number::3]) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert len({sample.context for sample in samples}) == 6


@pytest.mark.parametrize("entry", ["grid", {"name": "grid", "depths": 4, "questions": QUESTIONS}])
def test_same_arguments_same_samples(entry, tokens):
    task = get_task(entry)
    samples = list(task.samples(tokens, length=900, count=8, seed=3))
    assert list(task.samples(tokens, length=900, count=5, seed=3)) == samples[:5]
    others = list(task.samples(tokens, length=900, count=8, seed=4))
    assert len({sample.id for sample in samples + others}) == 16
    assert not {sample.prompt for sample in samples} & {sample.prompt for sample in others}


@pytest.mark.parametrize(
    "entry",
    [
        "grid",
        {"name": "grid", "label": "second", "depths": [0, 12.5, 100], **CHINESE},
        {"name": "grid", "depths": 3, "questions": QUESTIONS, "haystack": "somewhere"},
    ],
)
def test_a_grid_is_made_by_its_spec(entry):
    (task,) = make_tasks(entry)
    assert make_tasks(task.spec) == (task,)


def test_two_grids_have_two_names(chinese):
    first, second = (
        get_task("grid"),
        get_task({"name": "grid", "label": "chinese", "haystack": chinese, **CHINESE}),
    )
    assert (first.name, second.name) == ("grid", "chinese")
    assert first.content()["haystack"] != second.content()["haystack"]
    assert chinese not in str(second.content())


def test_too_short_a_length_names_one_that_works(tokens):
    task = get_task({"name": "grid", "questions": QUESTIONS})
    with pytest.raises(ConfigError, match=r"task 'grid', got 9 tokens; use at least (\d+)") as refused:
        next(task.samples(tokens, length=9, count=1, seed=0))
    enough = int(str(refused.value).rpartition(" ")[2])
    (sample,) = task.samples(tokens, length=enough, count=1, seed=0)
    assert tokens.count(sample.prompt) <= enough


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"depth": 3}, "depth"),
        ({"depths": 1}, "depths"),
        ({"depths": True}, "depths"),
        ({"depths": []}, "depths"),
        ({"depths": [0, 101]}, "depths"),
        ({"depths": [5, 5]}, "depths"),
        ({"depths": ["5"]}, "depths"),
        ({"label": ""}, "label"),
        ({"haystack": 3}, "haystack"),
        ({"needle": "x"}, "question"),
        ({**CHINESE, "answers": "七"}, "answers"),
        ({**CHINESE, "answers": []}, "answers"),
        ({**CHINESE, "answers": [721]}, "answers[0]"),
        ({**CHINESE, "questions": QUESTIONS}, "questions"),
        ({"questions": []}, "questions"),
        ({"questions": [{**CHINESE, "needle": " "}]}, "questions[0].needle"),
        ({"questions": ["x"]}, "questions[0]"),
    ],
)
def test_bad_parameters(params, field):
    with pytest.raises(ConfigError) as refused:
        make_tasks({"name": "grid", **params})
    assert refused.value.field == f"tasks.grid.{field}"


@pytest.mark.parametrize(
    ("text", "answers", "score"),
    [
        (" WALNUT!", ("walnut",), 1.0),
        ("wal nut", ("walnut",), 0.0),
        ("four and Nine", ("four", "nine", "twelve"), 2 / 3),
        ("STRASSE", ("straße",), 1.0),
        ("", ("x",), 0.0),
    ],
)
def test_score(text, answers, score):
    assert get_task("grid").score(text, answers, {}) == pytest.approx(score)


def test_a_full_answer_fits_whatever_the_tokens():
    task = get_task({"name": "grid", **CHINESE, "answers": ["七二一" * 40]})
    assert task.max_new_tokens > Bytes().count("七二一" * 40)
