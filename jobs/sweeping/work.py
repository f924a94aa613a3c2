"""From cells to work: prompts made and tokenised, each answer that is wanted under its own key, grouped by
the context that its prompt begins with."""

from __future__ import annotations

import hashlib
from array import array
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from jobs.disk.record import PlannedSample, PlanWriter, sample_key
from jobs.sweeping.cells import Cell, ModelPlan
from jobs.sweeping.prompts import PromptFile, Prompts
from jobs.tasks import Sample, Task
from spts.cost import (
    ModelShape,
    ProxyShape,
    dense_flops,
    dense_kv_bytes,
    kv_bytes,
    prefill_flops,
    prefix_bytes,
    reused_flops,
)
from spts.errors import ConfigError
from spts.methods import Method

_QUESTION_CHARS = 160


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One answer to get. What is long about it lies on disk.

    sample: its id. planned: place in the plan. prompt: place in the file of prompts, where num_tokens token
    ids of the prompt are followed by num_follow ones that the model is made to follow. flops: predicted, of
    the prefill; without what the first of a context leaves for the others to reuse.
    """

    key: str
    sample: str
    cell: Cell
    planned: int
    prompt: int
    num_tokens: int
    num_follow: int
    flops: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """What one engine does in one go: a context and its questions, in one cell.

    prefix_tokens: tokens that all prompts of the context begin with, in whole blocks of the cell's schedule
    (`Schedule.block_tokens`); 0 = none, or nobody to share them with.
    order: groups run in ascending order of it, most expensive context first (as if nothing were shared), its
    methods side by side: they are timed under like conditions and can use what is kept of the context.
    """

    cell: Cell
    members: tuple[Work, ...]
    prefix_tokens: int
    order: tuple[float, int, float]

    @property
    def flops(self) -> float:
        """Predicted, of the prefills; what the members share is done once."""
        return _flops(self.members)


@dataclass(kw_only=True)
class Cost:
    """What the cost model predicts for some samples together; flops as if no context were shared.

    reused_flops: the part of flops that is not done because prompts of a context share their beginning.
    """

    cells: int = 0
    groups: int = 0
    samples: int = 0
    flops: float = 0.0
    reused_flops: float = 0.0
    dense_flops: float = 0.0
    kv_bytes: int = 0
    dense_kv_bytes: int = 0


@dataclass(kw_only=True)
class Prepared:
    """All work of a plan, in the order of `Group.order`. costs: by (label, length)."""

    plan: ModelPlan
    groups: list[Group] = field(default_factory=list)
    costs: dict[tuple[str, int], Cost] = field(default_factory=lambda: defaultdict(Cost))

    @property
    def num_samples(self) -> int:
        """Answers that are wanted."""
        return sum(len(group.members) for group in self.groups)

    @property
    def prefix_bytes(self) -> int:
        """Most that a rank keeps of what the prompts of a group begin with."""
        return max((self._prefix_bytes(group) for group in self.groups if group.prefix_tokens), default=0)

    def _prefix_bytes(self, group: Group) -> int:
        shape = self.plan.shape
        return prefix_bytes(
            shape,
            group.prefix_tokens,
            group.cell.method.schedule_for(shape.num_layers).first_skip_layer,
            dtype_bytes=_dtype_bytes(group.cell),
            world_size=int(group.cell.record.content["tensor_parallel_size"]),
        )


@dataclass(frozen=True, kw_only=True)
class Fewer:
    """A task that has fewer samples of a length than were asked for."""

    task: str
    length: int
    wanted: int
    got: int


@dataclass(kw_only=True)
class _Context:
    """A text that prompts begin with: where its first prompt lies, what the others have in common with it."""

    number: int
    prompt: int
    common: int
    shortest: int
    num: int = 1

    @property
    def prefix_tokens(self) -> int:
        return 0 if self.num == 1 else min(self.common, self.shortest - 1)


def prepare(
    plans: Sequence[ModelPlan],
    prompts: Prompts,
    *,
    file: PromptFile,
    plan_file: PlanWriter,
    on_prompt: Callable[[int], None] = lambda count: None,
) -> tuple[list[Prepared], list[Fewer]]:
    """Every answer that the cells of one model want, as `Prepared` for each of its plans.

    on_prompt: called after each prompt with the number of samples that it was asked for.
    Raises ConfigError when a length has no room for a task, a prompt with its answer exceeds the context, a
    task has no sample, gives two the same name and prompt, or gives two seeds the same prompt. DiskError.
    """
    prepared = [Prepared(plan=plan) for plan in plans]
    users: dict[tuple[str, int, int], list[tuple[Prepared, Cell]]] = defaultdict(list)
    for one in prepared:
        for cell in one.plan.cells:
            users[cell.task.name, cell.length, cell.seed].append((one, cell))
            one.costs[cell.record.label, cell.length].cells += 1
    maker = _Maker(prompts, file, plan_file)
    fewer = []
    for cells in users.values():
        cell = cells[0][1]
        got = maker.make(cell.task, cells, lambda cells=cells: on_prompt(len(cells)))  # type: ignore[misc]  # a lambda's default
        if got < cell.count:
            fewer.append(Fewer(task=cell.task.name, length=cell.length, wanted=cell.count, got=got))
    for one in prepared:
        one.groups.sort(key=lambda group: group.order)
    return prepared, fewer


class _Maker:
    """Makes the samples of one task, length and seed for all cells that want them."""

    def __init__(self, prompts: Prompts, file: PromptFile, plan_file: PlanWriter) -> None:
        self._prompts = prompts
        self._file = file
        self._plan_file = plan_file
        self._keys: set[str] = set()
        self._seeds: dict[tuple[str, int, str], int] = {}
        self._num_contexts = 0

    def make(self, task: Task, users: list[tuple[Prepared, Cell]], on_prompt: Callable[[], None]) -> int:
        """Adds the groups to each `Prepared`; returns the number of samples."""
        first = users[0][1]
        contexts: dict[str, _Context] = {}
        members: list[dict[str, list[Work]]] = [defaultdict(list) for _ in users]
        got = 0
        for sample in task.samples(
            self._prompts.tokens, length=first.length, count=first.count, seed=first.seed
        ):
            token_ids = self._prompts.encode(sample)
            digest = _digest(token_ids, sample.follow)
            self._check_seed(first, digest)
            place = self._file.add((*token_ids, *sample.follow))
            # A sample without a context is a group of its own; no context is called like it.
            name = f"\0{got}" if sample.context is None else sample.context
            self._join(contexts, name, place, token_ids)
            for (prepared, cell), groups in zip(users, members, strict=True):
                groups[name].append(self._work(prepared, cell, sample, token_ids, digest, place))
            got += 1
            on_prompt()
        if not got:
            raise ConfigError(
                f"tasks must have samples, got none of {task.name!r} at {first.length} tokens; remove the "
                "task or the length",
                field="tasks",
            )
        peaks = {name: max(_flops(groups[name]) for groups in members) for name in contexts}
        for (prepared, cell), groups in zip(users, members, strict=True):
            prepared.costs[cell.record.label, cell.length].groups += len(groups)
            for name, works in groups.items():
                order = (-peaks[name], contexts[name].number, -_flops(works))
                group = _group(prepared, cell, works, contexts[name].prefix_tokens, order)
                prepared.groups.append(group)
        return got

    def _join(self, contexts: dict[str, _Context], name: str, place: int, token_ids: tuple[int, ...]) -> None:
        if name not in contexts:
            self._num_contexts += 1
            contexts[name] = _Context(
                number=self._num_contexts, prompt=place, common=len(token_ids), shortest=len(token_ids)
            )
            return
        context = contexts[name]
        context.num += 1
        context.shortest = min(context.shortest, len(token_ids))
        if context.common:
            first = self._file.read(context.prompt, context.common)
            context.common = common_prefix(first, array("i", token_ids))

    def _check_seed(self, cell: Cell, digest: str) -> None:
        """A prompt that two seeds share would count twice, and every interval would be too narrow."""
        seed = self._seeds.setdefault((cell.task.name, cell.length, digest), cell.seed)
        if seed != cell.seed:
            raise ConfigError(
                f"seeds must give samples of their own, got a prompt of {cell.task.name!r} at {cell.length} "
                f"tokens under seed {seed} and under seed {cell.seed}; give that task one seed, in a sweep "
                "of its own if others have several",
                field="seeds",
            )

    def _work(
        self,
        prepared: Prepared,
        cell: Cell,
        sample: Sample,
        token_ids: tuple[int, ...],
        digest: str,
        place: int,
    ) -> Work:
        plan = prepared.plan
        num_new = len(sample.follow) or cell.task.max_new_tokens
        if len(token_ids) + num_new > plan.max_context:
            raise ConfigError(
                f"lengths must leave room for the answer in the model's context of {plan.max_context} "
                f"tokens, got {len(token_ids)} + {num_new} in sample {sample.id!r}; use shorter lengths",
                field="lengths",
            )
        key = sample_key(cell.record.id, sample.id, digest)
        if key in self._keys:
            raise ConfigError(
                f"samples of a task must differ, got {sample.id!r} of {cell.task.name!r} twice; remove one "
                "from its data",
                field="tasks",
            )
        self._keys.add(key)
        planned = PlannedSample(
            key=key,
            cell=cell.record.id,
            sample=sample.id,
            prompt_tokens=len(token_ids),
            prompt_sha256=digest,
            question=sample.prompt[-_QUESTION_CHARS:],
            references=tuple(sample.references),
            meta=dict(sample.meta),
            context=sample.context,
        )
        flops = _count(prepared, cell, len(token_ids))
        return Work(
            key=key,
            sample=sample.id,
            cell=cell,
            planned=self._plan_file.add(planned),
            prompt=place,
            num_tokens=len(token_ids),
            num_follow=len(sample.follow),
            flops=flops,
        )


def _digest(token_ids: Sequence[int], follow: Sequence[int]) -> str:
    sha256 = hashlib.sha256(array("i", token_ids).tobytes())
    if follow:
        sha256.update(b"follow" + array("i", follow).tobytes())
    return sha256.hexdigest()


def _flops(works: Sequence[Work]) -> float:
    return sum(work.flops for work in works)


def common_prefix(first: array[int], second: array[int]) -> int:
    """Number of leading items that are equal: [5, 6, 7] and [5, 6, 8, 9] have 2 in common."""
    low, high = 0, min(len(first), len(second))
    while low < high:  # halving: comparing slices is fast, comparing items one by one is not
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _count(prepared: Prepared, cell: Cell, num_tokens: int) -> float:
    """Adds one prompt to its method's costs; returns the predicted FLOP of its prefill."""
    plan = prepared.plan
    flops, kv = _predict(plan.shape, plan.proxy, cell.method, num_tokens, _dtype_bytes(cell))
    dense, dense_kv = _predict_dense(plan.shape, num_tokens, _dtype_bytes(cell))
    cost = prepared.costs[cell.record.label, cell.length]
    cost.samples += 1
    cost.flops += flops
    cost.dense_flops += dense
    cost.kv_bytes += kv
    cost.dense_kv_bytes += dense_kv
    return flops


