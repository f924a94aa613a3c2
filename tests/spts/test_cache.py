"""The ragged cache: what each layer holds, where, and in how many bytes."""

from __future__ import annotations

import pytest
import torch

from spts.cache import LayerCache, RaggedCache


def _rows(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(num_tokens, 2, 4), torch.randn(num_tokens, 2, 4)


@pytest.mark.parametrize("room", [0, 3])
def test_a_layer_returns_what_was_stored(room):
    keys, values = _rows(5)
    cache = LayerCache(room_tokens=room)
    stored = cache.fill(keys.clone(), values.clone(), torch.tensor([0, 2, 3, 7, 8]))
    assert torch.equal(stored[0], keys)
    assert torch.equal(stored[1], values)
    for _ in range(room):
        new_k, new_v = _rows(1)
        keys, values = torch.cat((keys, new_k)), torch.cat((values, new_v))
        stored = cache.append(new_k, new_v)
        assert torch.equal(stored[0], keys)
        assert torch.equal(stored[1], values)
    assert cache.num_tokens == 5 + room
    assert cache.num_prompt_tokens == 5


def test_bytes_count_what_is_used_and_what_is_reserved():
    cache = RaggedCache(num_layers=2, prompt_tokens=9, room_tokens=3)
    assert cache.num_bytes == cache.allocated_bytes == cache.kv_tokens == 0
    cache.layers[0].fill(*_rows(9), torch.arange(9))
    cache.layers[1].fill(*_rows(4), torch.tensor([1, 2, 5, 8]))
    row_bytes = 2 * 2 * 4 * 4
    assert cache.num_bytes == (9 + 4) * row_bytes
    assert cache.allocated_bytes == (9 + 4 + 6) * row_bytes
    assert cache.kv_tokens == 13
    for layer in cache.layers:
        layer.append(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
    assert cache.num_bytes == (9 + 4 + 2) * row_bytes
    assert cache.allocated_bytes == (9 + 4 + 6) * row_bytes
    assert cache.kv_tokens == 13, "counts the prompt's part"


def test_half_precision_takes_half_the_bytes():
    cache = LayerCache(room_tokens=1)
    keys, values = _rows(3)
    cache.fill(keys.bfloat16(), values.bfloat16(), torch.arange(3))
    assert cache.num_bytes == 2 * 3 * 2 * 4 * 2


def test_positions_are_the_prompts_and_then_every_new_one():
    cache = RaggedCache(num_layers=1, prompt_tokens=8, room_tokens=2)
    cache.layers[0].fill(*_rows(3), torch.tensor([0, 3, 7]))
    assert cache.positions(0).tolist() == [0, 3, 7]
    for _ in range(2):
        cache.layers[0].append(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
    assert cache.positions(0).tolist() == [0, 3, 7, 8, 9]


@pytest.mark.parametrize("room", [0, 1])
def test_a_full_cache_says_so_and_stays_as_it_was(room):
    cache = LayerCache(room_tokens=room)
    cache.fill(*_rows(2), torch.arange(2))
    for _ in range(room):
        cache.append(torch.ones(1, 2, 4), torch.ones(1, 2, 4))
    before = [rows.clone() for rows in cache.rows()]
    with pytest.raises(ValueError, match=f"max_new_tokens must cover every decoded token, got {room}"):
        cache.append(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
    assert cache.num_tokens == 2 + room
    assert all(torch.equal(a, b) for a, b in zip(before, cache.rows(), strict=True))


def test_several_tokens_are_stored_at_once_or_not_at_all():
    cache = LayerCache(room_tokens=4)
    first, then = _rows(2), _rows(3)
    cache.store(*first, torch.tensor([0, 5]))
    stored = cache.store(*then, torch.tensor([6, 7, 8]))
    assert all(torch.equal(a, torch.cat((b, c))) for a, b, c in zip(stored, first, then, strict=True))
    with pytest.raises(ValueError, match="got 4 and 5 tokens"):
        cache.append(*_rows(2))
    assert (cache.num_tokens, cache.num_prompt_tokens) == (5, 2)
