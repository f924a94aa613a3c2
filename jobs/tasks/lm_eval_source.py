"""Where lm-eval's tasks come from: names to configurations (no data read), configurations to loaded tasks.

Where lm-eval would silently do something else than a sweep says (sample, run outside code, change a task
inside a group), there is an error here.
"""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any

from spts.errors import ConfigError, config_error, require_int

# What generation_kwargs may say; whatever else would change an answer that we would not change.
_GREEDY = ("do_sample", "temperature", "top_p", "top_k", "num_beams")
_ENDS = ("until", "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_GROUP_KEYS = {"group", "group_alias", "task", "tag", "aggregate_metric_list", "metadata", "include"}
_NAMES = "tasks.lm_eval.tasks"


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How an answer ends: before the first of `stop`, and after `max_new_tokens` tokens."""

    stop: tuple[str, ...]
    max_new_tokens: int


def generation(kwargs: Mapping[str, Any], *, where: str) -> Generation:
    """What lm-eval's generation_kwargs ask for, with lm-eval's defaults: 256 tokens, no stop string.

    where: names them in errors. Raises ConfigError unless they mean greedy decoding.
    """
    from lm_eval.defaults import DEFAULT_MAX_GEN_TOKS
    from lm_eval.models.utils import normalize_gen_kwargs

    known = ", ".join((*_ENDS, *_GREEDY))
    for key, value in kwargs.items():
        if key not in (*_ENDS, *_GREEDY):
            raise config_error(f"{where}.{key}", f"be one of {known}", repr(value), "take a task without it")
    until = kwargs.get("until") or []
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, list) or not all(isinstance(one, str) for one in until):
        raise config_error(f"{where}.until", "be a string or a list of strings", repr(until), "correct it")
    normal = dict(normalize_gen_kwargs(dict(kwargs), DEFAULT_MAX_GEN_TOKS))
    if normal["do_sample"] or normal.get("num_beams", 1) != 1:
        said = ", ".join(f"{key}: {kwargs[key]!r}" for key in _GREEDY if key in kwargs)
        raise config_error(
            where, "mean greedy decoding, the only one here", said, "take a task without sampling or beams"
        )
    require_int(f"{where}.max_gen_toks", normal["max_gen_toks"], minimum=1)
    return Generation(stop=tuple(one for one in until if one), max_new_tokens=int(normal["max_gen_toks"]))


@cache
def _index(folder: str | None) -> Any:
    """lm-eval's TaskManager of a folder; None = of its own tasks, which takes seconds, once a process."""
    from lm_eval.tasks import TaskManager

    if folder is None:
        return TaskManager()
    if not os.path.isdir(folder):  # Path's own raises for a name that is too long
        raise config_error(
            "tasks.lm_eval.include_path", "be a folder of lm-eval tasks", repr(folder), "correct it"
        )
    return TaskManager(include_path=folder, include_defaults=False)


def _manager(name: str, include_path: str | None) -> Any:
    """The TaskManager that knows a task, group or tag, one's own folder first. Raises ConfigError."""
    known: list[str] = []
    for folder in dict.fromkeys((include_path, None)):
        manager = _index(folder)
        if name in manager.task_index:
            return manager
        known += manager.all_tasks
    near = " or ".join(get_close_matches(name, known, n=3))
    remedy = f"did you mean {near}?" if near else "correct it, or add its folder as include_path"
    raise config_error(_NAMES, "name tasks, groups or tags of lm-eval", repr(name), remedy)


def expand(name: str, include_path: str | None) -> list[str]:
    """The tasks that the name of a task, group or tag stands for. Raises ConfigError."""
    entry = _manager(name, include_path).task_index[name]
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    if entry.kind.name == "GROUP":
        return [task for member in _members(name, entry.cfg) for task in expand(member, include_path)]
    return [name]


def _members(group: str, config: Mapping[str, Any]) -> list[str]:
    """Names in a group. Those with settings of their own would be other tasks than their names say."""
    if extra := set(config) - _GROUP_KEYS:
        raise _changed(group, f"{', '.join(sorted(extra))} for all of its tasks")
    found: list[str] = []
    for member in config["task"]:
        if isinstance(member, str):
            found.append(member)
        elif isinstance(member.get("task"), list):  # a group inside the group, written out in place
            found.extend(_members(group, member))
        elif extra := set(member) - {"task", "task_alias", "group", "group_alias"}:
            raise _changed(group, f"{', '.join(sorted(extra))} for one of its tasks")
        else:
            found.append(member.get("task") or member["group"])
    return found


def _changed(group: str, what: str) -> ConfigError:
    rule = "name tasks, or groups that take their tasks as they are"
    return config_error(_NAMES, rule, f"group {group!r} with {what}", "name the tasks that you want")


@cache
def config(task: str, include_path: str | None) -> Any:
    """A task's lm-eval TaskConfig; its functions are not imported and its data is not read.

    Raises ConfigError for a task that cannot be part of a sweep.
    """
    from lm_eval.api.task import TaskConfig

    entry = _manager(task, include_path).task_index[task]
    raw = copy.deepcopy(entry.cfg)
    where = f"lm-eval task {task!r}"
    if entry.kind.name != "TASK":
        raise config_error(where, "be configured in YAML", "one that is a Python class", "take another task")
    kind = raw.get("output_type", TaskConfig.output_type)
    if kind != "generate_until":
        raise config_error(where, "have output_type generate_until", kind, "take its generating variant")
    if raw.get("unsafe_code"):
        raise config_error(where, "not run what a model wrote", "unsafe_code: true", "take another task")
    if raw.get("doc_to_image") or raw.get("doc_to_audio"):
        raise config_error(where, "be text alone", "images or audio", "take another task")
    for key in ("group", "tag", "task_list"):
        raw.pop(key, None)
    try:
        return TaskConfig(**raw)
    except TypeError as error:
        raise config_error(where, "have known keys", str(error), "correct its YAML file") from None


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """An lm-eval task with its data. documents: what it is evaluated on (test, else validation), in order."""

    task: Any
    documents: Sequence[Mapping[str, Any]]


@cache
def load(task: str, include_path: str | None) -> Loaded:
    """A task with its functions and its data, read once a process. Raises ConfigError."""
    try:
        with seeded():
            loaded = _manager(task, include_path).load([task])["tasks"][task]
    except Exception as error:  # files, hub, templates, functions: whatever a task's author left to fail
        where, remedy = f"lm-eval task {task!r}", "check its YAML file, and that its data has documents"
        raise config_error(where, "load with its data", one_line(error), remedy) from error
    return Loaded(task=loaded, documents=loaded.task_docs)


@contextmanager
def seeded(offset: int = 0) -> Iterator[None]:
    """Global random numbers as `simple_evaluate` seeds them, plus `offset`; afterwards as they were."""
    import numpy
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    plain, array = random.getstate(), numpy.random.get_state()
    random.seed(DEFAULT_RANDOM_SEED + offset)
    numpy.random.seed(DEFAULT_OTHER_SEED + offset)
    try:
        yield
    finally:
        random.setstate(plain)
        numpy.random.set_state(array)


def one_line(error: BaseException) -> str:
    """An outside error's first cause, short enough to stand inside one of ours."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
