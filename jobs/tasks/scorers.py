"""How LongBench v1 scores an answer: number for number what its own eval.py and metrics.py give.

Source: github.com/THUDM/LongBench (MIT), LongBench/eval.py and metrics.py. Its quirks are kept, since they
are part of every published number; the three that surprise:

- `classification` drops class names from a list while it walks along it, so the one after a dropped name is
  never looked at.
- `rouge_l` gives 0 where the `rouge` package gives up: on texts without words, and on two sentences so long
  that its recursion passes Python's limit of 1000 frames.
- Code is compared with the first line that has none of ` # //, which may be an empty one.

One thing differs, where the rows of a set name different classes: the official code scores all of them with
the classes of the last row, ours scores each row with its own.
"""

from __future__ import annotations

import logging
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from threading import Thread

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"\d+")
_ASCII_PUNCTUATION = frozenset(string.punctuation)
# Which marks of Chinese text count is the official list's choice: of the pair 《 》 only the second does.
_PUNCTUATION = _ASCII_PUNCTUATION | frozenset(
    "–—‘’‛“”„‟…‧﹏、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿"
    "！＂＃＄％＆＇（）＊＋，－／：；＜＝＞？＠［＼］＾＿｀｛｜｝～｟｠｡｢｣､。"
)


def _overlap(answer: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of the words that two texts share, a word as often as both have it."""
    shared = (Counter(answer) & Counter(reference)).total()
    if shared == 0:
        return 0.0
    precision, recall = shared / len(answer), shared / len(reference)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    """The words of an English text in lower case, without punctuation and articles."""
    plain = "".join(char for char in text.lower() if char not in _ASCII_PUNCTUATION)
    return _ARTICLES.sub(" ", plain).split()


def _cut(text: str) -> list[str]:
    """The words of a Chinese text."""
    import jieba

    jieba.setLogLevel(logging.WARNING)  # else it tells stderr that it reads its dictionary
    return list(jieba.cut(text))


def _words_zh(text: str) -> list[str]:
    """The words of a Chinese text in lower case, without punctuation and white space."""
    kept = (
        "".join(char for char in word.lower() if char not in _PUNCTUATION and not char.isspace())
        for word in _cut(text)
    )
    return [word for word in kept if word]


def qa_f1(answer: str, reference: str) -> float:
    """F1 of the words shared with the reference, 0 to 1."""
    return _overlap(_words(answer), _words(reference))


def qa_f1_zh(answer: str, reference: str) -> float:
    """F1 of the words shared with the reference, 0 to 1, for Chinese; words are jieba's."""
    return _overlap(_words_zh(answer), _words_zh(reference))


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L F of the `rouge` package, 0 to 1; 0 where it raises."""
    found: list[float] = []
    # A thread begins with a stack as deep as that of the official script, wherever we are called from, so the
    # recursion limit is met by the same texts.
    thread = Thread(target=_rouge_l, args=(answer, reference, found))
    thread.start()
    thread.join()
    return found[0]


def _rouge_l(answer: str, reference: str, found: list[float]) -> None:
    from rouge import Rouge

    try:
        scores = Rouge(metrics=["rouge-l"]).get_scores([answer], [reference], avg=True)
    except (ValueError, RecursionError):
        found.append(0.0)
    else:
        found.append(scores["rouge-l"]["f"])


def rouge_l_zh(answer: str, reference: str) -> float:
    """ROUGE-L F over jieba's words, 0 to 1."""
    return rouge_l(" ".join(_cut(answer)), " ".join(_cut(reference)))


def classification(answer: str, reference: str, classes: Sequence[str]) -> float:
    """1 / number of class names in the answer if the reference is one of them, else 0.

    Names that are part of the reference's name do not count: "Location" inside "Other location" would.
    """
    named = [each for each in classes if each in answer]
    i = 0
    while i < len(named):
        each = named[i]
        if each in reference and each != reference:
            named.remove(each)
        i += 1
    return 1.0 / len(named) if reference in named else 0.0


def _share_of_numbers(answer: str, wanted: str) -> float:
    numbers = _NUMBER.findall(answer)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def count(answer: str, reference: str) -> float:
    """Share of the answer's numbers that are the reference, digit for digit; 0 without a number."""
    return _share_of_numbers(answer, reference)


def paragraph_number(reference: str, word: str) -> str | None:
    """The first number that follows `word` in a reference of a retrieval set; None if there is none."""
    found = re.search(word + r"(\d+)", reference)
    return found[1] if found else None


def _retrieval(answer: str, reference: str, word: str) -> float:
    number = paragraph_number(reference, word)
    if number is None:
        raise ValueError(f"a reference must hold {word!r} and a number, got {reference!r}")
    return _share_of_numbers(answer, number)


def retrieval_en(answer: str, reference: str) -> float:
    """Share of the answer's numbers that are the one after "Paragraph " in the reference."""
    return _retrieval(answer, reference, PARAGRAPH["passage_retrieval_en"])


def retrieval_zh(answer: str, reference: str) -> float:
    """Share of the answer's numbers that are the one after "段落" in the reference."""
    return _retrieval(answer, reference, PARAGRAPH["passage_retrieval_zh"])


def code_similarity(answer: str, reference: str) -> float:
    """How alike the answer's first line of code and the reference are, 0 to 1 in steps of 0.01.

    The value of `fuzz.ratio` of fuzzywuzzy on python-Levenshtein, which is rapidfuzz's normalised Indel
    similarity in whole percent.
    """
    from rapidfuzz.distance import Indel

    lines = answer.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * Indel.normalized_similarity(code, reference)) / 100


