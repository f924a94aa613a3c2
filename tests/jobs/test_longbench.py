"""LongBench's tasks: rows from files, prompts from templates, the official cut; faults name their place."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from transformers import PreTrainedTokenizerFast

from jobs.tasks import FAMILIES, Sample, Tokens, get_task, make_tasks
from jobs.tasks.longbench import MAX_NEW_TOKENS, truncate
from jobs.tasks.longbench_prompts import read_template
from jobs.tasks.tokens import PlainTokens
from spts.errors import ConfigError

SETS = FAMILIES["jobs.tasks.longbench"][1:]
CLASSES = ["Food", "Date", "Location"]
ANSWERS = {
    "passage_count": ["3"],
    "passage_retrieval_en": ["Paragraph 3"],
    "passage_retrieval_zh": ["段落3"],
    "trec": ["Date"],
    "lsht": ["Date"],
}
TEMPLATE = "Read {{this}}:\n{context}\nQ: {input}\nA:"
TOKENIZER = Path(__file__).parents[2] / "jobs" / "demo_model" / "tokenizer.json"


@pytest.fixture(scope="module")
def fast() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER))


@pytest.fixture(scope="module")
def tokens(fast) -> Tokens:
    return PlainTokens(fast.backend_tokenizer)


def row(name: str, number: int) -> dict[str, Any]:
    """A row with all of the official fields."""
    return {
        "input": f"Where is stone {number}?",
        "context": f"Stone {number // 2} is in the river of {name}. {{input}} " * 20,  # two rows share a text
        "answers": ANSWERS.get(name, ["in the river", "the river"]),
        "length": 160,
        "dataset": name,
        "language": "zh" if name.endswith("zh") else "en",
        "all_classes": CLASSES if name in ("trec", "lsht") else None,
        "_id": hashlib.sha256(f"{name}{number}".encode()).hexdigest(),
    }


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rows), encoding="utf-8")


@pytest.fixture
def folder(tmp_path) -> Path:
    """All 21 sets with four rows each, and templates."""
    for name in SETS:
        write_lines(tmp_path / f"{name}.jsonl", [row(name, i) for i in range(4)])
    (tmp_path / "dataset2prompt.json").write_text(json.dumps(dict.fromkeys(SETS, TEMPLATE)), encoding="utf-8")
    return tmp_path


def draw(entry: dict[str, Any], tokens: Tokens, *, length: int = 4096, count: int = 100) -> list[Sample]:
    return list(get_task(entry).samples(tokens, length=length, count=count, seed=0))


def test_all_21_sets_give_samples_in_the_order_of_the_file(folder, tokens):
    tasks = make_tasks({"name": "longbench", "data": str(folder)})
    assert [task.name for task in tasks] == list(SETS)
    for task in tasks:
        samples = list(task.samples(tokens, length=4096, count=100, seed=0))
        rows = [row(task.name, i) for i in range(4)]
        assert [sample.prompt for sample in samples] == [
            f"Read {{this}}:\n{each['context']}\nQ: {each['input']}\nA:" for each in rows
        ]
        assert [list(sample.references) for sample in samples] == [each["answers"] for each in rows]
        assert [sample.meta["_id"] for sample in samples] == [each["_id"] for each in rows]
        assert {sample.meta["original_length"] for sample in samples} == {160}
        assert len({sample.id for sample in samples}) == 4
        assert [task.score(s.references[0], s.references, s.meta) for s in samples] == pytest.approx([1] * 4)
        assert list(task.samples(tokens, length=4096, count=2, seed=7)) == samples[:2]
        assert make_tasks(task.spec) == (task,)


def test_rows_about_the_same_text_share_a_context(folder, tokens):
    names = [sample.context for sample in draw({"name": "qasper", "data": str(folder)}, tokens)]
    assert names[0] == names[1] != names[2] == names[3]


def test_the_official_answer_lengths_chat_rules_and_stops(folder, tokens):
    plain = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    for name in SETS:
        entry = {"name": name, "data": str(folder)}
        assert {sample.chat for sample in draw(entry, tokens)} == {name not in plain}
        assert get_task(entry).stop == ()
    by_length: dict[int, set[str]] = {}
    for name, length in MAX_NEW_TOKENS.items():
        by_length.setdefault(length, set()).add(name)
    assert by_length[512] == {"gov_report", "qmsum", "multi_news", "vcsum"}
    assert by_length[128] == {"narrativeqa", "qasper", "dureader", "samsum"}
    assert by_length[64] == {"multifieldqa_en", "multifieldqa_zh", "trec", "lsht", "lcc", "repobench-p"}
    assert len(by_length[32]) == 7


def test_sets_names_some(folder):
    tasks = make_tasks({"name": "longbench", "data": str(folder), "sets": ["trec", "qasper"]})
    assert [task.name for task in tasks] == ["trec", "qasper"]


# --- where the data and the prompts come from


def test_content_changes_with_the_data_and_the_prompt_and_names_no_path(folder, tmp_path):
    task = get_task({"name": "qasper", "data": str(folder)})
    first = dict(task.content())
    assert first["data"] == hashlib.sha256((folder / "qasper.jsonl").read_bytes()).hexdigest()
    assert str(tmp_path) not in json.dumps(first)
    (folder / "dataset2prompt.json").write_text(json.dumps({"qasper": TEMPLATE + " "}))
    second = dict(task.content())
    write_lines(folder / "qasper.jsonl", [row("qasper", 5)])
    third = dict(task.content())
    assert first["data"] == second["data"] != third["data"]
    assert first["prompt"] != second["prompt"] == third["prompt"]


@pytest.mark.parametrize("place", ["{}.parquet", "{}/test-00000-of-00001.parquet", "data/{}/0000.parquet"])
@pytest.mark.parametrize("name", ["qasper", "trec"])
def test_parquet_gives_the_same_samples(folder, tmp_path, tokens, name, place):
    (folder / "config").mkdir()
    (folder / "dataset2prompt.json").rename(folder / "config" / "dataset2prompt.json")
    expected = draw({"name": name, "data": str(folder)}, tokens)
    (folder / f"{name}.jsonl").unlink()
    path = folder / place.format(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist([row(name, i) for i in range(4)]), path)
    assert draw({"name": name, "data": str(folder)}, tokens) == expected


def test_several_parquet_files_are_one_set(folder, tokens):
    expected = draw({"name": "qasper", "data": str(folder)}, tokens)
    (folder / "qasper.jsonl").unlink()
    (folder / "qasper").mkdir()
    for part in range(2):
        rows = [row("qasper", i) for i in (2 * part, 2 * part + 1)]
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "qasper" / f"{part}.parquet")
    assert draw({"name": "qasper", "data": str(folder)}, tokens) == expected


@pytest.mark.parametrize(
    ("question", "prompt"),
    [("Q: where?\n", "Long text.\nQ: where?\nA:"), ("Q: where?\nA: ", "Long text.\nQ: where?\nA: ")],
)
def test_rows_that_bring_their_prompt_need_no_template(tmp_path, tokens, question, prompt):
    rows = [
        {
            "context": "Long text.\n",
            "question": question,
            "answer_prefix": "A:",
            "answers": ["there"],
            "all_classes": [],
            "length": "12",
            "task": "samsum",
        }
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "samsum.parquet")
    entry = {"name": "samsum", "data": str(tmp_path)}
    (sample,) = draw(entry, tokens)
    assert (sample.prompt, sample.references) == (prompt, ("there",))
    assert sample.meta == {"original_length": 12}
    assert get_task(entry).content()["prompt_source"] == "data"


@pytest.mark.parametrize("name", SETS)
def test_without_templates_the_installed_lm_eval_has_them(tmp_path, name):
    """lm-eval's own rendering is the oracle."""
    import jinja2
    from lm_eval import tasks

    template = read_template(tmp_path, name)
    assert template.source == "lm-eval"
    text = (Path(tasks.__file__).parent / "longbench" / f"{name}.yaml").read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if line.startswith("doc_to_text: ")]
    jinja = jinja2.Environment(keep_trailing_newline=True).from_string(json.loads(line.partition(" ")[2]))
    values = {"context": "{input} {{x}}", "question": "{context}? 石"}
    assert template.fill(values["context"], values["question"]) == jinja.render(values)


