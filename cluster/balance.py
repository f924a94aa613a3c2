"""Which replica of an engine a request goes to: the one with the fewest prompt tokens still to read, or,
within a bound, the one that lately read the same document. Standard library only; nothing is sent here."""

from __future__ import annotations

import threading
import time
import uuid
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b

# Documents are told apart by blocks of so many tokens; what prompts share beyond whole blocks is not seen.
BLOCK_TOKENS = 256
# Blocks remembered over all documents, the least recently used forgotten first: 16 million tokens in about
# 15 MB.
MAX_BLOCKS = 2**16
# A replica that has just failed is asked last for so long; by then it has said itself how it is.
AVOID_S = 5.0


class Balance:
    """One router's view of one engine's replicas. Safe to use from several threads.

    affinity_tokens: how many more tokens than the least loaded replica one may have ahead that read the
    document before; never more than it would save, the tokens that it has read. max_blocks: of BLOCK_TOKENS
    tokens, remembered. clock: seconds.

    Worked example, replicas a and b with nothing to do, affinity_tokens = 4096: a document of 8192 tokens
    goes to a. A question about it goes to a again while a has at most 4096 tokens more ahead than b, else to
    b, and from then on its document is b's. Any other prompt goes to whichever has fewer tokens ahead.
    """

    def __init__(
        self,
        *,
        affinity_tokens: int,
        max_blocks: int = MAX_BLOCKS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.router_id = uuid.uuid4().hex[:12]
        self._affinity_tokens = affinity_tokens
        self._max_blocks = max_blocks
        self._clock = clock
        self._lock = threading.Lock()
        # Tokens of the prompts that this router sent to each replica and that have had no token back.
        self._ahead: Counter[str] = Counter()
        self._readers: OrderedDict[bytes, str] = OrderedDict()
        self._avoided: dict[str, float] = {}
        self._turns: dict[str, int] = {}
        self._turn = 0

    def open(self, token_ids: Sequence[int], num_tokens: int | None = None) -> Placement:
        """A prompt that is to go somewhere. To be closed. num_tokens: to read, if not the prompt's alone."""
        return Placement(self, token_ids, len(token_ids) if num_tokens is None else num_tokens)

    def _rank(
        self, placement: Placement, replicas: Mapping[str, int | None], blocks: Sequence[bytes]
    ) -> list[str]:
        self._avoided = {name: until for name, until in self._avoided.items() if name in replicas}
        self._turns = {name: turn for name, turn in self._turns.items() if name in replicas}
        self._take_back(placement)
        now = self._clock()
        ahead = {name: self._ahead[name] + (others or 0) for name, others in replicas.items()}
        shut = {
            name
            for name, others in replicas.items()
            if others is None or now < self._avoided.get(name, float("-inf")) or name in placement.refused_by
        }
        placement.others = {*replicas} - shut
        # With the same work ahead, whichever was chosen longest ago: documents spread over idle replicas.
        ranked = sorted(replicas, key=lambda name: (name in shut, ahead[name], self._turns.get(name, -1)))
        open_to_all = {name: ahead[name] for name in replicas if name not in shut} or ahead
        reader = self._reader(blocks, open_to_all)
        if reader is not None:
            ranked.remove(reader)
            ranked.insert(0, reader)
        return ranked

    def _reader(self, blocks: Sequence[bytes], ahead: Mapping[str, int]) -> str | None:
        """The replica that read most of a prompt's first blocks, if it has little enough ahead."""
        least = min(ahead.values(), default=0)
        for num_blocks in range(len(blocks), 0, -1):
            reader = self._readers.get(blocks[num_blocks - 1])
            bound = min(self._affinity_tokens, num_blocks * BLOCK_TOKENS)
            if reader is not None and reader in ahead and ahead[reader] - least <= bound:
                return reader
        return None

    def _give(self, placement: Placement, replica: str, blocks: Sequence[bytes]) -> None:
        self._take_back(placement)
        placement.replica = replica
        self._ahead[replica] += placement.num_tokens
        self._turn += 1
        self._turns[replica] = self._turn
        for block in reversed(blocks):  # the first blocks last: most prompts share them
            self._readers[block] = replica
            self._readers.move_to_end(block)
        while len(self._readers) > self._max_blocks:
            self._readers.popitem(last=False)

    def _take_back(self, placement: Placement) -> None:
        replica, placement.replica = placement.replica, None
        if replica is not None:
            self._ahead[replica] -= placement.num_tokens
            self._ahead += Counter()  # drops what is 0, so that replicas long gone are not kept


class Placement:
    """Where one prompt goes. Its tokens count as ahead of a replica from `rank` to `close`.

    num_tokens: to read. replica: where it is now; None = nowhere. refused_by: replicas that were full.
    others: those that might take it, when it was ranked.
    """

    def __init__(self, balance: Balance, token_ids: Sequence[int], num_tokens: int) -> None:
        self._balance = balance
        self._token_ids = token_ids
        self._blocks: list[bytes] = []
        self._closed = False
        self.num_tokens = num_tokens
        self.replica: str | None = None
        self.refused_by: set[str] = set()
        self.others: set[str] = set()

    @property
    def router_id(self) -> str:
        """Whose prompt it is: the name of the router in what replicas report."""
        return self._balance.router_id

    def rank(self, replicas: Mapping[str, int | None]) -> list[str]:
        """`replicas`, best first; the prompt now counts for the best one.

        replicas: for each, the tokens that other routers have there; None = it says that it is not ready.
        Those, replicas that have just failed and those that were full come last.
        """
        # With a single replica there is no choice to make, and digests of long prompts take milliseconds.
        if len(replicas) > 1 and not self._blocks:
            self._blocks = block_digests(self._token_ids)
        with self._balance._lock:
            ranked = self._balance._rank(self, replicas, self._blocks)
            if ranked and not self._closed:
                self._balance._give(self, ranked[0], self._blocks)
            return ranked

    def move(self, replica: str) -> None:
        """It was sent to `replica`, whatever `rank` advised."""
        with self._balance._lock:
            if replica != self.replica and not self._closed:
                self._balance._give(self, replica, self._blocks)

    def fail(self) -> None:
        """The replica that had it could not answer: close, and keep others away from there for a while."""
        with self._balance._lock:
            if self.replica is not None:
                self._balance._avoided[self.replica] = self._balance._clock() + AVOID_S
        self.close()

    def refuse(self) -> bool:
        """The replica that had it is full. Whether to rank it again: another one may have room."""
        with self._balance._lock:
            replica = self.replica
            self._balance._take_back(self)
            if replica is None or replica in self.refused_by:
                return False
            self.refused_by.add(replica)
            return not self.others <= self.refused_by

    def close(self) -> None:
        """The prompt has been read, or nobody wants it any more. Again: nothing."""
        with self._balance._lock:
            self._closed = True
            self._balance._take_back(self)


def block_digests(token_ids: Sequence[int]) -> list[bytes]:
    """One digest for each whole block of BLOCK_TOKENS tokens, of everything up to its end.

    Prompts of 600 and 700 tokens that begin with the same 512 have the same two digests.
    """
    block_bytes = 8 * BLOCK_TOKENS
    data = array("q", token_ids).tobytes()
    digests: list[bytes] = []
    latest = b""
    for start in range(0, len(data) - block_bytes + 1, block_bytes):
        latest = blake2b(latest + data[start : start + block_bytes], digest_size=16).digest()
        digests.append(latest)
    return digests
