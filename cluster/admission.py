"""Whether a request can be computed at all, and what it takes: asked before any compute, by the router and by
the engine."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

from cluster.protocol import EngineError, EngineInfo, ErrorKind, Request
from cluster.scheduler import Demand
from spts import cost, memory
from spts.errors import ConfigError, RequestError, SptsError
from spts.methods import Dense, Method
from spts.request import check_prefix_tokens, check_tokens, check_vocabulary
from spts.sampling import Sampling


def check_request(request: Request, info: EngineInfo) -> None:
    """Raise EngineError unless `request` can be computed by the engine that `info` describes. No compute."""
    try:
        check_tokens(
            request.token_ids,
            max_new_tokens=request.max_new_tokens,
            vocab_size=info.vocab_size,
            max_context=info.max_context,
        )
        if request.prefix_tokens is not None:
            check_prefix_tokens(request.prefix_tokens, request.token_ids)
        request.method.schedule_for(info.shape.num_layers)
    except SptsError as error:
        raise as_engine_error(error) from None
    if request.max_new_tokens < 1:
        raise EngineError(
            "invalid_request",
            f"max_new_tokens must be at least 1, got {request.max_new_tokens}; ask for a token",
            "max_new_tokens",
        )
    if request.follow:
        _check_follow(request, info.vocab_size)
    if request.method.needs_proxies:
        _check_proxies(request.method, info)
    num_bytes = request_bytes(request, info)
    if num_bytes > info.kv_bytes_limit:
        raise EngineError(
            "context_length_exceeded",
            f"prompt + max_new_tokens must fit into {info.kv_bytes_limit} bytes of KV memory on each rank, "
            f"got {num_bytes} bytes; shorten the prompt, ask for fewer tokens, or skip more of them",
            "max_new_tokens",
        )


def request_bytes(request: Request, info: EngineInfo) -> int:
    """The most bytes that a rank holds for `request` at any time (`spts.memory`)."""
    num_tokens, new_tokens = len(request.token_ids), request.max_new_tokens
    if not request.follow:
        return _prompt_bytes(request.method, num_tokens, new_tokens, info)
    # The method's prompt and the dense model's, one after the other and unsliced; then the given tokens, all
    # at once; then the distributions, one of them once more while it is put together, and what comparing
    # takes.
    methods = {request.method, Dense()}
    whole = replace(info, slice_tokens=None)
    num_bytes = max(_prompt_bytes(method, num_tokens, new_tokens, whole) for method in methods)
    num_bytes += _prompt_bytes(Dense(), new_tokens, 0, whole)
    vocab_size = info.shape.vocab_size
    num_bytes += (len(methods) + 1) * new_tokens * vocab_size * 4
    return num_bytes + memory.comparison_bytes(vocab_size, new_tokens)


def demand(request: Request, info: EngineInfo) -> Demand:
    """What the scheduler has to know of a request that `check_request` lets pass."""
    method, shape = request.method, info.shape
    schedule, prefix_tokens = method.schedule_for(shape.num_layers), request.prefix_tokens
    depth, block_tokens = schedule.first_skip_layer, schedule.block_tokens
    work = method.planned_work(shape.num_layers, len(request.token_ids))
    flops = cost.prefill_flops(shape, work, info.proxy).total
    if request.follow:  # the given tokens but the last too; and all of it densely, to compare with
        prompt, whole = (
            cost.dense_flops(shape, len(request.token_ids) + more).total
            for more in (0, len(request.follow) - 1)
        )
        flops += whole - prompt + (0 if method == Dense() else whole)
    return Demand(
        request_id=request.request_id,
        token_ids=request.token_ids,
        num_tokens=request.num_read_tokens,
        kv_bytes=request_bytes(request, info),
        flops=flops,
        layers=(depth, schedule.attention_density),
        document_bytes=cost.prefix_bytes(
            shape, 1, depth, dtype_bytes=info.dtype_bytes, world_size=info.world_size
        ),
        block_tokens=block_tokens,
        prefix_tokens=None if prefix_tokens is None else prefix_tokens - prefix_tokens % block_tokens,
    )


def check_context(info: EngineInfo, methods: Sequence[Method] = ()) -> None:
    """Raise ConfigError, naming the length that would fit, unless one dense request of `info.max_context`
    tokens does, and one of each of `methods`: what choosing among tokens takes can be more than it saves."""
    for method in (Dense(), *methods):
        _check_context(info, method)


def _check_context(info: EngineInfo, method: Method) -> None:
    def fits(num_tokens: int) -> bool:
        return _prompt_bytes(method, max(1, num_tokens - 1), 1, info) <= info.kv_bytes_limit

    if fits(info.max_context):
        return
    longest = bisect_left(range(info.max_context), True, key=lambda num_tokens: not fits(num_tokens)) - 1
    advice = f"set it to at most {longest}, or" if longest >= 2 else "there is no room for any prompt;"
    raise ConfigError(
        f"max_model_len must be a length of which one {method.name} request fits into the "
        f"{info.kv_bytes_limit} bytes of KV memory on each rank, got {info.max_context} tokens, which take "
        f"{_prompt_bytes(method, info.max_context - 1, 1, info)}; {advice} give the engine more memory "
        "(kv_cache_bytes, tensor_parallel_size)",
        field="max_model_len",
    )


def _prompt_bytes(method: Method, num_tokens: int, max_new_tokens: int, info: EngineInfo) -> int:
    return memory.request_bytes(
        info.shape,
        method.planned_work(info.shape.num_layers, num_tokens),
        max_new_tokens=max_new_tokens,
        dtype_bytes=info.dtype_bytes,
        world_size=info.world_size,
        proxy=info.proxy,
        slice_flops=info.slice_flops,
    )


def _check_proxies(method: Method, info: EngineInfo) -> None:
    if info.first_proxy_layer is None:
        raise EngineError(
            "invalid_request",
            f"method must not need proxies on a model without them, got {method.name!r}; "
            "fit them with python -m jobs.calibrate, or use dense",
            "method",
        )
    schedule = method.schedule_for(info.shape.num_layers)
    for layer in range(info.first_proxy_layer):
        if schedule.active_tokens(layer) is not None:
            raise EngineError(
                "invalid_request",
                f"schedule must skip in no layer before {info.first_proxy_layer}, the first with proxies, "
                f"got layer {layer}; begin to skip there, or fit more with python -m jobs.calibrate",
                "schedule",
            )


def _check_follow(request: Request, vocab_size: int) -> None:
    if len(request.follow) != request.max_new_tokens:
        raise EngineError(
            "invalid_request",
            f"max_new_tokens must equal the number of tokens to follow, {len(request.follow)}, "
            f"got {request.max_new_tokens}; set it to that",
            "max_new_tokens",
        )
    try:
        check_vocabulary("follow", request.follow, vocab_size)
    except SptsError as error:
        raise as_engine_error(error) from None
    if request.sampling != Sampling(logprobs=request.sampling.logprobs):
        raise EngineError(
            "invalid_request",
            f"sampling must be the default but for logprobs when tokens are followed, "
            f"got {request.sampling}; nothing is drawn",
            "sampling",
        )


def as_engine_error(error: SptsError) -> EngineError:
    """A fault of the request, as the engine says it."""
    kind: ErrorKind = "invalid_request"
    if isinstance(error, RequestError) and error.code == "context_length_exceeded":
        kind = "context_length_exceeded"
    return EngineError(kind, str(error), error.field)
