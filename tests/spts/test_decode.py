"""A decode step by way of graphs: what a captured step reads is all there is, for any number of requests.

Without a GPU the step is "captured" as a function that runs again, with the kernel under Triton's
interpreter: everything but CUDA's own part. tests/spts/test_gpu.py has the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from spts.cache import RaggedCache
from spts.decode import Batch, DecodeGraphs
from spts.kernels import dispatch
from spts.methods import Dense, Method, Recency
from spts.model import SptsModel
from spts.schedule import Schedule, Stage
from tests.spts.tiny import prompt, spts_model, transformers_model

SCHEDULE = Schedule(num_layers=2, first_skip_layer=1, stages=(Stage(last_layer=1, active_tokens=30),))
REQUESTS: list[tuple[int, Method]] = [(70, Recency(schedule=SCHEDULE)), (3, Dense()), (40, Dense())]


class Again:
    """Stands for a capture: counts them, and runs the step into the tensor that the first run returned."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, run: Callable[[], Tensor], pool: Any) -> Callable[[], Tensor]:
        self.count += 1
        out = run()
        return lambda: out.copy_(run())


@pytest.fixture(scope="module")
def model() -> SptsModel:
    torch.manual_seed(0)
    return spts_model(transformers_model("llama", layers=2))


def caches(model: SptsModel, *, room: int) -> list[RaggedCache]:
    torch.manual_seed(1)
    return [model.prefill(prompt(length), method, max_new_tokens=room).cache for length, method in REQUESTS]


@torch.inference_mode()
def test_graphs_answer_as_steps_do_whoever_is_in_the_batch(model, monkeypatch):
    ours, theirs = caches(model, room=4), caches(model, room=4)
    steps = [(chosen, torch.tensor(prompt(len(chosen)))) for chosen in ([0, 1, 2], [2, 0], [1, 2, 0], [0])]
    expected = [model.decode_step(token_ids, [theirs[i] for i in chosen]) for chosen, token_ids in steps]

    for name in ("_PROGRAMS", "_FEWEST"):  # the interpreter runs programs one by one
        monkeypatch.setattr(f"spts.kernels.ragged_attention.{name}", 2)
    monkeypatch.setattr(dispatch, "ragged_attention", dispatch.kernel("ragged_attention"))
    capture = Again()
    graphs = DecodeGraphs(model._decode, device=model.device, capture=capture)
    found = [graphs.run(token_ids, Batch.claim([ours[i] for i in chosen])) for chosen, token_ids in steps]

    assert capture.count == 3, "one for 4 rows, one for 2, one for 1"
    for each, exact in zip(found, expected, strict=True):  # after the last step: answers are the caller's own
        torch.testing.assert_close(each, exact, atol=1e-4, rtol=1e-5)
    for our, their in zip(ours, theirs, strict=True):
        assert our.next_position == their.next_position
        for a, b in zip(our.layers, their.layers, strict=True):
            torch.testing.assert_close(a.rows(), b.rows(), atol=1e-4, rtol=1e-5)


def test_the_table_says_where_every_layers_tokens_are(model):
    held = caches(model, room=2)
    lengths = [[layer.num_tokens for layer in cache.layers] for cache in held]
    assert lengths == [[70, 30], [3, 3], [40, 40]]
    batch = Batch.claim(held)
    assert batch.table.shape == (1 + 2, 3, 3)
    assert batch.table[0].tolist() == [[0, 0, 70], [0, 0, 3], [0, 0, 40]]
    for row, cache in enumerate(held):
        assert batch.table[1:, row, 2].tolist() == lengths[row]
        assert cache.next_position == REQUESTS[row][0] + 1
        for index, layer in enumerate(cache.layers):
            assert layer.num_tokens == lengths[row][index] + 1
            assert batch.table[1 + index, row, :2].tolist() == [rows.data_ptr() for rows in layer.rows()]


def test_a_full_cache_refuses_the_step_and_leaves_all_as_they_were(model):
    first, full = (model.prefill(prompt(9), Dense(), max_new_tokens=room).cache for room in (2, 0))
    with pytest.raises(ValueError, match="max_new_tokens must cover every decoded token, got 0 and 1 tokens"):
        model.decode_step(torch.tensor([1, 2]), [first, full])
    assert (first.next_position, full.next_position) == (9, 9)
    assert {layer.num_tokens for cache in (first, full) for layer in cache.layers} == {9}
