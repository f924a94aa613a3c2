"""RULER (arXiv 2404.06654): its thirteen tasks, made here for any tokenizer and length, without a network.

What a task is made of (haystack, keys, values, hops, frequencies, tokens to generate) follows NVIDIA's code
(github.com/NVIDIA/RULER: scripts/synthetic.yaml, scripts/data/synthetic). Its wording is read at run time,
see `jobs.tasks.ruler_texts`. As there, a length counts the prompt and the tokens to generate together: a
prompt has at most `length - max_new_tokens` tokens, so that RULER's 131072 fits a context of 131072.

Where the data is not RULER's own, `content` says so: RULER's essays, word lists and question sets are given
as `haystack`, `words`, `squad` and `hotpotqa`; without them our shipped ones are taken, and scores are not
comparable with published ones.

RULER leaves the haystack a step of 10 to 500 units short of the length; ours is filled to within one. Keys
and values are never the same by chance. Prose is cut into sentences by a plain rule and not by NLTK.

Where lm-eval's RULER differs from NVIDIA's, this module follows NVIDIA's:

- qa is scored by the best reference, not by the mean over all of them;
- cwe's prompt begins with an answered example, and its question is not followed by an empty line;
- vt's example is followed by one empty line, and its noise and assignments stand on lines of their own;
- an essay shorter than the length is repeated.

For a chat model NVIDIA's answer prefix begins the assistant's turn; here it ends the user's message.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jobs.tasks.base import Meta, Sample, Tokens
from jobs.tasks.document import document
from jobs.tasks.fill import fill, no_room
from jobs.tasks.ruler_kind import Draft, Kind, Sources
from jobs.tasks.ruler_lists import CommonWords, FrequentWords, VariableTracking
from jobs.tasks.ruler_niah import Niah
from jobs.tasks.ruler_qa import DocumentQuestions
from jobs.tasks.ruler_qa_data import read_questions
from jobs.tasks.ruler_texts import ruler_texts, texts_hash
from jobs.tasks.ruler_words import ruler_words
from spts.errors import check_keys, config_error

KINDS: Mapping[str, Kind] = {
    "niah_single_1": Niah(haystack="noise"),
    "niah_single_2": Niah(haystack="essay"),
    "niah_single_3": Niah(haystack="essay", values="uuids"),
    "niah_multikey_1": Niah(haystack="essay", num_keys=4),
    "niah_multikey_2": Niah(haystack="needle"),
    "niah_multikey_3": Niah(haystack="needle", keys="uuids", values="uuids"),
    "niah_multivalue": Niah(haystack="essay", num_values=4),
    "niah_multiquery": Niah(haystack="essay", num_keys=4, num_queries=4),
    "vt": VariableTracking(),
    "cwe": CommonWords(),
    "fwe": FrequentWords(),
    "qa_1": DocumentQuestions(form="squad"),
    "qa_2": DocumentQuestions(form="hotpotqa"),
}
_PARAMS = ("templates", "haystack", "words", "squad", "hotpotqa")
_UNPRINTABLE = re.compile(r"[\x00-\x1f]")


@dataclass(frozen=True, kw_only=True)
class RulerTask:
    """One of RULER's tasks.

    Attributes:
        name: one of `KINDS`.
        templates: a folder or file with the wording of the prompts; None = the installed lm-eval's.
        haystack: a folder of .txt files, or RULER's PaulGrahamEssays.json; None = our shipped text.
        words: a folder with the lists of the package wonderwords; None = our shipped words.
        squad, hotpotqa: the data sets' JSON files; None = our shipped passages.
    """

    name: str
    templates: str | None = None
    haystack: str | None = None
    words: str | None = None
    squad: str | None = None
    hotpotqa: str | None = None
    version: ClassVar[int] = 2
    stop: ClassVar[tuple[str, ...]] = ()

    @property
    def spec(self) -> Meta:
        given = {param: value for param in _PARAMS if (value := getattr(self, param)) is not None}
        return {"name": self.name, **given}

    @property
    def kind(self) -> Kind:
        """Its settings."""
        return KINDS[self.name]

    @property
    def max_new_tokens(self) -> int:
        return self.kind.max_new_tokens

    def _sources(self) -> Sources:
        uses = self.kind.sources
        form = next((form for form in ("squad", "hotpotqa") if form in uses), None)
        return Sources(
            texts=ruler_texts(self.kind.texts, self.templates),
            haystack=document(self.haystack) if "haystack" in uses else None,
            words=ruler_words(self.words) if "words" in uses else None,
            questions=read_questions(form, getattr(self, form)) if form else None,
        )

    def content(self) -> Meta:
        sources = self._sources()
        parts = {"haystack": sources.haystack, "words": sources.words, "questions": sources.questions}
        return {
            "settings": dict(vars(self.kind)),
            "texts_sha256": texts_hash(sources.texts),
            **{name: dict(part.content()) for name, part in parts.items() if part is not None},
        }

    def samples(self, tokens: Tokens, *, length: int, count: int, seed: int) -> Iterator[Sample]:
        """`count` samples that leave `max_new_tokens` of `length`; sample i is the same for any `count`.

        The QA tasks give no more than their data set has questions. Raises ConfigError as `content` does, and
        when `length` has no room for the smallest prompt.
        """
        sources = self._sources()
        limit = self.kind.num_samples(sources)
        # What is asked is no other at another length; a question of a data set, with another seed neither.
        prefix = f"{self.name}-{seed}" if limit is None else self.name
        units = 0
        for index in range(count if limit is None else min(count, limit)):
            units, draft = self._fitting(sources, tokens, length, seed, index, guess=units)
            yield Sample(
                id=f"{prefix}-{index}",
                prompt=draft.prompt,
                references=draft.references,
                meta={} if draft.depth is None else {"depth": round(draft.depth, 4)},
                chat=True,
            )

    def _fitting(
        self, sources: Sources, tokens: Tokens, length: int, seed: int, index: int, *, guess: int
    ) -> tuple[int, Draft]:
        """Sample `index` with as many units of haystack as fit, and how many those are."""

        # The length is no part of the seed: the same needles at every length, and an exact smallest length.
        def draw(units: int, length: int) -> Draft:
            rng = random.Random(f"{self.name}/{self.version}/{seed}/{index}")
            return self.kind.draw(rng, sources, tokens, index=index, units=units, length=length)

        answer, fewest = self.max_new_tokens, self.kind.fewest(sources, index)
        units = fill(
            lambda units: draw(units, length).prompt,
            tokens=tokens,
            room=length - answer,
            fewest=fewest,
            guess=guess,
        )
        if units is None:
            enough = length  # some settings grow with the length: go on until nothing is missing
            while (needed := len(tokens.encode(draw(fewest, enough).prompt)) + answer) > enough:
                enough = needed
            raise no_room(self.name, length, enough)
        return units, draw(units, length)

    def score(self, text: str, references: tuple[str, ...], meta: Meta) -> float:
        """RULER's string_match_all, or string_match_part for the QA tasks, of one answer: 0 to 1."""
        answer = _UNPRINTABLE.sub("\n", text.strip()).strip().lower()
        found = [reference.lower() in answer for reference in references]
        return float(any(found)) if self.kind.any_reference else sum(found) / len(found)


