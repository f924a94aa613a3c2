"""Documents and questions about them: SQuAD's and HotpotQA's JSON files, or our own in the same forms."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from jobs.tasks.ruler_passages import hotpotqa_like, squad_like
from spts.errors import config_error


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question with its answers, the documents that it is asked about, and those that are close to them."""

    text: str
    answers: tuple[str, ...]
    documents: tuple[int, ...]
    close: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Questions:
    """All documents, sorted and each once, and the questions in the order of their file.

    Attributes:
        source: where they come from, in words; no path.
    """

    source: str
    documents: tuple[str, ...]
    questions: tuple[Question, ...]
    sha256: str

    def content(self) -> Mapping[str, Any]:
        """What a record says of them."""
        return {"source": self.source, "sha256": self.sha256}


class _Malformed(Exception):
    """An entry that is not of the form; args: the entry's place, what it must be, what it is."""


@cache
def read_questions(form: Literal["squad", "hotpotqa"], path: str | None) -> Questions:
    """SQuAD's dev JSON (questions without an answer left out) or HotpotQA's dev distractor JSON; None = ours.

    Raises:
        ConfigError: the file cannot be read, or an entry is not of the form: named with its place.
    """
    parse: Callable[[Any], tuple[list[str], list[Question]]] = {"squad": _squad, "hotpotqa": _hotpotqa}[form]
    if path is None:
        source = "shipped passages: invented, not comparable with the real data set"
        data: Any = squad_like() if form == "squad" else hotpotqa_like()
        text = json.dumps(data)
    else:
        source = "given file"
        try:
            text = Path(path).read_text(encoding="utf-8")
            data = json.loads(text)
        except (OSError, ValueError, RecursionError) as error:
            raise config_error(
                form, "be a readable JSON file", f"{path} ({error})", "name the data set's file"
            ) from error
    try:
        documents, questions = parse(data)
    except _Malformed as error:
        where, rule, got = error.args
        raise config_error(form, f"{rule} at {where}", f"{got} in {path}", "correct the file") from error
    if not questions:
        raise config_error(form, "hold a question with an answer", f"none in {path}", "correct the file")
    return Questions(
        source=source,
        documents=tuple(documents),
        questions=tuple(questions),
        sha256=hashlib.sha256(text.encode()).hexdigest(),
    )


def _get(where: str, data: Any, key: str, kind: type) -> Any:
    """The value of `data[key]`, which must be of that kind and not empty."""
    value = data.get(key) if isinstance(data, dict) else None
    if not isinstance(value, kind) or not value:
        raise _Malformed(where, f"have a {kind.__name__} {key!r} that is not empty", repr(value)[:80])
    return value


def _squad(data: Any) -> tuple[list[str], list[Question]]:
    articles: list[list[tuple[str, list[tuple[str, tuple[str, ...]]]]]] = []
    for a, article in enumerate(_get("the file", data, "data", list)):
        paragraphs = []
        for p, paragraph in enumerate(_get(f"data[{a}]", article, "paragraphs", list)):
            where = f"data[{a}].paragraphs[{p}]"
            context = _get(where, paragraph, "context", str)
            asked = []
            qas = paragraph.get("qas")
            if not isinstance(qas, list):
                raise _Malformed(where, "have a list 'qas'", repr(qas)[:80])
            for q, entry in enumerate(qas):
                at = f"{where}.qas[{q}]"
                text = _get(at, entry, "question", str)
                if not entry.get("is_impossible", False):
                    answers = _get(at, entry, "answers", list)
                    asked.append((text, tuple(_get(at, answer, "text", str) for answer in answers)))
            paragraphs.append((context, asked))
        articles.append(paragraphs)
    documents = sorted({context for article in articles for context, _ in article})
    number = {context: i for i, context in enumerate(documents)}
    questions = []
    for article in articles:
        own = dict.fromkeys(number[context] for context, _ in article)
        for context, asked in article:
            close = tuple(i for i in own if i != number[context])
            questions += [
                Question(text=text, answers=answers, documents=(number[context],), close=close)
                for text, answers in asked
            ]
    return documents, questions


def _hotpotqa(data: Any) -> tuple[list[str], list[Question]]:
    if not isinstance(data, list):
        raise _Malformed("the file", "be a list of entries", type(data).__name__)
    entries: list[tuple[str, str, list[str]]] = []
    for e, entry in enumerate(data):
        where = f"entry {e}"
        question, answer = (_get(where, entry, key, str) for key in ("question", "answer"))
        passages = []
        for passage in _get(where, entry, "context", list):
            match passage:
                case [str(title), [*sentences]] if all(isinstance(each, str) for each in sentences):
                    passages.append(f"{title}\n{''.join(sentences)}")
                case _:
                    raise _Malformed(where, "have a context of [title, sentences] pairs", repr(passage)[:80])
        entries.append((question, answer, passages))
    documents = sorted({passage for _, _, passages in entries for passage in passages})
    number = {passage: i for i, passage in enumerate(documents)}
    return documents, [
        Question(
            text=question,
            answers=(answer,),
            documents=tuple(dict.fromkeys(number[passage] for passage in passages)),
        )
        for question, answer, passages in entries
    ]
