"""One layer: its operations, what it computes only when asked, and what tensor-parallel ranks exchange."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from spts.cache import LayerCache
from spts.kernels import reference as ops
from spts.layer import DecoderLayer, LayerTrace
from spts.methods import Method, Random, Recency, Spts
from spts.model import SptsModel
from spts.schedule import Schedule, Stage
from tests.spts.tiny import prompt, spts_model, transformers_model


@pytest.fixture(scope="module")
def model() -> SptsModel:
    torch.manual_seed(1)
    return spts_model(transformers_model("llama"), first_layer=0)


def _one_stage(active_tokens: int, keep_tokens: int | None) -> Schedule:
    stage = Stage(last_layer=0, active_tokens=active_tokens, keep_tokens=keep_tokens)
    return Schedule(num_layers=6, first_skip_layer=0, stages=(stage,))


def _run_layer(
    model: SptsModel,
    layer: int,
    method: Method,
    *,
    active: int | None,
    keep: int | None,
    num_tokens: int = 50,
) -> tuple[Any, LayerTrace, torch.Tensor, torch.Tensor]:
    """The layer's work and trace, and the residual stream before and after."""
    stream = model.start_prefill(prompt(num_tokens), Recency(schedule=_one_stage(1, None))).stream
    before = stream.x_TD.clone()
    with torch.inference_mode():
        work, trace = model.layers[layer].prefill(
            stream,
            LayerCache(room_tokens=0),
            method=method,
            active_tokens=active,
            keep_tokens=keep,
            recent_tokens=1,
            trace=True,
        )
    assert trace is not None
    return work, trace, before, stream.x_TD


@pytest.mark.parametrize("num_tokens", [1, 63, 500])
def test_rotation_equals_transformers(num_tokens):
    x_THd, angles = torch.randn(num_tokens, 3, 8), torch.randn(num_tokens, 8)
    cos_Td, sin_Td = angles.cos(), angles.sin()
    expected, _ = apply_rotary_pos_emb(x_THd[None], x_THd[None], cos_Td[None], sin_Td[None], unsqueeze_dim=2)
    torch.testing.assert_close(ops.rotate_in_place(x_THd.clone(), cos_Td, sin_Td), expected[0])


def test_rotation_worked_example():
    turned = ops.rotate_in_place(torch.tensor([[[1.0, 0.0]]]), torch.zeros(1, 2), torch.ones(1, 2))
    assert turned.tolist() == [[[0.0, 1.0]]]


def test_gather_and_add_worked_examples():
    x_TD = torch.tensor([[1.0], [2.0], [3.0]])
    index_M = torch.tensor([0, 2])
    assert ops.gather_rows(x_TD, index_M).tolist() == [[1.0], [3.0]]
    assert ops.add_rows_in_place(x_TD, index_M, torch.tensor([[10.0], [20.0]])).tolist() == [
        [11.0],
        [2.0],
        [23.0],
    ]
    assert x_TD.tolist() == [[11.0], [2.0], [23.0]], "in place"