def make(name: str, params: Mapping[str, Any]) -> tuple[RulerTask, ...]:
    """The task of that name, or all thirteen for "ruler", or those of its `tasks`.

    A parameter is known where a task makes use of it. Raises ConfigError.
    """
    names = (name,)
    if name == "ruler":
        listed = params.get("tasks", list(KINDS))
        if not isinstance(listed, list) or not listed or len(set(map(str, listed))) < len(listed):
            raise config_error(
                "tasks.ruler.tasks", "be a list of different names", repr(listed), "correct it"
            )
        for each in listed:
            if not isinstance(each, str) or each not in KINDS:
                rule = f"be names of {', '.join(KINDS)}"
                raise config_error("tasks.ruler.tasks", rule, repr(each), "correct the name")
        names = tuple(listed)
    used = {"templates", *(source for each in names for source in KINDS[each].sources)}
    known = [param for param in _PARAMS if param in used]
    check_keys(
        f"tasks.{name}", params, required=(), optional=(*(("tasks",) if name == "ruler" else ()), *known)
    )
    paths = {param: params[param] for param in known if params.get(param) is not None}
    for param, path in paths.items():
        if not isinstance(path, str) or not path:
            raise config_error(f"tasks.{name}.{param}", "be a path", repr(path), "correct it")
    return tuple(
        RulerTask(
            name=each,
            **{
                param: path
                for param, path in paths.items()
                if param == "templates" or param in KINDS[each].sources
            },
        )
        for each in names
    )
