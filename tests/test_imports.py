"""Who may import whom: every import statement, in functions too, and what a fresh process really loads."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.without import run_without

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("spts", "cluster", "jobs")
PURE = (
    "spts.errors",
    "spts.schedule",
    "spts.cost",
    "spts.memory",
    "spts.traffic",
    "spts.kernels.blocks",
    "spts.methods",
    "spts.sampling",
)  # no torch when imported


@dataclass(frozen=True, kw_only=True)
class Rule:
    """`modules` and what lies below import nothing of `never` less `but`; third parties only of `only`."""

    modules: tuple[str, ...]
    never: tuple[str, ...]
    but: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None  # None = any third party; own packages are ruled by `never`


# part of jobs -> the other parts that it may import; what is not here is a command, and imports what it likes
JOBS = {
    "aligned": (),
    "disk": (),
    "engines": (),
    "tasks": (),
    "options": ("disk",),
    "demo": ("tasks",),
    "timing": ("aligned", "disk", "engines", "options"),
    "reporting": ("disk", "options", "tasks"),
    "sweeping": ("aligned", "disk", "options", "reporting", "tasks"),
    "tuning": ("aligned", "disk", "options", "reporting", "sweeping", "tasks"),
    "load": ("disk", "options", "reporting", "sweeping", "tasks"),
}
RULES = [
    Rule(
        modules=("spts.errors", "spts.schedule", "spts.cost", "spts.memory", "spts.traffic"),
        never=("torch", "cluster", "jobs", "spts.model", "spts.layer", "spts.kernels"),
        but=("spts.kernels.blocks",),
        only=(),
    ),
    Rule(
        modules=("spts.kernels",),
        never=("spts", "transformers"),
        but=("spts.kernels",),
        only=("torch", "triton"),
    ),
    Rule(
        modules=("spts",),
        never=("ray", "deepspeed", "pydantic", "cluster", "jobs"),
        only=(
            "torch",
            "triton",
            "transformers",
            "safetensors",
            "numpy",
            "tqdm",
            "huggingface_hub",
            "tokenizers",
        ),
    ),
    Rule(
        modules=("cluster.protocol", "cluster.placement", "cluster.scheduler", "cluster.documents"),
        never=("ray", "torch", "spts.model", "spts.layer", "spts.kernels", "spts.proxy"),
        only=(),
    ),
    Rule(modules=("cluster.balance", "cluster.autoscaling"), never=PACKAGES, only=()),
    Rule(modules=("cluster.router",), never=("torch", "deepspeed", "spts.model", "cluster.shard")),
    Rule(modules=("cluster",), never=("jobs",)),
    Rule(
        modules=("jobs.tasks", "jobs.disk", "jobs.reporting", "jobs.report"),
        never=("ray", "torch", "cluster", "deepspeed"),
    ),
    *(
        Rule(modules=(f"jobs.{name}",), never=("jobs",), but=tuple(f"jobs.{each}" for each in (name, *below)))
        for name, below in JOBS.items()
    ),
    Rule(modules=PACKAGES, never=("tests",)),
]

# module -> what must not be in sys.modules after a fresh process imported it
FRESH = {
    "spts": ("torch", "triton", "transformers", "ray", "numpy"),
    **dict.fromkeys(PURE, ("torch", "transformers", "ray", "numpy")),
    "spts.model": ("ray", "deepspeed", "pydantic", "spts.kernels.rms_norm"),
    "cluster.protocol": ("torch", "ray", "pydantic"),
    "cluster.placement": ("torch", "ray"),
    "cluster.scheduler": ("torch", "ray"),
    "cluster.router": ("torch", "deepspeed", "jobs"),
    "jobs.tasks": ("torch", "ray", "cluster"),
    "jobs.disk.record": ("torch", "ray", "cluster"),
    "jobs.reporting.stats": ("torch", "ray", "cluster"),
    "jobs.report": ("torch", "ray", "cluster"),
}


def is_within(module: str, packages: tuple[str, ...]) -> bool:
    """True for a module in `packages` or below one: is_within("a.b", ("a",)), not is_within("ab", ("a",))."""
    return any(module == each or module.startswith(each + ".") for each in packages)


def sources() -> dict[str, Path]:
    """Module name -> file, for every module of the three packages."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(module: str, path: Path, text: str | None = None) -> Iterator[tuple[int, str]]:
    """(line, full name) of each import; `from a import b` gives a.b, relative ones are resolved, and so is
    importlib.import_module with a literal name."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(text or path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")
                base = ".".join([*above[: len(above) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func)
            if called in ("importlib.import_module", "import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def breaches(module: str, path: Path, text: str | None = None) -> Iterator[str]:
    """One sentence for each import of `module` that a rule forbids."""
    for line, name in imports(module, path, text):
        top = name.split(".")[0]
        for rule in RULES:
            if not is_within(module, rule.modules):
                continue
            never = is_within(name, rule.never) and not is_within(name, rule.but)
            third_party = top not in sys.stdlib_module_names and top not in PACKAGES
            if never or (third_party and rule.only is not None and top not in rule.only):
                yield f"{path}:{line}: {module} must not import {name}"
        if top == "deepspeed" and module != "cluster.shard":
            yield f"{path}:{line}: only cluster.shard may import deepspeed"


def test_every_import_keeps_the_rules() -> None:
    found = sources()
    assert {"spts.model", "cluster.engine", "jobs.sweep"} <= set(found)
    assert [each for module, path in found.items() for each in breaches(module, path)] == []


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("spts.schedule", "import torch"),
        ("spts.cost", "def f():\n    import numpy as np"),
        ("spts.model", "from ray import serve"),
        ("spts.kernels.gather", "from ..layer import attend"),
        ("spts.kernels.gather", "import transformers"),
        ("spts.layer", "import importlib\nimportlib.import_module('pydantic')"),
        ("cluster.engine", "from jobs.disk.record import Row"),
        ("cluster.engine", "import deepspeed"),
        ("cluster.scheduler", "from ray.util import state"),
        ("jobs.tasks.needle", "from cluster.engine import Engine"),
        ("jobs.disk.record", "import torch.nn as nn"),
        ("jobs.sweep", "from tests import fakes"),
        ("jobs.disk.record", "from jobs.tasks import Task"),
        ("jobs.reporting.page", "from jobs.sweeping import work"),
        ("jobs.timing.arena", "from jobs import latency"),
    ],
)
def test_a_breach_is_seen(module: str, text: str) -> None:
    path = ROOT / (module.replace(".", "/") + ".py")
    assert list(breaches(module, path, text))


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("spts.cost", "import math\nfrom .schedule import Schedule"),
        ("spts.kernels.gather", "from . import reference\nimport torch"),
        ("spts.layer", "from . import kernels\nfrom .kernels import reference"),
        ("cluster.protocol", "from spts.methods import Method"),
        ("cluster.shard", "import deepspeed, torch"),
        ("jobs.sweeping.runner", "from cluster.engine import start_engine"),
        ("jobs.sweeping.progress", "from jobs.reporting import wording"),
    ],
)
def test_a_permitted_import_passes(module: str, text: str) -> None:
    path = ROOT / (module.replace(".", "/") + ".py")
    assert list(breaches(module, path, text)) == []


@pytest.mark.parametrize("module", FRESH)
def test_fresh_process_loads_nothing_forbidden(module: str) -> None:
    code = f"import sys, {module}; print([each for each in {FRESH[module]!r} if each in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_import_spts_is_fast() -> None:
    code = "import time; start = time.perf_counter(); import spts; print(time.perf_counter() - start)"
    best_s = min(
        float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True).stdout)
        for _ in range(3)
    )
    assert best_s < 0.3


def test_core_imports_without_the_extras() -> None:
    """On a machine with torch and transformers alone: all of spts, and the CLIs that need no cluster."""
    extras = ("ray", "deepspeed", "pydantic", "fastapi", "openai", "datasets")
    modules = [*(each for each in sources() if is_within(each, ("spts",))), "jobs.latency", "jobs.calibrate"]
    result = run_without(extras, f"import importlib\nfor name in {modules!r}: importlib.import_module(name)")
    assert result.returncode == 0, result.stderr


# import name -> distribution, where they differ; starlette is fastapi's own face
DISTRIBUTION = {
    "yaml": "pyyaml",
    "starlette": "fastapi",
    "huggingface_hub": "huggingface-hub",
    "lm_eval": "lm-eval",
    "prometheus_client": "prometheus-client",
    "pytest_asyncio": "pytest-asyncio",
}
TOOLS = {"ruff", "mypy", "types-pyyaml", "types-tqdm", "pytest-timeout"}
BOUNDS = {"datasets"}  # lm-eval brings it, and we bound its version: from 4 on it runs no code of a data set
NEVER_IMPORTED = TOOLS | BOUNDS


def declared() -> dict[str, set[str]]:
    """Distributions by extra, those of the core under ""; lower case, without versions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    names = {
        extra: {re.match(r"[\w-]+", line).group().lower() for line in lines}  # type: ignore[union-attr]
        for extra, lines in groups.items()
    }
    return {extra: found - {"spts"} for extra, found in names.items()}


def imported(folder: str) -> set[str]:
    """Distributions that the files below a folder import from."""
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        found |= {name.split(".")[0] for _, name in imports("x.y", path)}
    outside = found - set(sys.stdlib_module_names) - {*PACKAGES, "tests", "x"}
    return {DISTRIBUTION.get(name, name) for name in outside}


def test_what_is_imported_is_declared_and_the_other_way_round() -> None:
    extras = declared()
    core = extras[""]
    assert imported("spts") <= core
    assert imported("cluster") <= core | extras["cluster"]
    assert imported("jobs") <= core | extras["cluster"] | extras["jobs"]
    everything = set().union(*extras.values())
    used = set().union(*(imported(folder) for folder in (*PACKAGES, "tests")))
    assert used <= everything
    assert everything - used == NEVER_IMPORTED


def test_no_catch_all_modules() -> None:
    names = {"utils", "common", "helpers", "manager", "misc"}
    assert [module for module in sources() if module.rpartition(".")[2] in names] == []
