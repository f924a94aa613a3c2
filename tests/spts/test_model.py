"""The model against transformers and against the masked reference: dense, skipping, decode, bad requests."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from spts.errors import ConfigError, ModelError, ProxyError, RequestError
from spts.methods import Dense, Method, Random, Recency, Spts
from spts.model import SptsModel
from spts.proxy import Proxies
from spts.sampling import Sampling
from spts.schedule import Schedule, Stage
from tests.spts.masked_reference import MaskedReference
from tests.spts.tiny import (
    FAMILIES,
    FINGERPRINT,
    ample_schedule,
    prompt,
    random_schedule,
    spts_model,
    transformers_model,
)

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"rope": "llama3", "attention_bias": True, "tie_word_embeddings": True}),
    ("llama", {"rope": "linear", "num_key_value_heads": 6, "mlp_bias": True}),
    ("mistral", {}),
    ("mistral", {"rope": "yarn", "sliding_window": 4096}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen2", {"rope": "yarn", "num_key_value_heads": 1}),
    ("qwen3", {}),
    ("qwen3", {"rope": "yarn", "attention_bias": True, "tie_word_embeddings": True}),
]
VARIANT_IDS = ["-".join([family, *(f"{k}={v}" for k, v in options.items())]) for family, options in VARIANTS]


@pytest.mark.parametrize(("family", "options"), VARIANTS, ids=VARIANT_IDS)
@torch.no_grad()
def test_dense_equals_transformers(family, options):
    hf_model = transformers_model(family, **options)
    model = SptsModel(hf_model, fingerprint=FINGERPRINT)
    token_ids = prompt(333)
    expected = hf_model(torch.tensor([token_ids])).logits[0, -1]
    torch.testing.assert_close(model.prefill(token_ids, Dense()).logits, expected, atol=1e-4, rtol=1e-5)
    answer = hf_model.generate(torch.tensor([token_ids]), max_new_tokens=64, do_sample=False)[
        0, 333:
    ].tolist()
    generation = model.generate(token_ids, Dense(), 64)
    assert len(set(answer)) > 3, "an answer that repeats one token would show nothing"
    assert generation.token_ids == answer
    assert generation.finish_reason == "length"


@pytest.mark.parametrize("num_tokens", [1, 2, 63, 500, 1000])
@pytest.mark.parametrize("family", FAMILIES)
def test_budgets_that_cover_the_prompt_equal_dense(family, num_tokens):
    model = spts_model(transformers_model(family), first_layer=1)
    token_ids, schedule = prompt(num_tokens), ample_schedule(6, num_tokens)
    dense = model.prefill(token_ids, Dense())
    for method in [_method(name, schedule, **options) for name, options in ABLATIONS]:
        skipping = model.prefill(token_ids, method)
        assert torch.equal(skipping.logits, dense.logits)
        assert skipping.work == dense.work, "nothing is probed that is not used"
        for ours, theirs in zip(skipping.cache.layers, dense.cache.layers, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours.rows(), theirs.rows(), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_probe_equals_the_last_row_of_eager_attention(family):
    hf_model = transformers_model(family, rope="yarn" if family != "llama" else "llama3")
    model = spts_model(hf_model, first_layer=2)
    token_ids = prompt(257)
    hf_model.set_attn_implementation("eager")
    weights = hf_model(torch.tensor([token_ids]), output_attentions=True).attentions[2][0, :, -1].mean(dim=0)
    schedule = Schedule(
        num_layers=6, first_skip_layer=2, stages=(Stage(last_layer=5, active_tokens=20, keep_tokens=None),)
    )
    trace = model.prefill(token_ids, Spts(schedule=schedule), trace=True).trace
    assert trace is not None
    assert trace[1].probe_scores is None
    torch.testing.assert_close(trace[2].probe_scores, weights, atol=1e-5, rtol=0)
    assert weights.max() > 5 * weights.mean(), "even attention would hide a wrong head or position"


CASES = [
    (family, rope, num_tokens, seed)
    for seed, (family, rope, num_tokens) in enumerate(
        (family, rope, num_tokens)
        for family, rope in (
            ("llama", "llama3"),
            ("mistral", "default"),
            ("qwen2", "default"),
            ("qwen3", "yarn"),
        )
        for num_tokens in (2, 17, 63, 300)
    )
]


ABLATIONS: list[tuple[str, dict[str, Any]]] = [
    ("spts", {}),
    ("spts", {"probe_tokens": 4, "ffn_score": "attention"}),
    ("spts", {"probe_tokens": 64, "ffn_score": "dense"}),
    ("random", {}),
    ("recency", {}),
]
ABLATION_IDS = ["-".join([name, *map(str, options.values())]) for name, options in ABLATIONS]


@pytest.mark.parametrize(("name", "options"), ABLATIONS, ids=ABLATION_IDS)
@pytest.mark.parametrize(("family", "rope", "num_tokens", "seed"), CASES)
def test_gathered_equals_masked(family, rope, num_tokens, seed, name, options):
    draw = random.Random(seed)
    hf_model = transformers_model(family, rope=rope)
    model = spts_model(hf_model, first_layer=0)
    reference = MaskedReference(hf_model, model.proxies)
    for _ in range(3):
        schedule = random_schedule(draw, layers=6, num_tokens=num_tokens)
        method = _method(name, schedule, **options)
        token_ids = prompt(num_tokens)
        result = model.prefill(token_ids, method, trace=True)
        assert result.trace is not None
        expected = reference.run(token_ids, schedule, result.trace, name, **options)
        assert_near(result.logits, expected.logits)
        for layer, (trace, truth) in enumerate(zip(result.trace, expected.layers, strict=True)):
            assert torch.equal(result.cache.positions(layer), trace.attention_tokens)
            keys, values = result.cache.layers[layer].rows()
            assert_near(keys, truth.keys[trace.attention_tokens])
            assert_near(values, truth.values[trace.attention_tokens])
            if trace.probe_scores is not None:
                assert_near(trace.probe_scores, truth.attention_scores[trace.candidates])


def assert_near(ours: Tensor, truth: Tensor) -> None:
    """float32 against float64; at position 300 the angle of RoPE alone is rounded by up to 1.5e-5 radian."""
    torch.testing.assert_close(ours.double(), truth, atol=5e-5 * float(truth.abs().max()), rtol=0)


def _method(name: str, schedule: Schedule, **options: Any) -> Method:
    classes: dict[str, Any] = {"spts": Spts, "random": Random, "recency": Recency}
    method: Method = classes[name](schedule=schedule, **options)
    return method


SKIPPING = Schedule(
    num_layers=6,
    first_skip_layer=2,
    stages=(
        Stage(last_layer=3, active_tokens=60, keep_tokens=40),
        Stage(last_layer=4, active_tokens=20, keep_tokens=10),
    ),
)


@pytest.mark.parametrize(("name", "options"), ABLATIONS, ids=ABLATION_IDS)
def test_work_is_what_the_schedule_says(name, options):
    model = spts_model(transformers_model("qwen3"), first_layer=2)
    method = _method(name, SKIPPING, **options)
    for num_tokens in (5, 15, 50, 200):
        result = model.prefill(prompt(num_tokens), method)
        assert result.work == method.planned_work(6, num_tokens)
        assert result.cache.kv_tokens == sum(work.attention_tokens for work in result.work)


@pytest.mark.parametrize("ffn_score", ["attention", "dense"])
def test_what_reads_no_proxies_runs_without_them(ffn_score):
    hf_model = transformers_model("llama")
    method, token_ids = Spts(schedule=SKIPPING, ffn_score=ffn_score), prompt(150)
    bare = spts_model(hf_model).prefill(token_ids, method)
    fitted = spts_model(hf_model, first_layer=2).prefill(token_ids, method)
    assert torch.equal(bare.logits, fitted.logits)
    assert not any(layer.proxied for layer in bare.work)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["dense", "spts", "recency"])
def test_decode_equals_attention_from_scratch_over_the_same_tokens(family, name):
    """Each new token, computed in float64 over what every layer's cache holds, gives the same logits."""
    hf_model = transformers_model(family, rope="yarn")
    model = spts_model(hf_model, first_layer=2)
    method = Dense() if name == "dense" else _method(name, SKIPPING)
    prefill = model.prefill(prompt(200), method, max_new_tokens=5)
    reference = MaskedReference(hf_model, None)
    for step, token_id in enumerate(prompt(5)):
        expected = reference.decode(token_id, prefill.cache)
        logits = model.decode_step(torch.tensor([token_id]), [prefill.cache])
        assert_near(logits[0], expected)
        assert prefill.cache.next_position == 200 + step + 1


