"""What tests of several machines run on the first: one engine whose ranks are on both.

    python -m tests.cluster.on_machines MODEL [DEVICE]

Prints a JSON object a line: what the engine is, its answers, that a stream has begun; then waits for that
stream's end, whatever it is, and for the engine to answer again.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import ray

from cluster.config import EngineConfig
from cluster.engine import Engine
from cluster.group import RayGroup
from cluster.protocol import EngineError, Request
from spts.errors import SptsError
from spts.methods import Dense, Method, Spts
from spts.schedule import Schedule

PROMPT = tuple(range(1, 200))


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def methods(num_layers: int) -> list[Method]:
    schedule = Schedule.preset("demo-12l", num_layers=num_layers, num_tokens=len(PROMPT))
    return [Dense(), Spts(schedule=schedule)]


async def main(model: str, device: str = "cpu") -> None:
    ray.init(log_to_driver=False)
    config = EngineConfig.model_validate({"model": model, "device": device, "tensor_parallel_size": 2})
    engine = Engine(config, RayGroup(config))
    try:
        await engine.start()
        info = await engine.info()
        say(hosts=info.hosts)
        asked = methods(info.shape.num_layers)
        say(answers=[await answer(engine, method) for method in asked])
        say(ended=await stream(engine))
        while not await engine.ready():
            await asyncio.sleep(0.5)
        say(answers=[await answer(engine, method) for method in asked])
    except SptsError as error:
        say(refused=str(error))
    finally:
        await engine.shutdown()


async def answer(engine: Engine, method: Method) -> list[int]:
    request = Request(request_id=method.name, token_ids=PROMPT, method=method, max_new_tokens=8)
    return list((await engine.run(request)).token_ids)


async def stream(engine: Engine) -> str:
    """How a long answer ends; says when it has begun."""
    request = Request(
        request_id="long", token_ids=PROMPT, method=Dense(), max_new_tokens=300, ignore_eos=True
    )
    begun = False
    try:
        async for _ in engine.generate(request):
            if not begun:
                begun = True
                say(streaming=True)
    except EngineError as error:
        return error.kind
    return "whole"


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
