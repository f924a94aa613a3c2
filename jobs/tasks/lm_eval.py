"""Tasks of lm-evaluation-harness as tasks of a sweep: `{name: lm_eval, tasks: [gsm8k_cot, drop]}`.

Prompts, few-shot examples, filters and scores are lm-eval's own: what `simple_evaluate` without a chat
template gives the model, and what it makes of its answer, document for document
(https://github.com/EleutherAI/lm-evaluation-harness). A name may be a task, a group or a tag; the last two
stand for all of their tasks.

Tasks in a folder of one's own (`include_path`) may name functions with `!function`: those run, like a module
that one imports. Code that a data set brings is never run (`datasets` cannot, since its version 4). Nor is
code that a model wrote: such tasks are refused.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

from jobs.tasks import lm_eval_source as source
from jobs.tasks.base import Meta, Sample, Tokens
from spts.errors import ConfigError, check_keys, config_error, require_int

# Where a task's data lies; what it is has a hash.
_PLACES = ("dataset_path", "dataset_kwargs")


@dataclass(frozen=True, kw_only=True)
class LmEvalTask:
    """One task of lm-eval.

    Attributes:
        task: its name there.
        include_path: folder with tasks of one's own; None = only lm-eval's.
        num_fewshot: examples before each question; None = the task's own number.
        metric: what an answer is scored by, as lm-eval's results name it: "exact_match", or
            "exact_match,strict-match" where a task has several filters. None = the first metric that is a
            mean of values where higher is better, with the first filter.
    """

    task: str
    include_path: str | None = None
    num_fewshot: int | None = None
    metric: str | None = None
    version: ClassVar[int] = 1

    @property
    def name(self) -> str:
        shots = None if self.num_fewshot is None else f"{self.num_fewshot}-shot"
        return ":".join(part for part in ("lm_eval", self.task, shots, self.metric) if part is not None)

    @property
    def spec(self) -> Meta:
        given = {name: getattr(self, name) for name in ("include_path", "num_fewshot", "metric")}
        set_ones = {name: value for name, value in given.items() if value is not None}
        return {"name": "lm_eval", "tasks": [self.task], **set_ones}

    @property
    def max_new_tokens(self) -> int:
        return self._generation.max_new_tokens

    @property
    def stop(self) -> tuple[str, ...]:
        return self._generation.stop

    def content(self) -> Meta:
        """Versions, the configuration with hashes of its functions' files, and hashes of all documents.

        Raises ConfigError when the data cannot be loaded or the metric cannot be a score: to see that, the
        first document's own target is scored as if it were an answer.
        """
        return _content(self)

    def samples(self, tokens: Tokens, *, length: int, count: int, seed: int) -> Iterator[Sample]:
        """The first `count` documents, those that simple_evaluate's `limit` takes.

        seed: of the few-shot examples; 0 draws those that simple_evaluate draws by default. Without examples
        every seed gives the same samples. Raises ConfigError when a prompt has more than `length` tokens:
        lm-eval would cut off its beginning.
        """
        prompts = self._prompts(count, seed)
        for number, prompt in enumerate(prompts):
            if tokens.count(prompt) > length:
                longest = max(tokens.count(each) for each in (prompt, *prompts))
                raise config_error(
                    "length",
                    f"hold every prompt of {self.name} whole",
                    f"{length} tokens for document {number} with {tokens.count(prompt)}",
                    f"use at least {longest}, or fewer samples",
                )
            document = self._loaded.documents[number]
            yield Sample(
                id=f"{self.task}-{number}",
                prompt=prompt,
                references=self._targets(document),
                meta={"document": number, "document_sha256": _sha256([document])},
            )

    def score(self, text: str, references: tuple[str, ...], meta: Meta) -> float:
        """What lm-eval's filters and scorer make of an answer. They look at the whole document, so this loads
        the task's data; no network is needed once it is there.

        Raises ConfigError when the document is not the one that was asked about any more, and when the metric
        does not give a number from 0 to 1.
        """
        number, documents = meta["document"], self._loaded.documents
        if number >= len(documents) or _sha256([documents[number]]) != meta["document_sha256"]:
            raise config_error(
                f"document {number} of {self.name}",
                "be the one that was asked about",
                "another or none",
                "restore the data, or run the sweep again",
            )
        return self._score(text, number)

    @property
    def _generation(self) -> source.Generation:
        kwargs = source.config(self.task, self.include_path).generation_kwargs
        return source.generation(kwargs, where=f"generation_kwargs of lm-eval task {self.task!r}")

    @property
    def _loaded(self) -> source.Loaded:
        return source.load(self.task, self.include_path)

    @property
    def _shots(self) -> int:
        own = self._loaded.task.config.num_fewshot or 0
        return int(own if self.num_fewshot is None else self.num_fewshot)

    def _prompts(self, count: int, seed: int) -> Iterator[str]:
        from lm_eval.defaults import DEFAULT_OTHER_SEED

        # Examples are drawn for one document after the other: each call has a sampler of its own.
        task = copy.copy(self._loaded.task)
        task.sampler = copy.copy(task.sampler)
        task.set_fewshot_seed(DEFAULT_OTHER_SEED + seed)
        for number in range(min(count, len(self._loaded.documents))):
            document = self._loaded.documents[number]
            with self._about(number):
                prompt = task.fewshot_context(
                    document, num_fewshot=self._shots, gen_prefix=task.doc_to_prefix(document)
                )
            yield prompt

    def _targets(self, document: Mapping[str, Any]) -> tuple[str, ...]:
        """What a reader may compare an answer with."""
        task = self._loaded.task
        target = task.doc_to_target(document)
        if isinstance(target, int) and task.config.doc_to_choice is not None:
            target = task.doc_to_choice(document)[target]
        return tuple(str(one) for one in (target if isinstance(target, list) else [target]))

    def _metric(self) -> tuple[str, str]:
        """Names of the metric and of the filter."""
        from lm_eval.api.registry import get_aggregation

        task = self._loaded.task
        filters = [each["name"] for each in task.config.filter_list or ()] or ["none"]
        better = task.higher_is_better()
        if self.metric is None:
            mean = get_aggregation("mean")
            for name, aggregate in task.aggregation().items():
                if better.get(name) and aggregate is mean:
                    return name, filters[0]
            raise self._metric_error("be named where no mean is better when higher", "none", better)
        name, _, chosen = self.metric.partition(",")
        if chosen and chosen not in filters:
            raise self._metric_error("name a filter of the task", chosen, filters)
        if better.get(name) is False:
            raise self._metric_error("be better when higher", name, [each for each in better if better[each]])
        return name, chosen or filters[0]

    def _score(self, text: str, number: int) -> float:
        from lm_eval.api.instance import Instance

        document, (metric, chosen) = self._loaded.documents[number], self._metric()
        task = copy.copy(self._loaded.task)
        repeats = task.config.repeats
        asked = Instance(
            request_type="generate_until",
            doc=document,
            arguments=("", {}),
            idx=0,
            metadata=(self.task, number, repeats),
            resps=[text] * repeats,  # greedy: each repeat would say the same
        )
        task._instances = [asked]
        with self._about(number):
            task.apply_filters()
            values = task.process_results(document, [asked.filtered_resps[chosen]])
        if metric not in values:
            raise self._metric_error("be one that the task gives", metric, values)
        value = values[metric]
        try:
            score = float(value)
        except (TypeError, ValueError):
            score = float("nan")
        if not 0 <= score <= 1:
            others = [name for name in values if name != metric]
            got = f"{value!r} from {metric}"
            raise self._metric_error("give a number from 0 to 1 per answer", got, others)
        return score

    def _metric_error(self, rule: str, got: str, known: Iterable[str]) -> ConfigError:
        names = ", ".join(known)
        remedy = f"choose among {names}" if names else "take another task"
        return config_error(f"metric of {self.name}", rule, got, remedy)

    @contextmanager
    def _about(self, number: int) -> Iterator[None]:
        """Around lm-eval's code for a document: its random numbers repeat, its faults say where they are."""
        try:
            with source.seeded(number):
                yield
        except Exception as error:
            raise config_error(
                f"document {number} of {self.name}", "suit its task", source.one_line(error), "correct either"
            ) from error


