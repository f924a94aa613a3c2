"""What an engine answers before it says that it is ready.

On a GPU kernels compile or load when they are first called, and a decode step is captured for each size of
batch: up to a second each, in which running answers would stand still.
"""

from __future__ import annotations

from cluster.admission import check_request
from cluster.protocol import EngineError, EngineInfo, Request
from spts.cost import rows_flops
from spts.kernels.blocks import BLOCK_TOKENS, MANY_QUERIES, MANY_ROWS
from spts.methods import Dense, Method, Spts
from spts.schedule import Schedule, Stage

_BUDGET = 128
_SLICED_TOKENS = 2 * (MANY_QUERIES + BLOCK_TOKENS)


def prompts(info: EngineInfo) -> list[tuple[Request, int | None]]:
    """Prompts to read one after the other, and the FLOP to compute of each at once (None = all).

    One token, dense. On a GPU also a prompt in slices and some that skip, one of them long and one with
    sparse attention; what the model has no room for is left out.
    """
    asked: list[tuple[Method, int, int | None]] = [(Dense(), 1, info.slice_flops)]
    if info.device != "cpu":
        half = _SLICED_TOKENS // 2
        asked.append((Dense(), _SLICED_TOKENS, rows_flops(info.shape, half, half)))
        asked += [(method, num_tokens, info.slice_flops) for method, num_tokens in _skipping(info)]
    sent = [
        (_request(number, method, num_tokens, 1), flops)
        for number, (method, num_tokens, flops) in enumerate(asked)
    ]
    return [(request, flops) for request, flops in sent if _fits(request, info)]


def answers(info: EngineInfo, max_running: int) -> tuple[list[Request], list[int]]:
    """Requests of one token to hold together, and how many of them decode at once, step by step: on a GPU 1,
    2, 4, ..., as many as may run and have room; else none do."""
    if info.device == "cpu":
        return [], []
    sizes = [*(1 << power for power in range((max_running - 1).bit_length())), max_running]
    request = _request(0, Dense(), 1, 1 + len(sizes))
    if not _fits(request, info):
        return [], []
    return [_request(number, Dense(), 1, 1 + len(sizes)) for number in range(max_running)], sizes


def _request(number: int, method: Method, num_tokens: int, max_new_tokens: int) -> Request:
    return Request(
        request_id=f"warm-up-{number}",
        token_ids=(0,) * num_tokens,
        method=method,
        max_new_tokens=max_new_tokens,
    )


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
        for density, num_tokens in ((1.0, 512), (0.5, 512), (1.0, MANY_ROWS + BLOCK_TOKENS))
    ]