def test_a_batch_of_requests_equals_each_alone():
    model = spts_model(transformers_model("llama"), first_layer=2)
    requests = [
        (prompt(200), Spts(schedule=SKIPPING)),
        (prompt(3), Dense()),
        (prompt(64), Recency(schedule=SKIPPING)),
        (prompt(150), Random(schedule=SKIPPING, seed=7)),
    ]
    alone = [model.prefill(ids, method, max_new_tokens=8).cache for ids, method in requests]
    together = [model.prefill(ids, method, max_new_tokens=8).cache for ids, method in requests]
    for _ in range(8):
        token_ids = torch.tensor(prompt(4))
        batch = model.decode_step(token_ids, together)
        for row, cache in enumerate(alone):
            single = model.decode_step(token_ids[row : row + 1], [cache])
            torch.testing.assert_close(batch[row], single[0], atol=1e-4, rtol=1e-5)
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.num_bytes == theirs.num_bytes


def test_one_cache_for_two_requests_is_refused_and_left_alone():
    model = spts_model(transformers_model("llama"))
    cache = model.prefill(prompt(9), Dense(), max_new_tokens=2).cache
    with pytest.raises(ValueError, match="caches must be one per request"):
        model.decode_step(torch.tensor([1, 2]), [cache, cache])
    assert cache.next_position == 9


