import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import spts
from spts.methods import Dense, Spts
from spts.model import SptsModel
from spts.proxy import Proxies
from spts.safety import measure, rank_correlation, run_dense, run_frozen, spread, visible_rows

NUM_LAYERS = 6


@pytest.fixture(scope="module")
def model() -> SptsModel:
    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        use_sliding_window=False,
        initializer_range=0.3,
    )
    hf_model = Qwen2ForCausalLM(config).eval()
    plain = SptsModel(hf_model, fingerprint="tiny")
    proxies = Proxies.fit(plain, [torch.randint(97, (60,)).tolist()], first_layer=2, channels=24, rank=12)
    return SptsModel(hf_model, fingerprint="tiny", proxies=proxies)


def schedule(active: int) -> spts.Schedule:
    return spts.Schedule(
        num_layers=NUM_LAYERS,
        first_skip_layer=2,
        stages=(spts.Stage(last_layer=4, active_tokens=active, keep_tokens=active),),
    )


def text(num_tokens: int) -> list[int]:
    return torch.randint(97, (num_tokens,)).tolist()


def by_hand(model: SptsModel, token_ids: list[int], first: int, num_live: int) -> torch.Tensor:
    """The analysis on transformers' own layers: each runs whole, then the context is put back."""
    hf = model.layers[0].block.__class__  # the decoder layer class, to be sure that its own forward runs
    body = model._body
    ids = torch.tensor([token_ids])
    with torch.no_grad():
        x = body.embed_tokens(ids)
        positions = torch.arange(len(token_ids))[None]
        rotation = body.rotary_emb(x, positions)
        mask = torch.full((len(token_ids), len(token_ids)), float("-inf")).triu(1)[None, None]
        for index, block in enumerate(body.layers):
            assert isinstance(block, hf)
            out = block(x, attention_mask=mask, position_embeddings=rotation, position_ids=positions)
            out = out[0] if isinstance(out, tuple) else out
            if index >= first:
                out[:, : len(token_ids) - num_live] = x[:, : len(token_ids) - num_live]
            x = out
        return model._head(body.norm(x))[0, -num_live:]


@pytest.mark.parametrize("num_tokens", [5, 63])
def test_freezing_equals_whole_layers_with_the_context_put_back(model, num_tokens):
    token_ids = text(num_tokens)
    live = [num_tokens - 3, num_tokens - 2, num_tokens - 1]
    run = run_frozen(model, token_ids, live, together=True)
    for first in range(NUM_LAYERS):
        torch.testing.assert_close(
            run.frozen_LV[first], by_hand(model, token_ids, first, 3), rtol=1e-4, atol=1e-4
        )


def test_live_tokens_apart_equal_prompts_of_their_own(model):
    token_ids = text(40)
    run = run_frozen(model, token_ids, [0, 7, 20, 39])
    for row, position in enumerate([0, 7, 20, 39]):
        alone = run_frozen(model, token_ids[: position + 1], [position])
        torch.testing.assert_close(run.dense_LV[row], alone.dense_LV[0], rtol=1e-4, atol=1e-4)
        for layer in range(NUM_LAYERS):
            torch.testing.assert_close(
                run.frozen_LV[layer][row], alone.frozen_LV[layer][0], rtol=1e-4, atol=1e-4
            )


def test_nothing_reads_updates_of_the_last_layer_but_everything_those_of_the_first(model):
    run = run_frozen(model, text(50), [49])
    torch.testing.assert_close(run.frozen_LV[-1], run.dense_LV, rtol=1e-4, atol=1e-4)
    assert (run.frozen_LV[0] - run.dense_LV).abs().max() > 0.1


def test_visible_rows_worked_example():
    live = torch.tensor([2, 3])
    apart = [[1, 1, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1]]
    together = [[1, 1, 0, 0, 1, 0], [1, 1, 0, 0, 1, 1]]
    assert visible_rows(live, 4, together=False).int().tolist() == apart
    assert visible_rows(live, 4, together=True).int().tolist() == together


@pytest.mark.parametrize("live", [[], [3, 3], [4, 2], [-1, 2], [50]])
def test_bad_live_positions_are_refused(model, live):
    with pytest.raises(spts.RequestError, match="live_positions must"):
        run_frozen(model, text(50), live)


def test_dense_run_agrees_with_prefill(model):
    token_ids = text(63)
    dense = run_dense(model, token_ids)
    torch.testing.assert_close(dense.logits_V, model.prefill(token_ids, Dense()).logits)
    for attention in dense.attention_N:
        assert attention.shape == (63,)
        assert float(attention.sum()) == pytest.approx(1.0, abs=1e-5)
    assert [value is None for value in dense.proxy_correlation] == [True] * 2 + [False] * 4


def test_full_budget_agrees_and_covers_everything(model):
    result = measure(model, [text(40), text(63)], Spts(schedule=schedule(64)), live_tokens=8)
    assert result.method_agreement == 1.0
    assert result.method_kl_nats < 1e-6
    assert [row.coverage for row in result.layers] == pytest.approx([1.0] * NUM_LAYERS, abs=1e-5)
    assert (result.num_live, result.num_prompts) == (16, 2)


def test_small_budget_covers_less_and_only_where_it_skips(model):
    done = []
    result = measure(
        model, [text(63)], Spts(schedule=schedule(6)), live_tokens=4, progress=lambda: done.append(1)
    )
    covered = [row.coverage for row in result.layers]
    assert covered[:2] == pytest.approx([1.0, 1.0], abs=1e-5)
    assert all(0 < share < 0.999 for share in covered[2:])
    assert result.method_kl_nats > 1e-3
    assert [row.active_tokens for row in result.layers] == [None, None, 6, 6, 6, None]
    assert done == [1]


def test_safe_from_is_the_first_layer_after_the_last_unsafe_one(model):
    result = measure(model, [text(63)], Spts(schedule=schedule(6)), live_tokens=16)
    agreement = [row.frozen_agreement for row in result.layers]
    assert agreement[-1] == 1.0
    safe = result.safe_from(1.0)
    assert all(value == 1.0 for value in agreement[safe:])
    assert safe == 0 or agreement[safe - 1] < 1.0
    assert result.safe_from(0.0) == 0


def test_small_pieces():
    assert spread(4, 10, 3) == [5, 7, 9]
    assert spread(0, 1, 32) == [0]
    assert rank_correlation(torch.tensor([1.0, 5.0, 9.0]), torch.tensor([2.0, 3.0, 4.0])) == pytest.approx(1)
    assert rank_correlation(torch.tensor([1.0, 5.0, 9.0]), torch.tensor([4.0, 3.0, 2.0])) == pytest.approx(-1)
