"""A whole model on the kernels: they take what its layers hand them, strides and all."""

from __future__ import annotations

import pytest
import torch

from spts.kernels import dispatch
from spts.methods import Recency
from spts.schedule import Schedule, Stage
from tests.spts.kernel_inputs import DEVICE
from tests.spts.tiny import prompt, spts_model, transformers_model

SCHEDULE = Schedule(
    num_layers=6,
    first_skip_layer=2,
    stages=(Stage(last_layer=3, active_tokens=60, keep_tokens=50), Stage(last_layer=4, active_tokens=20)),
    attention_density=0.1,  # and yet all 150 tokens are read
)
KERNELS = (
    *("rms_norm", "rotate_in_place", "top_rows", "add_rows_in_place", "gated_product"),
    *("causal_attention", "sparse_attention", "ragged_attention"),
)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="there tests/spts/test_gpu.py does it")
@pytest.mark.parametrize("room", [0, 2])
@pytest.mark.parametrize("flops", [None, 3 * 10**6], ids=["whole", "sliced"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_prefill_and_its_decoding_on_the_kernels_equal_the_references(kind, flops, room, monkeypatch):
    model = spts_model(transformers_model(kind), first_layer=0)
    method = Recency(schedule=SCHEDULE)

    def answers() -> list[torch.Tensor]:
        state = model.start_prefill(prompt(150), method, max_new_tokens=room)
        while not model.advance(state, flops):
            pass
        assert state.result is not None
        tokens = [torch.tensor([token]) for token in (5, 6)[:room]]
        decoded = [model.decode_step(token, [state.cache])[0] for token in tokens]
        return [state.result.logits, *decoded]

    torch.manual_seed(3)
    expected = answers()
    called = set()
    monkeypatch.setattr("spts.kernels.ragged_attention._PROGRAMS", 2)
    monkeypatch.setattr("spts.kernels.ragged_attention._FEWEST", 2)
    for name in KERNELS:

        def run(*args, name=name, **kwargs):
            called.add(name)
            return dispatch.kernel(name)(*args, **kwargs)

        monkeypatch.setattr(dispatch, name, run)
    torch.manual_seed(3)
    for found, exact in zip(answers(), expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-4)
    assert called == set(KERNELS) - (set() if room else {"ragged_attention"})
