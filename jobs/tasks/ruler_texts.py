"""The wording of RULER's prompts, read at run time from where it already lies: none of it is in this package.

By default from the source files of the installed lm-eval (lm_eval/tasks/ruler), which are parsed and not
imported: importing them downloads data. Or from `templates`: RULER's own folder scripts/data/synthetic, or a
JSON or YAML file with the texts by the names of `FIELDS`.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import string
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import yaml

from spts.errors import config_error

# Each text with the fields that it must have, and those that it may have.
FIELDS: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    name: (frozenset(must.split()), frozenset(may.split()))
    for name, must, may in (
        ("niah", "context query", "type_needle_v"),
        ("niah_answer", "", "query type_needle_v"),
        ("needle", "key value", "type_needle_v"),
        ("noise", "", ""),
        ("vt", "context query", "num_v"),
        ("vt_answer", "", "query num_v"),
        ("cwe", "context", "query num_cw"),
        ("cwe_answer", "", "query num_cw"),
        ("fwe", "context", "query"),
        ("fwe_answer", "", "query"),
        ("qa", "context query", ""),
        ("qa_answer", "", "query"),
        ("document", "document", "i"),
    )
}

# Where each text stands: a file, the name it is assigned to, and the keys that lead into a dictionary there.
_LM_EVAL: Mapping[str, tuple[str, ...]] = {
    "niah": ("niah_utils.py", "TEMPLATE"),
    "niah_answer": ("prepare_niah.py", "formatted_output", "gen_prefix"),
    "needle": ("prepare_niah.py", "NEEDLE"),
    "noise": ("prepare_niah.py", "haystack"),
    "vt": ("vt_utils.py", "CONFIG", "variable_tracking", "template"),
    "vt_answer": ("vt_utils.py", "CONFIG", "variable_tracking", "answer_prefix"),
    "cwe": ("cwe_utils.py", "CONFIG", "template"),
    "cwe_answer": ("cwe_utils.py", "CONFIG", "answer_prefix"),
    "fwe": ("fwe_utils.py", "CONFIG", "template"),
    "fwe_answer": ("fwe_utils.py", "CONFIG", "answer_prefix"),
    "qa": ("qa_utils.py", "CONFIG", "template"),
    "qa_answer": ("qa_utils.py", "CONFIG", "answer_prefix"),
    "document": ("qa_utils.py", "DOCUMENT_PROMPT"),
}
_RULER_KEYS = {
    "niah": "niah",
    "vt": "variable_tracking",
    "cwe": "common_words_extraction",
    "fwe": "freq_words_extraction",
    "qa": "qa",
}
_RULER: Mapping[str, tuple[str, ...]] = {
    "needle": ("niah.py", "needle"),
    "noise": ("niah.py", "haystack"),
    "document": ("qa.py", "DOCUMENT_PROMPT"),
    **{name: ("constants.py", "TASKS", key, "template") for name, key in _RULER_KEYS.items()},
    **{
        f"{name}_answer": ("constants.py", "TASKS", key, "answer_prefix") for name, key in _RULER_KEYS.items()
    },
}


@cache
def ruler_texts(names: tuple[str, ...], templates: str | None) -> Mapping[str, str]:
    """The texts of those names from `templates`, or from the installed lm-eval when it is None.

    Raises:
        ConfigError: lm-eval is not installed, a file cannot be read, a text is missing, or one lacks a field
            or has one too many.
    """
    path = _lm_eval_folder() if templates is None else Path(templates)
    if os.path.isdir(path):  # Path's own raises for a name that is too long
        places = _RULER if (path / "constants.py").is_file() else _LM_EVAL
        texts = {name: _constant(path, *places[name]) for name in names}
    else:
        texts = _listed(path, names)
    for name, text in texts.items():
        must, may = FIELDS[name]
        try:
            fields = {field for _, field, _, _ in string.Formatter().parse(text) if field is not None}
        except ValueError as error:
            raise _fault(path, f"{name!r} that is no template ({error})") from error
        if not must <= fields <= must | may:
            raise _fault(
                path, f"{name!r} with {sorted(fields)}, which needs {sorted(must)} of {sorted(must | may)}"
            )
    return texts


def texts_hash(texts: Mapping[str, str]) -> str:
    """SHA-256 of texts by name: two machines with the same value word their prompts the same way."""
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()


def _lm_eval_folder() -> Path:
    spec = importlib.util.find_spec("lm_eval")  # finds it without running any of it
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        if (path := Path(folder) / "tasks" / "ruler").is_dir():
            return path
    raise config_error(
        "templates",
        "be given where lm-eval's RULER is not installed",
        "nothing",
        "install the package lm-eval, or name a file of templates",
    )


def _listed(path: Path, names: Sequence[str]) -> dict[str, str]:
    try:
        # JSON is YAML too.
        listed = yaml.safe_load(path.read_text(encoding="utf-8"))
    # PyYAML lets through what its constructors raise: of a date or tag that is none, of 3,000 brackets.
    except (OSError, yaml.YAMLError, ValueError, RecursionError, AttributeError, KeyError) as error:
        raise _fault(path, f"a file that cannot be read ({error!r})") from error
    if not isinstance(listed, dict):
        raise _fault(path, f"a file of {type(listed).__name__}, not of texts by name")
    for name in names:
        if not isinstance(listed.get(name), str):
            raise _fault(path, f"a file whose {name!r} is {listed.get(name)!r}, not a text")
    return {name: listed[name] for name in names}


def _constant(folder: Path, file: str, name: str, *keys: str) -> str:
    """The first text that `file` assigns to `name`, or the one under `keys` of the dictionary there."""
    path = folder / file
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError) as error:
        raise _fault(path, f"a file that cannot be read ({error!r})") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == name for target in node.targets
        ):
            text = _text(_entry(node.value, keys))
            if text is not None:
                return text
    raise _fault(path, f"no text {'.'.join((name, *keys))!r}")


def _entry(node: ast.expr | None, keys: Sequence[str]) -> ast.expr | None:
    for wanted in keys:
        if not isinstance(node, ast.Dict):
            return None
        node = next(
            (
                value
                for key, value in zip(node.keys, node.values, strict=True)
                if isinstance(key, ast.Constant) and key.value == wanted
            ),
            None,
        )
    return node


def _text(node: ast.expr | None) -> str | None:
    """The template that an expression spells: a string, or an f-string whose values are names."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.IfExp):  # "one value" if … else "several": RULER words the several
        return _text(node.orelse)
    if isinstance(node, ast.JoinedStr):
        parts: list[str] = []
        for value in node.values:
            if isinstance(value, ast.Constant):
                parts.append(str(value.value).replace("{", "{{").replace("}", "}}"))
            elif isinstance(value, ast.FormattedValue) and isinstance(value.value, ast.Name):
                parts.append(f"{{{value.value.id}}}")
            else:
                return None
        return "".join(parts)
    return None


def _fault(path: Path, got: str) -> Exception:
    return config_error(
        "templates",
        "hold the wording of RULER's prompts",
        f"{got}, in {path}",
        "correct it, install lm-eval 0.4.13, or name another file or folder as `templates`",
    )
