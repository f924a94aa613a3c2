"""What the command lines share: a schedule by name or file, where to write to, files that appear whole, an
end by Ctrl-C.

Neither Ray nor pydantic: `jobs.latency --local` and `jobs.calibrate` run where only torch and transformers
are.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

from jobs.disk.record import write_file
from spts.errors import ConfigError, check_keys, config_error, require_int
from spts.schedule import PRESETS, Schedule

P = ParamSpec("P")


def interruptible(
    advice: str = "the same command again starts from the beginning",
) -> Callable[[Callable[P, int]], Callable[P, int]]:
    """Has a `main` that Ctrl-C interrupts end in one line with `advice` and exit status 130."""

    def decorate(main: Callable[P, int]) -> Callable[P, int]:
        @wraps(main)
        def run(*args: P.args, **kwargs: P.kwargs) -> int:
            try:
                return main(*args, **kwargs)
            except KeyboardInterrupt:
                print(f"interrupted: {advice}", file=sys.stderr)
                return 130

        return run

    return decorate


def read_schedule(choice: str, *, num_layers: int, num_tokens: int) -> Schedule:
    """The schedule that `--schedule` means for a model and a prompt length.

    choice: a preset's name, scaled to the model's depth and the length; or a YAML file with what a sweep's
    `schedule` may hold: {preset, scaled, attention_density}, or a schedule's own keys, with
    `reference_tokens` to have it scaled.

    Worked example: "llama-3.1-8b" for 32 layers and 4,096 tokens has an eighth of the budgets that it has at
    32,768.

    Raises ConfigError naming the file and the key.
    """
    if choice in PRESETS:
        return Schedule.preset(choice, num_layers=num_layers, num_tokens=num_tokens)
    path = Path(choice)
    if not path.is_file():
        raise ConfigError(
            f"schedule must be one of {', '.join(PRESETS)} or a YAML file, got {choice!r}; check the name",
            field="schedule",
        )
    from cluster.yaml_file import read_yaml  # not for the reports, which need nothing of the cluster

    data = read_yaml(path)
    try:
        return schedule_from(data, num_layers=num_layers, num_tokens=num_tokens)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}", field=error.field) from None


def schedule_from(data: object, *, num_layers: int, num_tokens: int) -> Schedule:
    """The schedule that a mapping of a configuration means for a model and a prompt length.

    {preset: NAME} is the preset as published, {preset: NAME, scaled: true} fitted to depth and length, either
    with an attention_density if there is one; else `data` has a schedule's own keys, and is fitted if it also
    has reference_tokens. Raises ConfigError naming the key.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"schedule must be a mapping, got {data!r}; correct it", field="schedule")
    if "preset" in data:
        check_keys("schedule", data, required=("preset",), optional=("scaled", "attention_density"))
        name, scaled = str(data["preset"]), data.get("scaled", False)
        if not isinstance(scaled, bool):
            raise ConfigError(
                f"schedule.scaled must be true or false, got {scaled!r}; correct it", field="schedule"
            )
        preset = Schedule.preset(name)
        if scaled:
            preset = Schedule.preset(name, num_layers=num_layers, num_tokens=num_tokens)
        density = data.get("attention_density", preset.attention_density)
        try:
            return replace(preset, attention_density=density)
        except ConfigError as error:
            raise ConfigError(f"schedule.{error}", field=f"schedule.{error.field}") from None
    own = {key: value for key, value in data.items() if key != "reference_tokens"}
    schedule = Schedule.from_dict(own)
    if "reference_tokens" not in data:
        return schedule
    require_int("schedule.reference_tokens", data["reference_tokens"], minimum=1)
    return schedule.scaled(
        num_layers=num_layers, num_tokens=num_tokens, reference_tokens=data["reference_tokens"]
    )


def describe_schedule(schedule: Schedule) -> str:
    """One line for a terminal.

    Example: "dense before layer 4, attention to 0.1 of the blocks; 4-6: 512 tokens, then keep 320; 7: 256
    tokens; the last 32 in every choice".
    """
    density = schedule.attention_density
    sparse = f", attention to {density:.4g} of the blocks" if density < 1 else ""
    if not schedule.stages:
        return f"every layer dense{sparse}"
    parts = [f"dense before layer {schedule.first_skip_layer}{sparse}"]
    first = schedule.first_skip_layer
    for stage in schedule.stages:
        keep = schedule.keep_tokens(stage.last_layer)
        cut = "" if keep is None else f", then keep {keep}"
        layers = f"{first}-{stage.last_layer}" if first < stage.last_layer else f"{first}"
        parts.append(f"{layers}: {stage.active_tokens} tokens{cut}")
        first = stage.last_layer + 1
    if schedule.recent_tokens > 1:
        parts.append(f"the last {schedule.recent_tokens} in every choice")
    return "; ".join(parts)


def writable_folder(path: str | os.PathLike[str], *, field: str = "out") -> Path:
    """`path` as a folder that files can be written to, made if it is not there. Raises ConfigError about
    `field`.
    """
    folder = Path(os.path.expanduser(path))  # Path's own raises where there is no such user
    probe = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"{field} must be a folder that can be written, got {folder} ({reason}); choose another",
            field=field,
        ) from None
    return folder


def writable_file(path: Path, *, field: str = "out") -> Path:
    """`path` as a file that `write_file` can write or replace, in a folder that is there. Raises ConfigError
    about `field`.
    """
    if os.path.isdir(path):  # Path's own raises for a name that is too long
        raise config_error(field, "be a file", f"the folder {path}", "name a file in it")
    probe = path.with_name(f"{path.name}.new")  # as long a name as write_file needs
    try:
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        rule = "be a file that can be written, in a folder that is there"
        raise config_error(field, rule, f"{path} ({reason})", "choose another") from None
    return path


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes a JSON file that appears whole or not at all."""
    write_file(path, (json.dumps(data, indent=2) + "\n").encode())
