"""A rank that also tells what it did, for tests."""

from __future__ import annotations

import os
import time
from typing import Any

from cluster.shard import Shard
from spts.methods import Method


class TracingShard(Shard):
    """`cluster.shard.Shard` with its choices, its process and its process group laid open."""

    def trace(self, token_ids: tuple[int, ...], method: Method, prefix_tokens: int = 0) -> dict[str, Any]:
        """The logits [V] of a prefill, and per layer the positions chosen, as plain lists.

        prefix_tokens: that many first tokens come from another prompt's prefill.
        """
        model, prefix = self._loaded, None
        if prefix_tokens:
            other = model.start_prefill((*token_ids[:prefix_tokens], 1), method, keep_prefix=prefix_tokens)
            model.advance(other)
            prefix = other.kept
        state = model.start_prefill(token_ids, method, trace=True, prefix=prefix)
        model.advance(state)
        prefill = state.result
        assert prefill is not None
        assert prefill.trace is not None
        return {
            "reused_tokens": state.reused_tokens,
            "logits": prefill.logits.tolist(),
            "layers": [
                {
                    "candidates": layer.candidates.tolist(),
                    "attention": layer.attention_tokens.tolist(),
                    "ffn": layer.ffn_tokens.tolist(),
                }
                for layer in prefill.trace
            ],
        }

    def pid(self) -> int:
        return os.getpid()

    def hang(self) -> None:
        while True:
            time.sleep(1)

    def facts(self) -> dict[str, Any]:
        """What this process has built."""
        import torch.distributed
        from deepspeed.ops.op_builder.builder import OpBuilder

        attention = self._loaded._body.layers[0].self_attn
        return {
            "process_group": torch.distributed.is_initialized(),
            "compiled_ops": sorted(OpBuilder._loaded_ops),
            "q_rows": attention.q_proj.weight.shape[0],
            "linear": type(attention.o_proj).__name__,
            "threads": torch.get_num_threads(),
        }
