"""From a checked body to pieces of text: choose pool and method, send to an engine, turn its tokens into
text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from cluster.admission import check_request
from cluster.answers import Answer, Endpoint, Piece, Usage
from cluster.api import GenerationBody
from cluster.config import AppConfig, PoolConfig, parse_method
from cluster.errors import ApiError
from cluster.protocol import Chunk, EngineError, EngineInfo, Request
from cluster.tokenizer import TextStream, TextTokenizer
from spts.methods import Method
from spts.sampling import Sampling

# Seconds that an engine may take to say that it is there; a replica that is still loading says nothing.
ANSWER_S = 5.0

Value = TypeVar("Value")


class EngineClient(Protocol):
    """What the router needs from an engine; `cluster.engine.Engine` is one, and so is a handle to a
    deployment of it."""

    async def info(self) -> EngineInfo:
        """See `Engine.info`."""

    async def ready(self) -> bool:
        """See `Engine.ready`."""

    def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """See `Engine.generate`."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """An HTTP request as engine requests. requests: one per choice, in order of their index."""

    engine: EngineClient
    requests: list[Request]
    answer: Answer
    usage: Usage
    body: GenerationBody


class Dispatcher:
    """The pools of `config` over `engines`, which have the names in `config.engines`. Raises ApiError,
    EngineError and SptsError for what cannot be answered, the faults that can be known before any compute
    before any compute."""

    def __init__(
        self, config: AppConfig, engines: Mapping[str, EngineClient], tokenizer: TextTokenizer
    ) -> None:
        self._config = config
        self._engines = engines
        self._tokenizer = tokenizer
        self._methods = [parse_method(pool.method) for pool in config.pools]
        self._infos: dict[str, EngineInfo] = {}

    @property
    def max_context(self) -> int | None:
        """Longest prompt plus answer of any engine, in tokens; None until an engine has told."""
        return max((info.max_context for info in self._infos.values()), default=None)

    async def ready(self) -> dict[str, bool]:
        """For every engine, whether it produces tokens now."""
        return {name: await self._is_ready(name) for name in self._engines}

    # -- what to send where ----------------------------------------------------------------------------------

    async def job(
        self, body: GenerationBody, prompts: list[tuple[int, ...]], endpoint: Endpoint, request_id: str
    ) -> Job:
        """What to send for a body whose prompts are `prompts`, in tokens. Checks everything, computes
        nothing."""
        n = body.n or 1
        if not prompts or len(prompts) * n > self._config.max_prompts:
            raise ApiError(
                "invalid_request",
                f"prompts x n must be from 1 to {self._config.max_prompts}, got {len(prompts)} x {n}; "
                "send fewer",
                "n" if n > 1 else "prompt",
            )
        # One pool for a batch, by its longest prompt: one HTTP request, one engine, one method in its usage.
        pool, method = self._pool(max(map(len, prompts)))
        method = self._chosen_method(body, method)
        engine = self._engines[pool.engine]
        info = await self._info(pool.engine)
        requests = []
        for index, token_ids in enumerate(prompt for prompt in prompts for _ in range(n)):
            limit = body.token_limit()
            request = Request(
                request_id=f"{request_id}-{index}",
                token_ids=token_ids,
                method=method,
                # "As many as fit" is at least one, so that a prompt that fills the context is refused, with
                # counts.
                max_new_tokens=max(1, info.max_context - len(token_ids)) if limit is None else limit,
                sampling=_sampling(body, index),
                deadline_s=self._config.request_timeout_s,
            )
            check_request(request, info)
            requests.append(request)
        return Job(
            engine=engine,
            requests=requests,
            answer=Answer(
                endpoint=endpoint, request_id=request_id, model=body.model, tokenizer=self._tokenizer
            ),
            usage=Usage(prompt_tokens=sum(map(len, prompts)), method=method.name),
            body=body,
        )

    def _pool(self, prompt_tokens: int) -> tuple[PoolConfig, Method]:
        """The first pool whose prompts may be this long; the last one takes any."""
        return next(
            (pool, method)
            for pool, method in zip(self._config.pools, self._methods, strict=True)
            if pool.max_prompt_tokens is None or prompt_tokens <= pool.max_prompt_tokens
        )

    def _chosen_method(self, body: GenerationBody, of_pool: Method) -> Method:
        """The request's own method, else the pool's. A method without a schedule takes the configured one."""
        chosen = body.spts
        if chosen is None:
            return of_pool
        data: dict[str, Any] = {"name": chosen.method}
        if chosen.seed is not None:
            data["seed"] = chosen.seed
        if chosen.schedule is not None:
            data["schedule"] = chosen.schedule
        elif chosen.method != "dense":
            configured = [pool.method for pool in self._config.pools if "schedule" in pool.method]
            own = [method for method in configured if method["name"] == chosen.method]
            if configured:
                data["schedule"] = (own or configured)[-1]["schedule"]
        return parse_method(data)

    # -- from chunks to text ---------------------------------------------------------------------------------

    async def pieces(self, job: Job) -> AsyncGenerator[Piece, None]:
        """The pieces of all choices as they come. Raises what the first failing choice raises, and ends the
        others."""
        out: asyncio.Queue[Piece | None] = asyncio.Queue()

        async def run(index: int, request: Request) -> None:
            async with aclosing(self._choice(job, index, request)) as pieces:
                async for piece in pieces:
                    out.put_nowait(piece)

        async def run_all() -> None:
            try:
                async with asyncio.timeout(self._config.request_timeout_s), asyncio.TaskGroup() as group:
                    for index, request in enumerate(job.requests):
                        group.create_task(run(index, request))
            finally:
                out.put_nowait(None)

        everyone = asyncio.create_task(run_all())
        try:
            while (piece := await out.get()) is not None:
                yield piece
            await everyone
        except TimeoutError:
            raise EngineError(
                "deadline",
                f"the answer must take at most {self._config.request_timeout_s:g} s; it took longer",
            ) from None
        except BaseExceptionGroup as group:
            raise _first(group) from None
        finally:
            everyone.cancel()
            await asyncio.gather(everyone, return_exceptions=True)

    async def _choice(self, job: Job, index: int, request: Request) -> AsyncGenerator[Piece, None]:
        stream = TextStream(self._tokenizer, job.body.stops)
        held = Piece(index=index, text="", num_tokens=0)
        async with aclosing(job.engine.generate(request)) as chunks:
            async for chunk in chunks:
                # The token that ended the answer has no text, whatever the tokenizer would make of it.
                ids = chunk.token_ids[:-1] if chunk.finish_reason == "stop" else chunk.token_ids
                text = "".join(map(stream.push, ids))
                if chunk.finish_reason is not None:
                    text += stream.finish()
                held = replace(
                    held,
                    text=text,
                    num_tokens=held.num_tokens + len(chunk.token_ids),
                    logprobs=chunk.logprobs
                    if held.logprobs is None
                    else held.logprobs + (chunk.logprobs or ()),
                    prefilled=held.prefilled or chunk.prefilled,
                    finish_reason="stop" if stream.stopped else chunk.finish_reason,
                )
                if held.text or held.finish_reason is not None:
                    yield held
                    held = Piece(index=index, text="", num_tokens=0)
                if stream.stopped:
                    return

    # -- engines ---------------------------------------------------------------------------------------------

    async def _info(self, name: str) -> EngineInfo:
        if name not in self._infos:
            self._infos[name] = await _soon(self._engines[name].info())
        return self._infos[name]

    async def _is_ready(self, name: str) -> bool:
        try:
            await self._info(name)
            return await _soon(self._engines[name].ready())
        except EngineError:
            return False


async def _soon(answer: Awaitable[Value]) -> Value:
    try:
        return await asyncio.wait_for(answer, ANSWER_S)
    except TimeoutError:
        raise EngineError("unavailable", "the engine is loading or restarting; retry later") from None


def _sampling(body: GenerationBody, index: int) -> Sampling:
    """OpenAI's defaults where the body says nothing. Choices of one seed differ by their index, and
    repeat."""
    return Sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k or 0),
        seed=None if body.seed is None else (body.seed + index + 2**63) % 2**64 - 2**63,
        logprobs=body.num_logprobs(),
    )


def _first(error: BaseException) -> BaseException:
    """The first failure in a group of them."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
