"""What a prefill costs: FLOP and KV bytes, counted from what each layer did.

`LayerWork` says what happened in one layer. `planned_work` predicts it from a schedule before the prompt runs
(budgets are counts, so the prediction is exact), `spts.layer` reports it, and every cost here is counted from
it: one set of formulas for all methods, predicted or measured.

FLOP are those of matrix products, a multiply-add being 2: norms, RoPE, softmax, activations, gathers and
sorts are left out. Causal attention over N tokens counts 2 * N^2 * H * d, half of the full square: of the
pair of a query with its own key, half. Where it is sparse, the pairs that it reads are counted likewise; what
it takes to choose them is left out. Standard library only.

Legend: D hidden size, F FFN inner size, H query heads, Hk key/value heads, d head size, V vocabulary, C
candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import isqrt

from spts.errors import config_error, require_int
from spts.kernels.blocks import BLOCK_TOKENS, pairs_read
from spts.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a decoder-only model that its cost depends on; head counts are the model's, not one
    rank's.

    Raises ConfigError when a size is not an integer of at least 1, or the query heads do not share the
    key/value heads evenly.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    def __post_init__(self) -> None:
        for field in fields(self):
            require_int(field.name, getattr(self, field.name), minimum=1)
        if self.num_heads % self.num_kv_heads:
            raise config_error(
                "num_heads",
                f"be a multiple of num_kv_heads = {self.num_kv_heads}",
                self.num_heads,
                "correct it",
            )

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> ModelShape:
        """The shape in a Hugging Face `config.json`. Absent (or null), `num_key_value_heads` is the number of
        query heads and `head_dim` is hidden_size / num_attention_heads. Raises ConfigError naming a missing
        key."""

        def size(key: str, default: object = None) -> int:
            value = config.get(key)
            value = default if value is None else value
            require_int(f"config.{key}", value, minimum=1)
            assert isinstance(value, int)
            return value

        num_heads, hidden_size = size("num_attention_heads"), size("hidden_size")
        return cls(
            num_layers=size("num_hidden_layers"),
            hidden_size=hidden_size,
            intermediate_size=size("intermediate_size"),
            num_heads=num_heads,
            num_kv_heads=size("num_key_value_heads", num_heads),
            head_dim=size("head_dim", hidden_size // num_heads),
            vocab_size=size("vocab_size"),
        )


@dataclass(frozen=True, kw_only=True)
class ProxyShape:
    """Size of one layer's FFN proxy (LTP): D_low channels kept, rank r of its factors."""

    channels: int
    rank: int

    def __post_init__(self) -> None:
        require_int("channels", self.channels, minimum=1)
        require_int("rank", self.rank, minimum=1)

    @classmethod
    def default(cls, shape: ModelShape) -> ProxyShape:
        """Size in the proportions that the paper gives LLaMA-3.1-8B: F / 28 channels, 3 / 64 of D as rank.

        At least 64 channels and rank 16, where the model has as many: below, an estimate is mostly noise.
        Example: F = 14,336 and D = 4,096 give (512, 192); F = 1,792 and D = 512 give (64, 24).
        """
        channels = min(max(64, shape.intermediate_size // 28), shape.intermediate_size)
        return cls(
            channels=channels, rank=min(max(16, 3 * shape.hidden_size // 64), channels, shape.hidden_size)
        )


@dataclass(frozen=True, kw_only=True)
class LayerWork:
    """What one layer did in a prefill, in tokens.

    candidates: tokens alive when it started. attention_tokens, ffn_tokens: those that ran each block.
    probe_tokens: queries that PAP read, so K was projected for every candidate; 0 = it did not run. proxied:
    the LTP proxy ran on every candidate. attention_density: share of the blocks of keys that its attention
    was to read (`spts.kernels.blocks`), 1.0 = all.
    """

    candidates: int
    attention_tokens: int
    ffn_tokens: int
    probe_tokens: int
    proxied: bool
    attention_density: float = 1.0

    @property
    def probed(self) -> bool:
        """Whether PAP ran."""
        return self.probe_tokens > 0


def planned_work(
    schedule: Schedule, num_tokens: int, *, probe: int = 1, proxy: bool = True, skips_ffn: bool = True
) -> list[LayerWork]:
    """What each layer will do for a prompt of `num_tokens` tokens, in layer order.

    probe, proxy, skips_ffn: what the method reads and skips; `Method.planned_work` knows them. A layer whose
    budget covers its candidates runs dense; it probes only if it has to cut the candidates, and never asks
    the proxy.

    Worked example: 3 layers, first_skip_layer 1, stages (last_layer=1, active_tokens=40, keep_tokens=30) and
    (last_layer=2, active_tokens=40).

        num_tokens 100    layer 0: 100 of 100   layer 1: 40 of 100, probed, proxied   layer 2: 30 of 30
        num_tokens 35     layer 0: 35 of 35     layer 1: 35 of 35, probed             layer 2: 30 of 30
        num_tokens 30     all 30 of 30, nothing probed
    """
    require_int("num_tokens", num_tokens, minimum=1)
    work: list[LayerWork] = []
    candidates = num_tokens
    for layer in range(schedule.num_layers):
        active = min(schedule.active_tokens(layer) or candidates, candidates)
        kept = min(schedule.keep_tokens(layer) or candidates, candidates)
        skips, cuts = active < candidates, kept < candidates
        work.append(
            LayerWork(
                candidates=candidates,
                attention_tokens=active,
                ffn_tokens=active if skips_ffn else candidates,
                probe_tokens=min(probe, candidates) if skips or cuts else 0,
                proxied=proxy and skips,
                attention_density=schedule.density(layer),
            )
        )
        candidates = kept
    return work


@dataclass(frozen=True, kw_only=True)
class LayerFlops:
    """FLOP of one layer by component.

    key: of every candidate where the layer probed. probe: the last tokens' queries and their products with
    the candidates' keys up to their own. proxy: the LTP scores. All else: of the tokens that ran.
    """

    query: int
    key: int
    value: int
    output: int
    attention: int
    probe: int
    proxy: int
    ffn: int

    @property
    def total(self) -> int:
        """FLOP of the layer."""
        return sum(asdict(self).values())


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOP of a prefill: one entry per layer, and one row of the LM head."""

    layers: tuple[LayerFlops, ...]
    lm_head: int

    @property
    def total(self) -> int:
        """FLOP of the prefill."""
        return self.lm_head + sum(layer.total for layer in self.layers)


def prefill_flops(shape: ModelShape, work: Sequence[LayerWork], proxy: ProxyShape | None = None) -> Flops:
    """FLOP of a prefill that did `work`, on a model of `shape` with proxies of size `proxy`.

    Raises ConfigError when `work` has not one entry per layer, or says that a proxy ran and `proxy` is None.
    """
    check_depth(shape, work)
    if proxy is None and any(layer.proxied for layer in work):
        raise config_error(
            "proxy", "be given when a layer ran its proxy", "None", "pass the proxies' ProxyShape"
        )
    return Flops(
        layers=tuple(layer_flops(shape, layer, proxy) for layer in work),
        lm_head=2 * shape.hidden_size * shape.vocab_size,
    )


def layer_flops(shape: ModelShape, work: LayerWork, proxy: ProxyShape | None) -> LayerFlops:
    """FLOP of one layer that did `work`; a proxy without a size costs nothing."""
    q_row = 2 * shape.hidden_size * shape.num_heads * shape.head_dim
    kv_row = 2 * shape.hidden_size * shape.num_kv_heads * shape.head_dim
    attended = 2 * shape.num_heads * shape.head_dim
    # Of Q queries at the end, the last sees every candidate and each before it one less.
    probe_pairs = work.probe_tokens * work.candidates - work.probe_tokens * (work.probe_tokens - 1) // 2
    proxy_row = 0
    if work.proxied and proxy is not None:
        # D x 2r (gate and up share their input), r x D_low twice, D_low x r; r x D is never needed for a
        # norm.
        proxy_row = 2 * proxy.rank * (2 * shape.hidden_size + 3 * proxy.channels)
    return LayerFlops(
        query=q_row * work.attention_tokens,
        key=kv_row * (work.candidates if work.probed else work.attention_tokens),
        value=kv_row * work.attention_tokens,
        output=q_row * work.attention_tokens,
        attention=attended * _square(0, work.attention_tokens, work.attention_density),
        probe=q_row * work.probe_tokens + attended * probe_pairs,
        proxy=proxy_row * work.candidates,
        ffn=6 * shape.hidden_size * shape.intermediate_size * work.ffn_tokens,
    )


def dense_flops(shape: ModelShape, num_tokens: int) -> Flops:
    """FLOP of a dense prefill of `num_tokens` tokens."""
    return prefill_flops(shape, planned_work(Schedule.dense(shape.num_layers), num_tokens))


def rows_flops(shape: ModelShape, before: int, rows: int, density: float = 1.0) -> int:
    """FLOP of `rows` tokens in one dense layer, when `before` tokens come before them.

    R rows pass the linear layers. They attend to what they and the P tokens before them see, 2 H d
    ((P + R)^2 - P^2) by the count above:

        R * (4 D H d + 4 D Hk d + 6 D F) + 2 H d ((P + R)^2 - P^2)

    density: of the layer's attention; below 1, P is a multiple of BLOCK_TOKENS, and twice the pairs that are
    read take the place of the difference of squares. Example: one token, alone in one layer of LLaMA-3.1-8B,
    436 MFLOP.
    """
    linear, attended = _row_costs(shape)
    return rows * linear + attended * _square(before, rows, density)


def rows_within(shape: ModelShape, before: int, most: int, flops: int, density: float = 1.0) -> int:
    """The most rows, at most `most`, whose `rows_flops` are at most `flops`; below density 1 all of them, or
    whole blocks of BLOCK_TOKENS."""
    if density < 1:
        rows = 0
        while rows < most:
            block = min(BLOCK_TOKENS, most - rows)
            flops -= rows_flops(shape, before + rows, block, density)
            if flops < 0:
                break
            rows += block
        return rows
    linear, attended = _row_costs(shape)
    half = linear + 2 * attended * before  # attended R^2 + half R = flops, solved for R
    return min(most, (isqrt(half * half + 4 * attended * flops) - half) // (2 * attended))


def _row_costs(shape: ModelShape) -> tuple[int, int]:
    """FLOP of a row's linear layers, and of a pair of a query and a key."""
    linear = 4 * shape.hidden_size * (shape.num_heads + shape.num_kv_heads) * shape.head_dim
    linear += 6 * shape.hidden_size * shape.intermediate_size
    return linear, 2 * shape.num_heads * shape.head_dim


def _square(before: int, rows: int, density: float) -> int:
    """Twice the pairs that the attention of `rows` reads, half of each row's with itself: at density 1 the
    difference of squares."""
    if density == 1:
        return (before + rows) ** 2 - before**2
    return 2 * pairs_read(before + rows, density, before) - rows


def pairs_share(work: Iterable[LayerWork]) -> float:
    """Share of their pairs of a query and a key that layers with sparse attention read; 1.0 without any.

    Example: at density 0.1 it is 0.114 of 8,192 tokens, as the blocks that are always read come on top.
    """
    sparse = [layer for layer in work if layer.attention_density < 1]
    if not sparse:
        return 1.0
    read = sum(pairs_read(layer.attention_tokens, layer.attention_density) for layer in sparse)
    return read / sum(layer.attention_tokens * (layer.attention_tokens + 1) // 2 for layer in sparse)


def reused_flops(shape: ModelShape, prefix_tokens: int, depth: int, density: float = 1.0) -> int:
    """FLOP that a prefill does not do when the first `prefix_tokens` of its tokens are kept after `depth`
    dense layers with attention of `density`: what these tokens alone cost there."""
    require_int("prefix_tokens", prefix_tokens, minimum=0)
    require_int("depth", depth, minimum=0)
    return depth * rows_flops(shape, 0, prefix_tokens, density)


def prefix_bytes(
    shape: ModelShape, prefix_tokens: int, depth: int, *, dtype_bytes: int, world_size: int = 1
) -> int:
    """Bytes that each of `world_size` ranks keeps of a prefix: keys and values of `depth` layers, and the
    rows that enter the next one, if there is one.

    Example: 32,768 tokens of LLaMA-3.1-8B in bfloat16 on one rank are 1.5 GiB before layer 10 (the published
    schedule), 4 GiB for all 32 layers.
    """
    row = 2 * depth * (shape.num_kv_heads // world_size) * shape.head_dim
    row += shape.hidden_size if depth < shape.num_layers else 0
    return prefix_tokens * row * dtype_bytes


def speedup(shape: ModelShape, work: Sequence[LayerWork], proxy: ProxyShape | None = None) -> float:
    """FLOP of a dense prefill of the same prompt over those of `work`: the speed-up that FLOP alone allow."""
    return dense_flops(shape, work[0].candidates).total / prefill_flops(shape, work, proxy).total


def kv_tokens(work: Sequence[LayerWork]) -> int:
    """Tokens in the KV cache after the prefill, summed over layers: a layer caches those that ran its
    attention."""
    return sum(layer.attention_tokens for layer in work)


def kv_bytes(shape: ModelShape, work: Sequence[LayerWork], dtype_bytes: int) -> int:
    """Bytes of keys and values after the prefill, over all layers and ranks. dtype_bytes: of one element."""
    check_depth(shape, work)
    return kv_tokens(work) * 2 * shape.num_kv_heads * shape.head_dim * dtype_bytes


def dense_kv_bytes(shape: ModelShape, num_tokens: int, dtype_bytes: int) -> int:
    """Bytes of keys and values after a dense prefill of `num_tokens` tokens."""
    return kv_bytes(shape, planned_work(Schedule.dense(shape.num_layers), num_tokens), dtype_bytes)


def check_depth(shape: ModelShape, work: Sequence[LayerWork]) -> None:
    """Raises ConfigError unless `work` has one entry for each of the model's layers."""
    if len(work) != shape.num_layers:
        raise config_error(
            "work",
            f"have one entry for each of {shape.num_layers} layers",
            len(work),
            "use this model's schedule",
        )
