"""The HTML page of a report: self-contained, for laptop and phone, safe to open whatever the model wrote."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

from jobs import plots, wording
from jobs.options import describe_schedule
from jobs.summary import Line, ModelSummary, Results, Scored
from spts.schedule import Schedule

EXAMPLES_PER_TASK = 8
_TEMPLATES = Path(__file__).parent / "templates"


def html(results: Results) -> str:
    """One page with everything in it: loads nothing, runs no script, shows a model's words as plain text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=wording.percent, share=wording.share, points=wording.points, seconds=wording.seconds,
        times=wording.times, visible=wording.visible, interval=wording.interval,
        short_length=plots.short_length, data_uri=_data_uri, day=_day,
    )  # fmt: skip
    return environment.get_template("report.html.j2").render(
        results=results,
        models=[_model_view(model) for model in results.models],
        warnings=wording.warnings(results),
        start=results.starts[-1] if results.starts else {},
        schedules=_schedules(results),
        examples_per_task=EXAMPLES_PER_TASK,
        questions=len({one.question for model in results.models for one in model.scored}),
        comparisons=sum(len(model.labels) - 1 for model in results.models),
        styles=(_TEMPLATES / "report.css").read_text(encoding="utf-8"),
    )


def _model_view(model: ModelSummary) -> dict[str, Any]:
    """What the page shows of one model."""
    return {
        "summary": model,
        "headline": wording.headline(model),
        "colours": {label: colour for label, (colour, _) in plots.colours(model).items()},
        "main_plots": [
            ("Score against prompt length", plots.score_by_length(model)),
            ("Score against measured compute", plots.score_by_cost(model)),
            ("Measured compute against prompt length", plots.cost_by_length(model)),
            ("Time to first token", plots.ttft_by_length(model)),
        ],
        "task_plots": [(task, plots.score_by_length(model, task)) for task in model.tasks],
        "depth_maps": [(label, plots.depth_map(model, label)) for label in model.labels],
        "by_length": lambda label, length: model.by_length.get((label, length)),
        "by_task_length": {task: _cell_of(model, task) for task in model.tasks},
        "examples": {task: _examples(model, task) for task in model.tasks},
    }


def _cell_of(model: ModelSummary, task: str) -> Callable[[str, int], Line | None]:
    return lambda label, length: model.cells.get((label, task, length))


def _examples(model: ModelSummary, task: str) -> list[dict[str, Scored]]:
    """Samples where spts and the baseline differ, then where any methods do, the longest prompts first."""
    by_question: dict[Any, dict[str, Scored]] = {}
    for one in model.scored:
        if one.cell.task == task:
            by_question.setdefault(one.question, {})[one.cell.label] = one

    def interest(answers: dict[str, Scored]) -> tuple[float, ...]:
        scores = {label: one.score for label, one in answers.items()}
        base = scores.get(model.baseline or "")
        lost = [
            abs(s - base)
            for label, s in scores.items()
            if base is not None and model.methods[label] == "spts"
        ]
        length = next(iter(answers.values())).cell.length
        return (-max(lost, default=0.0), min(scores.values()) - max(scores.values()), -length)

    ranked = sorted(by_question.values(), key=interest)
    return ranked[:EXAMPLES_PER_TASK]


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


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _day(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(unix_s))
