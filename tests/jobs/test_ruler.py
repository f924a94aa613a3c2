"""RULER's tasks: what a prompt holds, how long it is, and how an answer is scored."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from jobs.tasks import FAMILIES, Sample, get_task, make_tasks
from jobs.tasks.ruler import KINDS
from jobs.tasks.tokens import PlainTokens
from spts.errors import ConfigError
from tests.jobs.ruler_stand_ins import TEXTS, Bytes, Words

GOLDEN = Path(__file__).parent / "golden" / "benchmark_scores.json"
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
WORDS = r"[a-z]+-[a-z]+"
NUMBER = r"[1-9]\d{6}"
# keys, values, needles about the keys asked for, needles about others (None = many), references, haystack
NIAH = {
    "niah_single_1": (WORDS, NUMBER, 1, 0, 1),
    "niah_single_2": (WORDS, NUMBER, 1, 0, 1),
    "niah_single_3": (WORDS, UUID, 1, 0, 1),
    "niah_multikey_1": (WORDS, NUMBER, 1, 3, 1),
    "niah_multikey_2": (WORDS, NUMBER, 1, None, 1),
    "niah_multikey_3": (UUID, UUID, 1, None, 1),
    "niah_multivalue": (WORDS, NUMBER, 4, 0, 4),
    "niah_multiquery": (WORDS, NUMBER, 4, 0, 4),
}
TOKENS_TO_GENERATE = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}  # NVIDIA's constants.py

NEEDLE = re.compile(r"Note: (\w+) of (\S+) = (\S+)\.")


@pytest.fixture(scope="module")
def demo() -> PlainTokens:
    return PlainTokens(Tokenizer.from_file(str(Path(__file__).parents[2] / "jobs/demo_model/tokenizer.json")))


@pytest.fixture(scope="module")
def templates(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("templates") / "texts.json"
    file.write_text(json.dumps(TEXTS), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def draw(templates, demo):
    def draw(
        name: str, *, length: int = 3000, count: int = 3, seed: int = 0, tokens=demo, **params
    ) -> list[Sample]:
        task = get_task({"name": name, "templates": templates, **params})
        return list(task.samples(tokens, length=length, count=count, seed=seed))

    return draw


@pytest.mark.parametrize("name", NIAH)
def test_needles_of_each_kind(name, draw):
    keys, values, num_own, num_others, num_references = NIAH[name]
    for sample in draw(name):
        found = NEEDLE.findall(sample.prompt)
        plural = "uuids" if values == UUID else "numbers"
        assert {kind for kind, _, _ in found} == {plural}
        assert all(re.fullmatch(keys, key) and re.fullmatch(values, value) for _, key, value in found)
        assert len(sample.references) == num_references
        question = sample.prompt[sample.prompt.rindex("\nWhat") :]
        several = num_references > 1
        singular = plural if several else plural[:-1]
        asked = re.fullmatch(
            rf"\nWhat {'are all' if several else 'is'} {singular} of (.+)\? "
            rf"The {singular} of \1 {'are' if several else 'is'}",
            question,
        )
        assert asked is not None
        assert sample.prompt.startswith(
            f"{'Some' if several else 'A'} {singular} {'are' if several else 'is'} "
        )
        queries = re.split(r", and |, ", asked[1])
        assert len(queries) == (4 if name == "niah_multiquery" else 1)
        own = [(key, value) for _, key, value in found if key in queries]
        assert len(own) == num_own
        if name == "niah_multivalue":
            assert Counter(value for _, value in own) == Counter(sample.references)
        else:  # the references in the order of the queries
            assert [dict(own)[query] for query in queries] == list(sample.references)
        others = len(found) - len(own)
        assert others == num_others if num_others is not None else others > 20
        all_values = [value for _, _, value in found]
        assert len(set(all_values)) == len(found)  # no two needles with one value
        assert len({key for _, key, _ in found}) == (1 if name == "niah_multivalue" else len(found))
        noise = sample.prompt.count(TEXTS["noise"])
        assert (noise > 50) if name == "niah_single_1" else noise == 0
        for reference in sample.references:
            assert sample.prompt.count(reference) == 1


@pytest.mark.parametrize("name", [name for name in NIAH if NIAH[name][4] == 1])
def test_depth_of_the_one_answer(name, draw):
    depths = []
    for sample in draw(name, count=25, length=1500):
        context = sample.prompt[: sample.prompt.rindex("\nWhat")].partition("\n")[2]
        depth = sample.meta["depth"]
        assert context.index(sample.references[0]) / len(context) == pytest.approx(depth, abs=1e-4)
        depths.append(depth)
    assert min(depths) < 0.2 < 0.8 < max(depths)


def test_prose_of_a_given_folder_is_whole_and_repeated(draw, tmp_path):
    sentences = [f"This is sentence {i} of a short book. " for i in range(20)]
    (tmp_path / "book.txt").write_text("".join(sentences), encoding="utf-8")
    for sample in draw("niah_multikey_1", haystack=str(tmp_path)):
        document = sample.prompt[: sample.prompt.rindex("\nWhat")].partition("\n")[2]
        document = NEEDLE.sub("", document)
        counts = [int(i) for i in re.findall(r"sentence (\d+) of", document)]
        assert counts == [i % 20 for i in range(len(counts))]
        assert len(counts) > 100


def test_a_chain_of_variables_can_be_followed(draw):
    for sample in draw("vt"):
        example, _, asked = sample.prompt.rpartition("Follow.\n")
        for text, letters in ((example, 3), (asked, 5)):
            given = re.search(r"Which have (\d{5})\? These 5 have \1: ", text)
            assert given is not None
            assert len(re.findall(r"^VAR", text, re.MULTILINE)) == 5
            (first,) = re.findall(rf"^VAR ([A-Z]{{{letters}}}) = {given[1]}$", text, re.MULTILINE)
            links = re.findall(rf"^VAR ([A-Z]{{{letters}}}) = VAR ([A-Z]{{{letters}}}) $", text, re.MULTILINE)
            names = [first]
            for new, old in links:  # in the order of the text
                assert old == names[-1]
                names.append(new)
            assert len(set(names)) == 5
            if text is asked:
                assert tuple(names) == sample.references
                assert text.endswith(": ")
            else:
                assert text.endswith(f":  {' '.join(names)}\n\n")
        assert example.count(TEXTS["noise"]) % 5 == 0
        assert len(set(re.findall(r"have (\d+)\?", sample.prompt))) == 2


def test_an_example_of_variables_has_at_most_500_tokens(draw, demo):
    for tokens in (demo, Words()):
        (sample,) = draw("vt", tokens=tokens, count=1)
        example = sample.prompt[: sample.prompt.rindex("Follow.\n") - 1]
        size = len(tokens.encode(example))
        five_more = len(tokens.encode((TEXTS["noise"] + "\n") * 5))
        assert 500 - five_more - 2 <= size <= 500


@pytest.mark.parametrize(
    ("length", "example_counts", "counts"),
    [(3000, {3: 10, 1: 10}, (6, 1)), (6000, {10: 10, 3: 30}, (30, 3))],
)
def test_common_words_are_as_common_as_they_should(length, example_counts, counts, draw):
    for sample in draw("cwe", length=length):
        shown, asked = sample.prompt.split("\nCount.\n")
        example, _, answer = shown.removeprefix("Count.\n").partition("\nWhich are common? Common: ")
        words = Counter(numbered(example))
        assert Counter(words.values()) == example_counts
        assert set(numbered(answer)) == {word for word, _ in words.most_common(10)}
        words = Counter(numbered(asked.removesuffix("\nWhich are common? Common:")))
        times = Counter(words.values())
        assert times[counts[0]] == 10
        assert set(times) == set(counts)
        assert {word for word, _ in words.most_common(10)} == set(sample.references)
        assert len(sample.references) == 10


def numbered(text: str) -> list[str]:
    items = text.split()
    assert items[::2] == [f"{i}." for i in range(1, len(items) // 2 + 1)]
    return items[1::2]


def test_a_list_longer_than_the_words_goes_on_with_pairs(draw):
    (sample,) = draw("cwe", length=30_000, tokens=Words(), count=1)
    words = Counter(
        numbered(sample.prompt.split("\nCount.\n")[1].removesuffix("\nWhich are common? Common:"))
    )
    single = [word for word in words if "-" not in word]
    assert 800 < len(single) < len(words) == 10 + (sum(words.values()) - 300) / 3
    assert any("-" in word for word in sample.references)  # common words are of both kinds


@pytest.mark.parametrize("length", [1000, 5000])
def test_frequent_words_follow_zipf(length, draw):
    for sample in draw("fwe", length=length):
        text = sample.prompt.removeprefix("Count. ").removesuffix("\nWhich are frequent? Frequent:").split()
        ranked = Counter(text).most_common()
        assert [word for word, _ in ranked[:4]] == ["...", *sample.references]
        assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked[1:])
        assert len(ranked) <= length // 50
        # n from the count of the first rank (6 / pi^2 of n), the others from n: one off by rounding down.
        for rank, (_, times) in enumerate(ranked, start=1):
            assert times == pytest.approx(ranked[0][1] / rank**2, abs=1.001)
        assert ranked[3][1] > ranked[4][1]


def test_shipped_questions_about_one_passage(draw):
    samples = draw("qa_1", count=8)
    assert [sample.references for sample in draw("qa_1", count=8, seed=1)] == [s.references for s in samples]
    for sample in samples:
        number = re.findall(r"^No\. (\d+):$", sample.prompt, re.MULTILINE)
        assert number == [str(i) for i in range(1, len(number) + 1)]
        (reference,) = sample.references
        assert reference in sample.prompt
        assert 0 <= sample.meta["depth"] < 1
        question = sample.prompt[sample.prompt.rindex("\nAnswer: ") :]
        town = re.search(r"(?:in|through|of|was|founded) ([A-Z]\w+)", question)
        assert town is not None
        (passage,) = (p for p in sample.prompt.split("\nNo. ") if f"\n{town[1]} is a town" in p)
        assert reference in passage
        context = sample.prompt[: sample.prompt.rindex("\nAnswer: ")].removeprefix("Read.\n")
        start = int(sample.meta["depth"] * len(context))
        assert abs(start - context.index(f"\n{town[1]} is a town")) < 20


def test_shipped_questions_over_two_passages(draw):
    for sample in draw("qa_2", count=8):
        person = re.search(r"the town where (\w+ \w+) was born", sample.prompt)
        assert person is not None
        born = re.search(rf"\n{person[1]} was an? \w+, born in (\w+) in", sample.prompt)
        assert born is not None
        (town,) = re.findall(rf"\n({born[1]} is a town.*)", sample.prompt)
        assert sample.references[0] in town
        assert sample.meta == {}
        assert len(re.findall(r"^No\. \d+:$", sample.prompt, re.MULTILINE)) >= 10


def test_shipped_passages_are_distinct_and_many():
    from jobs.tasks.ruler_passages import hotpotqa_like, squad_like

    paragraphs = [p for article in squad_like()["data"] for p in article["paragraphs"]]
    assert len({p["context"] for p in paragraphs}) == len(paragraphs) >= 150
    questions = [qa["question"] for p in paragraphs for qa in p["qas"]]
    assert len(set(questions)) == len(questions) == len(paragraphs)
    entries = hotpotqa_like()
    assert len({entry["question"] for entry in entries}) == len(entries) >= 100
    for entry in entries:
        titles = [title for title, _ in entry["context"]]
        assert len(set(titles)) == 10
        assert sum(entry["answer"] in "".join(sentences) for _, sentences in entry["context"]) >= 1


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("length", [2500, 6000])
def test_prompts_fill_the_length_less_the_answer(name, length, draw, demo):
    """To within a unit of haystack: a sentence, a needle, a passage, three words of a list."""
    for tokens, slack in ((demo, 150), (Words(), 100), (Bytes(), 800)):
        answer = TOKENS_TO_GENERATE.get(name, 128)
        if tokens.__class__ is Bytes:
            length = 8000
        for sample in draw(name, length=length, tokens=tokens):
            size = len(tokens.encode(sample.prompt))
            assert length - answer - slack < size <= length - answer
            assert sample.chat


def test_a_long_prompt(draw, demo):
    (sample,) = draw("niah_multikey_2", length=131072, count=1)
    assert 131072 - 128 - 30 < len(demo.encode(sample.prompt)) <= 131072 - 128


@pytest.mark.parametrize("name", KINDS)
def test_same_arguments_same_samples(name, draw):
    samples = draw(name, length=1500, seed=7)
    assert draw(name, length=1500, seed=7, count=5)[:3] == samples
    others = draw(name, length=1500, seed=8) + draw(name, length=1600, seed=7)
    assert len({sample.prompt for sample in samples + others}) == 9


@pytest.mark.parametrize("name", KINDS)
def test_samples_that_ask_the_same_have_one_name(name, draw):
    """Intervals resample by name: what asks the same at two lengths is no two independent samples."""
    by_seed = {
        seed: draw(name, length=1500, seed=seed) + draw(name, length=1600, seed=seed) for seed in (7, 8)
    }
    for samples in by_seed.values():
        assert len({sample.id for sample in samples[:3]}) == 3
        for short, long in zip(samples[:3], samples[3:], strict=True):
            assert short.id == long.id
            if name not in ("cwe", "fwe", "niah_multikey_2", "niah_multikey_3"):  # more words, more needles
                assert short.references == long.references
    names = [{sample.id for sample in samples} for samples in by_seed.values()]
    if name in ("qa_1", "qa_2"):
        assert names[0] == names[1]
        assert [s.references for s in by_seed[7]] == [s.references for s in by_seed[8]]
    else:
        assert not names[0] & names[1]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("tokens", [Words(), Bytes()], ids=["words", "bytes"])
def test_too_short_a_length_names_the_smallest_that_works(name, tokens, draw):
    with pytest.raises(ConfigError, match=rf"task '{name}', got 9 tokens; use at least \d+") as refused:
        draw(name, length=9, tokens=tokens, count=1)
    assert refused.value.field == "length"
    enough = int(str(refused.value).rpartition(" ")[2])
    with pytest.raises(ConfigError, match="length must leave room"):
        draw(name, length=enough - 1, tokens=tokens, count=1)
    assert draw(name, length=enough, tokens=tokens, count=1)


def test_golden_scores():
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))["ruler"]
    rows = golden["rows"]
    for key, name in (("all", "niah_multivalue"), ("all", "cwe"), ("part", "qa_1"), ("part", "qa_2")):
        task = get_task(name)
        scores = [task.score(row["prediction"], tuple(row["references"]), {}) for row in rows]
        assert [round(100 * score, 2) for score in scores] == [row[key] for row in rows]
        assert round(100 * sum(scores) / len(scores), 2) == golden[key]


@pytest.mark.parametrize(
    ("text", "references", "every", "one"),
    [
        ("", ("a",), 0.0, 0.0),
        ("  \x00\x1f ", ("\n",), 0.0, 0.0),
        ("a\tb", ("a\nb",), 1.0, 1.0),  # what cannot be printed is a line break
        ("xAmBerx", ("amber", "amber", "oak"), 2 / 3, 1.0),
        ("\x1famber\x00", ("amber ",), 0.0, 0.0),
    ],
)
def test_score_of_odd_answers(text, references, every, one):
    assert get_task("vt").score(text, references, {}) == every
    assert get_task("qa_1").score(text, references, {}) == one


def test_every_task_is_made_by_its_spec():
    names = FAMILIES["jobs.tasks.ruler"]
    assert tuple(task.name for task in make_tasks("ruler")) == names[1:] == tuple(KINDS)
    entry = {
        "name": "ruler",
        "templates": "t",
        "haystack": "h",
        "words": "w",
        "squad": "s",
        "hotpotqa": "q",
    }
    for task in (*make_tasks("ruler"), *make_tasks(entry)):
        assert make_tasks(task.spec) == (task,)
        assert task.max_new_tokens == TOKENS_TO_GENERATE.get(task.name, 128)
    given = {task.name: set(task.spec) - {"name", "templates"} for task in make_tasks(entry)}
    assert given["niah_single_1"] == {"words"}
    assert given["niah_single_2"] == {"haystack", "words"}
    assert given["niah_multikey_3"] == given["vt"] == given["fwe"] == set()
    assert (given["cwe"], given["qa_1"], given["qa_2"]) == ({"words"}, {"squad"}, {"hotpotqa"})
    assert [task.name for task in make_tasks({"name": "ruler", "tasks": ["vt", "qa_1"]})] == ["vt", "qa_1"]


def test_content_says_what_a_sample_is_made_of(templates, tmp_path):
    (tmp_path / "a.txt").write_text("One. Two. Three.", encoding="utf-8")
    ours = {task.name: task.content() for task in make_tasks({"name": "ruler", "templates": templates})}
    theirs = get_task({"name": "niah_single_2", "templates": templates, "haystack": str(tmp_path)}).content()
    assert ours["niah_single_2"]["haystack"]["source"].startswith("the Python standard library")
    assert theirs["haystack"]["source"] == "given text"
    assert {key for key in theirs if theirs[key] != ours["niah_single_2"][key]} == {"haystack"}
    assert len({json.dumps(content, sort_keys=True) for content in ours.values()}) == 13
    assert "shipped passages" in ours["qa_1"]["questions"]["source"]
    assert str(tmp_path) not in json.dumps(theirs)
    assert templates not in json.dumps(ours)


@pytest.mark.parametrize(
    ("entry", "field"),
    [
        ({"name": "vt", "haystack": "x"}, "tasks.vt.haystack"),
        ({"name": "niah_single_1", "haystack": "x"}, "tasks.niah_single_1.haystack"),
        ({"name": "qa_1", "hotpotqa": "x"}, "tasks.qa_1.hotpotqa"),
        ({"name": "qa_1", "squad": 3}, "tasks.qa_1.squad"),
        ({"name": "vt", "tasks": ["vt"]}, "tasks.vt.tasks"),
        ({"name": "ruler", "tasks": ["vt"], "squad": "x"}, "tasks.ruler.squad"),
        ({"name": "ruler", "tasks": []}, "tasks.ruler.tasks"),
        ({"name": "ruler", "tasks": "vt"}, "tasks.ruler.tasks"),
        ({"name": "ruler", "tasks": ["vt", "vt"]}, "tasks.ruler.tasks"),
        ({"name": "ruler", "tasks": [["vt"]]}, "tasks.ruler.tasks"),
        ({"name": "ruler", "tasks": [{"a": 1}]}, "tasks.ruler.tasks"),
        ({"name": "ruler", "tasks": ["vtt"]}, "tasks.ruler.tasks"),
        ({"name": "ruler", "length": 3}, "tasks.ruler.length"),
    ],
)
def test_bad_parameters(entry, field):
    with pytest.raises(ConfigError) as refused:
        make_tasks(entry)
    assert refused.value.field == field


def test_any_seed_keeps_needles_apart(draw):
    """Among thousands of needles no key comes twice, which chance alone would not give."""
    rng = random.Random(0)
    (sample,) = draw("niah_multikey_2", length=60_000, count=1, seed=rng.randrange(1000))
    keys = [key for _, key, _ in NEEDLE.findall(sample.prompt)]
    assert len(set(keys)) == len(keys) > 2000
