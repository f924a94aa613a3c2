"""Frozen pydantic models that refuse unknown keys, and their faults in the house's words: file, key, rule and
value."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.yaml_file import read_yaml
from spts.errors import ConfigError


class Strict(BaseModel):
    """Base of every configuration model: unknown keys are errors, numbers are finite, instances do not
    change."""

    # JSON, which every configuration is recorded as, has no infinity.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Model = TypeVar("Model", bound=BaseModel)


def parse(data: object, model: type[Model], *, source: str) -> Model:
    """`data` as a `model`. Raises ConfigError naming `source`, the key, the rule and the value of every
    fault."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        faults = "; ".join(explain(dict(fault), model) for fault in error.errors())
        first = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise ConfigError(f"{source}: {faults}", field=first or None) from None


def load_yaml(path: str | Path, model: type[Model]) -> Model:
    """Read a YAML file as a `model`. Raises ConfigError as `parse`, and for a file that is missing or not
    YAML."""
    return parse(read_yaml(path), model, source=str(path))


def brief(value: object) -> str:
    """`value` as an error quotes it: its repr, cut where it is long or deep."""
    short = reprlib.Repr()
    short.maxlevel = 2
    short.maxstring = short.maxother = short.maxlong = 100
    short.maxlist = short.maxtuple = short.maxdict = 10
    return short.repr(value)


def explain(fault: Mapping[str, Any], model: type[BaseModel] | None = None) -> str:
    """One pydantic fault in the house's words: "<key> must <rule>, got <value>; <what to do>"."""
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = ", ".join(_known_keys(model, fault["loc"][:-1])) if model else ""
        what = f"be one of {known}" if known else "be a known key"
        return f"{key} must {what}, got an unknown key; remove it or correct its name"
    if fault["type"] == "missing":
        return f"{key} must be given, got nothing; add it"
    if fault["type"] == "value_error":
        message = str(fault["ctx"]["error"])
        name = str(fault["loc"][-1]) if fault["loc"] else ""
        if re.match(rf"{re.escape(name)}\b", message):  # it names the field by itself
            return key.removesuffix(name) + message
        return f"{key}: {message}"
    rule = re.sub(r"^\w+ should ", "", fault["msg"])  # "Input should be …", "String should have …"
    rule = rule.replace("a valid tuple", "a list")  # as JSON and YAML have it
    return f"{key} must {rule[0].lower()}{rule[1:]}, got {brief(fault['input'])}; correct it"


def refuse_unknown_keys(data: object, schema: object, where: str, key: str = "") -> None:
    """Walk `data` beside a pydantic schema; raise ConfigError at the first key that the schema does not
    have."""
    if isinstance(data, list):
        for index, item in enumerate(data):
            refuse_unknown_keys(item, schema, where, f"{key}.{index}")
    model = _model_in(schema)
    if model is None or not isinstance(data, Mapping):
        return
    fields = {field.alias or name: field.annotation for name, field in model.model_fields.items()}
    for name, value in data.items():
        path = f"{key}.{name}".lstrip(".")
        if name not in fields:
            raise ConfigError(
                f"{where}: {path} must be one of {', '.join(sorted(fields))}, got an unknown key; "
                "remove it or correct its name",
                field=path,
            )
        refuse_unknown_keys(value, fields[name], where, path)


def _known_keys(model: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    """Keys of the model at `loc` inside `model`; empty when it is not a model."""
    schema: object = model
    for part in loc:
        inner = _model_in(schema)
        if inner is not None and part in inner.model_fields:
            schema = inner.model_fields[part].annotation
    inner = _model_in(schema)
    return list(inner.model_fields) if inner else []


def _model_in(annotation: object) -> type[BaseModel] | None:
    """The pydantic model inside an annotation such as `list[Model] | None`, if there is one."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return annotation if issubclass(annotation, BaseModel) else None
    return next((found for arg in get_args(annotation) if (found := _model_in(arg))), None)
