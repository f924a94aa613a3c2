"""What an engine answers before it says that it is ready.

On a GPU kernels compile or load when they are first called, and a decode step is captured for each size of
batch: up to a second each, in which running answers would stand still.
"""

from __future__ import annotations

from cluster.admission import check_request
from cluster.protocol import EngineError, EngineInfo, Request
from spts.cost import rows_flops
from spts.kernels.blocks import BLOCK_TOKENS
from spts.methods import Dense, Method, Spts
from spts.schedule import Schedule, Stage

_BUDGET = 128
# Slices of more than 1,024 tokens, and more candidates than 32,768, go other ways (`spts.kernels`).
_SLICED_TOKENS = 20 * BLOCK_TOKENS
_MANY_TOKENS = 258 * BLOCK_TOKENS


def prefills(info: EngineInfo, max_running: int) -> list[tuple[Request, int | None]]:
    """Requests, and the FLOP to compute of each at once (None = all).

    One token, dense. On a GPU as many requests as may run at once, among them a prompt in two slices a layer
    and some that skip: kernels are compiled for lengths that are multiples of 16 and for others. Those that
    the model has no room for are left out.
    """
    whole, half = info.slice_flops, rows_flops(info.shape, 0, _SLICED_TOKENS // 2)
    asked: list[tuple[Method, int, int | None]] = [(Dense(), 1, whole)]
    if info.device != "cpu":
        skipping = [(method, num_tokens, whole) for method, num_tokens in _skipping(info)]
        asked = [(Dense(), _SLICED_TOKENS, half), *skipping, *asked * max_running]
    sent = [
        (
            Request(
                request_id=f"warm-up-{number}",
                token_ids=(0,) * num_tokens,
                method=method,
                max_new_tokens=1 + len(batches(info, max_running)),
                ignore_eos=True,
            ),
            flops,
        )
        for number, (method, num_tokens, flops) in enumerate(asked)
    ]
    return [(request, flops) for request, flops in sent if _fits(request, info)][:max_running]


def batches(info: EngineInfo, num_requests: int) -> list[int]:
    """How many requests decode at once, step by step: on a GPU 1, 2, 4, ..., all of them; else none do."""
    if info.device == "cpu":
        return []
    return [*(1 << power for power in range((num_requests - 1).bit_length())), num_requests]


def _fits(request: Request, info: EngineInfo) -> bool:
    try:
        check_request(request, info)
    except EngineError:
        return False
    return True


def _skipping(info: EngineInfo) -> list[tuple[Method, int]]:
    num_layers, first = info.shape.num_layers, info.first_proxy_layer
    if first is None or first == num_layers:
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
        for density, num_tokens in ((1.0, 512), (0.5, 500), (1.0, _MANY_TOKENS))
    ]