def test_random_draws_anew_by_layer_and_the_same_by_seed():
    model = spts_model(transformers_model("llama"), first_layer=2)
    token_ids = prompt(200)
    first, again, other = (
        model.prefill(token_ids, Random(schedule=SKIPPING, seed=seed), trace=True).trace for seed in (1, 1, 2)
    )
    assert first is not None
    assert again is not None
    assert other is not None
    assert torch.equal(first[2].attention_tokens, again[2].attention_tokens)
    assert not torch.equal(first[2].attention_tokens, other[2].attention_tokens)
    assert not torch.equal(first[2].attention_tokens, first[3].attention_tokens)
    assert not torch.equal(first[2].attention_tokens, first[2].ffn_tokens)


def test_generation_stops_and_reports():
    model = spts_model(transformers_model("qwen2"), first_layer=2)
    token_ids, method = prompt(100), Spts(schedule=SKIPPING)
    free = model.generate(token_ids, method, 12, Sampling(logprobs=3))
    assert len(free.token_ids) == 12
    assert free.logprobs is not None
    assert [entry.top[0][0] for entry in free.logprobs] == free.token_ids, "greedy takes the most likely"
    stop = free.token_ids[4]
    stopped = model.generate(token_ids, method, 12, Sampling(stop_token_ids=(stop,)))
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]
    assert stopped.finish_reason == "stop"
    drawn = [
        model.generate(token_ids, method, 12, Sampling(temperature=1.5, seed=3)).token_ids for _ in range(2)
    ]
    assert drawn[0] == drawn[1] != free.token_ids


