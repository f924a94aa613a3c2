"""From a checked body to engine requests: choose pool and method, check, send, and send elsewhere if need
be."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from cluster.admission import check_request
from cluster.answers import Answer, Endpoint, Usage
from cluster.api import GenerationBody
from cluster.choices import Echo, Job
from cluster.config import AppConfig, PoolConfig, parse_method
from cluster.errors import ApiError
from cluster.protocol import Chunk, EngineError, EngineInfo, EngineStats, Request
from cluster.tokenizer import TextTokenizer
from spts.methods import Method
from spts.sampling import Sampling
from spts.schedule import Schedule

logger = logging.getLogger(__name__)

# Seconds that an engine may take to say that it is there; a replica that is still loading says nothing.
ANSWER_S = 5.0
# Seconds for which /ready says the same again: it asks every replica, and needs no key.
READY_AGE_S = 1.0
# Tokens of prompts from which on they are checked in a thread, as streams must not wait for the milliseconds.
MANY_TOKENS = 1 << 16
# The largest attention_density below 1 that a request may bring: on a GPU, more of it is slower than dense.
MAX_DENSITY = 0.5

Value = TypeVar("Value")


class EngineClient(Protocol):
    """What the router needs from an engine; `cluster.engine.Engine` is one, and so is a handle to a
    deployment of it."""

    async def info(self) -> EngineInfo:
        """See `Engine.info`."""

    async def ready(self) -> bool:
        """See `Engine.ready`."""

    async def stats(self) -> EngineStats:
        """See `Engine.stats`."""

    def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """See `Engine.generate`."""


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
        self._asks: dict[str, asyncio.Task[EngineError | None]] = {}
        self._ready: dict[str, bool] = {}
        self._ready_at = -math.inf
        self._ready_lock = asyncio.Lock()

    @property
    def max_context(self) -> int | None:
        """Longest prompt plus answer of any engine, in tokens; None until every engine has told."""
        return self.known_context if len(self._infos) == len(self._engines) else None

    @property
    def known_context(self) -> int:
        """The same of the engines that have told, 0 if none has."""
        return max((info.max_context for info in self._infos.values()), default=0)

    async def longest(self, *, wait: bool = False) -> int | None:
        """`max_context`; engines that have not told are asked. wait: for all of them; else for none, as soon
        as one has told. Raises EngineError "unavailable" while no engine can tell."""
        for name in self._engines:
            ask = self._asks.get(name)
            if name not in self._infos and (ask is None or ask.done()):
                # In a context of its own: it is no part of the request that happens to come first.
                self._asks[name] = asyncio.create_task(self._ask(name), context=contextvars.Context())
        asks = waiting = {*self._asks.values()}
        first = asyncio.ALL_COMPLETED if wait else asyncio.FIRST_COMPLETED
        while waiting and (wait or not self._infos):
            _, waiting = await asyncio.wait(waiting, return_when=first)
        if not self._infos:
            raise next(error for ask in asks if (error := _failure(ask)))
        return self.max_context

    async def ready(self) -> dict[str, bool]:
        """For every engine, whether it produces tokens now, or did `READY_AGE_S` ago."""
        async with self._ready_lock:
            if time.monotonic() - self._ready_at >= READY_AGE_S:
                answers = await asyncio.gather(*map(self._is_ready, self._engines))
                self._ready = dict(zip(self._engines, answers, strict=True))
                self._ready_at = time.monotonic()
            return self._ready

    async def stats(self) -> dict[str, EngineStats]:
        """What each engine has to do; those that do not answer are left out."""
        answers = await asyncio.gather(
            *(_soon(engine.stats()) for engine in self._engines.values()), return_exceptions=True
        )
        stats = {}
        for name, answer in zip(self._engines, answers, strict=True):
            if isinstance(answer, EngineStats):
                stats[name] = answer
            elif not isinstance(answer, EngineError):  # one says that the engine is not there
                logger.error("engine %s has no stats: %r", name, answer)
        return stats

    # -- what to send where ----------------------------------------------------------------------------------

    def check_choices(self, num_prompts: int, n: int) -> None:
        """Raise ApiError for more choices than one request may ask for, or none."""
        if not 1 <= num_prompts * n <= self._config.max_prompts:
            raise ApiError(
                "invalid_request",
                f"prompts x n must be from 1 to {self._config.max_prompts}, got {num_prompts} x {n}; "
                "send fewer",
                "n" if n > 1 else "prompt",
            )

    async def job(
        self,
        body: GenerationBody,
        prompts: list[tuple[int, ...]],
        endpoint: Endpoint,
        *,
        request_id: str,
        arrived: float,
    ) -> Job:
        """What to send for a body whose prompts are `prompts`, in tokens. Checks everything, computes
        nothing."""
        n = body.n or 1
        self.check_choices(len(prompts), n)
        activity_bins = (body.spts.activity if body.spts else None) or 0
        if activity_bins and len(prompts) * n > 1:
            raise ApiError(
                "invalid_request",
                f"spts.activity must be asked for one choice of one prompt, got {len(prompts)} x {n}; send "
                "one",
                "spts.activity",
            )
        limit = body.token_limit()
        # One pool for a batch, by its longest prompt: one HTTP request, one engine, one method in its usage.
        pool, method = self._pool(max(map(len, prompts)), limit or 1)
        most = self._config.engines[pool.engine].max_requests
        if len(prompts) * n > most:  # a 503 would have it sent again, for ever
            raise ApiError(
                "invalid_request",
                f"prompts x n must be at most {most}, which is all that engine {pool.engine} may run and "
                f"have wait at once, got {len(prompts)} x {n}; send fewer",
                "n" if n > 1 else "prompt",
            )
        method = self._chosen_method(body, method)
        info = await self._info(pool.engine)
        stop_token_ids = self._tokenizer.special_ids(body.stops)  # of text that no answer's text has
        requests = []
        for index, token_ids in enumerate(prompt for prompt in prompts for _ in range(n)):
            request = Request(
                request_id=f"{request_id}-{index}",
                token_ids=token_ids,
                method=method,
                # At least one, so that a prompt that fills the context is refused, with counts.
                max_new_tokens=max(1, min(self._config.default_max_tokens, info.max_context - len(token_ids)))
                if limit is None
                else limit,
                sampling=_sampling(body, index, stop_token_ids),
                activity_bins=activity_bins,
                ignore_eos=bool(body.ignore_eos),
            )
            requests.append(request)
        await _check(requests[::n], info)  # the choices of a prompt differ in nothing that is checked
        texts = [text for text in body.echoed for _ in range(n)]
        echoes = [self._echo(request, text, info) for request, text in zip(requests, texts, strict=False)]
        job = Job(
            send=lambda request: self._send(pool.engine, request, job),
            requests=requests,
            echoes=echoes,
            answer=Answer(
                endpoint=endpoint, request_id=request_id, model=body.model, tokenizer=self._tokenizer
            ),
            usage=Usage(prompt_tokens=sum(map(len, prompts)), method=method.name, choices_per_prompt=n),
            body=body,
            timeout_s=self._config.request_timeout_s,
            arrived=arrived,
        )
        return job

    def _echo(self, request: Request, text: str | None, info: EngineInfo) -> Echo:
        """The prompt of `request`, to be repeated; its log-probabilities are the dense model's only."""
        if request.method.name != "dense":
            raise ApiError(
                "invalid_request",
                f"echo must only be given with the method dense, got {request.method.name}: a prompt's own "
                "log-probabilities do not depend on what is skipped, and would say nothing about it; "
                'add "spts": {"method": "dense"}',
                "echo",
            )
        token_ids = request.token_ids
        follow = None
        if request.sampling.logprobs is not None and len(token_ids) > 1:
            if len(token_ids) > self._config.max_echo_tokens:
                raise ApiError(
                    "invalid_request",
                    f"echo with logprobs must be of a prompt of at most {self._config.max_echo_tokens} "
                    f"tokens, got {len(token_ids)}; send less",
                    "echo",
                )
            follow = replace(
                request,
                request_id=f"{request.request_id}-echo",
                token_ids=token_ids[:1],
                follow=token_ids[1:],
                max_new_tokens=len(token_ids) - 1,
                sampling=Sampling(logprobs=request.sampling.logprobs),
                activity_bins=0,
            )
            check_request(follow, info)
        return Echo(text=text, token_ids=token_ids, request=follow)

    def _pool(self, prompt_tokens: int, new_tokens: int) -> tuple[PoolConfig, Method]:
        """The first pool whose prompts may be this long and whose engine, if it has told, has room for the
        answer too; else the first whose prompts may be this long. The last one takes any."""
        pools = [
            (pool, method)
            for pool, method in zip(self._config.pools, self._methods, strict=True)
            if pool.max_prompt_tokens is None or prompt_tokens <= pool.max_prompt_tokens
        ]
        for pool, method in pools:
            info = self._infos.get(pool.engine)
            if info is None or prompt_tokens + new_tokens <= info.max_context:
                return pool, method
        return pools[0]

    def _chosen_method(self, body: GenerationBody, of_pool: Method) -> Method:
        """The request's own method, else the pool's. What it does not say is as the last pool of that method
        has it; the schedule, if there is no such pool, as the last pool with one."""
        chosen = body.spts
        if chosen is None or chosen.method is None:
            if chosen is not None and (chosen.schedule is not None or chosen.seed is not None):
                raise ApiError(
                    "invalid_request",
                    "spts.method must be given with a schedule or a seed, got null; add it",
                    "spts.method",
                )
            return of_pool
        data: dict[str, Any] = {"name": chosen.method}
        if chosen.method != "dense":
            configured = [pool.method for pool in self._config.pools if "schedule" in pool.method]
            own = [method for method in configured if method["name"] == chosen.method]
            if own:
                data = dict(own[-1])
            elif configured:
                data["schedule"] = configured[-1]["schedule"]
        if chosen.seed is not None:
            data["seed"] = chosen.seed
        if chosen.schedule is not None:
            data["schedule"] = chosen.schedule
        method = parse_method(data)
        self._check_limits(method, own_schedule=chosen.schedule is not None)
        return method

    def _check_limits(self, method: Method, *, own_schedule: bool) -> None:
        """Raise ApiError for a choice that the configuration does not leave to requests."""
        allowed = self._config.allowed_methods
        if method.name not in allowed:
            names = ", ".join(allowed) or "none: this server chooses by the prompt's length"
            raise ApiError(
                "invalid_request",
                f"spts.method must be one of {names}, got {method.name!r}; choose one of them",
                "spts.method",
            )
        if not own_schedule:
            return
        least, most = self._config.min_budget_tokens, self._config.most_budget_tokens
        schedule: Schedule = method.schedule  # type: ignore[attr-defined]  # dense brought none
        if MAX_DENSITY < schedule.attention_density < 1:
            raise ApiError(
                "invalid_request",
                f"spts.schedule.attention_density must be at most {MAX_DENSITY}, or 1, got "
                f"{schedule.attention_density}; more costs more than reading every key",
                "spts.schedule.attention_density",
            )
        for stage in schedule.stages:
            budget = min(stage.active_tokens, stage.keep_tokens or stage.active_tokens)
            if budget < least:
                raise ApiError(
                    "invalid_request",
                    f"spts.schedule must have budgets of at least {least} tokens, got {budget} up to layer "
                    f"{stage.last_layer}; raise it",
                    "spts.schedule",
                )
            # A layer that skips is computed at once (`spts.prefill`): with a budget of nearly the whole
            # prompt, running answers would wait for a whole dense layer.
            if most is not None and stage.active_tokens > most:
                raise ApiError(
                    "invalid_request",
                    f"spts.schedule.active_tokens must be at most {most}, got {stage.active_tokens} up to "
                    f"layer {stage.last_layer}; lower it, or choose dense",
                    "spts.schedule.active_tokens",
                )

    # -- engines ---------------------------------------------------------------------------------------------

    async def _send(self, name: str, request: Request, job: Job) -> AsyncGenerator[Chunk, None]:
        """The answer of the engine `name`; of another replica or engine, if it is lost before its first
        token. An engine gets the time that is left of the job's."""
        may_move = True  # once, and not after a token
        while True:
            timed = replace(request, deadline_s=job.left_s)
            try:
                async with aclosing(self._engines[name].generate(timed)) as chunks:
                    async for chunk in chunks:
                        may_move = False
                        yield chunk
                return
            except EngineError as error:
                may_move = may_move and error.kind == "unavailable"
                other = await self._elsewhere(name, request) if may_move else None
                if other is None:
                    raise
                logger.warning("request %s goes to engine %s: %s", request.request_id, other, error)
                name, may_move = other, False

    async def _elsewhere(self, name: str, request: Request) -> str | None:
        """The engine itself if it has another replica that is ready, else another engine that is ready and
        has a pool for prompts of this length, or None."""
        if self._config.engines[name].max_replicas > 1 and await self._is_ready(name):
            return name
        for pool in self._config.pools:
            fits = pool.max_prompt_tokens is None or len(request.token_ids) <= pool.max_prompt_tokens
            if fits and pool.engine != name and await self._is_ready(pool.engine):
                try:
                    await _check([request], self._infos[pool.engine])
                except EngineError:
                    continue
                return pool.engine
        return None

    async def _info(self, name: str) -> EngineInfo:
        if name not in self._infos:
            self._infos[name] = await _soon(self._engines[name].info())
        return self._infos[name]

    async def _ask(self, name: str) -> EngineError | None:
        """Have the engine say what it runs; returns why it does not."""
        try:
            await self._info(name)
        except EngineError as error:
            return error
        return None

    async def _is_ready(self, name: str) -> bool:
        try:
            await self._info(name)
            return await _soon(self._engines[name].ready())
        except EngineError:
            return False


async def _check(requests: Sequence[Request], info: EngineInfo) -> None:
    """`check_request` of each."""

    def check() -> None:
        for request in requests:
            check_request(request, info)

    if sum(len(request.token_ids) for request in requests) < MANY_TOKENS:
        check()
    else:
        await asyncio.to_thread(check)


def _failure(ask: asyncio.Task[EngineError | None]) -> EngineError | None:
    if ask.cancelled():
        return EngineError("unavailable", "the engine was not asked to the end; retry later")
    return ask.result()


async def _soon(answer: Awaitable[Value]) -> Value:
    try:
        return await asyncio.wait_for(answer, ANSWER_S)
    except TimeoutError:
        raise EngineError("unavailable", "the engine is loading or restarting; retry later") from None


def _sampling(body: GenerationBody, index: int, stop_token_ids: tuple[int, ...]) -> Sampling:
    """OpenAI's defaults where the body says nothing. Choices of one seed differ by their index, and
    repeat."""
    return Sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k or 0),
        seed=None if body.seed is None else (body.seed + index + 2**63) % 2**64 - 2**63,
        stop_token_ids=stop_token_ids,
        logprobs=body.num_logprobs(),
    )
