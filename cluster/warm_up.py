"""What an engine answers before it says that it is ready.

On a GPU kernels compile or load when they are first called, and a decode step is captured for each size of
batch: up to a second each, in which running answers would stand still.
"""

from __future__ import annotations

from cluster.admission import check_request
from cluster.group import Group
from cluster.protocol import EngineError, EngineInfo, Request, Step, StepOutput
from spts.cost import rows_flops
from spts.kernels.blocks import BLOCK_TOKENS, MANY_QUERIES, MANY_ROWS
from spts.methods import Dense, Method, Spts
from spts.schedule import Schedule, Stage

_BUDGET = 128
_SLICED_TOKENS = 2 * (MANY_QUERIES + BLOCK_TOKENS)


async def run(group: Group, info: EngineInfo, max_running: int) -> StepOutput:
    """Answer a few requests, so that what is slow the first time is slow now and "ready" has been seen to be
    true; the last step's output. Raises EngineError, also for a request that is refused."""
    latest, tokens = StepOutput(), dict[str, int]()

    async def do(step: Step) -> None:
        output = await group.step(step)
        for _, error in output.refused:
            raise error
        tokens.update((token.request_id, token.token_id) for token in output.tokens)

    async def read(request: Request, flops: int | None) -> None:
        await do(Step(start=request, advance=(request.request_id, flops)))
        while request.request_id not in tokens:
            await do(Step(advance=(request.request_id, flops)))

    for request, flops in prompts(info):
        await read(request, flops)
        latest = await group.step(Step(release=(request.request_id,)))
        tokens.clear()
    together, sizes = answers(info, max_running)
    for request in together:
        await read(request, None)
    for size in sizes:
        await do(Step(decode=tuple(tokens.items())[:size]))
    return await group.step(Step(release=tuple(tokens))) if together else latest


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
    # A layer is left to see the cut, where there are two.
    stage = Stage(last_layer=max(first, num_layers - 2), active_tokens=_BUDGET, keep_tokens=_BUDGET // 2)
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
