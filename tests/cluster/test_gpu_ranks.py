"""Real ranks on GPUs: decode steps captured, NCCL's sums in them, and the answers are the library's."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

import spts
from cluster.config import EngineConfig
from cluster.engine import Engine
from cluster.group import RayGroup
from cluster.protocol import Request, Result
from cluster.shard import Shard
from spts.methods import Dense, Method, Spts
from spts.schedule import Schedule

MODEL = Path(__file__).resolve().parents[2] / "jobs" / "demo_model"
METHODS: list[Method] = [Dense(), Spts(schedule=Schedule.preset("demo-12l", num_tokens=2048))]

pytestmark = [pytest.mark.slow, pytest.mark.real]


class CountingShard(Shard):
    """`cluster.shard.Shard` that tells for how many requests decode steps are captured."""

    def captured(self) -> list[int]:
        graphs = self._loaded._graphs
        return [] if graphs is None else sorted(graphs._sizes)


async def answers(config: EngineConfig, asked: list[Request]) -> tuple[list[Result], list[list[int]]]:
    """Of an engine, and what its ranks have captured."""
    import ray

    group = RayGroup(config, CountingShard)
    engine = Engine(config, group)
    await engine.start()
    try:
        found = await asyncio.gather(*(engine.run(request) for request in asked))
        return found, ray.get([rank.captured.remote() for rank in group._ranks])
    finally:
        await engine.shutdown()


@pytest.mark.parametrize("world_size", [1, 2], ids=["one-rank", "two-ranks"])
def test_prompts_sent_at_once_are_answered_as_the_library_answers_each(driver, world_size):
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs")
    draw = np.random.default_rng(0)
    asked = [
        Request(
            request_id=f"{number}",
            token_ids=tuple(draw.integers(1, 4000, length).tolist()),
            method=METHODS[number % 2],
            max_new_tokens=12,
        )
        for number, length in enumerate(draw.integers(10, 3000, 16).tolist())
    ]
    whole = spts.load(MODEL, device="cuda")
    expected = [whole.generate(each.token_ids, each.method, each.max_new_tokens).token_ids for each in asked]
    config = EngineConfig(
        model=str(MODEL), device="cuda", tensor_parallel_size=world_size, kv_cache_bytes=2**32, max_running=16
    )
    found, captured = asyncio.run(answers(config, asked))
    assert [list(result.token_ids) for result in found] == expected
    assert captured == [[1, 2, 4, 8, 16]] * world_size
