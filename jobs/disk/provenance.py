"""Where results come from: command, code, versions, hardware. Imports nothing of what it reports on."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.disk import shapes
from jobs.disk.lines import append as append_line
from jobs.disk.lines import read_lines, repair_last_line, to_line, writing

_FILE = "provenance.jsonl"
_PACKAGES = ("spts", "torch", "transformers", "tokenizers", "ray", "deepspeed", "triton", "numpy", "scipy",
             "jieba", "rouge", "rapidfuzz", "lm_eval", "datasets")  # fmt: skip
_CODE = ("spts", "cluster", "jobs")


def collect(*, command: Sequence[str], config: Mapping[str, Any], commit: str | None) -> dict[str, Any]:
    """All that is known before an engine starts. `commit` is what the caller says; None = ask git here."""
    return {
        "started_unix_s": round(time.time(), 3),
        "command": list(command),
        "config": dict(config),
        **software(commit),
        "hardware": hardware(),
    }


def software(commit: str | None = None) -> dict[str, Any]:
    """The code and the packages of this process: what answers, and what scores them. commit: as `collect`."""
    root = Path(__file__).resolve().parents[2]
    return {
        "code": {"commit": commit or _git_commit(root), "sha256": code_hash(root)},
        "versions": versions(),
    }


def append(folder: Path, entry: Mapping[str, Any]) -> None:
    """Adds one start of the sweep to a results folder; `entry["run"]` names it. Raises DiskError."""
    path = folder / _FILE
    with writing(path), path.open("ab+", buffering=0) as file:
        repair_last_line(file)
        append_line(file, to_line(entry))
        os.fsync(file.fileno())


def finish(folder: Path, run: str, end: Mapping[str, Any]) -> None:
    """Adds how a start of the sweep ended: `read` gives it as that start's `end`. Raises DiskError."""
    append(folder, {"run": run, "end": dict(end)})


def read(folder: Path) -> list[dict[str, Any]]:
    """One entry per start of the sweep, oldest first. One without `end` was killed.

    Raises ConfigError for a line that is none of these, other than a torn last one.
    """
    path = folder / _FILE
    starts: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(read_lines(path) if path.exists() else (), 1):
        _check(line, f"{path}:{number}")
        starts.setdefault(line["run"], {}).update(line)
    return list(starts.values())


def _check(line: Mapping[str, Any], where: str) -> None:
    shapes.check(shapes.Start, line, where, more=True)
    shapes.check(shapes.Engine, line.get("engine", {}), f"{where}: engine", more=True)
    shapes.check(shapes.End, line.get("end", {}), f"{where}: end", more=True)
    config = line.get("config", {})
    shapes.check(shapes.Config, config, f"{where}: config", more=True)
    shapes.check(shapes.EngineChoice, config.get("engine", {}), f"{where}: config.engine", more=True)


def code_hash(root: Path) -> str:
    """First 20 hex digits of the sha256 over the source files: names the code where git is not at hand."""
    digest = hashlib.sha256()
    for package in _CODE:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


def versions() -> dict[str, str]:
    """Python and the installed packages that can change an answer, a score or a time."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """The machine of this process: processor, usable cores, memory."""
    return {
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git_commit(root: Path) -> str | None:
    """The commit of a checkout, "-dirty" added where files differ from it; None outside of one."""
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        )
        changes = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("-dirty" if changes.stdout.strip() else "")