@pytest.mark.parametrize("flops", [1, None])
def test_scores_that_are_no_numbers_end_a_prefill_without_a_result(flops):
    hf_model = transformers_model("llama")
    model = spts_model(hf_model, first_layer=0)
    with torch.no_grad():
        hf_model.model.layers[3].self_attn.k_proj.weight.fill_(float("nan"))
    schedule = Schedule(
        num_layers=6, first_skip_layer=2, stages=(Stage(last_layer=4, active_tokens=20, keep_tokens=10),)
    )
    state = model.start_prefill(prompt(50), Spts(schedule=schedule))
    while flops is not None and (state.next_layer, state.rows_done) < (5, 9):  # the tenth row is its last
        assert not model.advance(state, flops)
    with pytest.raises(ModelError, match="scores_T must be numbers, got NaN"):
        model.advance(state, flops)
    assert state.result is None


def test_the_models_own_end_token_stops():
    hf_model = transformers_model("llama")
    token_ids = prompt(50)
    free = SptsModel(hf_model, fingerprint=FINGERPRINT).generate(token_ids, Dense(), 10)
    hf_model.generation_config.eos_token_id = [free.token_ids[3], 210]
    model = SptsModel(hf_model, fingerprint=FINGERPRINT)
    assert model.eos_token_ids == (free.token_ids[3], 210)
    answer = model.generate(token_ids, Dense(), 10)
    assert answer.finish_reason == "stop"
    assert answer.token_ids == free.token_ids[: free.token_ids.index(free.token_ids[3]) + 1]


def test_the_wrapped_model_is_left_as_it_was():
    hf_model = transformers_model("qwen3")
    before = {name: (type(module), set(vars(module))) for name, module in hf_model.named_modules()}
    weights = {name: tensor.clone() for name, tensor in hf_model.state_dict().items()}
    model = spts_model(hf_model, first_layer=2)
    model.generate(prompt(100), Spts(schedule=SKIPPING), 3)
    assert {name: (type(module), set(vars(module))) for name, module in hf_model.named_modules()} == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in hf_model.state_dict().items())


def test_rotation_stays_exact_in_a_model_cast_whole():
    """`model.to(bfloat16)` casts the rotary frequencies too; far positions would turn wrongly."""
    hf_model = transformers_model("llama").to(torch.bfloat16)
    assert hf_model.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    model = SptsModel(hf_model, fingerprint=FINGERPRINT)
    stream = model.start_prefill(prompt(1000), Dense()).stream
    angle = torch.tensor(999.0 * 10000.0 ** (-2 / 16), dtype=torch.float64)
    assert abs(float(stream.cos_Td[999, 1]) - float(angle.cos())) < 0.01


BAD_REQUESTS = [
    ([], 0, "empty_prompt", "token_ids must hold at least one token, got 0"),
    ([1, 2, 211, 999], 0, "token_out_of_vocabulary", "got 211 at index 2"),
    ([1, -5], 0, "token_out_of_vocabulary", "got -5 at index 1"),
    ([1, 2.5], 0, "token_out_of_vocabulary", "got 2.5 at index 1"),
    ([True], 0, "token_out_of_vocabulary", "got True at index 0"),
    ([1] * 1000, 101, "context_length_exceeded", "context of 1100 tokens, got 1000 + 101"),
    ([1], -1, "invalid_sampling", "max_new_tokens must be at least 0, got -1"),
]


@pytest.mark.parametrize(("token_ids", "max_new_tokens", "code", "message"), BAD_REQUESTS)
def test_bad_requests_are_refused_before_any_compute(token_ids, max_new_tokens, code, message, monkeypatch):
    model = spts_model(transformers_model("llama"))
    monkeypatch.setattr(model, "_embed", _unreachable)
    with pytest.raises(RequestError, match=message.replace("+", r"\+")) as refused:
        model.prefill(token_ids, Dense(), max_new_tokens=max_new_tokens)
    assert refused.value.code == code
    assert refused.value.field in ("token_ids", "max_new_tokens")


def test_the_whole_context_may_be_used():
    model = spts_model(transformers_model("llama"))
    assert len(model.generate(prompt(1090), Dense(), 10).token_ids) == 10


def test_generate_wants_a_token():
    with pytest.raises(RequestError, match="max_new_tokens must be at least 1, got 0"):
        spts_model(transformers_model("llama")).generate([1], Dense(), 0)