@pytest.mark.parametrize(
    ("num_queries", "num_keys"), [(1, 1), (63, 63), (1, 500), (7, 63), (499, 500), (1030, 2100)]
)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_causal_attention_of_the_last_tokens_equals_attention_by_mask(num_queries, num_keys, num_kv_heads):
    q, k, v = (
        torch.randn(n, h, 8)
        for n, h in ((num_queries, 6), (num_keys, num_kv_heads), (num_keys, num_kv_heads))
    )
    out = ops.causal_attention(q, k, v, 0.3)
    position_M = torch.arange(num_keys)[-num_queries:, None]
    hidden_ML = torch.arange(num_keys) > position_M
    for head in range(6):
        key, value = (each[:, head // (6 // num_kv_heads)].double() for each in (k, v))
        weights = ((q[:, head].double() @ key.T) * 0.3).masked_fill(hidden_ML, -torch.inf).softmax(dim=-1)
        torch.testing.assert_close(out[:, head].double(), weights @ value, atol=1e-5, rtol=1e-5)


def test_skipped_tokens_keep_their_row_bit_for_bit(model):
    _, trace, before, after = _run_layer(model, 2, Spts(schedule=_one_stage(9, None)), active=9, keep=None)
    ran = set(trace.attention_tokens.tolist()) | set(trace.ffn_tokens.tolist())
    assert 9 < len(ran) < 50, "attention and FFN choose apart"
    for token in range(50):
        assert torch.equal(before[token], after[token]) == (token not in ran)


def test_a_cut_leaves_the_rows_of_the_candidates_it_kept(model):
    method = Spts(schedule=_one_stage(9, None))
    state = torch.random.get_rng_state()
    _, whole, _, everyone = _run_layer(model, 2, method, active=9, keep=None)
    torch.random.set_rng_state(state)
    _, trace, _, left = _run_layer(model, 2, method, active=9, keep=7)
    assert torch.equal(trace.attention_tokens, whole.attention_tokens)
    assert whole.probe_scores is not None
    best = whole.probe_scores[:-1].topk(6).indices.sort().values.tolist()
    assert torch.equal(left, everyone[[*best, 49]])


@pytest.mark.parametrize(
    ("active", "keep", "probed", "proxied"),
    [
        (None, None, False, False),
        (50, 50, False, False),
        (50, 20, True, False),
        (20, None, True, True),
        (20, 10, True, True),
        (20, 30, True, True),
    ],
)
def test_only_what_a_choice_needs_is_computed(model, active, keep, probed, proxied):
    counts: dict[str, int] = {}
    layer = model.layers[1]
    hooks = [
        module.register_forward_hook(lambda _m, args, _o, name=name: counts.__setitem__(name, len(args[0])))
        for name, module in layer.block.self_attn.named_children()
    ]
    try:
        work, trace, _, _ = _run_layer(model, 1, Spts(schedule=_one_stage(1, None)), active=active, keep=keep)
    finally:
        for hook in hooks:
            hook.remove()
    num_active = min(active or 50, 50)
    assert (work.probed, work.proxied) == (probed, proxied)
    assert (trace.probe_scores is not None) == probed
    assert counts == {
        "q_proj": 1 if probed and keep and not proxied else num_active,
        "k_proj": 50 if probed else num_active,
        "v_proj": num_active,
        "o_proj": num_active,
    }


@pytest.mark.parametrize("method_class", [Random, Recency])
def test_a_method_that_never_probes_projects_keys_of_active_tokens_alone(model, method_class):
    seen = []
    layer = model.layers[1]
    hook = layer.block.self_attn.k_proj.register_forward_hook(lambda _m, args, _o: seen.append(len(args[0])))
    work, _, _, _ = _run_layer(model, 1, method_class(schedule=_one_stage(1, None)), active=8, keep=5)
    hook.remove()
    assert seen == [8]
    assert not work.probed
    assert not work.proxied


def test_recency_runs_the_latest(model):
    _, trace, _, _ = _run_layer(model, 1, Recency(schedule=_one_stage(1, None)), active=8, keep=5)
    assert trace.attention_tokens.tolist() == trace.ffn_tokens.tolist() == list(range(42, 50))


def test_the_last_token_runs_however_low_it_scores(model):
    class Backwards(Recency):
        name: ClassVar[str] = "backwards"

        def attention_scores(self, signals):
            return -signals.positions.float()

        ffn_scores = prune_scores = attention_scores

    _, trace, _, left = _run_layer(model, 1, Backwards(schedule=_one_stage(1, None)), active=4, keep=3)
    assert trace.attention_tokens.tolist() == [0, 1, 2, 49]
    assert left.shape[0] == 3


class _Recording:
    """A group of one that notes what would cross between ranks."""

    rank = 0

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.calls: list[tuple[str, tuple[int, ...], torch.dtype]] = []

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self.calls.append(("all_reduce", tuple(tensor.shape), tensor.dtype))
        return tensor

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        self.calls.append(("broadcast", tuple(tensor.shape), tensor.dtype))
        return tensor


def test_ranks_exchange_scores_and_choices_and_nothing_else(model):
    group = _Recording(world_size=2)
    whole = model.layers[2]
    layer = DecoderLayer(
        whole.block,
        index=2,
        num_heads=whole.num_heads,
        head_dim=whole.head_dim,
        collective=group,
        proxy=whole.proxy,
    )
    stream = model.start_prefill(prompt(50), Recency(schedule=_one_stage(1, None))).stream
    with torch.inference_mode():
        layer.prefill(
            stream,
            LayerCache(room_tokens=0),
            method=Spts(schedule=_one_stage(1, None)),
            active_tokens=9,
            keep_tokens=7,
            recent_tokens=1,
            trace=False,
        )
    assert group.calls == [
        ("all_reduce", (50,), torch.float32),
        ("broadcast", (9,), torch.int64),
        ("all_reduce", (50,), torch.float32),
        ("broadcast", (9,), torch.int64),
        ("broadcast", (7,), torch.int64),
    ]
