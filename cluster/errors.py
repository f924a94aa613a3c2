"""Every way a request can fail over HTTP: one table, one shape, {"error": {message, type, param, code}}."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.responses import JSONResponse, Response

from cluster.protocol import EngineError
from spts.errors import SptsError


@dataclass(frozen=True)
class HttpError:
    """One row. retry_after_s: when to try again, as a Retry-After header; None = trying again does not
    help."""

    status: int
    type: str
    code: str | None
    retry_after_s: int | None = None


HTTP_ERRORS: Mapping[str, HttpError] = {
    "invalid_request": HttpError(400, "invalid_request_error", "invalid_value"),
    "unsupported_parameter": HttpError(400, "invalid_request_error", "unsupported_parameter"),
    "context_length_exceeded": HttpError(400, "invalid_request_error", "context_length_exceeded"),
    "invalid_api_key": HttpError(401, "authentication_error", "invalid_api_key"),
    "model_not_found": HttpError(404, "invalid_request_error", "model_not_found"),
    "not_found": HttpError(404, "invalid_request_error", "not_found"),
    "method_not_allowed": HttpError(405, "invalid_request_error", "method_not_allowed"),
    "deadline": HttpError(408, "timeout_error", None),
    "payload_too_large": HttpError(413, "invalid_request_error", "payload_too_large"),
    "internal": HttpError(500, "server_error", "internal_error"),
    "overloaded": HttpError(503, "server_error", "overloaded", 1),
    "unavailable": HttpError(503, "server_error", "unavailable", 5),
}


# What the library and the engine call a field, and what the API calls it; what is inside keeps its name.
API_NAMES = {
    "token_ids": "prompt",
    "max_new_tokens": "max_tokens",
    "method.name": "spts.method",
    "method.seed": "spts.seed",
    "method.schedule": "spts.schedule",
    "schedule": "spts.schedule",
    "method": "spts.method",
}


class ApiError(Exception):
    """A fault found in the router. kind: a key of HTTP_ERRORS. param: the request's field, if one is at
    fault."""

    def __init__(self, kind: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.param = param


def as_api_error(error: Exception, request_id: str) -> ApiError:
    """What the client may know of `error`. A bug of ours is opaque: its text stays in the log, under the
    id."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineError) and error.kind != "internal":
        return _renamed(error.kind, error.message, error.param)
    if isinstance(error, SptsError):
        return _renamed("invalid_request", str(error), error.field)
    return ApiError("internal", f"internal error; quote request id {request_id} to the operator")


def _renamed(kind: str, message: str, param: str | None) -> ApiError:
    for ours, theirs in API_NAMES.items():
        if param is not None and re.match(rf"{re.escape(ours)}\b", param):
            # Where it first comes it is the field; further on it may be a word.
            return ApiError(kind, message.replace(ours, theirs, 1), theirs + param.removeprefix(ours))
    return ApiError(kind, message, param)


def error_body(error: ApiError) -> dict[str, dict[str, str | None]]:
    """The JSON of an error, in a response's body or in a data chunk of a stream."""
    row = HTTP_ERRORS[error.kind]
    param = None if error.param is None else _cut(error.param)
    return {"error": {"message": _cut(error.message), "type": row.type, "param": param, "code": row.code}}


def _cut(text: str) -> str:
    """`text`, or its beginning and end: messages quote what the client sent, and that may be megabytes."""
    return text if len(text) <= 1000 else f"{text[:800]} … {text[-200:]}"


def error_response(error: ApiError) -> Response:
    """The answer to a request that failed before anything was sent."""
    row = HTTP_ERRORS[error.kind]
    headers = {} if row.retry_after_s is None else {"Retry-After": str(row.retry_after_s)}
    if row.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), row.status, headers)
