"""Whether a request can be computed at all: asked by the router and by the engine, before any compute."""

from __future__ import annotations

from cluster.protocol import EngineError, EngineInfo, ErrorKind, Request
from spts.errors import RequestError, SptsError
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
    if request.method.needs_proxies and not info.has_proxies:
        raise EngineError(
            "invalid_request",
            f"method must not need proxies on a model without them, got {request.method.name!r}; "
            "fit them with python -m jobs.calibrate, or use dense",
            "method",
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
