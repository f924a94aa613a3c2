"""LongBench's scorers: equal to the official ones, by their own numbers and by lm-eval's copy of the code."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.tasks import FAMILIES, get_task
from jobs.tasks.longbench import MAX_NEW_TOKENS
from jobs.tasks.scorers import (
    CLASSIFIED,
    METRICS,
    classification,
    code_similarity,
    data_set_score,
    longbench_score,
    rouge_l,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "benchmark_scores.json").read_text("utf-8"))[
    "longbench"
]


def scores(case: dict[str, Any]) -> list[float]:
    """What our task gives the rows of one golden set; its data folder does not exist."""
    task = get_task({"name": case["dataset"], "data": "/no/such/folder"})
    return [
        task.score(row["prediction"], tuple(row["answers"]), {"all_classes": row["all_classes"]})
        for row in case["rows"]
    ]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["dataset"])
def test_every_row_and_every_set_has_the_official_score(case):
    ours = scores(case)
    assert [round(100 * score, 2) for score in ours] == [row["score"] for row in case["rows"]]
    assert data_set_score(ours) == case["dataset_score"]


def test_the_golden_file_is_read_whole():
    assert len(GOLDEN) == 13
    assert all(len(case["rows"]) == 12 for case in GOLDEN)


def test_every_set_has_one_metric_and_a_task():
    names = set(FAMILIES["jobs.tasks.longbench"][1:])
    assert len(names) == 21
    assert set(METRICS) | CLASSIFIED == names == set(MAX_NEW_TOKENS)
    assert not set(METRICS) & CLASSIFIED


# --- lm-eval ships the official functions, slightly changed: an oracle for the metrics it left as they were


@pytest.fixture(scope="module")
def official() -> ModuleType:
    """lm-eval's copy. The fuzzywuzzy that it imports is not installed, and not used here."""
    missing = "fuzzywuzzy" not in sys.modules
    if missing:
        stand_in: Any = ModuleType("fuzzywuzzy")
        stand_in.fuzz = None
        sys.modules["fuzzywuzzy"] = stand_in
    try:
        return importlib.import_module("lm_eval.tasks.longbench.metrics")
    finally:
        if missing:
            del sys.modules["fuzzywuzzy"]
            sys.modules.pop("lm_eval.tasks.longbench.metrics", None)


ORACLES = {
    "qasper": "qa_f1_score",
    "multifieldqa_zh": "qa_f1_zh_score",
    "gov_report": "rouge_score",
    "dureader": "rouge_zh_score",
    "passage_count": "count_score",
    "passage_retrieval_en": "retrieval_score",
    "passage_retrieval_zh": "retrieval_zh_score",
}
PIECES = [
    *("the", "The", "a", "an", "stone", "Stone", "river-bed", "it's", "12", "1", "２", "3.5", "Paragraph 1"),
    *("段落1", "段落12", "北京", "图书馆", "石头", "研究。", "，", "《", "》", "！", "—", "ｈ"),
    *(" ", "\n", "\t", ".", "..", ",", "　", "_", "$"),
]
texts = st.lists(st.sampled_from(PIECES), max_size=12).flatmap(
    lambda pieces: st.sampled_from(["", " "]).map(lambda between: between.join(pieces))
)


@pytest.mark.parametrize("data_set", ORACLES)
@settings(max_examples=150, deadline=None)
@given(answer=texts, reference=texts)
def test_a_metric_equals_the_official_one(official, data_set, answer, reference):
    if "retrieval" in data_set:
        reference = {"passage_retrieval_en": "Paragraph 1", "passage_retrieval_zh": "段落12"}[
            data_set
        ] + reference
    theirs = getattr(official, ORACLES[data_set])(answer, reference)
    assert METRICS[data_set](answer, reference) == theirs
    assert longbench_score(data_set, answer, [reference, reference]) == theirs


CLASS_PIECES = ["Location", "Other location", "location", "Other", "Food", "Fo", "", " or ", "Date"]


