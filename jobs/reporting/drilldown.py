"""Single samples for the page: every one up to a bound, else those that tell most, and what they can be
filtered by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jobs.reporting.scoring import Scored
from jobs.reporting.summary import ModelSummary

MAX_ANSWERS = 4_000
MAX_CHARS = 1_200


@dataclass(frozen=True, kw_only=True)
class Question:
    """One sample with the answers of all methods, by label. tags: what filters find it by."""

    one: Scored
    answers: Mapping[str, Scored]
    tags: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Drilldown:
    """The samples that a page shows of one model.

    Attributes:
        by_task: questions of each task in the order of the plan.
        shown, total: questions on the page, and questions there are.
        filters: (tag, name) of all filters that find something.
    """

    by_task: Mapping[str, Sequence[Question]]
    shown: int
    total: int
    filters: tuple[tuple[str, str], ...]


def drilldown(model: ModelSummary, *, max_answers: int = MAX_ANSWERS) -> Drilldown:
    """All questions if their answers are at most `max_answers`; else of each task its share, those first that
    methods answer most differently, failures among them, then the longest."""
    questions = _questions(model)
    total = sum(map(len, questions.values()))
    room = max(1, max_answers // max(1, len(model.labels)))
    if total > room:
        questions = {
            task: _most_telling(found, max(1, room * len(found) // total))
            for task, found in questions.items()
        }
    present = {tag for found in questions.values() for question in found for tag in question.tags}
    names = [("differ", "methods score differently"), ("failed", "a method failed"), ("zero", "a score of 0")]
    for index, label in enumerate(model.labels):
        names += [(f"below{index}", f"{label} below {model.baseline}"),
                  (f"above{index}", f"{label} above {model.baseline}")]  # fmt: skip
    return Drilldown(
        by_task=questions,
        shown=sum(map(len, questions.values())),
        total=total,
        filters=tuple((tag, name) for tag, name in names if tag in present),
    )


def _questions(model: ModelSummary) -> dict[str, list[Question]]:
    answers: dict[str, dict[object, dict[str, Scored]]] = {task: {} for task in model.tasks}
    for one in model.scored:
        answers[one.cell.task].setdefault(one.question, {})[one.cell.label] = one
    return {
        task: [
            Question(one=next(iter(by_label.values())), answers=by_label, tags=_tags(model, by_label))
            for by_label in found.values()
        ]
        for task, found in answers.items()
        if found
    }


def _tags(model: ModelSummary, answers: Mapping[str, Scored]) -> tuple[str, ...]:
    scores = [one.score for one in answers.values()]
    tags = []
    if max(scores) > min(scores):
        tags.append("differ")
    if any(one.row.error is not None for one in answers.values()):
        tags.append("failed")
    if min(scores) == 0:
        tags.append("zero")
    base = answers.get(model.baseline or "")
    for index, label in enumerate(model.labels):
        one = answers.get(label)
        if one is not None and base is not None and one.score != base.score:
            tags.append(f"{'below' if one.score < base.score else 'above'}{index}")
    return tuple(tags)


def _most_telling(questions: Sequence[Question], number: int) -> list[Question]:
    def interest(question: Question) -> tuple[float, ...]:
        scores = [one.score for one in question.answers.values()]
        return ("failed" not in question.tags, min(scores) - max(scores), -question.one.planned.prompt_tokens)

    chosen = set(map(id, sorted(questions, key=interest)[:number]))
    return [question for question in questions if id(question) in chosen]
