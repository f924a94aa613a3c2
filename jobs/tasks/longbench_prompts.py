"""The prompt templates of LongBench: read from the user's copy of them, never kept here.

They come from the official `dataset2prompt.json` beside the data (github.com/THUDM/LongBench,
LongBench/config/), and where there is none from the task files of the installed lm-eval. lm-eval 0.4.13
differs from the official file in six of the 21: the blank line before the question of triviaqa and samsum is
gone, and so is the white space at the end of passage_count, passage_retrieval_en (a space), lcc and
repobench-p (a line end). The official file itself came in versions: "as concisely" in narrativeqa was once
written in one word, and lm-eval has that.
"""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

import yaml

from jobs.tasks.longbench_data import is_text, only
from spts.errors import ConfigError

FILE = "dataset2prompt.json"
_FIELDS = {"context", "input"}
_LM_EVAL_FIELDS = {"context": "{context}", "question": "{input}", "input": "{input}"}
_LM_EVAL_FIELD = re.compile(r"\{\{\s*(\w+)\s*\}\}")


@dataclass(frozen=True, kw_only=True)
class Template:
    """A prompt with places for the fields `context` and `input`, in the way of str.format.

    source: "dataset2prompt.json" or "lm-eval".
    """

    text: str
    source: str

    def fill(self, context: str, question: str) -> str:
        """The prompt. What the fields hold is never taken for a place itself."""
        return self.text.format(context=context, input=question)


def read_template(folder: Path, name: str) -> Template:
    """The template of set `name`. Raises ConfigError when there is none, or one with other fields."""
    file = only([folder / FILE, folder / "config" / FILE], FILE)
    template = _lm_eval(folder, name) if file is None else _official(file, name)
    try:
        places = [place for place in Formatter().parse(template.text) if place[1] is not None]
    except ValueError as error:
        raise _fault(name, template, str(error)) from None
    fields = {field for _, field, _, _ in places}
    if "context" not in fields or fields - _FIELDS or any(spec or conv for _, _, spec, conv in places):
        raise _fault(name, template, f"the places {sorted(str(field) for field in fields)}")
    return template


def _fault(name: str, template: Template, got: str) -> ConfigError:
    return ConfigError(
        f"{template.source}: the prompt of {name} must have a place {{context}}, perhaps {{input}}, and no "
        f"other, got {got}; put the official {FILE} into the data folder",
        field="data",
    )


def _official(file: Path, name: str) -> Template:
    if not file.is_file():
        raise ConfigError(
            f"{file} must be a regular file, got another; put the official one there", field="data"
        )
    try:
        prompts = json.loads(file.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} must be JSON, got {error}; get the file again", field="data") from None
    if not isinstance(prompts, dict) or not is_text(prompts.get(name)):
        raise ConfigError(
            f"{file} must hold a prompt under {name!r}, got none; get the official file", field="data"
        )
    return Template(text=prompts[name], source=FILE)


class _TaskFile(yaml.SafeLoader):
    """lm-eval's task files; their !function values are read as names and never imported."""


def _name_of_function(loader: _TaskFile, node: yaml.ScalarNode) -> Any:
    return loader.construct_scalar(node)


_TaskFile.add_constructor("!function", _name_of_function)


def _lm_eval(folder: Path, name: str) -> Template:
    package = importlib.util.find_spec("lm_eval")
    roots = [] if package is None else list(package.submodule_search_locations or ())
    files = [file for root in roots if (file := Path(root, "tasks", "longbench", f"{name}.yaml")).is_file()]
    if not files:
        raise ConfigError(
            f"data must hold {FILE}, got none in {folder} nor lm-eval's tasks in this Python; put the "
            f"official file there or install lm-eval",
            field="data",
        )
    task = yaml.load(files[0].read_text(encoding="utf-8"), Loader=_TaskFile)  # a SafeLoader of our own
    return Template(text=_from_jinja(str(task.get("doc_to_text"))), source="lm-eval")


def _from_jinja(jinja: str) -> str:
    """A template of {{fields}} alone as one for str.format; another field keeps its name, to be refused."""
    pieces = _LM_EVAL_FIELD.split(jinja)
    for i in range(0, len(pieces), 2):
        pieces[i] = pieces[i].replace("{", "{{").replace("}", "}}")
    for i in range(1, len(pieces), 2):
        pieces[i] = _LM_EVAL_FIELDS.get(pieces[i], f"{{{pieces[i]}}}")
    return "".join(pieces)
