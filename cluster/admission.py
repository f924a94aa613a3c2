"""Whether a request can be computed at all: checked before any compute, by the router and again by the
engine."""

from __future__ import annotations

from cluster.protocol import EngineError, EngineInfo, Request
from spts.errors import SptsError


def check_request(request: Request, info: EngineInfo) -> None:
    """Raise EngineError unless `request` can be computed by the engine that `info` describes. No compute."""
    prompt = len(request.token_ids)
    if prompt == 0:
        raise EngineError("invalid_request", "prompt must have at least one token, got 0; send one", "prompt")
    wrong = next((t for t in request.token_ids if not 0 <= t < info.vocab_size), None)
    if wrong is not None:
        raise EngineError(
            "invalid_request",
            f"prompt must hold token ids from 0 to {info.vocab_size - 1}, got {wrong}; use the model's "
            "tokenizer",
            "prompt",
        )
    if request.max_new_tokens < 1:
        raise EngineError(
            "invalid_request",
            f"max_tokens must be at least 1, got {request.max_new_tokens}; ask for one",
            "max_tokens",
        )
    if prompt + request.max_new_tokens > info.max_context:
        raise EngineError(
            "context_length_exceeded",
            f"prompt + max_tokens must be at most {info.max_context} tokens, got {prompt} + "
            f"{request.max_new_tokens}"
            f" = {prompt + request.max_new_tokens}; shorten the prompt or ask for fewer tokens",
            "max_tokens" if prompt < info.max_context else "prompt",
        )
    if request.method.needs_proxies and not info.has_proxies:
        raise EngineError(
            "invalid_request",
            f"method must not need proxies on a model without them, got {request.method.name!r}; "
            "fit them with python -m jobs.calibrate, or use dense",
            "method",
        )
    try:
        request.method.schedule_for(info.shape.num_layers)
    except SptsError as error:
        raise EngineError("invalid_request", str(error), error.field) from None
