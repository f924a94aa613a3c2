"""The HTML page of a report: self-contained, for laptop and phone, safe to open whatever the model wrote."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

from jobs.options import describe_schedule
from jobs.reporting import facts, palette, plots, wording
from jobs.reporting.drilldown import MAX_ANSWERS, MAX_CHARS, drilldown
from jobs.reporting.measures import Costs
from jobs.reporting.summary import Line, ModelSummary, Results
from spts.schedule import Schedule

MAX_FAILURES = 200
_FEW_METHODS = 6  # cards are for as many
_FEW_TASKS = 6  # plots by length are open for as many
_TEMPLATES = Path(__file__).parent / "templates"


def html(results: Results) -> str:
    """One page with everything in it: loads nothing, runs no script, shows a model's words as plain text."""
    return environment().get_template("report.html.j2").render(
        results=results,
        models=[_model_view(index, model, len(results.models)) for index, model in enumerate(results.models)],
        warnings=wording.warnings(results),
        start=results.starts[-1] if results.starts else {},
        facts=facts.facts(results),
        starts_head=facts.STARTS_HEAD,
        starts=facts.starts_table(results),
        starts_json=json.dumps(results.starts, indent=1, ensure_ascii=False),
        schedules=_schedules(results),
        questions=len({one.question for model in results.models for one in model.scored}),
        max_failures=MAX_FAILURES,
        few_methods=_FEW_METHODS,
        few_tasks=_FEW_TASKS,
    )  # fmt: skip


def environment() -> jinja2.Environment:
    """Templates that escape whatever they are given, with the wording's functions as filters."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        percent=wording.percent, share=wording.share, points=wording.points, seconds=wording.seconds,
        times=wording.times, number=wording.number, nats=wording.nats, probability=wording.probability,
        visible=wording.visible, interval=wording.interval, bytes=wording.bytes_text,
        short_length=wording.short_length, data_uri=_data_uri, day=facts.day, shortened=_shortened,
    )  # fmt: skip
    made.globals["styles"] = (_TEMPLATES / "report.css").read_text(encoding="utf-8")
    return made


def _model_view(index: int, model: ModelSummary, num_models: int) -> dict[str, Any]:
    """What the page shows of one model."""
    colours = palette.colours(model)
    labels = [label for label in model.labels if label in model.overall]
    costs = [model.overall[label].costs for label in labels]
    return {
        "id": f"m{index}",
        "summary": model,
        "labels": labels,
        "headline": wording.headline(model),
        "corrected": wording.corrected(model),
        "colours": {label: colour for label, (colour, _) in colours.items()},
        "numbered": palette.numbered(model),
        "plots": [
            (title, svg, note)
            for title, svg, note in (
                ("Score against prompt length", plots.score_by_length(model), ""),
                (
                    "Score against measured compute",
                    plots.score_by_cost(model, plots.flop_share, "prefill FLOP, % of dense (measured)"),
                    "Dashed: no method is both cheaper and better.",
                ),
                (
                    "Score against measured time to first token",
                    plots.score_by_cost(model, plots.ttft_share, "time to first token, % of dense (median)"),
                    "Dashed: no method is both faster and better.",
                ),
                (
                    "Score against KV cache kept",
                    plots.score_by_cost(model, plots.kv_share, "KV cache, % of dense (measured)"),
                    "Dashed: no method keeps less and scores better.",
                ),
                (
                    "Time to first token, measured and predicted",
                    plots.ttft_by_length(model),
                    "Dotted: dense's measured time × the method's share of dense FLOP.",
                ),
                ("Measured compute against prompt length", plots.flops_by_length(model), ""),
            )
            if svg is not None
        ],
        "task_plot": plots.score_by_task(model),
        "task_plots": [
            (task, plots.score_by_length(model, task), _cell_of(model, task))
            for task in model.tasks
            if len(model.lengths) > 1
        ],
        "by_length": lambda label, length: model.by_length.get((label, length)),
        "families": list(dict.fromkeys(family for _, family in model.families)),
        "cost_columns": _cost_columns(costs),
        "agreement": any(cost.rank_mean is not None for cost in costs),
        "lengths_differ": any(cost.lengths_differ for cost in costs),
        "drilldown": drilldown(model, max_answers=MAX_ANSWERS // num_models),
    }


def _cost_columns(costs: list[Costs]) -> list[tuple[str, str, Callable[[Costs], str]]]:
    """(head, explanation, words for a line's costs), only those that some method has a number for."""
    columns: list[tuple[str, str, str, Callable[[Any], str]]] = [
        ("FLOP", "of the prefill, share of dense", "flop_share", wording.share),
        ("after reuse", "FLOP without what was kept from prompts before", "done_share", wording.share),
        ("KV cache", "bytes after the prefill, share of dense", "kv_share", wording.share),
        ("TTFT", "time to first token, median", "ttft_s", wording.seconds),
        ("TTFT ×", "as fast as dense", "speedup", wording.times),
        ("TPOT", "time per further token, median", "tpot_s", wording.seconds),
        ("end to end", "arrival to last token, median", "total_s", wording.seconds),
        ("end to end ×", "as fast as dense, answers as they came", "e2e_speedup", wording.times),
        ("at equal tokens ×", "had the answers as many tokens as dense's", "equal_speedup", wording.times),
        ("answer tokens", "mean", "answer_tokens", wording.number),
        ("peak memory", "of the device", "peak_memory_bytes", wording.bytes_text),
    ]
    reused = any(cost.reused for cost in costs)
    return [
        (head, why, lambda cost, name=name, words=words: words(getattr(cost, name)))  # type: ignore[misc]  # a lambda's default
        for head, why, name, words in columns
        if any(getattr(cost, name) is not None for cost in costs) and (name != "done_share" or reused)
    ]


def _cell_of(model: ModelSummary, task: str) -> Callable[[str, int], Line | None]:
    return lambda label, length: model.cells.get((label, task, length))


def _schedules(results: Results) -> list[tuple[str, int, str]]:
    """(label, length, schedule in words) of every method that has one, each once."""
    found = {
        (cell.label, cell.length): cell.content["method"]["schedule"]
        for cell in results.plan.cells
        if "schedule" in cell.content["method"]
    }
    return [
        (label, length, describe_schedule(Schedule.from_dict(schedule)))
        for (label, length), schedule in found.items()
    ]


def _shortened(text: str) -> str:
    """At most MAX_CHARS characters, and how many are left out."""
    left_out = len(text) - MAX_CHARS
    return text if left_out <= 0 else f"{text[:MAX_CHARS]} … ({left_out} more characters in samples.parquet)"


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
