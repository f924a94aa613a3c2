"""What a schedule search found, for people: tables, and the preset file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from jobs.aligned import aligned
from jobs.options import describe_schedule
from jobs.reporting.stats import Estimate, paired_difference
from jobs.tuning.pool import Measured
from jobs.tuning.search import Candidate
from spts.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Contest:
    """The schedule found and a preset at the same cost, on samples that the search has not seen.

    tasks: of the samples, in their order.
    """

    baseline: str
    tasks: tuple[str, ...]
    found: Measured
    preset: Measured

    def agreement_difference(self) -> Estimate:
        """Found minus preset, share of tokens, paired by sample, with a 95 % interval."""
        return paired_difference(self.found.agreement, self.preset.agreement)

    def lines(self) -> list[str]:
        """A table by task, and the difference in words."""
        rows = [("", "samples", "agreement, %", f"of {self.baseline}", "KL, nats", f"of {self.baseline}")]
        for name in ["all", *dict.fromkeys(self.tasks)]:
            mine = [index for index, task in enumerate(self.tasks) if name in ("all", task)]
            numbers = [
                factor * sum(values[index] for index in mine) / len(mine)
                for values, factor in (
                    (self.found.agreement, 100),
                    (self.preset.agreement, 100),
                    (self.found.kl, 1),
                    (self.preset.kl, 1),
                )
            ]
            first, second, third, fourth = numbers
            rows.append(
                (name, str(len(mine)), f"{first:.1f}", f"{second:.1f}", f"{third:.4f}", f"{fourth:.4f}")
            )
        agreement = self.agreement_difference()
        return [
            *aligned(rows),
            f"against {self.baseline} at the same cost: agreement {100 * agreement.value:+.1f} points "
            f"[{100 * agreement.low:+.1f}, {100 * agreement.high:+.1f}] (95 %, paired)",
        ]


def front_table(front: Sequence[Candidate], marks: dict[Schedule, str]) -> list[str]:
    """The front, slowest first, one line each. marks: a word on some schedules."""
    rows = [("speed-up", "agreement, %", "KL, nats", "", "schedule")]
    for one in front:
        rows.append(
            (
                f"{one.speedup:.3f}x",
                f"{100 * one.measured.mean_agreement:.1f}",
                f"{one.measured.mean_kl:.4f}",
                marks.get(one.schedule, ""),
                describe_schedule(one.schedule),
            )
        )
    return aligned(rows, left=(3, 4))


def preset_file(schedule: Schedule, *, reference_tokens: int, comments: Sequence[str]) -> str:
    """The YAML that `--schedule` and a sweep's `schedule` take; it is scaled from `reference_tokens`."""
    data: dict[str, Any] = {**schedule.to_dict(), "reference_tokens": reference_tokens}
    return "".join(f"# {line}\n" for line in comments) + yaml.safe_dump(data, sort_keys=False)