def test_methods_that_do_not_fit_are_refused_before_any_compute(monkeypatch):
    hf_model = transformers_model("llama")
    bare, late = spts_model(hf_model), spts_model(hf_model, first_layer=3)
    for model in (bare, late):
        monkeypatch.setattr(model, "_embed", _unreachable)
        with pytest.raises(ProxyError, match=r"proxies must cover layers 2 to .* for method spts"):
            model.prefill([1, 2, 3], Spts(schedule=SKIPPING))
    with pytest.raises(ConfigError, match=r"schedule.num_layers must equal the model's 6 layers, got 7"):
        bare.prefill([1], Recency(schedule=SKIPPING.scaled(num_layers=7, num_tokens=32768)))


def test_proxies_of_another_model_are_refused():
    hf_model = transformers_model("llama")
    proxies = spts_model(hf_model, first_layer=2).proxies
    assert isinstance(proxies, Proxies)
    with pytest.raises(ProxyError, match="fingerprint other, got tiny"):
        SptsModel(hf_model, fingerprint="other", proxies=proxies)


def test_head_counts_that_do_not_add_up_are_refused():
    class TwoRanks:
        rank, world_size = 0, 2

        def all_reduce(self, tensor):
            return tensor

        def broadcast(self, tensor):
            return tensor

    with pytest.raises(ModelError, match=r"num_attention_heads = 6, got 6 x 2"):
        SptsModel(transformers_model("llama"), fingerprint=FINGERPRINT, collective=TwoRanks())


def _unreachable(*_: object) -> None:
    raise AssertionError("the request was computed")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("name", ["dense", "spts", "recency"])
def test_following_equals_decoding_the_same_tokens_one_by_one(family, name):
    model = spts_model(transformers_model(family), first_layer=2)
    method = Dense() if name == "dense" else _method(name, SKIPPING)
    token_ids, continuation = prompt(150), prompt(9)
    followed = model.follow(token_ids, continuation, method)
    prefill = model.prefill(token_ids, method, max_new_tokens=9)
    rows = [prefill.logits]
    rows += [model.decode_step(torch.tensor([token]), [prefill.cache])[0] for token in continuation[:-1]]
    torch.testing.assert_close(followed, torch.stack(rows), atol=1e-4, rtol=1e-5)
    assert torch.equal(model.follow(token_ids, continuation[:1], method), prefill.logits[None])


@torch.no_grad()
def test_following_densely_equals_one_forward_of_transformers():
    hf_model = transformers_model("qwen3")
    model = SptsModel(hf_model, fingerprint=FINGERPRINT)
    token_ids, continuation = prompt(100), prompt(20)
    expected = hf_model(torch.tensor([token_ids + continuation[:-1]])).logits[0, 99:]
    torch.testing.assert_close(model.follow(token_ids, continuation, Dense()), expected, atol=1e-4, rtol=1e-5)


def test_extending_leaves_a_cache_that_decodes_on():
    model = spts_model(transformers_model("llama"), first_layer=2)
    token_ids, new = prompt(90), prompt(4)
    method = Spts(schedule=SKIPPING)
    ours, theirs = (model.prefill(token_ids, method, max_new_tokens=5).cache for _ in range(2))
    model.extend(new, ours)
    for token in new:
        model.decode_step(torch.tensor([token]), [theirs])
    assert (ours.next_position, ours.kv_tokens, ours.num_bytes) == (
        theirs.next_position,
        theirs.kv_tokens,
        theirs.num_bytes,
    )
    last = torch.tensor(prompt(1))
    torch.testing.assert_close(
        model.decode_step(last, [ours]), model.decode_step(last, [theirs]), atol=1e-4, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("continuation", "message"), [([], "at least one token, got 0"), ([1, 211], "211 at")]
)
def test_a_continuation_that_cannot_be_followed_is_refused(continuation, message):
    with pytest.raises(RequestError, match=f"continuation must .*{message}") as refused:
        spts_model(transformers_model("llama")).follow([1, 2], continuation, Dense())
    assert refused.value.field == "continuation"
