"""A results folder as a sweep leaves it, with made-up answers: for tests of reports, without any engine."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.disk import provenance
from jobs.disk.record import (
    CellRecord,
    Plan,
    PlannedSample,
    Row,
    RowWriter,
    content_hash,
    read_plan,
    sample_key,
    write_plan,
)
from jobs.tasks import get_task
from spts.schedule import Schedule
from tests.jobs.many_tasks import NAMES

ACCURACY = {
    "dense": (0.99, 0.98, 0.97, 0.93),
    "spts": (0.985, 0.975, 0.965, 0.92),
    "random": (0.55, 0.42, 0.36, 0.3),
    "recency": (0.5, 0.4, 0.33, 0.28),
}
SHARE = {"dense": 1.0, "spts": 0.44, "random": 0.41, "recency": 0.41}
HARD = {"single": 1.0, "multikey": 0.99, "multivalue": 0.95, "twohop": 0.9}


def write_results(
    folder: Path,
    *,
    methods: tuple[str, ...] = ("dense", "spts", "random", "recency"),
    tasks: tuple[str, ...] = ("single", "multikey", "multivalue", "twohop"),
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192),
    count: int = 20,
    answers: dict[str, str] | None = None,
    errors: dict[str, str] | None = None,
    unfinished: int = 0,
    per_context: int = 1,
    reuse: bool = False,
    follows: tuple[str, ...] = (),
    answer_tokens: dict[str, int] | None = None,
    depths: tuple[float, ...] = (),
    dtype: str = "float32",
    in_flight: int = 1,
) -> Plan:
    """Writes plan, rows, provenance.

    methods: labels, "name" or "name, anything". answers, errors: text and error of the sample "label/sample
    id". per_context: samples that share a context; reuse: all but the first of them kept something from the
    one before. follows: tasks whose samples follow given tokens. answer_tokens: by label.
    """
    rng = random.Random(1)
    cells, samples, rows = [], [], []
    for label in methods:
        method = label.partition(",")[0]
        for task in tasks:
            for index, length in enumerate(lengths):
                cell = _cell(label, method, task, length, dtype)
                cells.append(cell)
                for number in range(count):
                    sample_id = f"{task}-{length}-0-{number}"
                    sha256 = hashlib.sha256(sample_id.encode()).hexdigest()
                    references = ("amber", "cedar", "river")[: 3 if task == "multivalue" else 1]
                    right = rng.random() < ACCURACY[method][index] * HARD.get(task, 1.0)
                    said = references if right else references[: rng.randrange(len(references))]
                    depth = depths[number % len(depths)] if depths else round(rng.random(), 4)
                    planned = PlannedSample(
                        key=sample_key(cell.id, sample_id, sha256),
                        cell=cell.id,
                        sample=sample_id,
                        prompt_tokens=length - rng.randrange(8),
                        prompt_sha256=sha256,
                        question="What is the code of falcon?\nAnswer:",
                        references=references,
                        meta={"depth": depth} if task not in NAMES else {},
                        context=f"{length}-{number // per_context}" if per_context > 1 else None,
                    )
                    samples.append(planned)
                    name = f"{label}/{sample_id}"
                    text = " " + ", ".join(said or ("granite",)) + "."
                    if task in NAMES:
                        mean = ACCURACY[method][index] * (0.3 + 0.03 * NAMES.index(task))
                        text = f"{min(1.0, max(0.0, rng.gauss(mean, 0.2))):.3f}"
                    row = _row(
                        planned, method, (answers or {}).get(name, text), (errors or {}).get(name), rng
                    )
                    change: dict[str, Any] = {}
                    if label in (answer_tokens or {}):
                        tokens = (answer_tokens or {})[label]
                        decode_s = 0.01 * (tokens - 1)
                        change = {"token_ids": tuple(range(tokens)), "decode_s": decode_s}
                        change["total_s"] = (row.ttft_s or 0) + decode_s
                    if reuse and number % per_context:
                        change |= {"reused_tokens": 500, "reused_flops": 0.25 * (row.flops or 0)}
                    if task in follows:
                        ranks = [1 if rng.random() < ACCURACY[method][index] else 4 for _ in range(8)]
                        change["agreement"] = {"rank": ranks, "kl": [0.01 * rank for rank in ranks]}
                        # As engines measure it: all tokens at once, with the dense model's pass before.
                        seconds = (row.ttft_s or 0) + 0.7
                        change |= {"ttft_s": seconds, "decode_s": 0.0, "total_s": seconds}
                        change |= {"token_ids": tuple(range(8)), "peak_memory_bytes": 10**12}
                    rows.append(row if row.error is not None else replace(row, **change))
    plan = Plan(name="demo", cells=tuple(cells), samples=tuple(samples))
    folder.mkdir(parents=True, exist_ok=True)
    write_plan(folder, plan)
    with RowWriter(folder, "engine-0") as writer:
        for row in rows[: len(rows) - unfinished]:
            writer.write(row)
    entry = provenance.collect(
        command=["python", "-m", "jobs.sweep"],
        config={"name": "demo", "engine": {"count": 1, "in_flight": in_flight}},
        commit="0" * 40,
    )
    engine = {"model_name": "demo_model", "device": "cpu", "dtype": dtype, "world_size": 1}
    engine |= {"attention": "made-up attention", "accelerator": None, "versions": {}}
    end = {
        "wall_s": 100.0,
        "samples_per_s": 12.8,
        "prompt_tokens_per_s": 49_152.0,
        "engines": {"engine-0": {"busy_s": 97.0, "utilisation": 0.97}},
    }
    provenance.append(folder, {**entry, "run": "r0", "engine": engine, "end": end})
    return plan


def change_plan(
    folder: Path,
    *,
    cell: Callable[[CellRecord], CellRecord] = lambda one: one,
    sample: Callable[[PlannedSample], PlannedSample] = lambda one: one,
) -> None:
    """Writes a folder's plan anew, with its cells and samples as `cell` and `sample` make them."""
    plan = read_plan(folder)
    cells, samples = tuple(map(cell, plan.cells)), tuple(map(sample, plan.samples))
    write_plan(folder, replace(plan, cells=cells, samples=samples))


