"""The schedules that a search may propose, each at exactly the cost that was asked for.

A schedule is a shape (where skipping starts, how layers fall into stages, how budgets and cuts shrink) times
a size. Budgets are counts, so `spts.cost` knows the cost of any of them without running it: the size follows
from the cost by bisection, and a search at a given cost has only shapes to choose from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from spts.cost import ModelShape, ProxyShape, planned_work, speedup
from spts.errors import config_error
from spts.schedule import Schedule, Stage

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

MAX_STAGES = 4
MAX_RECENT_TOKENS = 128
MIN_BUDGET, MIN_SHRINK, MIN_CUT, MAX_CUT = 0.02, 0.1, 0.25, 4.0

# Budgets of a shape are written as shares of _UNIT and sized in steps of 1 / _STEPS token, so that budgets
# grow one after the other and a cost is met to about one token in one stage.
_UNIT = 2**20
_STEPS = 2**10


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """What schedules cost on one model, for prompts of `num_tokens` tokens."""

    shape: ModelShape
    proxy: ProxyShape
    num_tokens: int

    def speedup(self, schedule: Schedule) -> float:
        """FLOP of a dense prefill over those of a prefill under `schedule`."""
        return speedup(self.shape, planned_work(schedule, self.num_tokens), self.proxy)

    def sized(self, schedule: Schedule, target: float, *, reference_tokens: int) -> Schedule | None:
        """`schedule` with all budgets and cuts times one factor, so that it is `target` times as fast as
        dense, or faster by less than one step of the factor makes. reference_tokens: as for
        `Schedule.scaled`, whose steps these are.

        None when even budgets of one token are not as fast. target: above 1.
        """

        def at(factor: int) -> Schedule:
            scaled = schedule.scaled(num_tokens=factor, reference_tokens=reference_tokens)
            return tidy(scaled, self.num_tokens)

        counts = [count for stage in schedule.stages for count in (stage.active_tokens, stage.keep_tokens)]
        smallest = min((count for count in counts if count is not None), default=1)
        # The largest factor that is fast enough lies in [low, high): at `high` every budget covers the
        # prompt, which is dense.
        low, high = 1, self.num_tokens * reference_tokens // smallest + 1
        if not schedule.stages or self.speedup(at(low)) < target:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            if self.speedup(at(middle)) >= target:
                low = middle
            else:
                high = middle
        return at(low)

    def limit(self, first_skip_layer: int, width: int = 1) -> float:
        """The speed-up that no schedule with a first stage of `width` layers from `first_skip_layer` on
        exceeds: that stage runs one token, and one is left after it."""
        only = Stage(last_layer=first_skip_layer + width - 1, active_tokens=1, keep_tokens=1)
        return self.speedup(
            Schedule(num_layers=self.shape.num_layers, first_skip_layer=first_skip_layer, stages=(only,))
        )


def tidy(schedule: Schedule, num_tokens: int) -> Schedule:
    """The same work on a prompt of `num_tokens` tokens, in the smallest numbers that say so: no first stage
    in which nothing is skipped or cut, no budget above the candidates, no cut that cuts nothing."""
    stages: list[Stage] = []
    first, candidates = schedule.first_skip_layer, num_tokens
    for stage in schedule.stages:
        keep = schedule.keep_tokens(stage.last_layer)
        cuts = keep is not None and keep < candidates
        if not stages and not cuts and stage.active_tokens >= candidates:
            first = stage.last_layer + 1
            continue
        stages.append(
            replace(
                stage,
                active_tokens=min(stage.active_tokens, candidates),
                keep_tokens=keep if cuts else None,
            )
        )
        candidates = min(candidates, keep or candidates)
    if not stages:
        return Schedule.dense(schedule.num_layers)
    return replace(schedule, first_skip_layer=first, stages=tuple(stages))


@dataclass(frozen=True, kw_only=True)
class Space:
    """The shapes to search.

    first_layer: first layer that has an FFN proxy; no schedule can skip before it.
    target: speed-up of every schedule; None = the size is searched too.

    A point of the space is a mapping of parameters, all ranges fixed:

        first_skip_layer    from first_layer to the last layer from which the target can be reached
        num_stages          1 to 4
        width_0 …           0 to 1: layers of a stage, between one and as many as leave one to each later
                            stage; whatever the last stage leaves runs dense over its candidates
        shrink_1 …          0.1 to 1: a stage's budget over that of the stage before it
        cut_0 …             0.25 to 4: candidates kept after a stage over its budget
        recent_tokens       1 to 128, at most a sixteenth of the prompt
        budget              (without a target) 0.02 to 1: the first budget over the prompt's length

    Parameters of stages that a point does not have are ignored.

    Raises ConfigError when the target is out of reach, or not above 1.
    """

    costs: CostModel
    first_layer: int
    target: float | None = None

    def __post_init__(self) -> None:
        if self.target is None:
            return
        limit = self.costs.limit(self.first_layer)
        if not 1 < self.target <= limit:
            shown = math.floor(100 * limit) / 100
            raise config_error(
                "target_speedup",
                f"be above 1 and at most {shown:.2f}, the limit at {self.costs.num_tokens} tokens "
                f"with proxies from layer {self.first_layer} on",
                self.target,
                "choose another target, longer prompts, or fit proxies for earlier layers "
                "(python -m jobs.calibrate --first-layer)",
            )

    @cached_property
    def last_first_skip_layer(self) -> int:
        """The last layer in which skipping can start."""
        layers = range(self.first_layer, self._num_layers)
        return max(layer for layer in layers if self._reaches(layer, 1))

    def distributions(self) -> dict[str, BaseDistribution]:
        """The range of every parameter, for Optuna."""
        from optuna.distributions import FloatDistribution, IntDistribution

        most_stages = min(MAX_STAGES, self._num_layers - self.first_layer)
        ranges: dict[str, BaseDistribution] = {
            "first_skip_layer": IntDistribution(self.first_layer, self.last_first_skip_layer),
            "num_stages": IntDistribution(1, most_stages),
            "recent_tokens": IntDistribution(1, self._most_recent, log=True),
        }
        if self.target is None:
            ranges["budget"] = FloatDistribution(MIN_BUDGET, 1.0, log=True)
        for stage in range(most_stages):
            ranges[f"width_{stage}"] = FloatDistribution(0.0, 1.0)
            ranges[f"cut_{stage}"] = FloatDistribution(MIN_CUT, MAX_CUT, log=True)
            if stage:
                ranges[f"shrink_{stage}"] = FloatDistribution(MIN_SHRINK, 1.0)
        return ranges

    def schedule(self, point: Mapping[str, float]) -> Schedule:
        """The schedule that a point stands for, tidy, and at the target if there is one."""
        first = start = int(point["first_skip_layer"])
        count = min(int(point["num_stages"]), self._num_layers - start)
        stages: list[Stage] = []
        share, kept = 1.0, float("inf")
        for index in range(count):
            share *= point[f"shrink_{index}"] if index else 1.0
            kept = min(kept, share * point[f"cut_{index}"])
            room = self._room(start, index, count)
            start += 1 + round(point[f"width_{index}"] * (room - 1))
            stages.append(
                Stage(
                    last_layer=start - 1,
                    active_tokens=round(share * _UNIT),
                    keep_tokens=round(kept * _UNIT) if start < self._num_layers else None,
                )
            )
        shape = Schedule(
            num_layers=self._num_layers,
            first_skip_layer=first,
            stages=tuple(stages),
            recent_tokens=int(point["recent_tokens"]),
        )
        if self.target is not None:
            sized = self.costs.sized(shape, self.target, reference_tokens=_UNIT * _STEPS)
            assert sized is not None, "no shape of the space is out of the target's reach"
            return sized
        size = max(1, round(point["budget"] * self.costs.num_tokens))
        return tidy(shape.scaled(num_tokens=size, reference_tokens=_UNIT), self.costs.num_tokens)

    def point(self, schedule: Schedule) -> dict[str, float]:
        """The point whose shape is nearest to that of `schedule`, which has at least one stage.

        The inverse of the method `schedule` where nothing lies outside the ranges.
        """
        first = start = min(max(schedule.first_skip_layer, self.first_layer), self.last_first_skip_layer)
        stages = [stage for stage in schedule.stages if stage.last_layer >= start][:MAX_STAGES]
        stages = stages or [schedule.stages[-1]]
        point: dict[str, float] = {
            "first_skip_layer": first,
            "num_stages": len(stages),
            "recent_tokens": min(schedule.recent_tokens, self._most_recent),
        }
        if self.target is None:
            point["budget"] = _within(stages[0].active_tokens / self.costs.num_tokens, MIN_BUDGET, 1.0)
        for index, stage in enumerate(stages):
            room = self._room(start, index, len(stages))
            width = min(max(stage.last_layer + 1 - start, 1), room)
            point[f"width_{index}"] = (width - 1) / (room - 1) if room > 1 else 0.0
            start += width
            keep = float("inf") if stage.keep_tokens is None else stage.keep_tokens
            point[f"cut_{index}"] = _within(keep / stage.active_tokens, MIN_CUT, MAX_CUT)
            if index:
                shrink = stage.active_tokens / stages[index - 1].active_tokens
                point[f"shrink_{index}"] = _within(shrink, MIN_SHRINK, 1.0)
        return point

    @property
    def _num_layers(self) -> int:
        return self.costs.shape.num_layers

    @property
    def _most_recent(self) -> int:
        return max(1, min(MAX_RECENT_TOKENS, self.costs.num_tokens // 16))

    def _reaches(self, first_skip_layer: int, width: int) -> bool:
        return self.target is None or self.costs.limit(first_skip_layer, width) >= self.target

    def _room(self, start: int, index: int, count: int) -> int:
        """Layers that stage `index` of `count`, from layer `start` on, may have at most."""
        room = self._num_layers - start - (count - 1 - index)
        if index == 0:  # in it every token is a candidate: the one part that no size makes cheap
            while room > 1 and not self._reaches(start, room):
                room -= 1
        return room


def _within(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
