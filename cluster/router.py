"""The OpenAI endpoint: routes, bodies in, answers and streams out, failures in one shape. No torch in
here."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from typing import Any

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from ray.exceptions import TaskCancelledError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp

from cluster.answers import SSE_END, Endpoint, Piece, sse
from cluster.api import AnyBody, ChatBody, CompletionBody, GenerationBody, parse_body, turns
from cluster.choices import Job, pieces
from cluster.config import AppConfig, resolve_path
from cluster.dispatch import Dispatcher, EngineClient
from cluster.errors import ApiError, as_api_error, error_body, error_response
from cluster.keys import Guard, read_keys
from cluster.metrics import Metrics
from cluster.openapi import openapi
from cluster.page import page_files
from cluster.protocol import EngineError
from cluster.request_id import RequestId
from cluster.strict import brief
from cluster.tokenizer import TextTokenizer
from cluster.tokens import DetokenizeBody, TokenizeBody
from spts.errors import SptsError
from spts.loading import resolve

logger = logging.getLogger(__name__)

# A token of a prompt takes at most about this many bytes of JSON; a body may have so many more around them.
BYTES_PER_TOKEN = 16
BYTES_AROUND = 1 << 16
# Bytes of a body from which on it is read in a thread of its own: this many take 10 to 50 ms.
LARGE_BODY = 1 << 20


_METHODS = {"GET": ["GET", "HEAD"], "POST": ["POST"]}  # probes may ask without wanting the body


class Router:
    """Routes and what is behind them. engines: by the names in `config.engines`."""

    def __init__(self, config: AppConfig, engines: Mapping[str, EngineClient]) -> None:
        self._config = config
        self._keys = read_keys(config)
        self._tokenizer = TextTokenizer(resolve(resolve_path(config.model), weights=False))
        self._metrics = Metrics()
        self._dispatcher = Dispatcher(config, engines, self._tokenizer)
        self._created = int(time.time())

    def app(self) -> ASGIApp:
        """The ASGI application: every answer has a request id, and every failure the same shape."""
        app = FastAPI(title="SPTS", openapi_url=None)  # the document of its own would not know our bodies
        for path, route, verb in (
            ("/health", self.health, "GET"),
            ("/ready", self.ready, "GET"),
            ("/metrics", self.metrics, "GET"),
            ("/openapi.json", self.openapi, "GET"),
            ("/v1/models", self.models, "GET"),
            ("/v1/models/{model:path}", self.model, "GET"),
            ("/v1/completions", self.completions, "POST"),
            ("/v1/chat/completions", self.chat, "POST"),
            ("/tokenize", self.tokenize, "POST"),
            ("/detokenize", self.detokenize, "POST"),
        ):
            app.add_api_route(path, route, methods=_METHODS[verb], response_model=None)
        for path, file in page_files().items():
            app.add_api_route(path, _answering(file), methods=_METHODS["GET"], response_model=None)
        app.add_exception_handler(HTTPException, _no_such_route)
        for kind in (ApiError, EngineError, SptsError, Exception):
            app.add_exception_handler(kind, self._failure)
        guarded: ASGIApp = app if self._keys is None else Guard(app, self._keys, self._metrics)
        return RequestId(self._cross_origin(guarded))

    def _cross_origin(self, app: ASGIApp) -> ASGIApp:
        """Before the keys: a browser's preflight brings none, and a refusal is for the page to read."""
        if not self._config.cors_origins:
            return app
        return CORSMiddleware(
            app,
            allow_origins=self._config.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),  # clients bring headers of their own, which say nothing here
            expose_headers=("x-request-id", "retry-after"),
            allow_private_network=True,  # where an endpoint often is; its operator named the sites
        )

    # -- routes ----------------------------------------------------------------------------------------------

    async def health(self) -> JSONResponse:
        """This process is alive."""
        return JSONResponse({"status": "ok"})

    async def ready(self) -> JSONResponse:
        """Whether a token can be produced: every engine has produced one, and its step loop runs."""
        engines = await self._dispatcher.ready()
        ready = all(engines.values())
        return JSONResponse({"ready": ready, "engines": engines}, 200 if ready else 503)

    async def metrics(self) -> Response:
        """What has been measured since the router started, and what the engines do now."""
        text = self._metrics.text(await self._dispatcher.stats())
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    async def openapi(self) -> JSONResponse:
        """The endpoint in OpenAPI's terms."""
        return JSONResponse(openapi(needs_key=self._keys is not None))

    async def models(self) -> JSONResponse:
        """The one model that is served."""
        return JSONResponse({"object": "list", "data": [await self._model_object()]})

    async def model(self, model: str) -> JSONResponse:
        """The model under its name, and 404 for any other."""
        self._check_model(model)
        return JSONResponse(await self._model_object())

    async def completions(self, http: HttpRequest) -> Response:
        """POST /v1/completions."""
        body = await self._body(http, CompletionBody)
        self._check_model(body.model)
        self._dispatcher.check_choices(len(body.prompts), body.n or 1)  # before any of them is encoded
        prompts = [
            await self._encode(prompt, "prompt") if isinstance(prompt, str) else tuple(prompt)
            for prompt in body.prompts
        ]
        return await self._answer(http, body, prompts, "completion")

    async def chat(self, http: HttpRequest) -> Response:
        """POST /v1/chat/completions."""
        body = await self._body(http, ChatBody)
        self._check_model(body.model)
        messages = turns(body.messages)
        await self._check_length(sum(len(message["content"]) for message in messages), "messages")
        token_ids = await asyncio.to_thread(self._tokenizer.encode_chat, messages)
        return await self._answer(http, body, [token_ids], "chat")

    async def tokenize(self, http: HttpRequest) -> JSONResponse:
        """POST /tokenize."""
        body = await self._body(http, TokenizeBody)
        self._check_model(body.model)
        await self._check_length(body.num_characters, "messages" if body.messages else "prompt")
        tokens, texts = await asyncio.to_thread(body.tokens, self._tokenizer)
        return JSONResponse(
            {
                "count": len(tokens),
                "max_model_len": await self._dispatcher.longest(wait=True),
                "tokens": tokens,
                "token_strs": texts,
            }
        )

    async def detokenize(self, http: HttpRequest) -> JSONResponse:
        """POST /detokenize."""
        body = await self._body(http, DetokenizeBody)
        self._check_model(body.model)
        return JSONResponse({"prompt": await asyncio.to_thread(body.prompt, self._tokenizer)})

    # -- bodies and answers ----------------------------------------------------------------------------------

    async def _body(self, http: HttpRequest, model: type[AnyBody]) -> AnyBody:
        """The body, checked; a large one in a thread, as streams must not wait for it."""
        raw = await self._read(http)
        if len(raw) < LARGE_BODY:
            return parse_body(raw, model)
        return await asyncio.to_thread(parse_body, raw, model)

    async def _read(self, http: HttpRequest) -> bytes:
        """The body, up to what the longest allowed batch of prompts could take, and within the deadline of
        the whole request."""
        longest = await self._dispatcher.longest()
        known = self._dispatcher.known_context
        limit = BYTES_AROUND + BYTES_PER_TOKEN * known * self._config.max_prompts
        raw = bytearray()  # bytes would be copied for every part
        try:
            spent_s = time.perf_counter() - http.scope["state"]["arrived"]
            async with asyncio.timeout(self._config.request_timeout_s - spent_s):
                async for part in http.stream():
                    raw += part
                    if len(raw) > limit and longest is None:
                        raise EngineError(
                            "unavailable",
                            f"body must be at most {limit} bytes while an engine loads, got more; retry "
                            "later",
                        )
                    if len(raw) > limit:
                        raise ApiError(
                            "payload_too_large", f"body must be at most {limit} bytes, got more; send less"
                        )
        except TimeoutError:
            limit_s = self._config.request_timeout_s
            raise EngineError(
                "deadline", f"the body must come within {limit_s:g} s; it took longer"
            ) from None
        except ClientDisconnect:  # nobody reads the answer; it is counted as what it is, not as a bug
            raise ApiError("invalid_request", "body must come whole, got a client that left") from None
        return bytes(raw)

    async def _encode(self, text: str, param: str) -> tuple[int, ...]:
        """In a thread: a long text takes a while, and streams must not wait for it."""
        await self._check_length(len(text), param)
        return await asyncio.to_thread(self._tokenizer.encode, text)

    async def _check_length(self, num_characters: int, param: str) -> None:
        """Raise ApiError for a text so far over the context that counting its tokens would cost minutes."""
        longest = await self._dispatcher.longest()
        if longest is not None and num_characters > (limit := BYTES_PER_TOKEN * longest):
            raise ApiError(
                "payload_too_large",
                f"{param} must be at most {limit} characters, got {num_characters}; send less",
                param,
            )

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self._config.model_name):
            raise ApiError(
                "model_not_found",
                f"model must be {self._config.model_name}, got {brief(name)}; see /v1/models",
                "model",
            )

    async def _answer(
        self, http: HttpRequest, body: GenerationBody, prompts: list[tuple[int, ...]], endpoint: Endpoint
    ) -> Response:
        # An id of our own: the one in the header may be the client's, and used twice.
        job = await self._dispatcher.job(
            body, prompts, endpoint, request_id=uuid.uuid4().hex, arrived=http.scope["state"]["arrived"]
        )
        answer = pieces(job, self._tokenizer, self._metrics)
        if not body.stream:
            choices: list[list[Piece]] = [[] for _ in job.requests]
            async with aclosing(answer):
                async for piece in answer:
                    http.state.begun = True
                    job.usage.add(piece)
                    choices[piece.index].append(piece)
            return JSONResponse(job.answer.whole(choices, job.usage))
        # The first piece comes before the response begins: what fails until then has a status of its own.
        first = await anext(answer)
        return StreamingResponse(self._events(job, first, answer, _id(http)), media_type="text/event-stream")

    async def _events(
        self, job: Job, first: Piece, rest: AsyncGenerator[Piece, None], request_id: str
    ) -> AsyncIterator[bytes]:
        """The stream of a job. A failure is an error object in a data chunk, then the end, without [DONE]."""
        begun: set[int] = set()
        options = job.body.stream_options
        try:
            async with aclosing(rest):
                piece: Piece | None = first
                while piece is not None:
                    job.usage.add(piece)
                    is_first = piece.index not in begun
                    yield sse(job.answer.chunk(piece, first=is_first, options=options, usage=job.usage))
                    begun.add(piece.index)
                    piece = await anext(rest, None)
            if options is not None and options.include_usage:
                yield sse(job.answer.usage_chunk(job.usage))
            yield SSE_END
        except Exception as error:  # the status is sent: all that is left is to say it in the stream
            yield sse(error_body(self._count(error, request_id, begun=True)))

    # -- failures --------------------------------------------------------------------------------------------

    async def _failure(self, http: HttpRequest, error: Exception) -> Response:
        begun = http.scope["state"].get("begun", False)
        return error_response(self._count(error, _id(http), begun=begun))

    def _count(self, error: Exception, request_id: str, *, begun: bool) -> ApiError:
        if isinstance(error, TaskCancelledError):  # Serve's receive, of a client that has left
            error = ApiError("invalid_request", "answer must be waited for, got a client that left")
        known = as_api_error(error, request_id)
        self._metrics.fail(known.kind, begun=begun)
        if known.kind == "internal":
            logger.error("request %s failed", request_id, exc_info=error)
        return known

    async def _model_object(self) -> dict[str, Any]:
        with suppress(EngineError):  # while an engine loads, the context is null
            await self._dispatcher.longest(wait=True)
        return {
            "id": self._config.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "spts",
            "max_model_len": self._dispatcher.max_context,
        }


def _answering(file: Response) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        return file

    return answer


def _id(http: HttpRequest) -> str:
    request_id: str = http.scope["state"]["request_id"]
    return request_id


async def _no_such_route(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    asked = f"got {http.method} {http.url.path}; see the README"
    if error.status_code != 405:
        return error_response(ApiError("not_found", f"route must exist, {asked}"))
    allowed = sorted((error.headers or {})["Allow"].split(", "))
    response = error_response(
        ApiError("method_not_allowed", f"method must be {' or '.join(allowed)}, {asked}")
    )
    response.headers["Allow"] = ", ".join(allowed)
    return response
