"""FakeShard and FakeEngine: the real interfaces without a model. The answer to a prompt is the prompt, over
and over.

So a test chooses the answer's tokens, and its text, by choosing the prompt. Token 0 is the end token.
"""

from __future__ import annotations

import asyncio
import time

from cluster.config import EngineConfig
from cluster.engine import Engine
from cluster.protocol import (
    Agreement,
    EngineError,
    EngineInfo,
    NewToken,
    Prefilled,
    Request,
    Step,
    StepOutput,
)
from spts import cost
from spts.sampling import TokenLogprobs

SHAPE = cost.ModelShape(
    num_layers=6,
    hidden_size=64,
    intermediate_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=298,
)
MAX_CONTEXT = 512
EOS = 0
PEAK_BYTES = 1000  # device memory of a request in flight


def info(config: EngineConfig) -> EngineInfo:
    return EngineInfo(
        model_name="fake",
        fingerprint="0" * 64,
        shape=SHAPE,
        max_context=config.max_model_len or MAX_CONTEXT,
        vocab_size=SHAPE.vocab_size,
        eos_token_ids=(EOS,),
        dtype=config.dtype,
        device=config.device,
        world_size=config.tensor_parallel_size,
        versions={},
        has_proxies=True,
        attention="none",
        accelerator="fake accelerator" if config.device == "cuda" else None,
    )


class FakeShard:
    """`cluster.shard.Shard` without weights: keeps the same books, so that a wrong call order fails here
    too."""

    def __init__(self, config: EngineConfig, rank: int) -> None:
        self._config = config
        self._rank = rank
        self._layers_left: dict[str, int] = {}
        self._requests: dict[str, Request] = {}
        self._answers: dict[str, list[int]] = {}
        self._prefixes: set[tuple[object, ...]] = set()

    def host(self) -> tuple[str, int]:
        return ("127.0.0.1", 0)

    def load(self, address: tuple[str, int]) -> EngineInfo:
        return info(self._config)

    @property
    def num_cached(self) -> int:
        """Requests that hold cache."""
        return len(self._requests)

    def step(self, step: Step) -> StepOutput | None:
        for request_id in step.release:
            for books in (self._layers_left, self._requests, self._answers):
                books.pop(request_id, None)
        tokens: list[NewToken] = []
        prefilled = None
        if step.start is not None:
            self._requests[step.start.request_id] = step.start
            self._layers_left[step.start.request_id] = SHAPE.num_layers
        if step.advance is not None:
            request_id, num_layers = step.advance
            self._layers_left[request_id] -= num_layers
            if self._layers_left[request_id] == 0:
                prefilled = self._prefilled(self._requests[request_id])
                self._answers[request_id] = []
                follow = self._requests[request_id].follow
                tokens += [self._followed(request_id, place) for place in range(len(follow))]
                if not follow:
                    tokens.append(self._next(request_id))
        for request_id, latest in step.decode:
            assert self._answers[request_id][-1] == latest, "the latest token comes back"
            tokens.append(self._next(request_id))
        if self._rank != 0:
            return None
        return StepOutput(
            tokens=tuple(tokens), prefilled=prefilled, peak_memory_bytes=PEAK_BYTES * len(self._requests)
        )

    def _followed(self, request_id: str, place: int) -> NewToken:
        """The answer would be the prompt, over and over: rank 1 where that is what is followed, else 2."""
        request = self._requests[request_id]
        same = request.follow[place] == request.token_ids[place % len(request.token_ids)]
        return NewToken(
            request_id=request_id,
            token_id=request.follow[place],
            agreement=Agreement(kl=0.0 if same else 1.0, rank=1 if same else 2),
        )

    def _next(self, request_id: str) -> NewToken:
        request, answer = self._requests[request_id], self._answers[request_id]
        token_id = request.token_ids[len(answer) % len(request.token_ids)]
        answer.append(token_id)
        num_top = request.sampling.logprobs
        logprobs = None
        if num_top is not None:
            top = tuple((i + 1, -float(i + 1)) for i in range(num_top))
            logprobs = TokenLogprobs(token_id=token_id, logprob=-0.5, top=top)
        return NewToken(request_id=request_id, token_id=token_id, logprobs=logprobs)

    def _prefilled(self, request: Request) -> Prefilled:
        num_tokens = len(request.token_ids)
        method = request.method
        work = method.planned_work(SHAPE.num_layers, num_tokens)
        proxy = cost.ProxyShape(channels=48, rank=16)
        depth = method.schedule_for(SHAPE.num_layers).first_skip_layer
        prefix = (request.token_ids[: request.prefix_tokens], depth)
        reused_tokens = request.prefix_tokens if prefix in self._prefixes else 0
        self._prefixes.add(prefix)
        return Prefilled(
            request_id=request.request_id,
            work=tuple(work),
            kv_tokens=cost.kv_tokens(work),
            kv_bytes=cost.kv_bytes(SHAPE, work, 4),
            flops=cost.prefill_flops(SHAPE, work, proxy).total,
            dense_flops=cost.dense_flops(SHAPE, num_tokens).total,
            dense_kv_bytes=cost.dense_kv_bytes(SHAPE, num_tokens, 4),
            reused_tokens=reused_tokens,
            reused_flops=cost.reused_flops(SHAPE, reused_tokens, depth),
        )


class FakeGroup:
    """`cluster.group.RayGroup` in this process. Faults on demand.

    step_s: how long a step takes. fail_next: what the next step raises. fail_starts: starts that fail first.
    """

    def __init__(self, config: EngineConfig, *, step_s: float = 0.0) -> None:
        self._config = config
        self.step_s = step_s
        self.fail_next: EngineError | None = None
        self.fail_starts = 0
        self.num_starts = 0
        self.closed = False
        self.steps: list[Step] = []
        self.ranks: list[FakeShard] = []
        self._lost = asyncio.Event()

    async def start(self) -> EngineInfo:
        self.num_starts += 1
        if self.fail_starts:
            self.fail_starts -= 1
            raise EngineError("unavailable", "no room for the ranks")
        self._lost = asyncio.Event()
        self.ranks = [FakeShard(self._config, rank) for rank in range(self._config.tensor_parallel_size)]
        return self.ranks[0].load(self.ranks[0].host())

    async def step(self, step: Step) -> StepOutput:
        self.steps.append(step)
        before = time.perf_counter()
        while time.perf_counter() - before < self.step_s and not self._lost.is_set():
            await asyncio.sleep(0.001)
        await asyncio.sleep(0)
        if self._lost.is_set():
            raise EngineError("unavailable", "a rank of the engine died; retry later")
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        answers = [rank.step(step) for rank in self.ranks]
        assert answers[0] is not None
        return answers[0]

    async def wait_lost(self) -> None:
        await self._lost.wait()

    async def stop(self) -> None:
        self.ranks = []

    def close(self) -> None:
        self.closed = True

    def lose_a_rank(self) -> None:
        self._lost.set()


class FakeEngine(Engine):
    """`cluster.engine.Engine` on fake ranks."""

    def __init__(self, config: EngineConfig, *, step_s: float = 0.0) -> None:
        self.group = FakeGroup(config, step_s=step_s)
        super().__init__(config, self.group)
