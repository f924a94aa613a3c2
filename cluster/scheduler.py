"""Who runs in the next step, and in which memory. Pure Python: no torch, no ray, no clock.

A request is waiting, then in prefill, then running. Its bytes are reserved when its prefill starts and are
free when it is released. What is left of the limit holds documents (`cluster.documents`), which go when a
request needs their room.

Every running request decodes in every step, and every step runs at most one slice of one prefill. The oldest
prefill goes on until it ends; beside it there may be one that has less to do than the oldest has left, what
documents spare it aside, and then the two take turns. So a short prompt never waits for all of a long one,
and a long one gets at least every other slice, whoever comes. Requests start in the order they came in, but
for those that start beside a prefill. When no prefill is under way, the first in the queue is the next to
start, and nobody passes it while it waits for memory: running requests end, so it starts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cluster.documents import LEAST_TOKENS, Document, Documents, Layers
from cluster.protocol import EngineError
from spts.cost import ModelShape, reused_flops


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What a request takes.

    num_tokens: to read, those to follow among them. kv_bytes: the most it holds on a rank at any time. flops:
    until its first token, nothing reused. layers: those that run all of its tokens; document_bytes: of one
    token kept after them, on a rank; block_tokens: what is kept or reused is a multiple of it
    (`Schedule.block_tokens`), prefix_tokens too, which is else as in `cluster.protocol.Request`.
    """

    request_id: str
    token_ids: tuple[int, ...]
    num_tokens: int
    kv_bytes: int
    flops: int
    layers: Layers = (0, 1.0)
    document_bytes: int = 0
    block_tokens: int = 1
    prefix_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Start:
    """A prefill that begins. reuse: (a document, tokens of it to begin with). keep: (name of the document to
    leave, first tokens of the prompt that it holds)."""

    request_id: str
    reuse: tuple[int, int] | None = None
    keep: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One step. forget: documents that are dropped first. start: the prefill that begins with it. advance:
    the request whose prefill gets a slice. decode: running requests, in the order their prefills ended."""

    forget: tuple[int, ...] = ()
    start: Start | None = None
    advance: str | None = None
    decode: tuple[str, ...] = ()


@dataclass(kw_only=True)
class _Prefill:
    """reads: the document it began with. leaves: the one it will leave."""

    demand: Demand
    flops_left: int
    reads: Document | None
    leaves: Document | None


class Scheduler:
    """Admits, plans and releases requests.

    shape: the model's. kv_bytes_limit: what requests and documents may take on a rank.
    slice_flops: of a prefill's slice, None = a prefill is never sliced. max_running: requests in prefill or
    running at once. max_waiting: requests that may queue beyond them. max_waiting_tokens: prompt tokens of
    those that wait; a prompt longer than that may wait alone.
    """

    def __init__(
        self,
        *,
        shape: ModelShape,
        documents: Documents,
        kv_bytes_limit: int,
        slice_flops: int | None,
        max_running: int,
        max_waiting: int,
        max_waiting_tokens: int,
    ) -> None:
        self._shape = shape
        self._documents = documents
        self._limit = kv_bytes_limit
        self._slice_flops = slice_flops
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._max_waiting_tokens = max_waiting_tokens
        self._waiting: dict[str, Demand] = {}
        self._left: dict[str, tuple[int, int]] = {}  # of those that wait: version of the documents, FLOP
        self._prefills: dict[str, _Prefill] = {}
        self._running: dict[str, Demand] = {}
        self._ended: list[_Prefill] = []
        self._second_next = False
        self.reserved_bytes = 0

    @property
    def num_waiting(self) -> int:
        """Requests admitted whose prefill has not begun."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests in prefill or running."""
        return len(self._prefills) + len(self._running)

    @property
    def document_bytes(self) -> int:
        """Bytes of the documents on each rank."""
        return self._documents.num_bytes

    @property
    def queued_flops(self) -> int:
        """FLOP of the prefills that have not begun, and what is left of those that have; without what
        documents spare them."""
        waiting = sum(self._flops(demand) for demand in self._waiting.values())
        return waiting + sum(prefill.flops_left for prefill in self._prefills.values())

    def admit(self, demand: Demand) -> None:
        """Queue a new request, which fits into an empty engine (`cluster.admission.check_request`). Raises
        EngineError "overloaded" when the queue is full."""
        assert demand.kv_bytes <= self._limit, "it would wait for ever, and all behind it"
        limit = self._max_running + self._max_waiting
        if self.num_running + self.num_waiting >= limit:
            raise EngineError(
                "overloaded",
                f"requests in flight must be at most {limit} ({self._max_running} running and "
                f"{self._max_waiting} waiting), got one more; retry later",
            )
        tokens = sum(each.num_tokens for each in self._waiting.values())
        if tokens and tokens + demand.num_tokens > self._max_waiting_tokens:
            raise EngineError(
                "overloaded",
                f"prompt tokens waiting must be at most {self._max_waiting_tokens}, got {tokens} and "
                f"{demand.num_tokens} more; retry later",
            )
        self._waiting[demand.request_id] = demand

    def release(self, request_id: str) -> None:
        """Forget a request wherever it is: finished, aborted or failed. Unknown ids are ignored."""
        if request_id in self._waiting:
            self._take(request_id)
        elif request_id in self._prefills:
            prefill = self._prefills.pop(request_id)
            self._ended.append(prefill)  # until the ranks have heard of it, they read and leave documents
            self.reserved_bytes -= prefill.demand.kv_bytes
        elif request_id in self._running:
            self.reserved_bytes -= self._running.pop(request_id).kv_bytes

    def prefilled(self, request_id: str) -> None:
        """The prefill has ended: the request decodes from the next step on."""
        prefill = self._prefills.pop(request_id)
        self._running[request_id] = prefill.demand
        if prefill.reads is not None:
            self._documents.use(prefill.reads, -1)

    def kept(self, document: int) -> None:
        """The ranks hold a document that a prefill was to leave."""
        self._documents.keep(document)

    def schedule(self) -> Plan | None:
        """The next step, or None when there is nothing to do. The caller carries it out, and tells what came
        of it (`kept`, `prefilled`, `release`), before it asks again.

        Worked example: requests a, then b of the same size, slices of half a prefill, no end in sight.

            step 1: start a, advance a                    step 3: start b, advance b, decode (a)
            step 2: advance a; a's first token            step 4: advance b, decode (a); b's first token
                                                          step 5: decode (a, b)

        A short c that comes after step 1 starts in step 2, beside a, and has its first token then.
        """
        for prefill in self._ended:
            if prefill.reads is not None:
                self._documents.use(prefill.reads, -1)
            if prefill.leaves is not None:
                self._documents.abandon(prefill.leaves.name)
        self._ended = []
        decode = tuple(self._running)
        start = self._start()
        advance = self._turn()
        forget = self._documents.take_forgotten()
        if advance is None and not decode and not forget:
            return None
        return Plan(forget=forget, start=start, advance=advance, decode=decode)

    def _turn(self) -> str | None:
        if not self._prefills:
            return None
        oldest, *beside = self._prefills
        chosen = beside[0] if beside and self._second_next else oldest
        self._second_next = chosen == oldest
        if self._slice_flops is not None:
            prefill = self._prefills[chosen]
            prefill.flops_left = max(0, prefill.flops_left - self._slice_flops)
        return chosen

    def _start(self) -> Start | None:
        if not self._waiting or self.num_running >= self._max_running:
            return None
        first = next(iter(self._waiting.values()))
        candidates: Iterable[Demand] = [first]
        if self._prefills:
            (oldest, *beside) = self._prefills.values()
            # Whoever starts goes at once: in the oldest's turn nobody does.
            if beside or not self._second_next or self._slice_flops is None:
                return None
            candidates = (each for each in self._waiting.values() if self._flops(each) < oldest.flops_left)
        for demand in candidates:
            if self._fits(demand):
                return self._begin(demand)
        return None

    def _fits(self, demand: Demand) -> bool:
        documents = self._documents
        in_use = documents.num_bytes - documents.free_bytes
        return self.reserved_bytes + demand.kv_bytes + in_use <= self._limit

    def _take(self, request_id: str) -> None:
        """Out of the queue."""
        del self._waiting[request_id]
        self._left.pop(request_id, None)

    def _flops(self, demand: Demand) -> int:
        """What a request that waits would compute if it started now."""
        version, flops = self._left.get(demand.request_id, (None, 0))
        if version != self._documents.version:
            _, length = self._find(demand)
            flops = demand.flops - reused_flops(self._shape, length, *demand.layers)
            self._left[demand.request_id] = (self._documents.version, flops)
        return flops

    def _find(self, demand: Demand) -> tuple[Document | None, int]:
        """What it could begin with: given tokens as they are, else as many as are known, if that is worth
        it."""
        limit = least = demand.prefix_tokens
        if limit is None or least is None:
            limit, least = len(demand.token_ids) - 1, LEAST_TOKENS
        return self._documents.find(demand.token_ids, demand.layers, limit, least, demand.block_tokens)

    def _begin(self, demand: Demand) -> Start:
        """Reserve the memory of a request that fits, and see what it can reuse and what it will leave."""
        documents = self._documents
        self._take(demand.request_id)
        self.reserved_bytes += demand.kv_bytes
        given = demand.prefix_tokens
        limit = len(demand.token_ids) - 1 if given is None else given
        reads, length = self._find(demand)
        if reads is not None:
            documents.use(reads, 1)
        room = min(documents.max_bytes, self._limit - self.reserved_bytes)
        if reads is not None and documents.num_bytes - documents.free_bytes > room:
            documents.use(reads, -1)  # there is no room for both
            reads, length = None, 0
        documents.shrink(room)
        leaves = None
        in_use = documents.num_bytes - documents.free_bytes
        depth, _ = demand.layers
        if depth and given is None:  # as much as there is room for
            limit = min(limit, length + (room - in_use) // demand.document_bytes)
            limit -= limit % demand.block_tokens
        num_bytes = (limit - length) * demand.document_bytes
        enough = limit - length >= (LEAST_TOKENS if given is None else 1)
        if depth and enough and num_bytes <= room - in_use:
            documents.shrink(room - num_bytes)
            leaves = documents.reserve(
                demand.token_ids[length:limit], demand.layers, reads, length, num_bytes
            )
        self._prefills[demand.request_id] = _Prefill(
            demand=demand,
            flops_left=demand.flops - reused_flops(self._shape, length, *demand.layers),
            reads=reads,
            leaves=leaves,
        )
        return Start(
            request_id=demand.request_id,
            reuse=None if reads is None else (reads.name, length),
            keep=None if leaves is None else (leaves.name, limit),
        )
