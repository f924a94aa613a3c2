"""What is timed at one prompt length: methods by name, and what each should cost.

Knows neither torch nor Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import nextafter

from jobs.options import read_schedule
from spts import memory
from spts.cost import ModelShape, ProxyShape, kv_bytes, pairs_share, prefill_flops
from spts.errors import ConfigError, config_error
from spts.methods import Dense, Method, Random, Recency, Spts
from spts.schedule import PRESETS, Schedule


@dataclass(frozen=True, kw_only=True)
class Case:
    """One prompt length: the methods to time there by name, dense first, and what each should cost.

    pairs_share: of the pairs of a query and a key in layers with sparse attention, what they read.
    peak_bytes: what a rank holds at most beside the weights (`spts.memory`).
    """

    length: int
    schedule: Schedule
    methods: Mapping[str, Method]
    flops: Mapping[str, int]
    kv_bytes: Mapping[str, int]
    pairs_share: Mapping[str, float]
    peak_bytes: Mapping[str, int]

    def predictions(self) -> list[str]:
        """A line for each method: FLOP, their ratio to dense, KV and peak bytes."""
        dense, width = self.flops["dense"], max(map(len, self.flops))
        return [
            f"{name:<{width}} {flops:.3e} FLOP, {self.kv_bytes[name] / 2**20:.1f} MiB KV, "
            f"at most {self.peak_bytes[name] / 2**30:.2f} GiB"
            + (f"; {dense / flops:.2f}x fewer FLOP than dense" if name != "dense" else "")
            + (f"; reads {share:.1%} of the first layers' pairs" if share < 1 else "")
            for name, flops in self.flops.items()
            for share in (self.pairs_share[name],)
        ]

    @property
    def is_sparse(self) -> bool:
        """Whether a method reads a part of the keys in its first layers, if they are many enough."""
        schedules = (method.schedule_for(self.schedule.num_layers) for method in self.methods.values())
        return any(schedule.attention_density < 1 for schedule in schedules)

    def full(self, *, sparse: bool = False) -> Spts:
        """SPTS with budgets that cover the prompt: it has to equal dense. sparse: by way of sparse attention
        that reads every key."""
        stages = tuple(
            replace(stage, active_tokens=self.length, keep_tokens=None) for stage in self.schedule.stages
        )
        # Nothing is left to choose, so no token needs to be kept; a prompt may have fewer than were to be.
        density = nextafter(1.0, 0.0) if sparse else 1.0
        return Spts(
            schedule=replace(self.schedule, stages=stages, recent_tokens=1, attention_density=density)
        )


def plan(
    shape: ModelShape,
    length: int,
    *,
    names: Sequence[str],
    schedule: str,
    proxy: ProxyShape | None,
    dtype_bytes: int,
    published: bool = False,
    densities: Sequence[float] = (),
    max_new_tokens: int = 0,
    world_size: int = 1,
) -> Case:
    """The methods at one length and their cost, with room for `max_new_tokens` more, on `world_size` ranks.

    published: the budgets of a preset as they are, not scaled. densities: for each of them "spts, density X"
    too, whose dense layers read that share of the blocks.

    "pap" and "pap+ltp" are the paper's steps towards its method: the first stage's budget in all deep layers
    and no cut, with every token in the FFN and then with the proxies' choice there.

    Raises ConfigError for an unknown method or schedule, "pap" or "pap+ltp" of a schedule without stages, a
    density that is none or has the name of another.
    """
    if published:
        if schedule not in PRESETS:
            rule = f"be a preset's name ({', '.join(PRESETS)}) with --published"
            raise config_error("schedule", rule, repr(schedule), "choose one, or leave --published out")
        wanted = Schedule.preset(schedule)
    else:
        wanted = read_schedule(schedule, num_layers=shape.num_layers, num_tokens=length)
    makers: dict[str, Callable[[], Method]] = {
        "pap": lambda: Spts(schedule=_uncut(wanted), ffn_score="dense"),
        "pap+ltp": lambda: Spts(schedule=_uncut(wanted)),
        "spts": lambda: Spts(schedule=wanted),
        "random": lambda: Random(schedule=wanted),
        "recency": lambda: Recency(schedule=wanted),
    }
    for name in names:
        if name not in makers:
            raise ConfigError(
                f"methods must be of {', '.join(makers)}, got {name!r}; dense is always timed",
                field="methods",
            )
    uncut = [name for name in names if name in ("pap", "pap+ltp")]
    if uncut and not wanted.stages:
        rule = "not have pap or pap+ltp with a schedule that skips in no layer"
        raise config_error("methods", rule, ", ".join(uncut), "leave them out")
    methods: dict[str, Method] = {"dense": Dense(), **{name: makers[name]() for name in names}}
    for density in densities:
        if not 0 < density <= 1:
            raise config_error("density", "be above 0 and at most 1", density, "correct it")
        name = f"spts, density {density:g}"
        if name in methods:
            raise config_error("density", "have each share once", f"{density:g} again", "leave it out")
        sparse = replace(wanted, attention_density=density)
        methods[name] = Spts(schedule=sparse)
    work = {name: method.planned_work(shape.num_layers, length) for name, method in methods.items()}
    return Case(
        length=length,
        schedule=wanted,
        methods=methods,
        flops={name: prefill_flops(shape, done, proxy).total for name, done in work.items()},
        kv_bytes={name: kv_bytes(shape, done, dtype_bytes) for name, done in work.items()},
        pairs_share={name: pairs_share(done) for name, done in work.items()},
        peak_bytes={
            name: memory.request_bytes(
                shape,
                done,
                max_new_tokens=max_new_tokens,
                dtype_bytes=dtype_bytes,
                world_size=world_size,
                proxy=proxy,
            )
            for name, done in work.items()
        },
    )


def _uncut(schedule: Schedule) -> Schedule:
    first = schedule.stages[0]
    whole = replace(first, last_layer=schedule.num_layers - 1, keep_tokens=None)
    return replace(schedule, stages=(whole,))
