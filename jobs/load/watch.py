"""The server while it is under load: memory of its processes if they are on this machine, and its own gauges.

And this client: how late it was in looking at its clock, which no measured time is better than.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self
from urllib.parse import urlsplit

import aiohttp
import psutil
from prometheus_client.parser import text_string_to_metric_families

from jobs.load.record import Moment

EVERY_S = 1.0
TICK_S = 0.02
GAUGES = (
    *("num_requests_running", "num_requests_waiting", "num_requests_held", "queued_prefill_tokens"),
    *("kv_cache_bytes", "kv_reserved_bytes", "kv_document_bytes"),
)
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
# "ray::Shard.step", "ray::ServeReplica:spts:Engine-default.handle_request" -> Shard, Engine-default
_TITLE = re.compile(r"ray::(?:ServeReplica:[^:]*:)?([\w-]+)")


class _Repeated:
    """Something done again and again beside the load, while the context lasts."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s

    async def look(self) -> None:
        """Once."""
        raise NotImplementedError

    async def _run(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(self._every_s)

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task


class Watch(_Repeated):
    """Adds a `Moment` every second to `moments`. now_s: the load's clock."""

    def __init__(
        self,
        url: str,
        session: aiohttp.ClientSession,
        now_s: Callable[[], float],
        moments: list[Moment],
    ) -> None:
        super().__init__(EVERY_S)
        self._session = session
        self._now_s = now_s
        self._moments = moments
        self._root = server_process(url)
        self._has_metrics = True

    async def look(self) -> None:
        at_s = self._now_s()
        memory = {} if self._root is None else await asyncio.to_thread(memory_by_kind, self._root)
        self._moments.append(Moment(at_s=round(at_s, 3), memory=memory, gauges=await self._gauges()))

    async def _gauges(self) -> dict[str, float]:
        """Of /metrics, summed over engines; empty where there are none, or the server is too busy to say."""
        if not self._has_metrics:
            return {}
        try:
            async with self._session.get("metrics", timeout=aiohttp.ClientTimeout(total=5)) as response:
                text = await response.text()
                self._has_metrics = response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return {}
        return gauges(text) if self._has_metrics else {}


class Lag(_Repeated):
    """longest_s: the most by which a short sleep was too long, so far."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.longest_s = 0.0

    async def look(self) -> None:
        begun = time.perf_counter()
        await asyncio.sleep(TICK_S)
        self.longest_s = max(self.longest_s, time.perf_counter() - begun - TICK_S)


def gauges(text: str) -> dict[str, float]:
    """Those of GAUGES in Prometheus' text form, whatever their prefix, summed over their labels."""
    found: dict[str, float] = {}
    try:
        for family in text_string_to_metric_families(text):
            name = family.name.rpartition(":")[2]
            if name in GAUGES:
                found[name] = sum(sample.value for sample in family.samples)
    except ValueError:  # not Prometheus' form: another server's page
        return {}
    return found


def server_process(url: str) -> Any:
    """The process that listens at a loopback address; of a Ray cluster, the node's, below which are all that
    serve. None when it is elsewhere or another user's."""
    parts = urlsplit(url)
    if parts.hostname not in _LOOPBACK:
        return None
    try:
        pids = {
            each.pid
            for each in psutil.net_connections(kind="tcp")
            if each.status == psutil.CONN_LISTEN and each.laddr.port == parts.port and each.pid
        }
        if not pids:
            return None
        process = psutil.Process(min(pids))
        return next((each for each in process.parents() if each.name() == "raylet"), process)
    except psutil.Error:
        return None


def memory_by_kind(root: Any) -> dict[str, int]:
    """Resident bytes less shared ones, of a process and all below it, by what the processes are."""
    found: dict[str, int] = {}
    with suppress(psutil.NoSuchProcess):
        for process in (root, *root.children(recursive=True)):
            with suppress(psutil.Error):
                memory = process.memory_info()
                kind = _kind(process)
                found[kind] = found.get(kind, 0) + memory.rss - memory.shared
    return found


def _kind(process: Any) -> str:
    title = (process.cmdline() or [process.name()])[0]
    match = _TITLE.match(title)
    return match[1] if match else str(process.name())
