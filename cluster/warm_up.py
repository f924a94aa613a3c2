"""What an engine answers before it says that it is ready.

On a GPU kernels compile when they are first called and a decode step is captured for each size of batch: half
a second each, in which running answers would stand still.
"""

from __future__ import annotations

from cluster.protocol import EngineInfo, Request
from spts.methods import Dense, Method, Spts
from spts.schedule import Schedule, Stage

_TOKENS = 512
_BUDGET = 128


def requests(info: EngineInfo, max_running: int) -> list[Request]:
    """One token, dense. On a GPU as many requests as may run at once, and among them prompts that skip, of a
    length that is a multiple of 16 and of one that is not: kernels are compiled for either."""
    dense: tuple[Method, int] = (Dense(), 1)
    asked = [dense]
    if info.device != "cpu":
        asked = [*_skipping(info), *[dense] * max_running][:max_running]
    return [
        Request(
            request_id=f"warm-up-{number}",
            token_ids=(0,) * num_tokens,
            method=method,
            max_new_tokens=1 + len(batches(info, len(asked))),
            ignore_eos=True,
        )
        for number, (method, num_tokens) in enumerate(asked)
    ]


def batches(info: EngineInfo, num_requests: int) -> list[int]:
    """How many requests decode at once, step by step: on a GPU 1, 2, 4, ..., all of them; else none do."""
    if info.device == "cpu":
        return []
    return [*(1 << power for power in range((num_requests - 1).bit_length())), num_requests]


def _skipping(info: EngineInfo) -> list[tuple[Method, int]]:
    num_layers, first = info.shape.num_layers, info.first_proxy_layer
    if first is None or first == num_layers or info.max_context < 2 * _TOKENS:
        return []
    stage = Stage(last_layer=num_layers - 1, active_tokens=_BUDGET, keep_tokens=_BUDGET // 2)
    return [
        (
            Spts(
                schedule=Schedule(
                    num_layers=num_layers,
                    first_skip_layer=first,
                    stages=(stage,),
                    attention_density=density,
                )
            ),
            num_tokens,
        )
        for density, num_tokens in ((1.0, _TOKENS), (0.5, _TOKENS - 12))
    ]
