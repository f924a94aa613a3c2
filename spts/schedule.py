"""Which layers skip, how many tokens stay active in each, and when candidates are pruned for good.

A `Schedule` is numbers only: it says how much each layer computes, never which tokens. Method and budgets as
in SPTS, arXiv 2601.13155 (multi-stage delayed pruning). Standard library only: every process can read one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property

from spts.errors import ConfigError, check_keys, config_error, require_int
from spts.kernels.blocks import BLOCK_TOKENS

MAX_STAGES = 1000  # of a schedule that is read, which anyone may have sent: models have fewer layers
K = 1024  # tokens, the unit of the paper's budgets: with it the KV memory at 32K is the published -58.6 %


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A run of skipping layers that share one budget; it starts where the stage before it ends.

    last_layer: index of its last layer, counted from 0.
    active_tokens: M, tokens that run attention and tokens that run the FFN in each of its layers (a count,
        not a ratio). A prompt with no more candidates than this runs dense here.
    keep_tokens: size of the candidate set T after the stage's last layer; None = no cut. After the model's
        last layer there is nothing to cut for.

    Raises ConfigError when a number is not an integer, or is out of range.
    """

    last_layer: int
    active_tokens: int
    keep_tokens: int | None = None

    def __post_init__(self) -> None:
        require_int("last_layer", self.last_layer, minimum=0)
        require_int("active_tokens", self.active_tokens, minimum=1)
        if self.keep_tokens is not None:
            require_int("keep_tokens", self.keep_tokens, minimum=1)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How many tokens each layer of one model runs.

    Layers 0 … first_skip_layer - 1 run dense; then come the stages; layers after the last stage run dense
    over the candidates that are left.

    Budgets (`active_tokens`) and cuts (`keep_tokens`) may only shrink from stage to stage. A cut may be
    larger than the budget of its own stage (the paper's wording leaves that open), and a budget larger than
    the candidates left means that its layers run dense.

    `recent_tokens`: that many last tokens of the prompt are always active and never cut, within the budgets.
    The paper has 1. More help where the answer's later tokens read the question in deep layers, which the
    last prompt token itself need not do (docs/results.md).

    `attention_density`: share of the blocks of 128 keys that a block of 128 queries reads in the layers
    before first_skip_layer, which are most of what a long prompt still costs; the first block, the queries'
    own and the one before it are always read (`spts.kernels.blocks`). 1.0 = all, as in the paper. Example: at
    0.1 the last block of 12,800 tokens reads 10 of 100 blocks; of up to 384 tokens everything is read.

    Worked example, 6 layers and a prompt of 100 tokens:

        Schedule(num_layers=6, first_skip_layer=2,
                 stages=(Stage(last_layer=3, active_tokens=40, keep_tokens=30),
                         Stage(last_layer=4, active_tokens=10)))

        layer                0    1    2    3    4    5
        candidates         100  100  100  100   30   30
        tokens that run    100  100   40   40   10   30

    Raises ConfigError naming the field, the rule and the value.
    """

    num_layers: int
    first_skip_layer: int
    stages: tuple[Stage, ...]
    recent_tokens: int = 1
    attention_density: float = 1.0

    def __post_init__(self) -> None:
        require_int("num_layers", self.num_layers, minimum=1)
        require_int("recent_tokens", self.recent_tokens, minimum=1)
        require_int("first_skip_layer", self.first_skip_layer, minimum=0)
        density = self.attention_density
        if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
            raise config_error(
                "attention_density",
                "be a number above 0 and at most 1",
                repr(density),
                "1.0 means that every key is read",
            )
        object.__setattr__(self, "attention_density", float(density))  # 1 in a file is 1.0 in every record
        if not isinstance(self.stages, tuple) or not all(isinstance(stage, Stage) for stage in self.stages):
            raise config_error(
                "stages", "be a tuple of Stage", repr(self.stages), "use Schedule.from_dict for plain data"
            )
        if self.first_skip_layer > self.num_layers:
            raise config_error(
                "first_skip_layer",
                f"be at most num_layers = {self.num_layers}",
                self.first_skip_layer,
                f"{self.num_layers} means that no layer skips",
            )
        if not self.stages and self.first_skip_layer != self.num_layers:
            raise config_error(
                "first_skip_layer",
                f"equal num_layers = {self.num_layers} when there are no stages",
                self.first_skip_layer,
                f"add a stage or use Schedule.dense({self.num_layers})",
            )
        self._check_stages()

    def _check_stages(self) -> None:
        first_free = self.first_skip_layer
        budget: int | None = None
        kept: int | None = None
        for index, stage in enumerate(self.stages):
            where = f"stages[{index}]"
            if stage.last_layer >= self.num_layers:
                raise config_error(
                    f"{where}.last_layer",
                    f"be below num_layers = {self.num_layers}",
                    stage.last_layer,
                    "layers are counted from 0",
                )
            if stage.last_layer < first_free:
                origin = "first_skip_layer" if index == 0 else f"the layer after stages[{index - 1}]"
                raise config_error(
                    f"{where}.last_layer",
                    f"be at least {first_free} ({origin})",
                    stage.last_layer,
                    "list the stages in layer order, each with one layer or more",
                )
            if budget is not None and stage.active_tokens > budget:
                raise config_error(
                    f"{where}.active_tokens",
                    "not grow from stage to stage",
                    f"{stage.active_tokens} after {budget}",
                    f"use {budget} or less",
                )
            if kept is not None and stage.keep_tokens is not None and stage.keep_tokens > kept:
                raise config_error(
                    f"{where}.keep_tokens",
                    "not grow from stage to stage",
                    f"{stage.keep_tokens} after {kept}",
                    f"use {kept} or less, or null for no cut",
                )
            for name, tokens in (("active_tokens", stage.active_tokens), ("keep_tokens", stage.keep_tokens)):
                if tokens is not None and tokens < self.recent_tokens:
                    raise config_error(
                        f"{where}.{name}",
                        f"be at least recent_tokens = {self.recent_tokens}",
                        tokens,
                        "the last tokens of a prompt are part of every choice",
                    )
            first_free, budget = stage.last_layer + 1, stage.active_tokens
            kept = kept if stage.keep_tokens is None else stage.keep_tokens

    @classmethod
    def dense(cls, num_layers: int) -> Schedule:
        """The schedule under which every layer runs every token."""
        return cls(num_layers=num_layers, first_skip_layer=num_layers, stages=())

    @classmethod
    def preset(cls, name: str, *, num_layers: int | None = None, num_tokens: int | None = None) -> Schedule:
        """A named schedule, for `num_layers` layers and prompts of `num_tokens`; None = as published.

        Raises ConfigError listing the known names, or as `scaled` does.
        """
        if name not in PRESETS:
            raise config_error("preset", f"be one of {', '.join(PRESETS)}", repr(name), "choose one of them")
        preset = PRESETS[name]
        return preset.schedule.scaled(
            num_layers=num_layers,
            num_tokens=preset.reference_tokens if num_tokens is None else num_tokens,
            reference_tokens=preset.reference_tokens,
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> Schedule:
        """The inverse of `to_dict`. Unknown and missing keys are refused by name (ConfigError)."""
        check_keys(
            "schedule",
            data,
            required=("num_layers", "first_skip_layer", "stages"),
            optional=("recent_tokens", "attention_density"),
        )
        raw_stages = data["stages"]
        if not isinstance(raw_stages, list | tuple):
            raise config_error(
                "schedule.stages", "be a list of stages", repr(raw_stages), "use [] for a dense schedule"
            )
        if len(raw_stages) > MAX_STAGES:
            raise config_error(
                "schedule.stages",
                f"be at most {MAX_STAGES} stages",
                len(raw_stages),
                "send one a layer at most",
            )
        stages = []
        for index, raw in enumerate(raw_stages):
            where = f"schedule.stages[{index}]"
            check_keys(where, raw, required=("last_layer", "active_tokens"), optional=("keep_tokens",))
            try:
                stages.append(Stage(**raw))
            except ConfigError as error:
                raise ConfigError(f"{where}.{error}", field=f"{where}.{error.field}") from None
        try:
            return cls(**{**data, "stages": tuple(stages)})  # type: ignore[arg-type]  # __post_init__ checks
        except ConfigError as error:
            raise ConfigError(f"schedule.{error}", field=f"schedule.{error.field}") from None

    def to_dict(self) -> dict[str, object]:
        """Plain JSON data that `from_dict` reads back to an equal schedule."""
        return {
            "num_layers": self.num_layers,
            "first_skip_layer": self.first_skip_layer,
            "stages": [asdict(stage) for stage in self.stages],
            "recent_tokens": self.recent_tokens,
            "attention_density": self.attention_density,
        }

    def scaled(
        self, *, num_layers: int | None = None, num_tokens: int, reference_tokens: int = 32768
    ) -> Schedule:
        """This schedule for another depth and prompt length.

        num_layers: depth of the model, None = the same. num_tokens: prompt length to run. reference_tokens:
        prompt length that this schedule was written for. The result is valid for every depth and length of at
        least 1, and is the schedule itself at its own depth and reference length.

        - first_skip_layer scales with depth and rounds up: the share of layers that run dense never falls;
        - the layer after each stage scales with depth and rounds half up;
        - budgets and cuts scale by num_tokens / reference_tokens, round half up, and are at least 1;
        - recent_tokens stays, since a question after a short document is as long, but is at most the smallest
          budget or cut; attention_density stays;
        - a stage left without layers vanishes, and its cut passes to the stage that now ends at the same
          layer, so that later layers see as few candidates as they were meant to. Without such a stage the
          cut is dropped.

        Worked example, "llama-3.1-8b" (32 layers, reference 32,768) to 8 layers and 1,000 tokens:

            first_skip_layer            10 -> ceil(2.5)                   = 3
            stages end before layer     14, 19, 24, 29 -> 3.5, 4.75, 6, 7.25 = 4, 5, 6, 7
            budgets                     9216, 7168, 4096, 2048            -> 281, 219, 125, 63
            cuts                        8192, 6144, 3072, 1024            -> 250, 188, 94, 31

        and to 4 layers: first_skip_layer ceil(1.25) = 2; the stages end before layers 2, 2, 3, 4. The first
        two have no layer left and none before them to take their cut, so layer 2 runs with budget 125 (cut
        94) and layer 3 with 63 (cut 31).

        Raises ConfigError when a number is not an integer of at least 1.
        """
        depth = self.num_layers if num_layers is None else num_layers
        require_int("num_layers", depth, minimum=1)
        require_int("num_tokens", num_tokens, minimum=1)
        require_int("reference_tokens", reference_tokens, minimum=1)

        def tokens(count: int) -> int:
            return max(1, _round_half_up(count * num_tokens, reference_tokens))

        first_skip_layer = -(-self.first_skip_layer * depth // self.num_layers)
        stages: list[Stage] = []
        start = first_skip_layer
        for stage in self.stages:
            end = _round_half_up((stage.last_layer + 1) * depth, self.num_layers)
            keep = None if stage.keep_tokens is None else tokens(stage.keep_tokens)
            if end > start:
                stages.append(
                    Stage(last_layer=end - 1, active_tokens=tokens(stage.active_tokens), keep_tokens=keep)
                )
                start = end
            elif stages and keep is not None:
                stages[-1] = replace(stages[-1], keep_tokens=keep)
        if not stages:
            return replace(Schedule.dense(depth), attention_density=self.attention_density)
        smallest = min(min(stage.active_tokens, stage.keep_tokens or stage.active_tokens) for stage in stages)
        return Schedule(
            num_layers=depth,
            first_skip_layer=first_skip_layer,
            stages=tuple(stages),
            recent_tokens=min(self.recent_tokens, smallest),
            attention_density=self.attention_density,
        )

    def active_tokens(self, layer: int) -> int | None:
        """Budget M of layer `layer` (0-based), or None when it runs all its candidates."""
        stage = self._stage_by_layer[layer]
        return None if stage is None else stage.active_tokens

    def keep_tokens(self, layer: int) -> int | None:
        """Candidates to keep after layer `layer` (0-based); None unless it ends a stage that cuts. None too
        after the model's last layer: no layer reads the candidates, and the last token is always one."""
        stage = self._stage_by_layer[layer]
        if stage is None or stage.last_layer != layer or layer == self.num_layers - 1:
            return None
        return stage.keep_tokens

    def density(self, layer: int) -> float:
        """Share of the blocks of keys that attention reads in layer `layer` (0-based); 1.0 = all."""
        return self.attention_density if layer < self.first_skip_layer else 1.0

    @property
    def block_tokens(self) -> int:
        """The layers before first_skip_layer compute a prompt's tokens in blocks of so many: what is computed
        of it at once, or kept of it for other prompts, ends at a multiple. 1 = each by itself."""
        return 1 if self.attention_density == 1 else BLOCK_TOKENS

    @cached_property
    def _stage_by_layer(self) -> dict[int, Stage | None]:
        by_layer: dict[int, Stage | None] = dict.fromkeys(range(self.num_layers))
        start = self.first_skip_layer
        for stage in self.stages:
            by_layer.update(dict.fromkeys(range(start, stage.last_layer + 1), stage))
            start = stage.last_layer + 1
        return by_layer


def _round_half_up(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A schedule and the prompt length (tokens) it was written for; `Schedule.scaled` gives other lengths."""

    schedule: Schedule
    reference_tokens: int


def _preset(
    num_layers: int,
    first_skip_layer: int,
    reference_tokens: int,
    *stages: tuple[int, int, int],
    recent_tokens: int = 1,
) -> Preset:
    return Preset(
        schedule=Schedule(
            num_layers=num_layers,
            first_skip_layer=first_skip_layer,
            stages=tuple(
                Stage(last_layer=last_layer, active_tokens=active, keep_tokens=keep)
                for last_layer, active, keep in stages
            ),
            recent_tokens=recent_tokens,
        ),
        reference_tokens=reference_tokens,
    )


PRESETS: Mapping[str, Preset] = {
    "llama-3.1-8b": _preset(
        32, 10, 32 * K, (13, 9 * K, 8 * K), (18, 7 * K, 6 * K), (23, 4 * K, 3 * K), (28, 2 * K, 1 * K)
    ),
    "qwen2.5-7b": _preset(
        28, 9, 32 * K, (12, 13 * K, 11 * K), (16, 10 * K, 8 * K), (20, 7 * K, 5 * K), (24, 4 * K, 2 * K)
    ),
    "openpangu-1b": _preset(
        26, 11, 32 * K, (13, 13 * K, 11 * K), (16, 10 * K, 8 * K), (19, 7 * K, 5 * K), (22, 4 * K, 2 * K)
    ),
    "demo-12l": _preset(12, 4, 4 * K, (6, 2048, 640), (8, 512, 320), (10, 256, 160), recent_tokens=32),
}
