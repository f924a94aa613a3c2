"""Needle tasks: what they ask can be answered from the prompt, in one way, within the length."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from jobs.tasks import Sample, Tokens, get_task, make_tasks
from jobs.tasks.haystack import haystack
from jobs.tasks.needle import NEEDLE_TASKS, NUM_VALUES, ask, chain, fact, hide, words
from jobs.tasks.tokens import PlainTokens
from spts.errors import ConfigError

DEMO_TOKENIZER = Path("jobs/demo_model/tokenizer.json")
FACT = re.compile(r"^The code of (\w+) is (\w+)\.$", re.MULTILINE)
LINK = re.compile(r"^The twin of (\w+) is (\w+)\.$", re.MULTILINE)
NUM_LINES = {"single": 1, "multikey": 12, "multivalue": 9, "twohop": 12}

TASKS = {task.name: task for task in NEEDLE_TASKS}


class Counting:
    """Tokens of any kind: what a text is split into."""

    def __init__(self, split: Callable[[str], list[str]]) -> None:
        self._split = split

    def count(self, text: str) -> int:
        return len(self._split(text))

    def encode(self, text: str) -> list[int]:
        raise AssertionError("needles only count")

    def decode(self, token_ids: Sequence[int]) -> str:
        raise AssertionError("needles only count")


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    tokenizer = Tokenizer.from_file(str(Path(__file__).parents[2] / DEMO_TOKENIZER))
    return PlainTokens(tokenizer)


def split(sample: Sample) -> tuple[str, str]:
    """The document and the question of a prompt."""
    document, _, question = sample.prompt.partition("\n\nQuestion: ")
    assert question.endswith("?\nAnswer:")
    return document, question.removesuffix("\nAnswer:")


@pytest.mark.parametrize("length", [512, 1000, 4096])
@pytest.mark.parametrize("name", TASKS)
def test_prompts_fill_the_length_and_never_exceed_it(name, length, tokens):
    for sample in TASKS[name].samples(tokens, length=length, count=6, seed=3):
        longest_line = 160  # in characters, so in tokens too
        assert length - longest_line < tokens.count(sample.prompt) <= length


@pytest.mark.parametrize("count", [str.split, list], ids=["words", "characters"])
def test_the_bound_holds_for_any_count(count):
    for sample in TASKS["twohop"].samples(Counting(count), length=2000, count=4, seed=0):
        assert len(count(sample.prompt)) <= 2000


@pytest.mark.parametrize("name", TASKS)
def test_same_arguments_same_samples(name, tokens):
    def draw(**changes: int) -> list[Sample]:
        return list(TASKS[name].samples(tokens, **{"length": 512, "count": 3, "seed": 1, **changes}))

    samples = draw()
    assert draw() == samples
    assert draw(count=5)[:3] == samples
    assert len({sample.prompt for sample in samples + draw(seed=2)}) == 6
    assert len({sample.id for sample in samples + draw(seed=2) + draw(length=600)}) == 9


@pytest.mark.parametrize("name", TASKS)
def test_the_answer_is_in_the_document_in_one_way(name, tokens):
    for sample in TASKS[name].samples(tokens, length=1000, count=8, seed=0):
        document, question = split(sample)
        facts, links = FACT.findall(document), dict(LINK.findall(document))
        asked = re.fullmatch(r".* of (\w+)\?", question)
        assert asked is not None
        key = asked[1]
        assert ("twin" in question) == (name == "twohop") == bool(links)
        if name == "twohop":
            key = links[key]
        assert sorted(value for other, value in facts if other == key) == sorted(sample.references)
        assert len(sample.references) == (NUM_VALUES if name == "multivalue" else 1)
        assert len(facts) + len(links) == NUM_LINES[name]
        nouns = [*{key for key, _ in facts}, *(value for _, value in facts), *links]
        assert len(set(nouns)) == len(nouns)  # no noun plays two parts
        assert set(nouns) <= set(words())


def test_depth_says_where_the_answer_stands(tokens):
    depths = []
    for sample in TASKS["twohop"].samples(tokens, length=1000, count=20, seed=0):
        lines = split(sample)[0].splitlines()
        place = next(i for i, line in enumerate(lines) if line.endswith(f" is {sample.references[0]}."))
        assert sample.meta["depth"] == pytest.approx(place / len(lines), abs=0.02)
        depths.append(place / len(lines))
    assert min(depths) < 0.3 < 0.7 < max(depths)


def test_everything_else_is_held_out_text(tokens):
    held_out = set(haystack("held_out"))
    (sample,) = TASKS["multikey"].samples(tokens, length=4096, count=1, seed=0)
    text = [line for line in split(sample)[0].splitlines() if not FACT.match(line)]
    assert len(text) > 100
    assert set(text) <= held_out


@pytest.mark.parametrize("name", TASKS)
def test_too_short_a_length_names_one_that_works(name, tokens):
    def draw(length: int) -> list[Sample]:
        return list(TASKS[name].samples(tokens, length=length, count=1, seed=0))

    with pytest.raises(ConfigError, match=rf"task '{name}', got 9 tokens; use at least \d+") as refused:
        draw(9)
    assert refused.value.field == "length"
    enough = int(str(refused.value).rpartition(" ")[2])
    with pytest.raises(ConfigError, match="length must leave room"):
        draw(enough - 1)
    assert tokens.count(draw(enough)[0].prompt) == enough


@pytest.mark.parametrize(
    ("text", "references", "score"),
    [
        (" amber", ("amber",), 1.0),
        ("Amber.", ("amber",), 1.0),
        ("The code is AMBER, I think", ("amber",), 1.0),
        ("ambers", ("amber",), 0.0),
        ("chamber", ("amber",), 0.0),
        ("", ("amber",), 0.0),
        (" oak, elm", ("oak", "elm", "ash"), 2 / 3),
        (" elm,ash\noak", ("oak", "elm", "ash"), 1.0),
        (" oak oak oak", ("oak", "elm", "ash"), 1 / 3),
    ],
)
def test_score(text, references, score):
    assert get_task("multivalue").score(text, references, {}) == pytest.approx(score)


@pytest.mark.parametrize("name", TASKS)
def test_a_full_answer_fits_into_max_new_tokens(name, tokens):
    task = get_task(name)
    for sample in task.samples(tokens, length=512, count=4, seed=0):
        answer = " " + ", ".join(sample.references)
        assert tokens.count(answer) < task.max_new_tokens
        assert task.score(answer, sample.references, sample.meta) == 1.0


def test_every_task_is_made_by_its_spec():
    assert make_tasks("needle") == NEEDLE_TASKS
    for task in NEEDLE_TASKS:
        assert make_tasks(task.spec) == (task,)


def test_a_parameter_that_a_task_does_not_have():
    with pytest.raises(ConfigError, match=r"tasks\.single.*depths"):
        make_tasks({"name": "single", "depths": 3})


def test_unknown_task():
    with pytest.raises(ConfigError, match=r"task must be one of needle, single, .*got 'singel'; fix"):
        get_task("singel")


def test_needles_of_the_docstrings():
    assert fact(["amber", "falcon"]).lines == ("The code of falcon is amber.",)
    twin = chain(["amber", "falcon", "heron"])
    assert twin.lines == ("The twin of heron is falcon.", "The code of falcon is amber.")
    assert twin.answers == ("amber",)
    assert ask(twin.question) == "\n\nQuestion: What is the code of the twin of heron?\nAnswer:"


@pytest.mark.parametrize(("num_lines", "num_needles"), [(0, 3), (1, 5), (63, 4)])
def test_hide_keeps_the_document_in_order(num_lines, num_needles):
    for seed in range(20):
        document, needles = list(range(num_lines)), list(range(-num_needles, 0))
        lines, places = hide(random.Random(seed), document, needles)
        assert [line for line in lines if line >= 0] == document
        assert [lines[place] for place in places] == needles
        assert len(lines) == num_lines + num_needles
