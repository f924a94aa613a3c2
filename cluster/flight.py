"""One request inside an engine, from its arrival to its last token."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass, field

from cluster.protocol import Agreement, Chunk, EngineError, FinishReason, NewToken, Prefilled, Request, Result
from spts.sampling import TokenLogprobs


@dataclass
class Flight:
    """Times are `time.perf_counter()` seconds, 0 until they are known. flops: planned until its first token.
    out: what its stream has yet to yield."""

    request: Request
    arrived: float
    flops: int
    out: asyncio.Queue[Chunk | EngineError] = field(default_factory=asyncio.Queue)
    timer: asyncio.TimerHandle | None = None
    started: float = 0.0
    first: float = 0.0
    last: float = 0.0
    prefilled: Prefilled | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    agreement: list[Agreement] = field(default_factory=list)
    peak_memory_bytes: int | None = None

    def note_peak(self, peak_memory_bytes: int) -> None:
        """Take the peak of a step that this request was part of."""
        self.peak_memory_bytes = max(peak_memory_bytes, self.peak_memory_bytes or 0)

    def accept(self, token: NewToken, eos_token_ids: Collection[int], now: float) -> Chunk:
        """Take the next token, hand it to the stream and return the chunk; the last one has the result.

        eos_token_ids: the model's own end tokens; the request's stop tokens end it too.
        """
        is_first = not self.token_ids
        if is_first:
            self.first = now
        self.last = now
        self.token_ids.append(token.token_id)
        if token.logprobs is not None:
            self.logprobs.append(token.logprobs)
        if token.agreement is not None:
            self.agreement.append(token.agreement)
        reason = self._finish_reason(eos_token_ids)
        chunk = Chunk(
            request_id=self.request.request_id,
            token_ids=(token.token_id,),
            logprobs=None if token.logprobs is None else (token.logprobs,),
            finish_reason=reason,
            result=None if reason is None else self._result(reason),
            prefilled=self.prefilled if is_first else None,
            queue_s=self.started - self.arrived if is_first else None,
        )
        self.out.put_nowait(chunk)
        return chunk

    @property
    def kv_bytes(self) -> int:
        """Bytes of its cache over all ranks: the prompt's, and a whole token's for each of the answer's."""
        if self.prefilled is None:
            return 0
        token_bytes = self.prefilled.dense_kv_bytes // len(self.request.token_ids)
        return self.prefilled.kv_bytes + token_bytes * len(self.token_ids)

    def finish(self) -> None:
        """Hand the stream a last chunk, with the result of the tokens so far and none of its own."""
        chunk = Chunk(
            request_id=self.request.request_id,
            token_ids=(),
            finish_reason="stop",
            result=self._result("stop"),
        )
        self.out.put_nowait(chunk)

    def _finish_reason(self, eos_token_ids: Collection[int]) -> FinishReason | None:
        latest = self.token_ids[-1]
        if self.request.follow:
            return "length" if len(self.token_ids) == len(self.request.follow) else None
        ends = latest in eos_token_ids and not self.request.ignore_eos
        if ends or latest in self.request.sampling.stop_token_ids:
            return "stop"
        return "length" if len(self.token_ids) == self.request.max_new_tokens else None

    def _result(self, reason: FinishReason) -> Result:
        request, prefilled = self.request, self.prefilled
        assert prefilled is not None, "a token before the end of the prefill"
        return Result(
            request_id=request.request_id,
            token_ids=tuple(self.token_ids),
            finish_reason=reason,
            prompt_tokens=len(request.token_ids),
            queue_s=self.started - self.arrived,
            ttft_s=self.first - self.arrived,
            decode_s=self.last - self.first,
            total_s=self.last - self.arrived,
            work=prefilled.work,
            kv_tokens=prefilled.kv_tokens,
            kv_bytes=prefilled.kv_bytes,
            flops=prefilled.flops,
            dense_flops=prefilled.dense_flops,
            dense_kv_bytes=prefilled.dense_kv_bytes,
            logprobs=tuple(self.logprobs) if request.sampling.logprobs is not None else None,
            reused_tokens=prefilled.reused_tokens,
            reused_flops=prefilled.reused_flops,
            peak_memory_bytes=self.peak_memory_bytes,
            agreement=tuple(self.agreement) if request.follow else None,
        )
