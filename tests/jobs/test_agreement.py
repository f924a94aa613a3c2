"""Agreement windows: real text and what really follows it, cut the same way whatever is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from jobs.tasks import Sample, Task, Tokens, get_task, make_tasks
from jobs.tasks.haystack import haystack
from jobs.tasks.tokens import PlainTokens
from spts.errors import ConfigError

DEMO_TOKENIZER = Path(__file__).parents[2] / "jobs" / "demo_model" / "tokenizer.json"


class Characters:
    """A token is a character: what a sample must be can then be read off the text itself."""

    def count(self, text: str) -> int:
        return len(text)

    def encode(self, text: str) -> list[int]:
        return [ord(char) for char in text]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    return PlainTokens(Tokenizer.from_file(str(DEMO_TOKENIZER)))


def task_over(*texts: Path, follow_tokens: int = 4) -> Task:
    return get_task(
        {"name": "agreement", "texts": [str(text) for text in texts], "follow_tokens": follow_tokens}
    )


def draw(task: Task, tokens: Tokens, *, length: int = 20, count: int = 10**6, seed: int = 0) -> list[Sample]:
    return list(task.samples(tokens, length=length, count=count, seed=seed))


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_worked_example(tmp_path):
    text = write(tmp_path / "a.txt", "one\ntwo\nthree\nfour\nfive\nsix\nseven\n")
    samples = sorted(draw(task_over(text), Characters(), length=9), key=lambda sample: sample.id)
    assert [(sample.prompt, Characters().decode(sample.follow)) for sample in samples] == [
        ("one\ntwo\n", "thre"),
        ("four\n", "five"),
        ("six\n", "seve"),
    ]
    assert all(sample.references == () and sample.meta == {"document": "a.txt"} for sample in samples)
    (first,) = draw(task_over(text, follow_tokens=20), Characters(), length=9)
    assert first.follow == tuple(map(ord, "three\nfour\nfive\nsix\n"[:20]))


@pytest.mark.parametrize("length", [63, 500, 2048])
def test_windows_fill_the_length_and_are_followed_by_what_really_follows(length, tokens):
    text = "\n".join(haystack("held_out"))
    (task,) = make_tasks("agreement")
    samples = draw(task, tokens, length=length, count=40)
    assert len(samples) == 40
    for sample in samples:
        assert length - 160 < tokens.count(sample.prompt) <= length
        assert len(sample.follow) == task.max_new_tokens == 32
        assert sample.prompt + tokens.decode(sample.follow) in text


def test_no_text_is_in_two_windows(tmp_path):
    lines = [f"{number:05}" for number in range(500)]
    samples = draw(task_over(write(tmp_path / "a", "\n".join(lines))), Characters(), length=60)
    seen = [line for sample in samples for line in sample.prompt.split()]
    seen += [Characters().decode(sample.follow) for sample in samples]  # four of the next line's five
    assert len(seen) == len(set(seen)) > 400


def test_sample_i_is_the_same_for_any_count_and_the_seed_says_the_order(tokens):
    (task,) = make_tasks("agreement")
    many = draw(task, tokens, length=1000, count=12)
    assert draw(task, tokens, length=1000, count=5) == many[:5]
    other = draw(task, tokens, length=1000, count=12, seed=1)
    assert [one.prompt for one in other] != [one.prompt for one in many]
    assert not {one.id for one in other} & {one.id for one in many}


def test_every_document_is_drawn_from_before_one_is_drawn_from_again(tmp_path):
    for name, count in {"a": 3, "b": 30, "c": 300}.items():
        write(tmp_path / name, "\n".join(f"{name}{number:04}" for number in range(count * 5)))
    samples = draw(task_over(tmp_path), Characters(), length=24)
    documents = [str(sample.meta["document"]) for sample in samples]
    assert set(documents[:3]) == {"a", "b", "c"} == set(documents[3:6])
    assert documents.count("c") > documents.count("b") > documents.count("a")
    assert len({sample.id for sample in samples}) == len(samples)


def test_files_of_the_same_name_are_two_documents(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "a.txt", f"{folder}\n" * 100)
    samples = draw(task_over(tmp_path / "x" / "a.txt", tmp_path / "y" / "a.txt"), Characters())
    assert len({sample.id for sample in samples}) == len(samples)
    assert {sample.prompt[0] for sample in samples} == {"x", "y"}


@pytest.mark.parametrize("unit", ["word ", "字"], ids=["words", "no white space"])
def test_text_without_line_breaks_is_cut_too(unit, tmp_path):
    samples = draw(task_over(write(tmp_path / "a", unit * 2000)), Characters(), length=500)
    assert len(samples) >= 3
    for sample in samples:
        assert 300 < len(sample.prompt) <= 500
        assert not sample.prompt.endswith(" "), "the text after it begins with its space"


@pytest.mark.parametrize(
    "entry",
    [
        "agreement",
        {"name": "agreement", "follow_tokens": 8},
        {"name": "agreement", "texts": ["a", "b"], "label": "mine"},
    ],
    ids=str,
)
def test_a_spec_gives_its_task_back(entry):
    (task,) = make_tasks(entry)
    assert make_tasks(task.spec) == (task,)
    assert task.name == (entry.get("label", "agreement") if isinstance(entry, dict) else "agreement")


def test_the_content_names_the_text_and_not_its_place(tmp_path):
    first, same = write(tmp_path / "a", "text\n" * 50), write(tmp_path / "b", "text\n" * 50)
    other = write(tmp_path / "c", "texts\n" * 50)
    contents = [task_over(path).content() for path in (first, same, other)]
    assert contents[0] == contents[1] != contents[2]
    assert task_over(first, follow_tokens=5).content() != contents[0]
    assert str(tmp_path) not in str(contents)


def test_an_answer_is_never_scored():
    with pytest.raises(AssertionError, match="'agreement' has no answers to score"):
        get_task("agreement").score("text", (), {})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"texts": "a.txt"}, r"tasks.agreement.texts must be a list of files or folders, got 'a.txt'"),
        ({"texts": []}, r"tasks.agreement.texts must list a file or folder, got \[\]"),
        ({"follow_tokens": 0}, r"tasks.agreement.follow_tokens must be an integer of at least 1, got 0"),
        ({"label": ""}, r"tasks.agreement.label must be a name, got ''"),
        ({"text": ["a"]}, r"tasks.agreement.text must be a known key"),
    ],
    ids=str,
)
def test_a_faulty_entry_is_refused(entry, message):
    with pytest.raises(ConfigError, match=message):
        make_tasks({"name": "agreement", **entry})


def test_a_length_shorter_than_a_piece_of_text_is_named(tmp_path):
    text = write(tmp_path / "long.txt", "x" * 1000)
    with pytest.raises(
        ConfigError, match=r"length must hold a line .*, got 20 tokens, and 1000 in long\.txt"
    ):
        draw(task_over(text), Characters())


def test_a_faulty_text_is_named(tmp_path):
    missing, short, latin = tmp_path / "none.txt", write(tmp_path / "short.txt", "too short"), tmp_path / "l"
    latin.write_bytes("Grüße".encode("latin-1"))
    (tmp_path / "empty").mkdir()
    for read in (lambda task: task.content(), lambda task: draw(task, Characters())):
        with pytest.raises(ConfigError, match=r"readable UTF-8 files, got .*none\.txt"):
            read(task_over(missing))
        with pytest.raises(ConfigError, match=r"readable UTF-8 files, got .*/l "):
            read(task_over(short, latin))
        with pytest.raises(ConfigError, match=r"folders with files in them, got none in .*empty"):
            read(task_over(tmp_path / "empty"))
    with pytest.raises(ConfigError, match=r"more than 20 \+ 4 tokens, got at most 9 in short\.txt"):
        draw(task_over(short), Characters())


def test_a_text_that_is_given_twice_is_refused(tmp_path):
    (tmp_path / "one.txt").write_text("A line.\n" * 500)
    with pytest.raises(ConfigError, match=r"texts must hold each text once, got one\.txt and one\.txt alike"):
        get_task({"name": "agreement", "texts": [str(tmp_path), str(tmp_path / "one.txt")]}).content()