@settings(max_examples=300, deadline=None)
@given(
    answer=st.lists(st.sampled_from(CLASS_PIECES), max_size=5).map("".join),
    reference=st.sampled_from(CLASS_PIECES),
    classes=st.lists(st.sampled_from(CLASS_PIECES), min_size=1, max_size=8),
)
def test_classification_equals_the_official_one(official, answer, reference, classes):
    theirs = official.classification_score(answer, reference, all_classes=classes)
    assert classification(answer, reference, classes) == theirs


def test_a_class_after_a_dropped_one_is_not_looked_at():
    classes = ["loc", "location", "Other location"]
    # "loc" is dropped, "location" then skipped: two names are left where none but the right one was meant.
    assert classification("Other location", "Other location", classes) == 1 / 2


# --- edges


@pytest.mark.parametrize("data_set", sorted(METRICS))
def test_an_empty_answer(data_set):
    reference = {"passage_retrieval_en": "Paragraph 3", "passage_retrieval_zh": "段落3"}.get(data_set, "3")
    assert longbench_score(data_set, "", [reference]) == 0.0


@pytest.mark.parametrize(
    ("data_set", "score"),
    [
        ("qasper", 0.0),
        ("multifieldqa_zh", 0.0),
        ("qmsum", 0.0),
        ("vcsum", 0.0),
        ("passage_count", 0.0),
        ("lcc", 1.0),
    ],
)
def test_an_empty_reference_meets_an_empty_answer(data_set, score):
    assert longbench_score(data_set, "", [""]) == score


@pytest.mark.parametrize(
    ("data_set", "answer", "score"),
    [
        ("triviaqa", "\n\nred stone\nblue", 1.0),
        ("triviaqa", " \nred stone", 0.0),  # only line ends are stripped, so the first line is a space
        ("qasper", "red stone\nblue", 0.8),
        ("samsum", "red stone\nred", pytest.approx(1.0)),
    ],
)
def test_the_first_line_counts_alone_in_some_sets(data_set, answer, score):
    assert longbench_score(data_set, answer, ["red stone"]) == score


def test_the_best_reference_counts():
    assert longbench_score("hotpotqa", "red", ["blue", "red stone", "green"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("x = 1", 1.0),
        ("\n\nx = 1\ny = 2", 1.0),
        ("# note\n// note\n`x`\nx = 1", 1.0),
        ("# note\n\nx = 1", 0.0),  # the empty line is the first without a mark
        ("# note", 0.0),
        (" x = 1", 0.91),
        ("x = 2", 0.8),
    ],
)
def test_code_is_the_first_line_without_marks(answer, score):
    assert code_similarity(answer, "x = 1") == score


@pytest.mark.parametrize(
    ("answer", "reference", "percent"),
    [("abcdefgh", "abcdefg" + "x", 88), ("a" * 3 + "b", "a" * 3 + "c", 75), ("abcdefg", "bcdefghi", 80)],
)
def test_code_similarity_is_rounded_to_percent(answer, reference, percent):
    """2 · common letters / all letters: 14/16 = 87.5 rounds to the even 88, 6/8 = 75, 12/15 = 80."""
    assert code_similarity(answer, reference) == percent / 100


def test_the_score_of_a_set_is_rounded_to_two_digits():
    assert data_set_score([1.0, 0.0, 0.0]) == 33.33
    assert data_set_score([0.1] * 3) == 10.0


EVAL = """
import sys
from rouge import Rouge
def rouge(answer, reference):
    try: return Rouge().get_scores([answer], [reference], avg=True)["rouge-l"]["f"]
    except Exception: return 0.0
def rouge_zh(answer, reference): return rouge(answer, reference)
def scorer():
    for n in range(970, 1010, 2):
        if not rouge_zh(*["x" + f" {word}" * (n // 2) for word in "ab"]): return n
print(scorer())
"""


def test_rouge_gives_up_on_the_same_length_wherever_it_is_called():
    """The official script's calls in a fresh process say at which length the recursion is too deep."""
    ran = subprocess.run([sys.executable, "-c", EVAL], capture_output=True, text=True, check=True)
    first_zero = int(ran.stdout)

    def at(n: int, deep: int) -> float:
        if deep:
            return at(n, deep - 1)
        return rouge_l("x" + " a" * (n // 2), "x" + " b" * (n // 2))

    for deep in (0, 300):
        assert at(first_zero, deep) == 0.0 < at(first_zero - 2, deep)
