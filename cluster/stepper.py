"""What one rank does in a step: starts, advances and ends prefills, decodes, and on rank 0 chooses tokens.

Every rank makes the same calls to the model in the same order; whatever is decided here is decided from the
requests alone, or said by the model on all ranks at once.

Legend: N followed tokens, B requests, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cluster.activity import summed_up
from cluster.admission import as_engine_error
from cluster.config import EngineConfig
from cluster.kept import Kept
from cluster.protocol import Agreement, EngineError, NewToken, Prefilled, Request, Step, StepOutput
from spts import cost
from spts.agreement import compare
from spts.cache import RaggedCache
from spts.errors import SptsError
from spts.methods import Dense
from spts.model import SptsModel
from spts.prefill import Prefill, PrefillState
from spts.prefix import Prefix
from spts.request import digest
from spts.sampling import make_generator, sample, token_logprobs

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Prefilling:
    """A request in prefill. dense_NV: what to compare it with, if it follows and is not dense itself; rank 0
    alone has the rows. document: name of what it leaves for others."""

    request: Request
    state: PrefillState
    dense_NV: Tensor | None
    document: int | None = None


@dataclass(kw_only=True)
class Running:
    """A request after its prefill. generator: rank 0's alone draws."""

    request: Request
    cache: RaggedCache
    generator: torch.Generator


