"""YAML files as plain data: no key twice, no aliases without end, and every fault with the file's name."""

from __future__ import annotations

import math
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from spts.errors import ConfigError

MAX_VALUES = 100_000  # in a file, aliases written out


class _Loader(yaml.SafeLoader):
    """Plain data, and no key twice in a mapping: PyYAML would let the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping's keys and values; keys that come from `<<` may be given again."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key.value!r} twice in a mapping", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: str | Path) -> object:
    """The plain data of a YAML file. Raises ConfigError for one that is missing, is not YAML, or stands for
    more values than anybody writes."""
    try:
        data = yaml.load(Path(path).read_bytes(), _Loader)  # YAML says itself how its bytes are to be read
    except OSError as error:
        raise ConfigError(
            f"{path} must be a readable YAML file, got {error.strerror}; check the path", field="config"
        ) from None
    # PyYAML lets through what its constructors raise: of a date or tag that is none, of 3,000 brackets.
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError, KeyError) as error:
        raise ConfigError(f"{path} must be a YAML file, got {error}; correct it", field="config") from None
    _check_size(data, path)
    return data


def _check_size(data: object, path: str | Path) -> None:
    """Raises ConfigError for a YAML file whose aliases make it endless, or far more than what it says."""
    sizes: dict[int, float] = {}

    def size(value: object) -> float:
        if not isinstance(value, dict | list):
            return 1
        if id(value) not in sizes:
            sizes[id(value)] = math.inf  # what it is while it holds itself
            values = value.values() if isinstance(value, dict) else value
            sizes[id(value)] = 1 + sum(map(size, values))
        return sizes[id(value)]

    if size(data) > MAX_VALUES:
        raise ConfigError(
            f"{path} must stand for at most {MAX_VALUES} values, got {size(data):g}, its aliases written "
            "out; use fewer of them",
            field="config",
        )
