"""From a sweep's configuration to its cells: models looked at (not loaded), schedules concrete."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import placement
from cluster.config import EngineConfig, resolve_path
from cluster.tokenizer import chat_template
from jobs.disk.record import CellRecord, content_hash
from jobs.sweeping.spec import MethodSpec, Sweep, is_uploaded_copy
from jobs.tasks import Meta, Task
from spts import loading
from spts.architectures import max_context
from spts.cost import ModelShape, ProxyShape
from spts.errors import ConfigError, ProxyError
from spts.methods import Method
from spts.schedule import Schedule

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# What can change an answer, if only in its last bits: threads the order of sums, in_flight what is decoded
# together.
_ENGINE_KEYS = ("dtype", "device", "tensor_parallel_size", "num_threads", "in_flight")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell and what is needed to run it. `record` names it by the hash of its whole content."""

    record: CellRecord
    method: Method
    task: Task
    length: int
    seed: int
    count: int


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """One model of a sweep with one set of proxies, looked at but not loaded: what engines are started with.

    source: as the configuration names it, for engines on other machines. folder: where it lies here.
    proxies: as the configuration names them; None = the model's own.
    """

    name: str
    source: str
    folder: Path
    proxies: str | None
    fingerprint: str
    tokenizer: str
    chat_template: str | None
    shape: ModelShape
    max_context: int
    proxy: ProxyShape | None
    cells: tuple[Cell, ...]

    @property
    def title(self) -> str:
        """Name of the model, and of its proxies where the configuration chooses them."""
        return self.name if self.proxies is None else f"{self.name} with {self.proxies}"

    def engine_config(self, sweep: Sweep, *, prefix_bytes: int = 0) -> EngineConfig:
        """What each engine of this plan is started with; alone in its engine, a prompt is never sliced.

        prefix_bytes: what a rank keeps of a context; there is room for one per group that is in flight.
        """
        options = sweep.engine.model_dump(exclude={"count", "in_flight"})
        usual = {name: field.default for name, field in EngineConfig.model_fields.items()}
        return EngineConfig(
            **options,
            model=self.source,
            proxies=self.proxies,
            max_running=max(8, sweep.engine.in_flight),
            slice_tokens=None if sweep.engine.in_flight == 1 else usual["slice_tokens"],
            prefix_cache_bytes=max(usual["prefix_cache_bytes"], sweep.engine.in_flight * prefix_bytes),
        )


def plan_models(sweep: Sweep) -> tuple[ModelPlan, ...]:
    """Every model with its cells, once per set of proxies; no weights read, all data of tasks is.

    Raises SptsError for whatever would fail later.
    """
    contents = {task.name: _content(task) for task in sweep.all_tasks}
    plans: list[ModelPlan] = []
    for source in sweep.model:
        plans_of_model = _plan_model(sweep, source, contents)
        name = plans_of_model[0].name
        if name in [plan.name for plan in plans]:
            raise ConfigError(
                f"model must list folders of different names, got {name!r} twice; rename one", field="model"
            )
        plans.extend(plans_of_model)
    _check_distinct([cell.record for plan in plans for cell in plan.cells])
    return tuple(plans)


def _content(task: Task) -> Meta:
    try:
        return dict(task.content())
    except ConfigError as error:
        raise ConfigError(f"task {task.name!r}: {error}", field="tasks") from None


def _check_distinct(cells: list[CellRecord]) -> None:
    seen: dict[str, CellRecord] = {}
    for cell in cells:
        other = seen.setdefault(cell.id, cell)
        if other is not cell:
            first, second = (f"{c.label!r} of model {c.model!r}" for c in (other, cell))
            raise ConfigError(
                f"methods must differ in what they compute, got the same cell from {first} and {second} for "
                f"task {cell.task!r} at {cell.length} tokens; remove one or change its parameters",
                field="methods",
            )


