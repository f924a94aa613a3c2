"""FakeShard and FakeEngine: the real interfaces without a model. The answer to a prompt is the prompt, over
and over.

So a test chooses the answer's tokens, and its text, by choosing the prompt. Token 0 is the end token.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from cluster.config import EngineConfig
from cluster.documents import Layers
from cluster.engine import Engine
from cluster.protocol import (
    Activity,
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
from spts.methods import Method
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
PROXY = cost.ProxyShape(channels=48, rank=16)
MAX_CONTEXT = 512
EOS = 0
PEAK_BYTES = 1000  # device memory of a request in flight


def info(config: EngineConfig) -> EngineInfo:
    return EngineInfo(
        model_name="fake",
        hosts=("127.0.0.1",) * config.tensor_parallel_size,
        fingerprint="0" * 64,
        proxies_sha256="1" * 64,
        shape=SHAPE,
        max_context=config.max_model_len or MAX_CONTEXT,
        vocab_size=SHAPE.vocab_size,
        eos_token_ids=(EOS,),
        dtype=config.dtype,
        device=config.device,
        world_size=config.tensor_parallel_size,
        versions={},
        proxy=PROXY,
        first_proxy_layer=2,
        kv_bytes_limit=config.kv_cache_bytes or 2**30,
        slice_tokens=config.slice_tokens,
        attention="none",
        accelerator="fake accelerator" if config.device == "cuda" else None,
    )


class FakeShard:
    """`cluster.shard.Shard` without weights: keeps the same books, so that a wrong call order fails here
    too."""

    def __init__(self, config: EngineConfig, rank: int) -> None:
        self._config = config
        self._rank = rank
        self._flops_left: dict[str, int] = {}
        self._starts: dict[str, Step] = {}
        self._requests: dict[str, Request] = {}
        self._answers: dict[str, list[int]] = {}
        self.documents: dict[int, tuple[Layers, tuple[int, ...]]] = {}  # name -> layers, its first tokens

    def host(self) -> str:
        return "127.0.0.1"

    def meet(self, host: str) -> tuple[str, int]:
        return (host, 0)

    def load(self, address: tuple[str, int]) -> EngineInfo:
        return info(self._config)

    @property
    def num_cached(self) -> int:
        """Requests that hold cache."""
        return len(self._requests)

    def step(self, step: Step) -> StepOutput | None:
        for request_id in step.release:
            for books in (self._flops_left, self._starts, self._requests, self._answers):
                books.pop(request_id, None)
        for document in step.forget:
            del self.documents[document]
        tokens: list[NewToken] = []
        prefilled = kept = None
        if step.start is not None:
            self._requests[step.start.request_id] = step.start
            self._starts[step.start.request_id] = step
            self._flops_left[step.start.request_id] = self._planned_flops(step)
        if step.advance is not None:
            request_id, flops = step.advance
            self._flops_left[request_id] -= self._flops_left[request_id] if flops is None else flops
            if self._flops_left[request_id] <= 0:
                request = self._requests[request_id]
                prefilled, kept = self._prefilled(request), self._keep(request_id)
                self._answers[request_id] = []
                tokens += [self._followed(request_id, place) for place in range(len(request.follow))]
                if not request.follow:
                    tokens.append(self._next(request_id))
        for request_id, latest in step.decode:
            assert self._answers[request_id][-1] == latest, "the latest token comes back"
            tokens.append(self._next(request_id))
        if self._rank != 0:
            return None
        return StepOutput(
            tokens=tuple(tokens),
            prefilled=prefilled,
            kept=kept,
            peak_memory_bytes=PEAK_BYTES * len(self._requests),
            held_requests=self.num_cached,
            held_documents=len(self.documents),
        )

    def _planned_flops(self, step: Step) -> int:
        """What the prefill costs, less what it reuses: of this very prompt, in these very layers."""
        request = step.start
        assert request is not None
        work = request.method.planned_work(SHAPE.num_layers, len(request.token_ids))
        flops = cost.prefill_flops(SHAPE, work, PROXY).total
        if step.reuse is None:
            return flops
        document, reused_tokens = step.reuse
        layers, tokens = self.documents[document]
        schedule = request.method.schedule_for(SHAPE.num_layers)
        assert layers == (schedule.first_skip_layer, schedule.attention_density)
        assert reused_tokens % schedule.block_tokens == 0
        assert tokens[:reused_tokens] == request.token_ids[:reused_tokens]
        assert 0 < reused_tokens < len(request.token_ids)
        return flops - cost.reused_flops(SHAPE, reused_tokens, *layers)

    def _keep(self, request_id: str) -> int | None:
        request, keep = self._requests[request_id], self._starts[request_id].keep
        if keep is None:
            return None
        schedule = request.method.schedule_for(SHAPE.num_layers)
        assert keep[1] % schedule.block_tokens == 0
        layers = (schedule.first_skip_layer, schedule.attention_density)
        self.documents[keep[0]] = (layers, request.token_ids[: keep[1]])
        return keep[0]

    def _followed(self, request_id: str, place: int) -> NewToken:
        """The answer would be the prompt, over and over: rank 1 where that is what is followed, else 2."""
        request = self._requests[request_id]
        same = request.follow[place] == request.token_ids[place % len(request.token_ids)]
        return NewToken(
            request_id=request_id,
            token_id=request.follow[place],
            logprobs=_logprobs(request, request.follow[place]),
            agreement=Agreement(kl=0.0 if same else 1.0, rank=1 if same else 2),
        )

    def _next(self, request_id: str) -> NewToken:
        request, answer = self._requests[request_id], self._answers[request_id]
        token_id = request.token_ids[len(answer) % len(request.token_ids)]
        answer.append(token_id)
        return NewToken(request_id=request_id, token_id=token_id, logprobs=_logprobs(request, token_id))

    def _prefilled(self, request: Request) -> Prefilled:
        num_tokens = len(request.token_ids)
        method = request.method
        work = method.planned_work(SHAPE.num_layers, num_tokens)
        bins = min(request.activity_bins, num_tokens)
        everywhere = ((100,) * bins,) * SHAPE.num_layers
        schedule = method.schedule_for(SHAPE.num_layers)
        reuse = self._starts[request.request_id].reuse
        reused_tokens = 0 if reuse is None else reuse[1]
        return Prefilled(
            request_id=request.request_id,
            work=tuple(work),
            kv_tokens=cost.kv_tokens(work),
            kv_bytes=cost.kv_bytes(SHAPE, work, 4),
            flops=cost.prefill_flops(SHAPE, work, PROXY).total,
            dense_flops=cost.dense_flops(SHAPE, num_tokens).total,
            dense_kv_bytes=cost.dense_kv_bytes(SHAPE, num_tokens, 4),
            activity=Activity(attention=everywhere, ffn=everywhere) if bins else None,
            reused_tokens=reused_tokens,
            reused_flops=cost.reused_flops(
                SHAPE, reused_tokens, schedule.first_skip_layer, schedule.attention_density
            ),
        )


def _logprobs(request: Request, token_id: int) -> TokenLogprobs | None:
    num_top = request.sampling.logprobs
    if num_top is None:
        return None
    return TokenLogprobs(
        token_id=token_id, logprob=-0.5, top=tuple((i + 1, -float(i + 1)) for i in range(num_top))
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
        return self.ranks[0].load(self.ranks[0].meet(self.ranks[0].host()))

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

    def __init__(self, config: EngineConfig, *, step_s: float = 0.0, methods: Sequence[Method] = ()) -> None:
        self.group = FakeGroup(config, step_s=step_s)
        super().__init__(config, self.group, methods)
