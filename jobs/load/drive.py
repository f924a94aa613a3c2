"""All streams of a load at once, from one event loop, each read as it comes."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp

from jobs.load.answer import Answer, Outcome, refusal
from jobs.load.asks import Ask, Asks
from jobs.load.record import Moment, Record, Run
from jobs.load.settings import Settings
from jobs.load.sse import Fault
from jobs.load.watch import Lag, Watch
from spts.errors import ConfigError

CONNECT_S = 10.0
MAX_WAIT_S = 60.0  # after a refusal, whatever Retry-After says
AFTER_S = 1.0  # from the end of the last request to the last look at the server
OnRecord = Callable[[Record], None]


class Endpoint:
    """An OpenAI endpoint under load. Use as an async context manager. key: of its API, if it asks for one."""

    def __init__(self, settings: Settings, key: str | None) -> None:
        self._settings = settings
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._begun_s = time.perf_counter()

    async def __aenter__(self) -> Endpoint:
        self.session = aiohttp.ClientSession(
            base_url=self._settings.url.rstrip("/") + "/",
            headers=self._headers,
            # A connection per stream, as of so many clients; never one that the server may have closed.
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=self._settings.timeout_s, sock_connect=CONNECT_S),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()

    async def model(self) -> str:
        """The model to ask: that of the settings if it is served, or the one that is.

        Raises ConfigError when the endpoint cannot be reached, refuses the key, has not the model, or has no
        room for the longest prompt and its answer.
        """
        url, wanted = self._settings.url, self._settings.model
        try:
            async with self.session.get("v1/models") as response:
                raw, status = await response.read(), response.status
                found = await response.json(content_type=None) if status == 200 else None
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise ConfigError(
                f"url must be an OpenAI endpoint that answers, got {url} ({error or type(error).__name__}); "
                "start it, or correct the address",
                field="url",
            ) from None
        try:
            served = {entry["id"]: entry for entry in found["data"]}  # type: ignore[index]
        except (TypeError, KeyError):
            raise ConfigError(
                f"url must be an OpenAI endpoint with a list of models, got {status} from {url}/v1/models: "
                f"{raw[:200].decode('utf-8', 'replace')!r}; correct it, or put its key into OPENAI_API_KEY",
                field="url",
            ) from None
        if wanted is None and len(served) == 1:
            wanted = next(iter(served))
        if wanted is None or wanted not in served:
            raise ConfigError(
                f"model must be one of {', '.join(served)}, got {wanted}; choose one", field="model"
            )
        longest, limit = (
            self._settings.longest + self._settings.max_tokens,
            served[wanted].get("max_model_len"),
        )
        if limit is not None and longest > limit:
            raise ConfigError(
                f"lengths must leave room for {self._settings.max_tokens} tokens in the context of {limit}, "
                f"got {self._settings.longest}; use at most {limit - self._settings.max_tokens}",
                field="lengths",
            )
        return wanted

    async def send(self, ask: Ask, model: str, *, due_s: float | None = None) -> tuple[Record, float]:
        """Sends one request and reads its answer to the end, whatever that is.

        due_s: when it should have been sent. Returns its record, and for how many seconds the endpoint asked
        not to come again.
        """
        settings = self._settings
        answer = Answer(chat=settings.chat, max_tokens=settings.max_tokens)
        outcome: Outcome = "fault"
        message: str | None = None
        wait_s = 0.0
        begun = self.now_s
        try:
            body = ask.body(settings, model)
            async with self.session.post(settings.path.lstrip("/"), json=body) as response:
                if response.status == 200 and response.content_type == "text/event-stream":
                    async for part in response.content.iter_any():
                        answer.feed(part, self.now_s - begun)
                    outcome = answer.close()
                    message = answer.error
                else:
                    retry_after = response.headers.get("Retry-After")
                    raw = await response.read()
                    if response.status == 200:
                        raise Fault(f"a stream was asked for, got {response.content_type}: {raw[:80]!r}")
                    outcome, message = refusal(response.status, retry_after, raw)
                    wait_s = float(retry_after or 0) if outcome == "refused" else 0.0
        except Fault as fault:
            outcome, message = "fault", str(fault)
        except TimeoutError:
            message = f"a request must end within {settings.timeout_s:g} s, got no end"
        except aiohttp.ClientError as error:
            message = f"the connection must hold to the end of an answer, got {error!r}"
        usage: Any = answer.usage or {}
        record = Record(
            index=ask.index,
            length=ask.length,
            task=ask.task.name,
            sent_s=_rounded(begun),
            late_s=_rounded(0.0 if due_s is None else max(0.0, begun - due_s)),
            end_s=_rounded(self.now_s - begun),
            outcome=outcome,
            message=message,
            times_s=tuple(map(_rounded, answer.times_s)),
            prompt_tokens=usage.get("prompt_tokens", 0),
            completion_tokens=usage.get("completion_tokens", 0),
            cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
            method=(usage.get("spts") or {}).get("method"),
            score=ask.score(answer.text) if outcome == "complete" else None,
        )
        return record, min(wait_s, MAX_WAIT_S)

    @property
    def now_s(self) -> float:
        """Seconds since the load began."""
        return time.perf_counter() - self._begun_s

    def begin(self) -> None:
        """The load begins now."""
        self._begun_s = time.perf_counter()


async def run(settings: Settings, asks: Asks, *, key: str | None, start: Callable[[], OnRecord]) -> Run:
    """Checks the endpoint with one request of each length, then puts it under load and reads all to the end.

    start: called as the load begins; what it gives is called with every record. Raises ConfigError when the
    endpoint cannot answer even those.
    """
    async with Endpoint(settings, key) as endpoint:
        model = await endpoint.model()
        for length, _ in settings.lengths:
            tried, _ = await endpoint.send(asks.of_length(length), model)
            if tried.outcome != "complete":
                raise ConfigError(
                    f"url must answer one prompt of {length} tokens before a load, got {tried.outcome}: "
                    f"{tried.message}; mend that first",
                    field="url",
                )
        records: list[Record] = []
        turns = _turns(settings)

        async def stream() -> None:
            """One client: a request, its answer to the end, the next one."""
            for index, due_s in turns:
                now_s = endpoint.now_s
                if settings.seconds is not None and max(now_s, due_s or 0.0) >= settings.seconds:
                    return
                if due_s is not None and due_s > now_s:
                    await asyncio.sleep(due_s - now_s)
                record, wait_s = await endpoint.send(asks.ask(index), model, due_s=due_s)
                records.append(record)
                on_record(record)
                if settings.seconds is not None:
                    wait_s = min(wait_s, max(0.0, settings.seconds - endpoint.now_s))
                await asyncio.sleep(wait_s)

        moments: list[Moment] = []
        on_record = start()
        endpoint.begin()
        watch = Watch(settings.url, endpoint.session, lambda: endpoint.now_s, moments)
        async with watch, Lag() as lag:
            async with asyncio.TaskGroup() as group:
                for _ in range(settings.streams):
                    group.create_task(stream())
            wall_s, longest_lag_s = endpoint.now_s, lag.longest_s
            await asyncio.sleep(AFTER_S)
        await watch.look()  # what is left when all is over
        return Run(
            settings=settings,
            wall_s=wall_s,
            lag_s=longest_lag_s,
            records=tuple(sorted(records, key=lambda record: record.index)),
            moments=tuple(moments),
        )


def _rounded(seconds: float) -> float:
    """To microseconds: files of many requests are for people too."""
    return round(seconds, 6)


def _turns(settings: Settings) -> Iterator[tuple[int, float | None]]:
    """(index, when it is due) of each request, taken by whichever stream is free. due: None = at once."""
    rng = random.Random(f"{settings.seed}/arrivals")
    due_s = 0.0
    index = 0
    while settings.requests is None or index < settings.requests:
        if settings.rate is not None:
            due_s += rng.expovariate(settings.rate)
        yield index, None if settings.rate is None else due_s
        index += 1
