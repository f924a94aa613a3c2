"""What a sweep asks for: a YAML file, checked whole before anything starts, and the cells it stands for.

name: demo
model: jobs/demo_model
methods:
  - name: dense
  - name: spts
    schedule: {preset: demo-12l, scaled: true}
tasks: [single, {name: grid, depths: 11}]
lengths: [1024, 4096]
samples: 20
output: results/demo
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator

from cluster.strict import Strict, brief, load_yaml
from jobs.options import schedule_from, writable_folder
from jobs.tasks import Task, make_tasks
from spts import methods
from spts.errors import ConfigError
from spts.methods import METHODS, Method, Spts
from spts.schedule import Schedule


class EngineSpec(Strict):
    """The engines of a sweep: `count` equal ones, each with `in_flight` contexts at a time.

    Times are those of a prompt alone only if in_flight is 1. The other keys: `cluster.config.EngineConfig`.
    """

    count: int = Field(default=1, ge=1)
    in_flight: int = Field(default=1, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    tensor_parallel_size: int = Field(default=1, ge=1)
    num_threads: int = Field(default=1, ge=1)
    start_timeout_s: float = Field(default=600.0, gt=0)
    step_timeout_s: float = Field(default=300.0, gt=0)


class MethodSpec(Strict):
    """One method with its parameters.

    schedule: a preset's name; {preset, scaled, attention_density}; or a schedule's own keys, with
    reference_tokens to scale it.
    A scaled schedule is fitted to the model's depth and to each prompt length. label: its name in reports,
    unique; None = the method's name. proxies: folder of fitted proxies, of a method that needs them; None =
    the sweep's. All other keys: the fields of the method's class in `spts.methods`.
    """

    model_config = ConfigDict(extra="allow")

    name: str
    label: str | None = Field(default=None, min_length=1, max_length=40)
    schedule: str | dict[str, Any] | None = None
    proxies: str | None = Field(default=None, min_length=1)

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in METHODS:
            raise ValueError(f"name must be one of {', '.join(METHODS)}, got {value!r}; choose one of them")
        return value

    @model_validator(mode="after")
    def _knows_its_keys(self) -> MethodSpec:
        method = METHODS[self.name]
        known = ["name", "label", *(field.name for field in fields(method))]
        if method is Spts:
            known.append("proxies")
        for key in (*self.model_fields_set, *(self.model_extra or {})):
            if key not in known:
                raise ValueError(
                    f"{key} must be one of {', '.join(known)} for method {self.name!r}, got an unknown key; "
                    "remove it or correct its name"
                )
        return self

    @property
    def title(self) -> str:
        """The label in reports."""
        return self.label or self.name

    @property
    def needs_proxies(self) -> bool:
        """Whether it reads FFN proxies. Raises ConfigError for a parameter that its method refuses."""
        return methods.reads_proxies({"name": self.name, **(self.model_extra or {})})

    def at(self, *, num_layers: int, length: int) -> Method:
        """The method with the schedule that prompts of `length` tokens get. Raises ConfigError."""
        data: dict[str, object] = {"name": self.name, **(self.model_extra or {})}
        if self.schedule is not None:
            data["schedule"] = concrete_schedule(
                self.schedule, num_layers=num_layers, length=length
            ).to_dict()
        method = methods.from_dict(data)
        method.schedule_for(num_layers)
        return method


class Sweep(Strict):
    """models × methods × tasks × lengths × seeds, `samples` of each.

    model: folder or hub id, or a list of them. proxies: folder of fitted proxies; None = the model's own.
    tasks: names, or mappings of a name and that task's parameters. samples: per task and length, or a mapping
    from length to such a number; a task over a data set may have fewer. output: folder of the results.
    sample_timeout_s: a sample that takes longer fails. attempts: times a sample is given to an engine, where
    the engine and not the sample was at fault.
    """

    name: str = Field(min_length=1, max_length=80)
    model: Annotated[tuple[str, ...], Field(strict=False)]
    proxies: str | None = Field(default=None, min_length=1)
    engine: EngineSpec = EngineSpec()
    methods: Annotated[tuple[MethodSpec, ...], Field(strict=False)]
    tasks: Annotated[tuple[str | dict[str, Any], ...], Field(strict=False)]
    lengths: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False)]
    samples: int | dict[int, int]
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], Field(strict=False)] = (0,)
    output: str = Field(min_length=1)
    sample_timeout_s: float = Field(default=600.0, gt=0)
    attempts: int = Field(default=3, ge=1)

    @field_validator("model", mode="before")
    @classmethod
    def _one_model_is_a_list(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @field_validator("samples", mode="before")
    @classmethod
    def _samples_are_counts(cls, value: object) -> object:
        counts = value if isinstance(value, dict) else {"": value}
        for length, count in counts.items():
            where = f"samples.{length}" if isinstance(value, dict) else "samples"
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(
                    f"{where} must be an integer of at least 1, or a mapping from length to one, "
                    f"got {brief(count)}; correct it"
                )
        return value

    @field_validator("model", "methods", "tasks", "lengths", "seeds")
    @classmethod
    def _some_and_no_duplicates(cls, value: tuple[Any, ...], info: ValidationInfo) -> tuple[Any, ...]:
        if not value:
            raise ValueError(f"{info.field_name} must list at least one value, got []; add one")
        twice = next((one for one in value if value.count(one) > 1), None)
        if twice is not None and info.field_name != "methods":  # those have labels
            raise ValueError(f"{info.field_name} must list each value once, got {twice!r} twice; remove one")
        return value

    @field_validator("tasks")
    @classmethod
    def _tasks_can_be_made(cls, value: tuple[str | dict[str, Any], ...]) -> tuple[str | dict[str, Any], ...]:
        made_by: dict[str, str] = {}
        for index, entry in enumerate(value):
            where = f"tasks.{index} ({entry if isinstance(entry, str) else entry.get('name')})"
            try:
                tasks = make_tasks(entry)
            except ConfigError as error:
                raise ValueError(f"tasks.{index}: {error}") from None
            for task in tasks:
                if task.name == "all":
                    raise ValueError(
                        f"{where} must not be called 'all', got that: so are the totals of a report; "
                        "give it another label"
                    )
                if task.name in made_by:
                    raise ValueError(
                        f"tasks must make each task once, got {task.name!r} from {made_by[task.name]} and "
                        f"from {where}; remove one"
                    )
                made_by[task.name] = where
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Sweep:
        titles = [method.title for method in self.methods]
        for index, title in enumerate(titles):
            if title in titles[:index]:
                raise ValueError(
                    f"methods.{index}.label must be unique, got {title!r} again; give it a label of its own"
                )
        if isinstance(self.samples, dict) and set(self.samples) != set(self.lengths):
            raise ValueError(
                f"samples must have one entry for each of lengths {sorted(self.lengths)}, "
                f"got {sorted(self.samples)}; list the same lengths"
            )
        chosen = [self.proxies, *(method.proxies for method in self.methods)]
        if any(chosen) and len(self.model) > 1:
            raise ValueError(
                f"proxies must be left out with several models, got {next(filter(None, chosen))!r}; "
                "put each model's proxies into its own folder"
            )
        return self

    @cached_property
    def all_tasks(self) -> tuple[Task, ...]:
        """The tasks that the entries of `tasks` stand for, in their order."""
        return tuple(task for entry in self.tasks for task in make_tasks(entry))

    def count(self, length: int) -> int:
        """Samples per task and seed at this length."""
        return self.samples[length] if isinstance(self.samples, dict) else self.samples


def load_sweep(path: str | Path) -> Sweep:
    """Reads a sweep's YAML file. Raises ConfigError naming file, key, rule and value of every fault."""
    return load_yaml(path, Sweep)


def concrete_schedule(choice: str | Mapping[str, Any], *, num_layers: int, length: int) -> Schedule:
    """The schedule that a configuration's `schedule` means for a model and a prompt length.

    Worked example: {preset: llama-3.1-8b, scaled: true} at 32 layers and 16,384 tokens has half the budgets
    that the paper gives for 32,768. Raises ConfigError.
    """
    if isinstance(choice, str):
        return Schedule.preset(choice)
    return schedule_from(choice, num_layers=num_layers, num_tokens=length)


def is_uploaded_copy() -> bool:
    """Whether this process runs in a copy of the working directory that `ray job submit` made."""
    return any(part.startswith("_ray_pkg_") for part in Path.cwd().parts)


def output_folder(sweep: Sweep, chosen: str | None) -> Path:
    """Where results go, an absolute path that outlives a job: `chosen` (--out), else the `output` key.

    In a copy of the working directory, which Ray makes for a job and deletes after it, a relative path is
    meant from the home folder. Creates the folder. Raises ConfigError if it cannot be written.
    """
    path = Path(os.path.expanduser(chosen or sweep.output))
    if not path.is_absolute():
        path = (Path.home() if is_uploaded_copy() else Path.cwd()) / path
    return writable_folder(path, field="output")