def _group(
    prepared: Prepared, cell: Cell, works: list[Work], common: int, order: tuple[float, int, float]
) -> Group:
    """The work on a context whose prompts have `common` tokens in common: all but the first of it reuse
    them; counts what that saves."""
    shape = prepared.plan.shape
    schedule = cell.method.schedule_for(shape.num_layers)
    prefix_tokens = common - common % schedule.block_tokens
    saved = 0.0
    if len(works) > 1:
        depth = schedule.first_skip_layer
        saved = float(reused_flops(shape, prefix_tokens, depth, schedule.attention_density))
    prepared.costs[cell.record.label, cell.length].reused_flops += saved * (len(works) - 1)
    members = (works[0], *(replace(work, flops=work.flops - saved) for work in works[1:]))
    return Group(cell=cell, members=members, prefix_tokens=prefix_tokens, order=order)


def _dtype_bytes(cell: Cell) -> int:
    return 4 if cell.record.content["dtype"] == "float32" else 2


@lru_cache(maxsize=4096)
def _predict(
    shape: ModelShape, proxy: ProxyShape | None, method: Method, num_tokens: int, dtype_bytes: int
) -> tuple[float, int]:
    layers = method.planned_work(shape.num_layers, num_tokens)
    return float(prefill_flops(shape, layers, proxy).total), kv_bytes(shape, layers, dtype_bytes)


@lru_cache(maxsize=4096)
def _predict_dense(shape: ModelShape, num_tokens: int, dtype_bytes: int) -> tuple[float, int]:
    return float(dense_flops(shape, num_tokens).total), dense_kv_bytes(shape, num_tokens, dtype_bytes)
