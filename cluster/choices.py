"""The choices of one HTTP request: from an engine's chunks to pieces of text, all choices at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from cluster.answers import Answer, Piece, Unpredicted, Usage
from cluster.api import GenerationBody
from cluster.metrics import ChoiceClock, Metrics
from cluster.protocol import Chunk, EngineError, FinishReason, Request, too_late
from cluster.tokenizer import TextStream, TextTokenizer
from spts.sampling import TokenLogprobs

Send = Callable[[Request], AsyncGenerator[Chunk, None]]


@dataclass(frozen=True, kw_only=True)
class Echo:
    """A prompt that its answer begins with. text: None = that of its tokens. request: for its
    log-probabilities, if they were asked for."""

    text: str | None
    token_ids: tuple[int, ...]
    request: Request | None


@dataclass(frozen=True, kw_only=True)
class Job:
    """An HTTP request as engine requests. requests: one per choice, in order of their index. echoes: one for
    each of these, or none. send: to the engine that answers. arrived: perf_counter() seconds."""

    send: Send
    requests: list[Request]
    echoes: list[Echo]
    answer: Answer
    usage: Usage
    body: GenerationBody
    timeout_s: float
    arrived: float = field(default_factory=time.perf_counter)

    @property
    def left_s(self) -> float:
        """Seconds until nobody waits for the answer any more: `timeout_s` is for all of the request, from its
        body to its last token."""
        return max(0.0, self.arrived + self.timeout_s - time.perf_counter())


async def pieces(job: Job, tokenizer: TextTokenizer, metrics: Metrics) -> AsyncGenerator[Piece, None]:
    """The pieces of all choices as they come. Raises what the first failing choice raises, and ends the
    others."""
    out: asyncio.Queue[Piece | None] = asyncio.Queue()
    clocks = [ChoiceClock(metrics, job.usage.method, job.arrived) for _ in job.requests]

    async def run(index: int, request: Request) -> None:
        async with aclosing(_choice(job, index, request, tokenizer, clocks[index])) as choice:
            async for piece in choice:
                out.put_nowait(piece)

    async def run_all() -> None:
        try:
            async with asyncio.timeout(job.left_s), asyncio.TaskGroup() as group:
                for index, request in enumerate(job.requests):
                    group.create_task(run(index, request))
        finally:
            out.put_nowait(None)

    everyone = asyncio.create_task(run_all())
    try:
        while (piece := await out.get()) is not None:
            yield piece
        await everyone
        if not all(clock.ended for clock in clocks):
            # An engine's call was cancelled beneath its choice, mostly since the client leaves: a task group
            # takes that for an end.
            raise EngineError("unavailable", "the answer was cancelled before its end; retry later")
    except (asyncio.CancelledError, GeneratorExit):  # the client has left
        for clock in clocks:
            clock.abort()
        raise
    except TimeoutError:
        raise too_late(job.timeout_s) from None
    except BaseExceptionGroup as group:
        raise _first(group) from None
    finally:
        everyone.cancel()
        await asyncio.gather(everyone, return_exceptions=True)


async def _choice(
    job: Job, index: int, request: Request, tokenizer: TextTokenizer, clock: ChoiceClock
) -> AsyncGenerator[Piece, None]:
    empty = held = Piece(index=index, text="", num_tokens=0)
    if job.echoes:
        # It goes out with the first token: until then a failure still has a status of its own.
        held = await _echoed(job, index, job.echoes[index], tokenizer)
    before = len(held.text)
    stream = TextStream(tokenizer, job.body.stops)
    clock.send()
    async with aclosing(job.send(request)) as chunks:
        async for chunk in chunks:
            clock.chunk(chunk)
            # The token that ended the answer has no text, whatever the tokenizer would make of it.
            num_texts = len(chunk.token_ids) - (chunk.finish_reason == "stop")
            text, offsets = held.text, []
            for place, token_id in enumerate(chunk.token_ids):
                offsets.append(before + stream.position)
                text += stream.push(token_id) if place < num_texts else ""
            if chunk.finish_reason is not None:
                text += stream.finish()
            reason: FinishReason | None = "stop" if stream.stopped else chunk.finish_reason
            held = replace(
                held,
                text=text,
                num_tokens=held.num_tokens + len(chunk.token_ids),
                logprobs=chunk.logprobs if held.logprobs is None else held.logprobs + (chunk.logprobs or ()),
                offsets=(*held.offsets, *offsets),
                prefilled=held.prefilled or chunk.prefilled,
                finish_reason=reason,
            )
            if reason is not None:
                clock.end(reason)
            if held.text or reason is not None:
                yield held
                held = empty
            if stream.stopped:
                return


async def _echoed(job: Job, index: int, echo: Echo, tokenizer: TextTokenizer) -> Piece:
    """The piece that repeats a prompt."""
    logprobs: list[TokenLogprobs | Unpredicted] = [Unpredicted(token_id=echo.token_ids[0])]
    if echo.request is not None:
        async with aclosing(job.send(echo.request)) as chunks:
            async for chunk in chunks:
                logprobs += chunk.logprobs or ()
    stream = TextStream(tokenizer)
    text, offsets = "", []
    for token_id in echo.token_ids:
        offsets.append(stream.position)
        text += stream.push(token_id)
    text += stream.finish()
    asked = job.body.num_logprobs() is not None
    return Piece(
        index=index,
        text=text if echo.text is None else echo.text,
        num_tokens=0,
        logprobs=tuple(logprobs) if asked else None,
        offsets=tuple(offsets),
    )


def _first(error: BaseException) -> BaseException:
    """The first failure in a group of them."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
