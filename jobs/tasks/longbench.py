"""LongBench v1 (arXiv 2308.14508): the 21 sets, with the official prompts, cut, answer lengths and scorers.

    tasks: [{name: longbench, data: FOLDER}]                    all 21
    tasks: [{name: longbench, data: FOLDER, sets: [qasper]}]    these
    tasks: [{name: qasper, data: FOLDER}]                       one
    tasks: [{name: qasper, hub: OWNER/NAME, revision: COMMIT}]  one, from a mirror on the Hugging Face hub

Samples come in the order of the file, so that a run over fewer is the beginning of a run over all; the seed
changes nothing. Source of all rules: github.com/THUDM/LongBench, LongBench/pred.py. What differs from it:

- It counts the special tokens that a tokenizer adds (one for Llama) as part of the limit, we do not.
- It never counts a cut prompt again; joined anew, the halves can have more tokens than the limit. We then cut
  on, by the fewest tokens that help. `truncated_from` in a sample's meta says how long the prompt was.
- For samsum it forbids a line end as the first token and stops at the next one; we go on, and the scorer
  takes the first line that is not empty.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jobs.tasks.base import Meta, Sample, Tokens
from jobs.tasks.longbench_data import DataSet, Source, load
from jobs.tasks.longbench_prompts import Template, read_template
from jobs.tasks.scorers import CLASSIFIED, longbench_score
from spts.errors import check_keys, config_error

FAMILY = "longbench"

MAX_NEW_TOKENS: Mapping[str, int] = {
    "narrativeqa": 128,
    "qasper": 128,
    "multifieldqa_en": 64,
    "multifieldqa_zh": 64,
    "hotpotqa": 32,
    "2wikimqa": 32,
    "musique": 32,
    "dureader": 128,
    "gov_report": 512,
    "qmsum": 512,
    "multi_news": 512,
    "vcsum": 512,
    "trec": 64,
    "triviaqa": 32,
    "samsum": 128,
    "lsht": 64,
    "passage_count": 32,
    "passage_retrieval_en": 32,
    "passage_retrieval_zh": 32,
    "lcc": 64,
    "repobench-p": 64,
}
"""Longest answer of each set, tokens (LongBench/config/dataset2maxlen.json)."""

WITHOUT_CHAT = frozenset({"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"})
"""Sets whose prompts are continued as plain text, also by chat models."""


def truncate(prompt: str, tokens: Tokens, length: int) -> tuple[str, int | None]:
    """A prompt of at most `length` tokens: its first half and its last half, without the middle.

    Returns the prompt and, if it was cut, its tokens before. Worked example, a token per letter: "abcdefg" at
    length 4 or 5 gives ("abfg", 7), since the official halves are length // 2 each.

    Raises:
        ConfigError: nothing is left at this length.
    """
    ids = tokens.encode(prompt)
    if len(ids) <= length:
        return prompt, None
    kept = length // 2 * 2
    while kept > 0:
        first, last = kept - kept // 2, kept // 2
        cut = tokens.decode(ids[:first]) + (tokens.decode(ids[-last:]) if last else "")
        excess = len(tokens.encode(cut)) - length
        if excess <= 0:
            return cut, len(ids)
        kept -= max(1, excess // 2)  # few steps, and the last ones small: one token less can save two
    raise config_error(
        "length", "leave room for a prompt's two halves", f"{length} tokens", "use a longer one"
    )


@dataclass(frozen=True, kw_only=True)
class LongBenchTask:
    """One of the sets, and where its data lies."""

    name: str
    source: Source
    version: ClassVar[int] = 1
    stop: ClassVar[tuple[str, ...]] = ()

    @property
    def spec(self) -> Meta:
        return {"name": self.name, **self.source.params}

    @property
    def max_new_tokens(self) -> int:
        return MAX_NEW_TOKENS[self.name]

    def content(self) -> Meta:
        """Hashes of the data and of the prompt template, and where the template came from."""
        data, template = self._read()
        if template is None:
            return {"data": data.sha256, "prompt": None, "prompt_source": "data"}
        digest = hashlib.sha256(template.text.encode()).hexdigest()
        return {"data": data.sha256, "prompt": digest, "prompt_source": template.source}

    def _read(self) -> tuple[DataSet, Template | None]:
        """The data, and the template for it unless every row brings its prompt."""
        data = load(self.source, self.name)
        if all(row.prompt is not None for row in data.rows):
            return data, None
        return data, read_template(self.source.folder(self.name), self.name)

    def samples(self, tokens: Tokens, *, length: int, count: int, seed: int) -> Iterator[Sample]:
        """The first `count` rows of the file, each cut in the middle to at most `length` tokens.

        `context` names the document, which several rows may share; `meta` holds what the row tells of itself
        (`_id`, `language`, `original_length` in words or in characters of Chinese), `all_classes` where the
        score needs them, and `truncated_from`, a number of tokens, where the prompt was cut.
        """
        data, template = self._read()
        for row in data.rows[:count]:
            whole = (
                template.fill(row.context, row.question) if template and row.prompt is None else row.prompt
            )
            assert whole is not None, "a row has a prompt or there is a template"
            prompt, truncated_from = truncate(whole, tokens, length)
            meta: dict[str, Any] = dict(row.info)
            if self.name in CLASSIFIED:
                meta["all_classes"] = list(row.classes)
            if truncated_from is not None:
                meta["truncated_from"] = truncated_from
            yield Sample(
                id=f"{self.name}-{row.number}",
                prompt=prompt,
                references=row.answers,
                meta=meta,
                context=hashlib.sha256(row.context.encode()).hexdigest()[:16],
                chat=self.name not in WITHOUT_CHAT,
            )

    def score(self, text: str, references: tuple[str, ...], meta: Meta) -> float:
        """The official score of one answer; `data_set_score` of jobs.tasks.scorers gives that of all rows."""
        classes = meta["all_classes"] if self.name in CLASSIFIED else ()
        return longbench_score(self.name, text, references, classes)


def make(name: str, params: Mapping[str, Any]) -> tuple[LongBenchTask, ...]:
    """The task of that name; for "longbench" those in `sets`, by default all 21. Reads nothing.

    Raises:
        ConfigError: a parameter is missing, unknown or wrong.
    """
    where = f"tasks.{name}"
    family = name == FAMILY
    check_keys(
        where, params, required=(), optional=("data", "hub", "revision", *(("sets",) if family else ()))
    )
    source = Source.parse(where, {key: value for key, value in params.items() if key != "sets"})
    names = params.get("sets", list(MAX_NEW_TOKENS)) if family else [name]
    if (
        not isinstance(names, list)
        or not names
        or not all(isinstance(each, str) and each in MAX_NEW_TOKENS for each in names)
        or len(set(names)) != len(names)
    ):
        raise config_error(
            f"{where}.sets",
            f"be a list of some of {', '.join(MAX_NEW_TOKENS)}, each once",
            repr(names),
            "correct it",
        )
    return tuple(LongBenchTask(name=each, source=source) for each in names)