def _plan_model(sweep: Sweep, source: str, contents: dict[str, Meta]) -> list[ModelPlan]:
    folder = loading.resolve(resolve_path(source))
    loading.check_folder(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape, context = ModelShape.from_config(config), max_context(config)
    try:
        placement.check_divisible(shape, sweep.engine.tensor_parallel_size)
    except ConfigError as error:
        raise ConfigError(f"engine.{error}", field=f"engine.{error.field}") from None
    _check_lengths(sweep, source, context)
    name = Path(source).name or folder.resolve().name
    template = chat_template(folder)
    generation = folder / "generation_config.json"
    same = {
        "model": loading.fingerprint(folder),
        "generation_config": _sha256(generation.read_bytes()) if generation.is_file() else None,
        "tokenizer": _tokenizer_fingerprint(folder),
        "chat_template": None if template is None else _sha256(template.encode()),
        **{key: getattr(sweep.engine, key) for key in _ENGINE_KEYS},
    }
    plans = []
    for chosen, specs in _by_proxies(sweep).items():
        needs = any(spec.needs_proxies for _, spec in specs)
        proxies = _Proxies.read(folder, chosen, same["model"]) if needs else None
        plans.append(
            ModelPlan(
                name=name,
                source=source if is_uploaded_copy() else str(folder),
                folder=folder,
                proxies=chosen,
                fingerprint=same["model"],
                tokenizer=same["tokenizer"],
                chat_template=same["chat_template"],
                shape=shape,
                max_context=context,
                proxy=proxies.shape if proxies else None,
                cells=tuple(
                    cell
                    for index, spec in specs
                    for cell in _cells(sweep, index, spec, name, same, contents, shape, proxies)
                ),
            )
        )
    return plans


def _by_proxies(sweep: Sweep) -> dict[str | None, list[tuple[int, MethodSpec]]]:
    """The methods by the proxies that their engines load; those that need none go with the first others."""
    needing = []
    for index, spec in enumerate(sweep.methods):
        try:
            if spec.needs_proxies:
                needing.append(spec)
        except ConfigError as error:
            raise ConfigError(f"methods.{index}: {error}", field=f"methods.{index}") from None
    first = (needing[0].proxies if needing else None) or sweep.proxies
    groups: dict[str | None, list[tuple[int, MethodSpec]]] = {}
    for index, spec in enumerate(sweep.methods):
        chosen = (spec.proxies or sweep.proxies) if spec in needing else first
        groups.setdefault(chosen, []).append((index, spec))
    return groups


def _check_lengths(sweep: Sweep, source: str, context: int) -> None:
    """A prompt's room for its answer is seen when it is made: to some tasks a length is that of both. An
    answer without any is seen here, as making prompts for it could take very long."""
    for task in sweep.all_tasks:
        if task.max_new_tokens >= context:
            raise ConfigError(
                f"tasks must leave room for a prompt in the context of {source} ({context} tokens), got "
                f"answers of up to {task.max_new_tokens} tokens of {task.name!r}; ask for less",
                field="tasks",
            )
    for length in sweep.lengths:
        if length > context:
            raise ConfigError(
                f"lengths must fit the context of {source} ({context} tokens), got {length}; use less",
                field="lengths",
            )


def _cells(
    sweep: Sweep,
    index: int,
    spec: MethodSpec,
    name: str,
    same: dict[str, Any],
    contents: dict[str, Meta],
    shape: ModelShape,
    proxies: _Proxies | None,
) -> Iterator[Cell]:
    """The cells of one method. same: what all cells of the model share."""
    for length in sweep.lengths:
        try:
            method = spec.at(num_layers=shape.num_layers, length=length)
        except ConfigError as error:
            raise ConfigError(f"methods.{index}: {error}", field=f"methods.{index}") from None
        if method.needs_proxies and proxies is not None:
            proxies.check(method.schedule_for(shape.num_layers))
        for task in sweep.all_tasks:
            for seed in sweep.seeds:
                content = {
                    **same,
                    "proxies": proxies.sha256 if proxies is not None and method.needs_proxies else None,
                    "method": method.to_dict(),
                    "task": task.name,
                    "task_version": task.version,
                    "task_content": contents[task.name],
                    "max_new_tokens": task.max_new_tokens,
                    "stop": list(task.stop),
                    "length": length,
                    "seed": seed,
                }
                record = CellRecord(
                    id=content_hash(content),
                    label=spec.title,
                    model=name,
                    content=content,
                    task_spec=dict(task.spec),
                )
                count = sweep.count(length)
                yield Cell(record=record, method=method, task=task, length=length, seed=seed, count=count)


@dataclass(frozen=True, kw_only=True)
class _Proxies:
    """What a sweep must know of a model's proxies."""

    shape: ProxyShape
    first_layer: int
    sha256: str

    @classmethod
    def read(cls, folder: Path, chosen: str | None, fingerprint: str) -> _Proxies:
        path = Path(resolve_path(chosen)) if chosen is not None else folder / loading.PROXIES_FOLDER
        loaded = loading.load_proxies(folder, path, fingerprint=fingerprint)
        assert loaded is not None, "a folder that is named is loaded or refused"
        return cls(
            shape=loaded.shape, first_layer=loaded.manifest.first_layer, sha256=loading.proxies_sha256(path)
        )

    def check(self, schedule: Schedule) -> None:
        if schedule.stages and schedule.first_skip_layer < self.first_layer:
            raise ProxyError(
                f"proxies must start at first_skip_layer {schedule.first_skip_layer} or before, "
                f"got proxies from layer {self.first_layer} on; fit them with python -m jobs.calibrate",
                field="proxies",
            )


def _tokenizer_fingerprint(folder: Path) -> str:
    """sha256 over the tokenizer's files."""
    if not (folder / _TOKENIZER_FILES[0]).is_file():
        raise ConfigError(
            f"model must hold {_TOKENIZER_FILES[0]}, got none in {folder}; save its tokenizer there",
            field="model",
        )
    files = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    return _sha256(b"".join(file.name.encode() + file.read_bytes() for file in files))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