class Stepper:
    """The requests of one rank and its model."""

    def __init__(self, model: SptsModel, config: EngineConfig, rank: int) -> None:
        self._model = model
        self._rank = rank
        self._world_size = config.tensor_parallel_size
        self._references: Kept[Tensor] = Kept(config.reference_cache_bytes)
        self._documents: dict[int, Prefix] = {}
        self._prefills: dict[str, Prefilling] = {}
        self._running: dict[str, Running] = {}

    def step(self, step: Step) -> StepOutput | None:
        """Do one step; the answer on rank 0, None on the others, which do not choose tokens."""
        for request_id in step.release:
            self._prefills.pop(request_id, None)
            self._running.pop(request_id, None)
        for document in step.forget:
            del self._documents[document]
        answer = Answer()
        if step.start is not None:
            start = partial(self._start, step.start, step.reuse, step.keep, answer)
            self._within_memory(start, step.start.request_id, answer)
        on_gpu = self._model.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self._model.device)
        if step.advance is not None:
            advance = partial(self._advance, *step.advance, answer)
            self._within_memory(advance, step.advance[0], answer)
        if step.decode:
            self._decode(step.decode, answer)
        elif on_gpu and step.advance is not None:
            # Nothing was read back: slices would queue up, and whoever comes next wait for all of them.
            torch.cuda.current_stream(self._model.device).synchronize()
        if self._rank != 0:
            return None
        peak = torch.cuda.max_memory_allocated(self._model.device) if on_gpu else None
        return answer.output(
            peak,
            held_requests=len(self._prefills) + len(self._running),
            held_documents=len(self._documents),
        )

    def _within_memory(self, run: Callable[[], None], request_id: str, answer: Answer) -> None:
        """Run a part of a prefill. A request that the device has no memory for, whatever was reserved, ends
        alone.

        Of several ranks one may be out of memory while the others wait for it in a collective: they cannot
        agree on what to drop, so it is raised, and the ranks start again.
        """
        try:
            run()
            return
        except torch.OutOfMemoryError:
            if self._world_size > 1:
                raise
            logger.exception("out of memory in the prefill of request %s", request_id)
        # The error is gone, and with its frames what they held.
        self._prefills.pop(request_id, None)
        self._running.pop(request_id, None)
        torch.cuda.empty_cache()
        message = "the device ran out of memory in the prefill; retry later, or send a shorter prompt"
        answer.refused.append((request_id, EngineError("overloaded", message)))

    def _start(
        self, request: Request, reuse: tuple[int, int] | None, keep: tuple[int, int] | None, answer: Answer
    ) -> None:
        document, reuse_tokens = reuse or (None, None)
        leaves, keep_prefix = keep or (None, 0)
        try:
            state = self._model.start_prefill(
                request.token_ids,
                request.method,
                trace=request.activity_bins > 0,
                max_new_tokens=request.max_new_tokens,
                prefix=None if document is None else self._documents[document],
                reuse_tokens=reuse_tokens,
                keep_prefix=keep_prefix,
            )
        except SptsError as error:
            # The same on every rank: it depends on the request and the configuration alone.
            answer.refused.append((request.request_id, as_engine_error(error)))
            return
        # Before the request's own layers, so that neither holds memory while the other runs.
        compared = bool(request.follow) and request.method != Dense()
        dense_NV = self._reference(request) if compared else None
        self._prefills[request.request_id] = Prefilling(
            request=request, state=state, dense_NV=dense_NV, document=leaves
        )

    def _advance(self, request_id: str, flops: int | None, answer: Answer) -> None:
        if request_id not in self._prefills:  # refused a moment ago
            return
        prefilling = self._prefills[request_id]
        request, state = prefilling.request, prefilling.state
        try:
            # What follows is compared with a dense run that was not sliced either: equal runs round alike.
            done = self._model.advance(state, None if request.follow else flops)
        except SptsError as error:  # scores that are no numbers, found on every rank at once: see spts.select
            del self._prefills[request_id]
            answer.refused.append((request_id, EngineError("internal", str(error))))
            return
        if not done:
            return
        assert state.result is not None
        del self._prefills[request_id]
        if prefilling.document is not None:
            assert state.kept is not None, "what was to be kept is there at the end"
            self._documents[prefilling.document] = state.kept
            answer.kept = prefilling.document
        if self._rank == 0:
            answer.prefilled = self._prefilled(request, state)
        if request.follow:
            self._follow(request, state.result, prefilling.dense_NV, answer)
            return
        running = Running(request=request, cache=state.cache, generator=make_generator(request.sampling))
        self._running[request_id] = running
        if self._rank == 0:
            self._choose(running, state.result.logits, answer)

    def _decode(self, latest: tuple[tuple[str, int], ...], answer: Answer) -> None:
        requests = [self._running[request_id] for request_id, _ in latest]
        logits_BV = self._model.decode_step(
            torch.tensor([token_id for _, token_id in latest]), [running.cache for running in requests]
        )
        if self._rank == 0:
            for running, logits_V in zip(requests, logits_BV, strict=True):
                self._choose(running, logits_V, answer)

    def _choose(self, running: Running, logits_V: Tensor, answer: Answer) -> None:
        request = running.request
        num_top = request.sampling.logprobs
        try:
            token_id = sample(logits_V, request.sampling, running.generator)
        except SptsError as error:  # logits that are not finite end this request, not the others
            answer.refused.append((request.request_id, EngineError("internal", str(error))))
            return
        logprobs = None if num_top is None else token_logprobs(logits_V, token_id, num_top)
        answer.tokens.append(NewToken(request_id=request.request_id, token_id=token_id, logprobs=logprobs))

    # -- following given tokens ------------------------------------------------------------------------------

    def _reference(self, request: Request) -> Tensor:
        """The dense model's logits at every followed token, on the host of rank 0; the others' are empty."""
        key = (digest(request.token_ids), digest(request.follow))
        dense_NV = self._references.get(key)
        if dense_NV is None:
            dense_NV = self._model.follow(request.token_ids, request.follow, Dense())
            num_bytes = dense_NV.numel() * dense_NV.element_size()
            # Counted on every rank as on rank 0, so that all keep and drop the same.
            dense_NV = dense_NV.cpu() if self._rank == 0 else torch.empty(0)
            self._references.put(key, dense_NV, num_bytes)
        return dense_NV

    def _follow(self, request: Request, prefill: Prefill, dense_NV: Tensor | None, answer: Answer) -> None:
        logits_NV = self._model.follow_on(prefill, request.follow)
        if self._rank != 0:
            return
        kl_N, rank_N = compare(logits_NV if dense_NV is None else dense_NV, logits_NV)
        if not bool(kl_N.isfinite().all()):
            message = "the distributions must be finite to be compared; the activations overflowed"
            answer.refused.append((request.request_id, EngineError("internal", message)))
            return
        num_top = request.sampling.logprobs
        for logits_V, token_id, kl, rank in zip(
            logits_NV, request.follow, kl_N.tolist(), rank_N.tolist(), strict=True
        ):
            answer.tokens.append(
                NewToken(
                    request_id=request.request_id,
                    token_id=token_id,
                    logprobs=None if num_top is None else token_logprobs(logits_V, token_id, num_top),
                    agreement=Agreement(kl=kl, rank=rank),
                )
            )

    def _prefilled(self, request: Request, state: PrefillState) -> Prefilled:
        model = self._model
        num_tokens = len(request.token_ids)
        proxy = None if model.proxies is None else model.proxies.shape
        return Prefilled(
            request_id=request.request_id,
            work=tuple(state.work),
            kv_tokens=state.cache.kv_tokens,
            kv_bytes=state.cache.num_bytes * self._world_size,
            flops=cost.prefill_flops(model.shape, state.work, proxy).total,
            dense_flops=cost.dense_flops(model.shape, num_tokens).total,
            dense_kv_bytes=cost.dense_kv_bytes(model.shape, num_tokens, model.dtype.itemsize),
            activity=summed_up(state.trace, num_tokens, request.activity_bins) if state.tracing else None,
            reused_tokens=state.reused_tokens,
            reused_flops=cost.reused_flops(
                model.shape,
                state.reused_tokens,
                state.schedule.first_skip_layer,
                state.schedule.attention_density,
            ),
        )


class Answer:
    """What rank 0 collects during a step."""

    def __init__(self) -> None:
        self.tokens: list[NewToken] = []
        self.prefilled: Prefilled | None = None
        self.kept: int | None = None
        self.refused: list[tuple[str, EngineError]] = []

    def output(self, peak_memory_bytes: int | None, *, held_requests: int, held_documents: int) -> StepOutput:
        """The step's answer."""
        return StepOutput(
            tokens=tuple(self.tokens),
            prefilled=self.prefilled,
            refused=tuple(self.refused),
            kept=self.kept,
            peak_memory_bytes=peak_memory_bytes,
            held_requests=held_requests,
            held_documents=held_documents,
        )
