"""What a calibration concludes: is this schedule safe for this model, and if not, from which layer on it
would be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.aligned import aligned
from spts.cost import LayerWork
from spts.schedule import Schedule

if TYPE_CHECKING:
    from spts.safety import Safety


@dataclass(frozen=True, kw_only=True)
class TaskCurve:
    """Accuracy on a task, 0 to 1.

    dense, method: score of generated answers. frozen: per layer, share of questions whose first reference is
    predicted token by token when the context is frozen from that layer on.
    """

    name: str
    samples: int
    dense: float
    method: float
    frozen: tuple[float, ...]

    def safe_from(self, min_agreement: float) -> int:
        """First layer from which on freezing keeps `min_agreement` of the accuracy with nothing frozen."""
        unsafe = [layer for layer, share in enumerate(self.frozen) if share < min_agreement * self.frozen[-1]]
        return unsafe[-1] + 1 if unsafe else 0


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The conclusion.

    safe: predictions under the schedule agree with dense on at least `min_agreement`, and so do task scores
    relative to dense. safe_from_layer: from here on updates of the context change nothing, on texts and
    tasks. early: first_skip_layer is before that.
    lines: the same for a person.
    """

    safe: bool
    early: bool
    first_skip_layer: int
    safe_from_layer: int
    min_agreement: float
    method_agreement: float
    lines: tuple[str, ...]


def judge(
    safety: Safety, curves: Sequence[TaskCurve], schedule: Schedule, *, min_agreement: float
) -> Verdict:
    """Safe or not, and from which layer on.

    Freezing is a stronger change than skipping, which still updates the tokens it chose: a schedule that
    starts before `safe_from_layer` can be safe, but only as long as the choice is right, so it is warned
    about.
    """
    first = schedule.first_skip_layer
    safe_from = max([safety.safe_from(min_agreement), *(curve.safe_from(min_agreement) for curve in curves)])
    lost = [curve for curve in curves if curve.method < min_agreement * curve.dense]
    safe = safety.method_agreement >= min_agreement and not lost
    early = first < safe_from
    lines = [
        f"{'SAFE' if safe else 'NOT SAFE'}: under this schedule {safety.method_agreement:.1%} of "
        f"{safety.num_prompts} predictions are the dense model's (KL {safety.method_kl_nats:.4f} nats; "
        f"safe means at least {min_agreement:.0%})",
        *(_task_line(curve, lost=curve in lost) for curve in curves),
        f"from layer {safe_from} on updates of the context no longer matter; "
        f"this schedule skips from layer {first}",
    ]
    if early:
        lines.append(
            f"WARNING: first_skip_layer {first} is before layer {safe_from}. What skips in between has to be "
            f"chosen well: measure on your own task, or set first_skip_layer to {safe_from}"
        )
    return Verdict(
        safe=safe,
        early=early,
        first_skip_layer=first,
        safe_from_layer=safe_from,
        min_agreement=min_agreement,
        method_agreement=safety.method_agreement,
        lines=tuple(lines),
    )


def _task_line(curve: TaskCurve, *, lost: bool) -> str:
    if not curve.dense:
        return f"{curve.name} says nothing: the dense model is never right on it"
    word = "NOT SAFE" if lost else "SAFE"
    return f"{word} on {curve.name}: {curve.method:.1%} of {curve.samples} right, dense {curve.dense:.1%}"


def table(safety: Safety, curves: Sequence[TaskCurve], work: Sequence[LayerWork]) -> str:
    """Both curves, a line for every layer, aligned.

    runs: tokens that run of the candidates. agree, KL: freezing from this layer on. covers: dense attention
    on what ran. proxy: rank correlation of LTP's estimate.
    """
    header = ["layer", "runs", "frozen: agree", "KL nats", *(f"{curve.name}" for curve in curves)]
    rows = [[*header, "attention covered", "proxy"]]
    for row, done in zip(safety.layers, work, strict=True):
        skips = done.attention_tokens < done.candidates
        rows.append(
            [
                str(row.layer),
                f"{done.attention_tokens} of {done.candidates}" if skips else f"all {done.candidates}",
                f"{row.frozen_agreement:.3f}",
                f"{row.frozen_kl_nats:.4f}",
                *(f"{curve.frozen[row.layer]:.2f}" for curve in curves),
                f"{row.coverage:.3f}",
                "" if row.proxy_correlation is None else f"{row.proxy_correlation:.2f}",
            ]
        )
    return "\n".join(aligned(rows, left=()))
