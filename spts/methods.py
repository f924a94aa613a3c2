"""What a run compares: frozen dataclasses whose fields are the hyper-parameters and whose repr is the record.

A method answers with scores, never with indices. Budget, forced last tokens, tie rule and order are the same
for all of them (`spts.select`), so that two methods at one schedule differ in nothing but the choice of
tokens.

Shape suffix: T candidates of the layer. Importing this module does not import torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, get_args

from spts.cost import LayerWork, planned_work
from spts.errors import ConfigError, check_keys, config_error, require_int
from spts.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor

FfnScore = Literal["product", "attention", "dense"]
FFN_SCORES: tuple[FfnScore, ...] = get_args(FfnScore)


class Signals(Protocol):
    """What one layer can tell about its candidates, computed when first asked for; built by `spts.layer`."""

    @property
    def positions(self) -> Tensor:
        """[T] int64, ascending: the candidates' positions in the prompt."""

    def attention(self) -> Tensor:
        """[T] float32: mean attention over the candidates, of all heads and the method's `probes` last
        candidates (PAP)."""

    def ffn_norm(self) -> Tensor:
        """[T] float32: the proxy's estimate of the norm of the FFN's output (LTP)."""

    def random(self, seed: int) -> Tensor:
        """[T] float32 in [0, 1): noise fixed by (seed, layer, position), the same on every rank."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """One answer to "which candidates run here". Scores are [T] float32; the highest run, or stay candidates.

    name: its name in records, YAML and requests.
    """

    name: ClassVar[str]

    @property
    def probes(self) -> int:
        """Queries that the attention probe reads, those of the last candidates; K is then projected for all
        candidates of a layer that chooses. 0 = it never asks for the probe."""
        return 0

    @property
    def needs_proxies(self) -> bool:
        """Whether it reads the FFN proxies, which have to be fitted for the model first."""
        return False

    @property
    def skips_ffn(self) -> bool:
        """Whether layers that skip choose tokens for the FFN too; else every candidate runs it."""
        return True

    def planned_work(self, num_layers: int, num_tokens: int) -> list[LayerWork]:
        """What each layer of a model of that depth will do for a prompt of `num_tokens`; see `spts.cost`.

        Raises ConfigError as `schedule_for` does.
        """
        return planned_work(
            self.schedule_for(num_layers),
            num_tokens,
            probe=self.probes,
            proxy=self.needs_proxies,
            skips_ffn=self.skips_ffn,
        )

    @abstractmethod
    def schedule_for(self, num_layers: int) -> Schedule:
        """The schedule to run on a model of `num_layers` layers.

        Raises ConfigError when this method's schedule is for another depth.
        """

    @abstractmethod
    def attention_scores(self, signals: Signals) -> Tensor:
        """[T]: which tokens run this layer's attention."""

    @abstractmethod
    def ffn_scores(self, signals: Signals) -> Tensor | None:
        """[T]: which tokens run this layer's FFN; None = all, of a method whose `skips_ffn` is False."""

    @abstractmethod
    def prune_scores(self, signals: Signals) -> Tensor:
        """[T]: which tokens stay candidates after this layer, the last of its stage."""

    @abstractmethod
    def to_dict(self) -> dict[str, object]:
        """Plain JSON data that `from_dict` reads back to an equal method."""


@dataclass(frozen=True, kw_only=True)
class Dense(Method):
    """Every layer runs every token: the model as published."""

    name: ClassVar[str] = "dense"

    def schedule_for(self, num_layers: int) -> Schedule:
        """The dense schedule of that depth."""
        return Schedule.dense(num_layers)

    def attention_scores(self, signals: Signals) -> Tensor:
        """Never asked: no layer of a dense schedule chooses tokens."""
        raise AssertionError("a dense schedule never chooses tokens")

    ffn_scores = prune_scores = attention_scores

    def to_dict(self) -> dict[str, object]:
        """{"name": "dense"}."""
        return {"name": self.name}


@dataclass(frozen=True, kw_only=True)
class _Scheduled(Method):
    """A method that runs under a schedule written for one depth."""

    schedule: Schedule

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Schedule):
            raise config_error(
                "schedule", "be a Schedule", repr(self.schedule), "use Schedule.preset or Schedule.from_dict"
            )

    def schedule_for(self, num_layers: int) -> Schedule:
        """The schedule itself; ConfigError when it is for another depth."""
        if self.schedule.num_layers != num_layers:
            raise config_error(
                "schedule.num_layers",
                f"equal the model's {num_layers} layers",
                self.schedule.num_layers,
                f"use schedule.scaled(num_layers={num_layers}, num_tokens=...)",
            )
        return self.schedule

    def to_dict(self) -> dict[str, object]:
        """The name and the whole schedule."""
        return {"name": self.name, "schedule": self.schedule.to_dict()}


