"""RULER's questions about documents: one answers (or two together do), the others are in the way."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar, Literal

from jobs.tasks.base import Tokens
from jobs.tasks.ruler_kind import Draft, Sources, joined


@dataclass(frozen=True, kw_only=True)
class DocumentQuestions:
    """Sample i asks question i of the data set. The units of haystack are documents.

    First come the question's own documents, then others of the same article, then any; all are shuffled. A
    prompt with more documents than there are repeats them.
    """

    form: Literal["squad", "hotpotqa"]
    max_new_tokens: ClassVar[int] = 32
    any_reference: ClassVar[bool] = True
    texts: ClassVar[tuple[str, ...]] = ("qa", "qa_answer", "document")

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.form,)

    def num_samples(self, sources: Sources) -> int | None:
        assert sources.questions is not None
        return len(sources.questions.questions)

    def fewest(self, sources: Sources, index: int) -> int:
        assert sources.questions is not None
        return len(sources.questions.questions[index].documents)

    def draw(
        self, rng: random.Random, sources: Sources, tokens: Tokens, *, index: int, units: int, length: int
    ) -> Draft:
        assert sources.questions is not None
        question, documents = sources.questions.questions[index], sources.questions.documents
        if units < len(documents):
            chosen = [*question.documents, *rng.sample(question.close, len(question.close))]
            known = set(chosen)
            if units > len(chosen):
                rest = [i for i in range(len(documents)) if i not in known]
                chosen += rng.sample(rest, units - len(chosen))
            del chosen[units:]
        else:
            chosen = [i % len(documents) for i in range(units)]
        rng.shuffle(chosen)
        parts = [
            sources.texts["document"].format(i=i, document=documents[each])
            for i, each in enumerate(chosen, start=1)
        ]
        context = "\n\n".join(parts)
        template = joined(sources.texts["qa"], sources.texts["qa_answer"])
        depth = None
        if len(question.documents) == 1:
            before = parts[: chosen.index(question.documents[0])]
            depth = sum(len(part) + 2 for part in before) / len(context)
        return Draft(
            prompt=template.format(context=context, query=question.text),
            references=tuple(dict.fromkeys(question.answers)),
            depth=depth,
        )
