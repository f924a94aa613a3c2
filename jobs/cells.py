"""From a sweep's configuration to its cells: models looked at (not loaded), schedules concrete."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from cluster import placement
from cluster.config import EngineConfig, resolve_path
from jobs.record import CellRecord, content_hash
from jobs.spec import Sweep, is_uploaded_copy
from jobs.tasks import get_task
from spts import loading
from spts.architectures import max_context
from spts.cost import ModelShape, ProxyShape
from spts.errors import ConfigError, ProxyError
from spts.methods import Method, reads_proxies
from spts.schedule import Schedule

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell and what is needed to run it. `record` names it by the hash of its whole content."""

    record: CellRecord
    method: Method
    count: int


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """One model of a sweep, looked at but not loaded.

    source: as the configuration names it, for engines on other machines. folder: where it lies here.
    """

    name: str
    source: str
    folder: Path
    fingerprint: str
    tokenizer: str
    shape: ModelShape
    max_context: int
    proxy: ProxyShape | None
    cells: tuple[Cell, ...]

    def engine_config(self, sweep: Sweep) -> EngineConfig:
        """What each engine of this model is started with; alone in its engine, a prompt is never sliced."""
        options = sweep.engine.model_dump(exclude={"count", "in_flight"})
        alone = sweep.engine.in_flight == 1
        return EngineConfig(
            **options,
            model=self.source,
            proxies=sweep.proxies,
            max_running=max(8, sweep.engine.in_flight),
            layers_per_step=self.shape.num_layers if alone else 4,
        )


def plan_models(sweep: Sweep) -> tuple[ModelPlan, ...]:
    """Every model with its cells, no weights read. Raises SptsError for whatever would fail later."""
    plans = [_plan_model(sweep, source) for source in sweep.model]
    for plan in plans[1:]:
        if plan.name in [other.name for other in plans[: plans.index(plan)]]:
            raise ConfigError(
                f"model must list folders of different names, got {plan.name!r} twice; rename one",
                field="model",
            )
    return tuple(plans)


def _plan_model(sweep: Sweep, source: str) -> ModelPlan:
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
    fingerprint = loading.fingerprint(folder)
    tokenizer = _tokenizer_fingerprint(folder)
    needs = any(reads_proxies({"name": method.name}) for method in sweep.methods)
    proxies = _Proxies.read(folder, sweep.proxies, fingerprint) if needs else None
    return ModelPlan(
        name=name,
        source=source if is_uploaded_copy() else str(folder),
        folder=folder,
        fingerprint=fingerprint,
        tokenizer=tokenizer,
        shape=shape,
        max_context=context,
        proxy=proxies.shape if proxies else None,
        cells=tuple(_cells(sweep, name, fingerprint, tokenizer, shape, proxies)),
    )


def _check_lengths(sweep: Sweep, source: str, context: int) -> None:
    for length in sweep.lengths:
        for task in sweep.tasks:
            answer = get_task(task).max_new_tokens
            if length + answer > context:
                raise ConfigError(
                    f"lengths must leave room for the answer in the context of {source} ({context} tokens), "
                    f"got {length} + {answer} for task {task!r}; use {context - answer} or less",
                    field="lengths",
                )


def _cells(
    sweep: Sweep, name: str, fingerprint: str, tokenizer: str, shape: ModelShape, proxies: _Proxies | None
) -> list[Cell]:
    cells = []
    for index, spec in enumerate(sweep.methods):
        for length in sweep.lengths:
            try:
                method = spec.at(num_layers=shape.num_layers, length=length)
            except ConfigError as error:
                raise ConfigError(f"methods.{index}: {error}", field=f"methods.{index}") from None
            if method.needs_proxies and proxies is not None:
                proxies.check(method.schedule_for(shape.num_layers))
            for task_name in sweep.tasks:
                task = get_task(task_name)
                for seed in sweep.seeds:
                    content = {
                        "model": fingerprint,
                        "tokenizer": tokenizer,
                        "proxies": proxies.sha256 if proxies is not None and method.needs_proxies else None,
                        "dtype": sweep.engine.dtype,
                        "device": sweep.engine.device,
                        "tensor_parallel_size": sweep.engine.tensor_parallel_size,
                        "method": method.to_dict(),
                        "task": task.name,
                        "task_version": task.version,
                        "task_content": dict(task.content()),
                        "max_new_tokens": task.max_new_tokens,
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
                    cells.append(Cell(record=record, method=method, count=sweep.count(length)))
    return cells


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
        digest = hashlib.sha256()
        for file in sorted(path.glob("*.safetensors")):
            digest.update(file.read_bytes())
        return cls(shape=loaded.shape, first_layer=loaded.manifest.first_layer, sha256=digest.hexdigest())

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
    return hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()