@dataclass(frozen=True, kw_only=True)
class Spts(_Scheduled):
    """Self-Predictive Token Skipping, arXiv 2601.13155.

    Attention (PAP): S_mha[n] = mean over heads of softmax_n(q_last · K[n] / sqrt(d)).
    FFN (LTP): S_ffn[n] = ‖proxy(y[n])‖ · S_mha[n], so a token is skipped only if it is both unimportant and
    nearly unchanged. Pruning (MSDP): S_mha of the stage's last layer.

    The defaults are the paper's method, the other values its ablations:
    probe_tokens: S_mha is the mean over that many last candidates' queries, over all where there are fewer;
        each sees the keys up to its own.
    ffn_score: "product" as above; "attention" = S_mha alone, without proxies; "dense" = the FFN runs every
        candidate, which leaves PAP alone.
    Without MSDP is a schedule without keep_tokens.
    """

    name: ClassVar[str] = "spts"
    probe_tokens: int = 1
    ffn_score: FfnScore = "product"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("probe_tokens", self.probe_tokens, minimum=1)
        if self.ffn_score not in FFN_SCORES:
            raise config_error(
                "ffn_score", f"be one of {', '.join(FFN_SCORES)}", repr(self.ffn_score), "choose one of them"
            )

    @property
    def probes(self) -> int:
        """`probe_tokens`."""
        return self.probe_tokens

    @property
    def needs_proxies(self) -> bool:
        """Only for the product."""
        return self.ffn_score == "product"

    @property
    def skips_ffn(self) -> bool:
        """Unless the FFN is to stay dense."""
        return self.ffn_score != "dense"

    def attention_scores(self, signals: Signals) -> Tensor:
        """S_mha of this layer."""
        return signals.attention()

    def ffn_scores(self, signals: Signals) -> Tensor | None:
        """S_ffn of this layer."""
        if self.ffn_score == "dense":
            return None
        if self.ffn_score == "attention":
            return signals.attention()
        return signals.ffn_norm() * signals.attention()

    def prune_scores(self, signals: Signals) -> Tensor:
        """S_mha of this layer, the freshest signal there is."""
        return signals.attention()

    def to_dict(self) -> dict[str, object]:
        """The name, the whole schedule and what of the paper's method is on."""
        return {**super().to_dict(), "probe_tokens": self.probe_tokens, "ffn_score": self.ffn_score}


@dataclass(frozen=True, kw_only=True)
class Random(_Scheduled):
    """Control: a uniform choice of the same size, drawn anew at every layer for each of the three questions.

    seed: at least 0; the same seed chooses the same tokens on every run and rank.
    """

    name: ClassVar[str] = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("seed", self.seed, minimum=0)

    # Attention, FFN and pruning each have a stream of their own: three of the layer's seeds for one of ours.
    def attention_scores(self, signals: Signals) -> Tensor:
        """Noise of the layer's attention stream."""
        return signals.random(3 * self.seed)

    def ffn_scores(self, signals: Signals) -> Tensor:
        """Noise of the layer's FFN stream."""
        return signals.random(3 * self.seed + 1)

    def prune_scores(self, signals: Signals) -> Tensor:
        """Noise of the layer's pruning stream."""
        return signals.random(3 * self.seed + 2)

    def to_dict(self) -> dict[str, object]:
        """The name, the whole schedule and the seed."""
        return {**super().to_dict(), "seed": self.seed}


@dataclass(frozen=True, kw_only=True)
class Recency(_Scheduled):
    """Control: the latest tokens of the prompt, S[n] = position of n."""

    name: ClassVar[str] = "recency"

    def attention_scores(self, signals: Signals) -> Tensor:
        """The candidates' positions; float32 holds them exactly up to 2^24."""
        return signals.positions.float()

    ffn_scores = prune_scores = attention_scores


METHODS: Mapping[str, type[Method]] = {cls.name: cls for cls in (Dense, Spts, Random, Recency)}


def from_dict(data: Mapping[str, object]) -> Method:
    """The method that `to_dict` wrote: {"name": "spts", "schedule": {...}}.

    Raises ConfigError for an unknown name (listing the known ones), unknown or missing keys, or a faulty
    schedule.
    """
    if not isinstance(data, Mapping) or "name" not in data:
        raise config_error("method", "be a mapping with the key name", repr(data), "add it")
    name = data["name"]
    if not isinstance(name, str) or name not in METHODS:
        raise config_error("method.name", f"be one of {', '.join(METHODS)}", repr(name), "choose one of them")
    cls = METHODS[name]
    check_keys(
        "method",
        data,
        required=("name", *(field.name for field in fields(cls) if field.default is MISSING)),
        optional=[field.name for field in fields(cls) if field.default is not MISSING],
    )
    values = {key: value for key, value in data.items() if key != "name"}
    try:
        if "schedule" in values:
            values["schedule"] = Schedule.from_dict(values["schedule"])  # type: ignore[arg-type]  # it checks
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"method.{error}", field=f"method.{error.field}") from None


def reads_proxies(data: Mapping[str, object]) -> bool:
    """Whether the method that `data` describes reads FFN proxies; its schedule need not be known yet.

    Raises ConfigError as `from_dict` does.
    """
    cls = METHODS.get(str(data.get("name")), Dense)
    if "schedule" in {field.name for field in fields(cls)}:
        data = {**data, "schedule": Schedule.dense(1).to_dict()}
    return from_dict(data).needs_proxies