@cache
def _content(task: LmEvalTask) -> Meta:
    loaded, metric = task._loaded, task._metric()
    task._score(next(iter(task._targets(loaded.documents[0])), ""), 0)
    config = loaded.task.config.to_dict(keep_callable=True)
    config["metadata"] = {k: v for k, v in (config.get("metadata") or {}).items() if k != "config_source"}
    return {
        "lm_eval": metadata.version("lm_eval"),
        "lm_eval_task_version": loaded.task.VERSION,
        "config": {key: _plain(value) for key, value in config.items() if key not in _PLACES},
        "num_fewshot": task._shots,
        "metric": ",".join(metric),
        "documents_sha256": _sha256(loaded.documents),
        "fewshot_sha256": _sha256(loaded.task.fewshot_docs() or ()) if task._shots else None,
    }


def _plain(value: Any) -> Any:
    """A value of a configuration as JSON; a function as its name and the hash of the file that defines it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if not callable(value):
        return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
    named = value if inspect.isroutine(value) or inspect.isclass(value) else type(value)
    digest = hashlib.sha256(Path(inspect.getfile(named)).read_bytes()).hexdigest()
    return {"function": named.__qualname__, "file_sha256": digest}


def _sha256(documents: Iterable[Mapping[str, Any]]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(json.dumps(document, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def make(name: str, params: Mapping[str, Any]) -> tuple[LmEvalTask, ...]:
    """The tasks that an entry's names stand for. Reads no data. Raises ConfigError."""
    where = f"tasks.{name}"
    check_keys(where, params, required=("tasks",), optional=("include_path", "num_fewshot", "metric"))
    names = params["tasks"]
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(one, str) for one in names):
        raise config_error(f"{where}.tasks", "be a list of at least one name", repr(names), "correct it")
    given = {key: value for key, value in params.items() if key != "tasks" and value is not None}
    for key in ("include_path", "metric"):
        if not isinstance(given.get(key, "x"), str) or given.get(key) == "":
            raise config_error(
                f"{where}.{key}", "be a string that is not empty", repr(given[key]), "correct it"
            )
    if "num_fewshot" in given:
        require_int(f"{where}.num_fewshot", given["num_fewshot"], minimum=0)
    found = dict.fromkeys(task for one in names for task in source.expand(one, given.get("include_path")))
    return tuple(_checked(LmEvalTask(task=task, **given)) for task in found)


def _checked(task: LmEvalTask) -> LmEvalTask:
    _ = task._generation  # what no sweep can run is refused before anything is
    own = source.config(task.task, task.include_path).num_fewshot
    if own == 0 and task.num_fewshot:  # lm-eval goes on with 0
        raise config_error(
            "tasks.lm_eval.num_fewshot",
            f"be left out for {task.task!r}, whose own is 0",
            task.num_fewshot,
            "remove it",
        )
    return task
