"""From cells to work: prompts made and tokenised, each answer that is wanted under its own key."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cluster.tokenizer import TextTokenizer
from jobs.cells import Cell, ModelPlan
from jobs.record import CellRecord, PlannedSample, sample_key
from jobs.tasks import Sample, get_task
from jobs.tokens import PlainTokens
from spts.cost import prefill_flops
from spts.errors import ConfigError
from spts.methods import Method

_QUESTION_CHARS = 160


@dataclass(frozen=True, kw_only=True)
class Work:
    """One answer to get: a prompt ready to send, and what it belongs to. flops: predicted, of the prefill."""

    planned: PlannedSample
    cell: CellRecord
    method: Method
    token_ids: tuple[int, ...]
    max_new_tokens: int
    flops: float


class Prompts:
    """A model folder's tokenizer, the one that also serves it, so that a swept prompt is a served prompt."""

    def __init__(self, folder: Path) -> None:
        self._text = TextTokenizer(folder)
        self.tokens = PlainTokens(self._text.tokenizer)

    def encode(self, prompt: str) -> tuple[int, ...]:
        """Token ids of a prompt, with whatever the tokenizer adds to one."""
        return self._text.encode(prompt)

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of an answer, without special tokens."""
        return self.tokens.decode(list(token_ids))


def prepare(plan: ModelPlan, prompts: Prompts) -> list[Work]:
    """Every answer that a model's cells want, longest first, the same sample's methods side by side.

    Raises ConfigError when a length has no room for a task, or a prompt with its answer exceeds the context.
    """
    samples: dict[tuple[str, int, int, int], list[tuple[Sample, tuple[int, ...]]]] = {}
    work: list[tuple[int, Work]] = []
    for cell in plan.cells:
        content = cell.record.content
        key = (cell.record.task, cell.record.length, int(content["seed"]), cell.count)
        if key not in samples:
            samples[key] = _samples(*key, prompts)
        for index, (sample, token_ids) in enumerate(samples[key]):
            work.append((index, _work(plan, cell, sample, token_ids)))
    work.sort(key=lambda one: (-one[1].cell.length, one[0]))
    return [one for _, one in work]


def _samples(
    task: str, length: int, seed: int, count: int, prompts: Prompts
) -> list[tuple[Sample, tuple[int, ...]]]:
    made = get_task(task).samples(prompts.tokens, length=length, count=count, seed=seed)
    return [(sample, prompts.encode(sample.prompt)) for sample in made]


def _work(plan: ModelPlan, cell: Cell, sample: Sample, token_ids: tuple[int, ...]) -> Work:
    max_new_tokens = int(cell.record.content["max_new_tokens"])
    if len(token_ids) + max_new_tokens > plan.max_context:
        raise ConfigError(
            f"lengths must leave room for the answer in the model's context of {plan.max_context} tokens, "
            f"got {len(token_ids)} + {max_new_tokens} in sample {sample.id!r}; use shorter lengths",
            field="lengths",
        )
    sha256 = hashlib.sha256(sample.prompt.encode()).hexdigest()
    planned = PlannedSample(
        key=sample_key(cell.record.id, sample.id, sha256),
        cell=cell.record.id,
        sample=sample.id,
        prompt_tokens=len(token_ids),
        prompt_sha256=sha256,
        question=sample.prompt[-_QUESTION_CHARS:],
        references=tuple(sample.references),
        meta=dict(sample.meta),
        context=sample.context,
    )
    method = cell.method
    layers = method.planned_work(plan.shape.num_layers, len(token_ids))
    return Work(
        planned=planned,
        cell=cell.record,
        method=method,
        token_ids=token_ids,
        max_new_tokens=max_new_tokens,
        flops=float(prefill_flops(plan.shape, layers, plan.proxy).total),
    )