PARAGRAPH: Mapping[str, str] = {"passage_retrieval_en": "Paragraph ", "passage_retrieval_zh": "段落"}
"""What stands before a paragraph's number in the references of the two retrieval sets."""

CLASSIFIED = frozenset({"trec", "lsht"})
"""Sets whose rows name the classes to choose from."""

FIRST_LINE = frozenset({"trec", "triviaqa", "samsum", "lsht"})
"""Sets where only the answer's first line that is not empty counts."""

METRICS: Mapping[str, Callable[[str, str], float]] = {
    "narrativeqa": qa_f1,
    "qasper": qa_f1,
    "multifieldqa_en": qa_f1,
    "multifieldqa_zh": qa_f1_zh,
    "hotpotqa": qa_f1,
    "2wikimqa": qa_f1,
    "musique": qa_f1,
    "dureader": rouge_l_zh,
    "gov_report": rouge_l,
    "qmsum": rouge_l,
    "multi_news": rouge_l,
    "vcsum": rouge_l_zh,
    "triviaqa": qa_f1,
    "samsum": rouge_l,
    "passage_count": count,
    "passage_retrieval_en": retrieval_en,
    "passage_retrieval_zh": retrieval_zh,
    "lcc": code_similarity,
    "repobench-p": code_similarity,
}
"""The metric of every set but the classified two."""


def longbench_score(
    data_set: str, answer: str, references: Sequence[str], classes: Sequence[str] = ()
) -> float:
    """The best score that an answer gets against any of its references, 0 to 1."""
    if data_set in FIRST_LINE:
        answer = answer.lstrip("\n").split("\n")[0]
    if data_set in CLASSIFIED:
        scores = [classification(answer, reference, classes) for reference in references]
    else:
        scores = [METRICS[data_set](answer, reference) for reference in references]
    return max([0.0, *scores])


def data_set_score(scores: Sequence[float]) -> float:
    """The score of a whole set in points out of 100, to two digits, from the scores of its rows."""
    total = 0.0
    for score in scores:  # not sum(), which rounds differently from Python 3.12 on
        total += score
    return round(100 * total / len(scores), 2)