def next_version(cell: CellRecord) -> CellRecord:
    """A cell of the same task, one version later."""
    content = {**cell.content, "task_version": cell.content["task_version"] + 1}
    return replace(cell, content=content)


def _cell(label: str, method: str, task: str, length: int, dtype: str) -> CellRecord:
    schedule = Schedule.preset("demo-12l", num_tokens=length).to_dict()
    content = {
        "model": "f" * 64,
        "tokenizer": "e" * 64,
        "dtype": dtype,
        "method": {"name": method} if method == "dense" else {"name": method, "schedule": schedule},
        "variant": label,
        "task": task,
        "task_version": get_task(task).version,
        "task_content": dict(get_task(task).content()),
        "length": length,
        "seed": 0,
    }
    return CellRecord(
        id=content_hash(content), label=label, model="demo_model", content=content, task_spec={"name": task}
    )


def _row(planned: PlannedSample, method: str, text: str, error: str | None, rng: random.Random) -> Row:
    start: dict[str, Any] = {
        "key": planned.key,
        "cell": planned.cell,
        "sample": planned.sample,
        "engine": "engine-0",
        "run": "r0",
        "attempts": 1,
        "finished_unix_s": 1.79e9,
    }
    if error is not None:
        return Row(**start, error=error, error_kind=error.partition(":")[0])
    dense = 2.0e6 * planned.prompt_tokens + 60.0 * planned.prompt_tokens**2
    seconds = dense * SHARE[method] / 3e10 * rng.uniform(0.95, 1.1)
    return Row(
        **start,
        prompt_tokens=planned.prompt_tokens,
        text=text,
        token_ids=(1, 2, 3),
        finish_reason="stop",
        queue_s=0.001,
        ttft_s=seconds,
        decode_s=0.02,
        total_s=seconds + 0.021,
        flops=dense * SHARE[method],
        dense_flops=dense,
        kv_bytes=int(planned.prompt_tokens * 12288 * (1 if method == "dense" else 0.41)),
        dense_kv_bytes=planned.prompt_tokens * 12288,
    )
