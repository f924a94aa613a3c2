"""A results folder as a sweep leaves it, with made-up answers: for tests of reports, without any engine."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

from jobs import provenance
from jobs.record import CellRecord, Plan, PlannedSample, Row, RowWriter, content_hash, sample_key, write_plan
from jobs.tasks import get_task
from spts.schedule import Schedule

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
) -> Plan:
    """Writes plan, rows, provenance. `answers`, `errors`: text and error of the sample "label/sample id"."""
    rng = random.Random(1)
    cells, samples, rows = [], [], []
    for method in methods:
        for task in tasks:
            for index, length in enumerate(lengths):
                schedule = Schedule.preset("demo-12l", num_tokens=length).to_dict()
                content = {
                    "model": "f" * 64,
                    "method": {"name": method}
                    if method == "dense"
                    else {"name": method, "schedule": schedule},
                    "task": task,
                    "task_version": get_task(task).version,
                    "length": length,
                    "seed": 0,
                }
                cell = CellRecord(
                    id=content_hash(content),
                    label=method,
                    model="demo_model",
                    content=content,
                    task_spec={"name": task},
                )
                cells.append(cell)
                for number in range(count):
                    sample_id = f"{task}-{length}-0-{number}"
                    sha256 = hashlib.sha256(sample_id.encode()).hexdigest()
                    references = ("amber", "cedar", "river")[: 3 if task == "multivalue" else 1]
                    right = rng.random() < ACCURACY[method][index] * HARD[task]
                    said = references if right else references[: rng.randrange(len(references))]
                    planned = PlannedSample(
                        key=sample_key(cell.id, sample_id, sha256),
                        cell=cell.id,
                        sample=sample_id,
                        prompt_tokens=length - rng.randrange(8),
                        prompt_sha256=sha256,
                        question="What is the code of falcon?\nAnswer:",
                        references=references,
                        meta={"depth": round(rng.random(), 4)},
                        context=None,
                    )
                    samples.append(planned)
                    name = f"{method}/{sample_id}"
                    error = (errors or {}).get(name)
                    text = (answers or {}).get(name, " " + ", ".join(said or ("granite",)) + ".")
                    rows.append(_row(planned, method, text, error, rng))
    plan = Plan(name="demo", cells=tuple(cells), samples=tuple(samples))
    folder.mkdir(parents=True, exist_ok=True)
    write_plan(folder, plan)
    with RowWriter(folder, "engine-0") as writer:
        for row in rows[: len(rows) - unfinished]:
            writer.write(row)
    entry = provenance.collect(
        command=["python", "-m", "jobs.sweep"], config={"name": "demo"}, commit="0" * 40
    )
    provenance.append(folder, {**entry, "run": "r0", "engines": [{"device": "cpu", "dtype": "float32"}]})
    return plan


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
        return Row(**start, error=error)
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
