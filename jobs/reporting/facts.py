"""Where results come from, in lines for a reader: the provenance block of a report."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jobs.reporting.summary import Results
from jobs.reporting.wording import share

Facts = list[tuple[str, str]]


def facts(results: Results) -> Facts:
    """(name, value) of all that is the same for the whole folder, or listed where it is not."""
    starts = _used(results)
    return [
        (name, value)
        for name, value in (*_code(starts, results.scored_by), *_what(results), *_how(starts))
        if value
    ]


def starts_table(results: Results) -> list[list[str]]:
    """One line per start of the sweep: when, run, model, commit, samples, seconds, utilisation of engines."""
    counts: dict[str, int] = {}
    for model in results.models:
        for one in model.scored:
            counts[one.row.run] = counts.get(one.row.run, 0) + 1
    return [
        [
            day(start.get("started_unix_s")),
            str(start.get("run", "–")),
            str(_get(start, "engine", "model_name") or "–"),
            short(commit(start)),
            str(counts.get(str(start.get("run")), 0)),
            *_end(start),
        ]
        for start in results.starts
    ]


STARTS_HEAD = ("started", "run", "model", "code", "answers", "wall time", "engines busy", "throughput")


def commit(start: Mapping[str, Any]) -> str:
    """The commit of a start, else the hash of its sources."""
    return str(_get(start, "code", "commit") or f"sources {_get(start, 'code', 'sha256') or 'unknown'}")


def short(text: str) -> str:
    """A hash cut to what tells it apart, what follows it kept: "0123456789ab-dirty"."""
    head, dash, rest = text.partition("-")
    return (head[:12] if len(head) == 40 else head) + dash + rest


def day(unix_s: Any) -> str:
    """Seconds since 1970 as a date and time."""
    if not isinstance(unix_s, int | float) or not abs(unix_s) < 1e11:  # no year of four digits
        return "–"
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(unix_s))


def _used(results: Results) -> list[dict[str, Any]]:
    """The starts that wrote rows; all of them if none did."""
    used = {one.row.run for model in results.models for one in model.scored}
    return [start for start in results.starts if start.get("run") in used] or results.starts


def _code(starts: Sequence[Mapping[str, Any]], scored_by: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "command", _join(shlex.join(start.get("command", [])) for start in starts)
    yield "code", _join(map(_source, starts))
    yield "hardware", _join(_hardware(start.get("hardware") or {}) for start in starts)
    yield "versions", _join(map(_versions, starts))
    yield "scored by", f"{_source(scored_by)}, with {_versions(scored_by)}"


def _source(start: Mapping[str, Any]) -> str:
    differs = " (files differ from it)" if commit(start).endswith("-dirty") else ""
    return f"{commit(start)}{differs}, sources {_get(start, 'code', 'sha256')}"


def _versions(start: Mapping[str, Any]) -> str:
    found = dict(start.get("versions") or {}) | dict(_get(start, "engine", "versions") or {})
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _what(results: Results) -> Iterator[tuple[str, str]]:
    cells = results.plan.cells
    for model in dict.fromkeys(cell.model for cell in cells):
        content = [cell.content for cell in cells if cell.model == model]
        parts = [
            f"{name} {_join((str(one.get(key) or 'none')[:20] for one in content), ' / ')}"
            for key, name in (
                ("model", "weights"),
                ("tokenizer", "tokenizer"),
                ("chat_template", "chat template"),
            )
            if any(key in one for one in content)
        ]
        proxies = _join((str(one["proxies"])[:20] for one in content if one.get("proxies")), " / ")
        yield f"model {model}", "; ".join([*parts, *([f"proxies {proxies}"] if proxies else [])])
    yield "dtype", _join(str(cell.content["dtype"]) for cell in cells if "dtype" in cell.content)
    yield "seeds", _join(str(cell.content["seed"]) for cell in cells)
    data = {
        f"{cell.task} (version {cell.content['task_version']})": ", ".join(
            f"{key} {str(value)[:20]}" for key, value in (cell.content.get("task_content") or {}).items()
        )
        for cell in cells
    }
    yield "tasks", "; ".join(f"{task}: {content}" if content else task for task, content in data.items())


def _how(starts: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    engines = [start.get("engine") or {} for start in starts]
    yield (
        "device",
        _join(
            f"{engine.get('accelerator') or engine.get('device')}, "
            f"{engine.get('world_size', 1)} rank(s) an engine"
            for engine in engines
            if engine
        ),
    )
    yield "attention", _join(str(engine.get("attention", "not recorded")) for engine in engines if engine)
    configs = [_get(start, "config", "engine") or {} for start in starts]
    yield (
        "batch policy",
        _join(
            f"{config.get('count', 1)} engine(s), {config['in_flight']} prompt(s) in flight in each"
            for config in configs
            if "in_flight" in config
        ),
    )


def _hardware(found: Mapping[str, Any]) -> str:
    if not found:
        return ""
    text = f"{found.get('cpu')}, {found.get('cpu_cores')} cores"
    if isinstance(memory := found.get("memory_bytes"), int):
        text += f", {memory / 2**30:.0f} GiB"
    return f"{text}; {found.get('system')}"


def _end(start: Mapping[str, Any]) -> list[str]:
    """Wall time, utilisation and throughput of a start, as far as its end was recorded."""
    end = start.get("end") or {}
    wall = end.get("wall_s")
    if not isinstance(wall, int | float) or not wall:
        return ["killed" if not end and "run" in start else "–", "–", "–"]
    shares = [share(engine.get("utilisation")) for engine in (end.get("engines") or {}).values()]
    rates = [
        f"{end[key]:,.{0 if end[key] >= 100 else 1}f} {unit}"
        for key, unit in (("samples_per_s", "samples/s"), ("prompt_tokens_per_s", "prompt tokens/s"))
        if isinstance(end.get(key), int | float)
    ]
    return [f"{wall:.0f} s", ", ".join(shares) or "–", ", ".join(rates) or "–"]


def _get(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _join(values: Iterable[str], between: str = "; ") -> str:
    """Each different value once."""
    return between.join(dict.fromkeys(value for value in values if value))