def test_a_pinned_mirror_is_read_from_the_hub_cache(folder, tmp_path, tokens, monkeypatch):
    """Laid out as the hub's own cache does it, with the network off."""
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "cache" / "datasets--someone--LongBench" / "snapshots" / commit
    (snapshot / "qasper").mkdir(parents=True)
    rows = [row("qasper", i) for i in range(4)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), snapshot / "qasper" / "0.parquet")
    (snapshot / "dataset2prompt.json").write_bytes((folder / "dataset2prompt.json").read_bytes())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    entry = {"name": "qasper", "hub": "someone/LongBench", "revision": commit}
    assert draw(entry, tokens) == draw({"name": "qasper", "data": str(folder)}, tokens)
    assert get_task(get_task(entry).spec) == get_task(entry)
    with pytest.raises(ConfigError, match="hub must be a data set that can be read, got 'someone/Other'"):
        draw({**entry, "hub": "someone/Other"}, tokens)


# --- the cut


def official_cut(tokenizer: PreTrainedTokenizerFast, prompt: str, limit: int) -> str:
    """The rule of LongBench's pred.py: two halves of the limit, decoded apart."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if len(ids) <= limit:
        return prompt
    half = int(limit / 2)
    first, last = ids[:half], ids[len(ids) - half :]
    return str(
        tokenizer.decode(first, skip_special_tokens=True) + tokenizer.decode(last, skip_special_tokens=True)
    )


ENGLISH = " ".join(f"The stone {i} lies in river {i * 7 % 31}." for i in range(300))
CHINESE = "石头在河里，图书馆在北京。研究结果说明。" * 60


@pytest.mark.parametrize("length", [6, 7, 63, 500, 1001, 10**6])
@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["english", "chinese"])
def test_a_prompt_is_cut_as_the_official_code_does_it(fast, tokens, text, length):
    official = official_cut(fast, text, length)
    cut, before = truncate(text, tokens, length)
    assert tokens.count(cut) <= length
    assert before == (None if tokens.count(text) <= length else tokens.count(text))
    if tokens.count(official) <= length:
        assert cut == official
    else:  # the official prompt is too long by what its seam costs: ours loses no more than that
        assert tokens.count(cut) >= length - 2 * (tokens.count(official) - length) - 4


def test_an_english_prompt_is_cut_exactly_as_the_official_code_does_it(fast, tokens):
    """So that the comparison above is not empty."""
    cut, before = truncate(ENGLISH, tokens, 500)
    assert cut == official_cut(fast, ENGLISH, 500) != ENGLISH
    assert before is not None and before > 500


class Letters:
    """A token per letter; a letter before a digit costs one more, so halves can grow when joined."""

    def encode(self, text: str) -> list[int]:
        ids = []
        for i, char in enumerate(text):
            if i and char.isdigit() and text[i - 1].isalpha():
                ids.append(0)
            ids.append(ord(char))
        return ids

    def decode(self, token_ids: Any) -> str:
        return "".join(map(chr, token_ids)).replace("\0", "")

    def count(self, text: str) -> int:
        return len(self.encode(text))


@pytest.mark.parametrize(
    ("text", "length", "cut"),
    [
        ("abcdefg", 7, ("abcdefg", None)),
        ("abcdefg", 4, ("abfg", 7)),
        ("abcdefg", 5, ("abfg", 7)),
        ("aaaa....1111", 6, ("aaa11", 12)),  # "aaa111" has seven tokens: one fewer is kept, at the end
        ("aaaa....1111", 7, ("aaa111", 12)),
    ],
)
def test_cuts_by_hand(text, length, cut):
    assert truncate(text, Letters(), length) == cut


@pytest.mark.parametrize("length", [0, 1])
def test_no_room_for_two_halves(length):
    with pytest.raises(ConfigError, match=f"length must leave room .* got {length} tokens"):
        truncate("abcdefg", Letters(), length)


def test_a_cut_sample_says_how_long_it_was(folder, tokens):
    entry = {"name": "qasper", "data": str(folder)}
    whole = draw(entry, tokens)
    for sample, uncut in zip(draw(entry, tokens, length=100), whole, strict=True):
        assert tokens.count(sample.prompt) <= 100
        assert sample.meta == {**uncut.meta, "truncated_from": tokens.count(uncut.prompt)}
        assert sample.prompt.startswith("Read {this}:") and sample.prompt.endswith("\nA:")
    assert all("truncated_from" not in sample.meta for sample in whole)


# --- faults


def test_a_missing_set_is_named(folder):
    (folder / "musique.jsonl").unlink()
    for task in make_tasks({"name": "longbench", "data": str(folder)}):
        if task.name != "musique":
            task.content()
            continue
        with pytest.raises(ConfigError, match=rf"musique\.jsonl.*{folder}.*sets"):
            task.content()


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"data must be a folder, got .*nowhere"):
        get_task({"name": "qasper", "data": str(tmp_path / "nowhere")}).content()


def test_a_set_that_is_there_twice(folder):
    (folder / "data").mkdir()
    (folder / "data" / "qasper.jsonl").write_bytes((folder / "qasper.jsonl").read_bytes())
    with pytest.raises(ConfigError, match=r"the set 'qasper' once, got .* and .*; remove one"):
        get_task({"name": "qasper", "data": str(folder)}).content()


def changed(**changes: Any) -> Callable[[dict[str, Any]], str]:
    return lambda given: json.dumps({**given, **changes})


def without(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda given: json.dumps({k: v for k, v in given.items() if k != key})


@pytest.mark.parametrize(
    ("name", "line", "fault"),
    [
        ("qasper", lambda given: '{"input": "no end', "must be a JSON object"),
        ("qasper", lambda given: "", "must be a JSON object"),
        ("qasper", lambda given: "[1]", "must be a JSON object"),
        ("qasper", lambda given: "[" * 100_000, "must be a JSON object"),
        ("qasper", without("context"), "context must be given"),
        ("qasper", without("input"), "input must be given"),
        ("qasper", without("answers"), "answers must be given"),
        ("qasper", changed(context=7), "context must be a text, got 7"),
        ("qasper", changed(context="\ud800"), "context must be a text"),
        ("qasper", changed(input=None), "input must be a text, got None"),
        ("qasper", changed(answers=[]), r"answers must be a list of at least one text, got \[\]"),
        ("qasper", changed(answers="x"), "answers must be a list of at least one text, got 'x'"),
        ("qasper", changed(answers=["x", 3]), "answers must be a list of at least one text"),
        ("qasper", changed(length="9" * 5000), "length must be an integer, got '999"),
        ("qasper", changed(length="long"), "length must be an integer, got 'long'"),
        ("trec", changed(all_classes=None), "all_classes must be a list of at least one text, got None"),
        ("trec", without("all_classes"), "all_classes must be given"),
        ("passage_retrieval_en", changed(answers=["3"]), "answers must hold 'Paragraph ' and a number"),
        ("passage_retrieval_zh", changed(answers=["第三"]), "answers must hold '段落' and a number"),
    ],
)
def test_a_malformed_line_is_named_with_its_file(folder, tokens, name, line, fault):
    path = folder / f"{name}.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")
    lines[2] = line(row(name, 2))
    path.write_text("\n".join(lines), encoding="utf-8")
    task = get_task({"name": name, "data": str(folder)})
    for read in (task.content, lambda: draw({"name": name, "data": str(folder)}, tokens, count=1)):
        with pytest.raises(ConfigError, match=rf"{name}\.jsonl line 3:? {fault}") as refused:
            read()
        assert refused.value.field == "data"
        assert len(str(refused.value)) < 600


def test_a_line_that_is_not_utf8(folder):
    (folder / "qasper.jsonl").write_bytes(b'{"input": "\xff"}\n')
    with pytest.raises(ConfigError, match=r"qasper\.jsonl line 1 must be a JSON object in UTF-8"):
        get_task({"name": "qasper", "data": str(folder)}).content()


def test_faults_of_parquet_files(tmp_path):
    task = get_task({"name": "qasper", "data": str(tmp_path)})
    path = tmp_path / "qasper.parquet"
    path.write_bytes(b"no parquet")
    with pytest.raises(ConfigError, match=r"qasper\.parquet must be a Parquet file"):
        task.content()
    rows = [row("qasper", 0), {**row("qasper", 1), "answers": []}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with pytest.raises(ConfigError, match=r"qasper\.parquet row 2: answers must be a list of at least one"):
        task.content()
    parquet.write_table(pyarrow.Table.from_pylist(rows).slice(0, 0), path)
    with pytest.raises(ConfigError, match=r"data must hold rows, got none in .*qasper\.parquet"):
        task.content()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", r"dataset2prompt\.json must be JSON"),
        ("[]", r"must hold a prompt under 'qasper', got none"),
        ('{"trec": "{context}"}', r"must hold a prompt under 'qasper', got none"),
        ('{"qasper": "{context} {answers}"}', r"the prompt of qasper .* \['answers', 'context'\]"),
        ('{"qasper": "{input}"}', r"the prompt of qasper .* \['input'\]"),
        ('{"qasper": "{context} \\ud800"}', r"must hold a prompt under 'qasper', got none"),
        ('{"qasper": "{context!r}"}', r"the prompt of qasper"),
        ('{"qasper": "{context} }"}', r"the prompt of qasper .*Single '}'"),
    ],
)
def test_a_template_that_cannot_be_filled(folder, text, fault):
    (folder / "dataset2prompt.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=fault):
        get_task({"name": "qasper", "data": str(folder)}).content()


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
@pytest.mark.parametrize("name", ["qasper.jsonl", "dataset2prompt.json"])
def test_what_is_no_file_is_refused(name, make, folder):
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with pytest.raises(ConfigError, match=r"must be (a )?regular files?|must hold qasper\.jsonl"):
        get_task({"name": "qasper", "data": str(folder)}).content()


COMMIT = "a" * 40


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        ({"name": "qasper"}, r"tasks\.qasper\.data must be given"),
        ({"name": "qasper", "data": 3}, r"tasks\.qasper\.data must be a text"),
        ({"name": "qasper", "data": ""}, r"tasks\.qasper\.data must be a text"),
        ({"name": "qasper", "data": "x", "sets": ["qasper"]}, r"tasks\.qasper\.sets must be a known key"),
        ({"name": "qasper", "data": "x", "hub": "a/b", "revision": COMMIT}, r"data must be given, or hub"),
        ({"name": "qasper", "hub": "a/b"}, r"revision must be given with hub"),
        ({"name": "qasper", "data": "x", "revision": COMMIT}, r"revision must be given with hub, and only"),
        ({"name": "qasper", "hub": "a/b", "revision": "main"}, r"revision must be a commit of 40 hex digits"),
        ({"name": "longbench", "data": "x", "sets": []}, r"tasks\.longbench\.sets must be a list"),
        ({"name": "longbench", "data": "x", "sets": "qasper"}, r"tasks\.longbench\.sets must be a list"),
        ({"name": "longbench", "data": "x", "sets": ["qasp"]}, r"tasks\.longbench\.sets must be a list"),
        ({"name": "longbench", "data": "x", "sets": [["a"]]}, r"tasks\.longbench\.sets must be a list"),
        ({"name": "longbench", "data": "x", "sets": ["lcc", "lcc"]}, r"each once, got \['lcc', 'lcc'\]"),
    ],
)
def test_parameters_that_make_no_task(entry, fault):
    with pytest.raises(ConfigError, match=fault):
        make_tasks(entry)
