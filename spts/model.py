"""A Hugging Face model walked under a schedule: prefill (resumable between layers), decode, generate.

Legend: N prompt tokens, B requests, M tokens appended to one request, D width, d head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spts import sampling as sampling_rules
from spts.architectures import check_config, max_context
from spts.cache import LayerCache, RaggedCache
from spts.collective import Collective, Local
from spts.cost import ModelShape
from spts.decode import Batch, DecodeGraphs, Held
from spts.errors import ModelError, ProxyError, RequestError
from spts.kernels.checks import WIDEST_HEAD
from spts.layer import DecoderLayer, Stream
from spts.methods import Method
from spts.prefill import Prefill, PrefillState, Walker
from spts.prefix import Prefix
from spts.proxy import Proxies
from spts.request import check_prefix_tokens, check_tokens, check_vocabulary
from spts.sampling import Sampling, TokenLogprobs
from spts.schedule import Schedule
from spts.select import refuse_nan


@dataclass(frozen=True, kw_only=True)
class Generation:
    """An answer. `token_ids` ends with the stop token when `finish_reason` is "stop"; "length" otherwise."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: str
    prefill: Prefill


class SptsModel:
    """A causal language model whose prefill a method may shorten; calls its modules, changes none."""

    def __init__(
        self,
        hf_model: Any,
        *,
        fingerprint: str,
        proxies: Proxies | None = None,
        collective: Collective | None = None,
    ) -> None:
        """Wraps a transformers model, whole or one tensor-parallel rank of it.

        Under tensor parallelism `hf_model` has its linears sharded by heads and channels, `o_proj` and
        `down_proj` sum over the ranks inside their forward, and `hf_model.config` is still the whole model's.
        Raises ModelError for an unsupported configuration or a head count that does not fit, ProxyError for
        another model's proxies.
        """
        self.config = hf_model.config
        config = self.config.to_dict()
        config["architectures"] = [type(hf_model).__name__]
        check_config(config)
        self.collective: Collective = collective or Local()
        self.fingerprint = fingerprint
        self.proxies = proxies
        self.shape = ModelShape.from_config(config)
        self.vocab_size = self.shape.vocab_size
        self.max_context = max_context(config)
        self.eos_token_ids = _eos_token_ids(hf_model)
        self._body = hf_model.model
        self._head = hf_model.lm_head
        weight = self._body.embed_tokens.weight
        self.device: torch.device = weight.device
        self.dtype: torch.dtype = weight.dtype
        # Its own instance: engines that cast a whole model to bfloat16 cast the rotary frequencies with it.
        self._rotary = type(self._body.rotary_emb)(config=self.config).to(self.device)
        if proxies is not None and proxies.manifest.fingerprint != fingerprint:
            raise ProxyError(
                f"proxies must belong to the model with fingerprint {fingerprint}, "
                f"got {proxies.manifest.fingerprint}; fit them for this model",
                field="fingerprint",
            )
        self.layers = [self._layer(index, block) for index, block in enumerate(self._body.layers)]
        self._walker = Walker(
            self.layers,
            shape=self.shape,
            proxy=None if proxies is None else proxies.shape,
            fingerprint=fingerprint,
            stream=self._stream,
        )
        # What attends with wider heads asks the host.
        graphed = self.device.type == "cuda" and self.shape.head_dim <= WIDEST_HEAD
        self._graphs = DecodeGraphs(self._decode, device=self.device) if graphed else None

    def _layer(self, index: int, block: Any) -> DecoderLayer:
        head_dim, ranks = self.shape.head_dim, self.collective.world_size
        heads_here = block.self_attn.q_proj.weight.shape[0] // head_dim
        if heads_here * ranks != self.shape.num_heads:
            raise ModelError(
                f"heads on this rank times ranks must equal num_attention_heads = {self.shape.num_heads}, "
                f"got {heads_here} x {ranks}; shard evenly by heads",
                field="num_attention_heads",
            )
        proxy = self.proxies.layers.get(index) if self.proxies is not None else None
        return DecoderLayer(
            block,
            index=index,
            num_heads=self.shape.num_heads,
            head_dim=head_dim,
            collective=self.collective,
            proxy=None if proxy is None else proxy.to(device=self.device, dtype=self.dtype),
        )

    def prefill(
        self, token_ids: Sequence[int], method: Method, *, trace: bool = False, max_new_tokens: int = 0
    ) -> Prefill:
        """Computes a prompt under a method, with room in the cache for `max_new_tokens` more.

        Raises RequestError (empty prompt, id outside the vocabulary, context exceeded), ConfigError (a
        schedule for another depth) or ProxyError (none for a layer the method skips in), all before any
        compute.
        """
        state = self.start_prefill(token_ids, method, trace=trace, max_new_tokens=max_new_tokens)
        self.advance(state)
        assert state.result is not None
        return state.result

    @torch.inference_mode()
    def start_prefill(
        self,
        token_ids: Sequence[int],
        method: Method,
        *,
        trace: bool = False,
        max_new_tokens: int = 0,
        prefix: Prefix | None = None,
        reuse_tokens: int | None = None,
        keep_prefix: int = 0,
    ) -> PrefillState:
        """Checks a request and embeds its prompt; `advance` runs its layers. Raises as `prefill` does.

        prefix: `state.kept` of a prompt that began with the same tokens, under any method that first skips in
        the same layer, at the same attention_density; its first `reuse_tokens` (None = all) are not computed
        again before that layer.
        keep_prefix: that many first tokens are to be kept in `state.kept`, where they are more than those
        reused and there is a layer before the first that skips. Each leaves at least one token of the prompt,
        and is a multiple of `Schedule.block_tokens`, or RequestError (invalid_prefix) is raised.
        """
        schedule = self.check(token_ids, method, max_new_tokens)
        check_prefix_tokens(keep_prefix, token_ids, schedule.block_tokens)
        reused_tokens = 0
        if prefix is not None:
            reused_tokens = prefix.num_tokens if reuse_tokens is None else reuse_tokens
            prefix.check(token_ids, reused_tokens, schedule=schedule, fingerprint=self.fingerprint)
        return PrefillState(
            token_ids=token_ids,
            method=method,
            schedule=schedule,
            stream=self._embed(token_ids[reused_tokens:], first_position=reused_tokens),
            cache=RaggedCache(
                num_layers=len(self.layers),
                prompt_tokens=len(token_ids),
                room_tokens=max_new_tokens,
                before=() if prefix is None else prefix.rows(reused_tokens),
            ),
            tracing=trace,
            prefix=prefix,
            reused_tokens=reused_tokens,
            keep_prefix=keep_prefix if schedule.first_skip_layer else 0,
        )

    @torch.inference_mode()
    def advance(self, state: PrefillState, flops: int | None = None) -> bool:
        """Runs more of a prefill, about `flops` of it (None = all); True when `state.result` is there.

        More than `flops` only where a single row of a dense layer (where attention is sparse, a block of 128
        of them), or a single layer that skips, costs more;
        the last slice also makes the logits of the last token.
        """
        self._walker.run(state, flops)
        if state.next_layer == len(self.layers) and state.result is None:
            refuse_nan(state.stream.has_nan)
            state.result = Prefill(
                logits=self.logits(state.stream.x_TD[-1:])[0],
                cache=state.cache,
                work=state.work,
                trace=state.trace if state.tracing else None,
            )
        return state.result is not None

    @torch.inference_mode()
    def decode_step(self, token_ids: Tensor, caches: Sequence[RaggedCache]) -> Tensor:
        """Appends one token to each request and returns the logits after it, float32 [B, V].

        `token_ids` [B] goes with `caches`, one request each, in any mixture of lengths and methods. Raises
        ValueError when a cache has no room left or is given twice.
        """
        if len({id(cache) for cache in caches}) != len(caches):
            raise ValueError("caches must be one per request, got one twice; prefill each request by itself")
        batch = Batch.claim(caches)
        if self._graphs is not None:
            return self._graphs.run(token_ids, batch)
        return self._decode(token_ids.to(self.device), batch.table.to(self.device), batch.held())

    def _decode(self, ids_B: Tensor, table: Tensor, held: Sequence[Held]) -> Tensor:
        """One token of each request through all layers; the logits. `table` as in `decode.Batch`."""
        x_BD = self._body.embed_tokens(ids_B)
        cos_Bd, sin_Bd = self._rotation(x_BD, table[0, :, 2])
        for layer in self.layers:
            x_BD = layer.decode(x_BD, cos_Bd, sin_Bd, held[layer.index], table[1 + layer.index])
        return self.logits(x_BD)

    @torch.inference_mode()
    def extend(self, token_ids: Sequence[int], cache: RaggedCache) -> Tensor:
        """Appends given tokens to one request, all at once; the logits after each, float32 [M, V].

        The same as M decode steps but for rounding. Raises ValueError when the cache has no room for them.
        """
        stream = self._embed(token_ids, first_position=cache.next_position)
        for layer in self.layers:
            layer.dense(stream, cache.layers[layer.index])
        cache.next_position += len(token_ids)
        return self.logits(stream.x_TD)

    def follow(self, token_ids: Sequence[int], continuation: Sequence[int], method: Method) -> Tensor:
        """What the model predicts at each token of a given continuation, float32 [M, V].

        Row 0 are the logits after the prompt, prefilled under `method`; row m those after the continuation's
        tokens 0 … m - 1 have been taken too. Its last token is never read. Raises as `prefill` does.
        """
        if len(continuation) == 0:
            raise RequestError(
                "continuation must hold at least one token, got 0; give tokens to follow",
                code="empty_prompt",
                field="continuation",
            )
        check_vocabulary("continuation", continuation, self.vocab_size)
        prefill = self.prefill(token_ids, method, max_new_tokens=len(continuation))
        return self.follow_on(prefill, continuation)

    def follow_on(self, prefill: Prefill, continuation: Sequence[int]) -> Tensor:
        """`follow` from a prefill with room for the continuation; uses up its cache."""
        first_1V = prefill.logits.unsqueeze(0)
        if len(continuation) == 1:
            return first_1V
        return torch.cat((first_1V, self.extend(continuation[:-1], prefill.cache)))

    def generate(
        self, token_ids: Sequence[int], method: Method, max_new_tokens: int, sampling: Sampling | None = None
    ) -> Generation:
        """Answers a prompt: prefill under `method`, then up to `max_new_tokens` tokens, at least one.

        Stops at the model's end tokens and at `sampling.stop_token_ids`. Raises as `prefill` does.
        """
        rules = sampling or Sampling()
        if max_new_tokens < 1:
            raise RequestError(
                f"max_new_tokens must be at least 1, got {max_new_tokens}; "
                "use prefill to compute a prompt alone",
                code="invalid_sampling",
                field="max_new_tokens",
            )
        prefill = self.prefill(token_ids, method, max_new_tokens=max_new_tokens)
        generator = sampling_rules.make_generator(rules)
        stop_ids = {*self.eos_token_ids, *rules.stop_token_ids}
        answer: list[int] = []
        logprobs: list[TokenLogprobs] | None = None if rules.logprobs is None else []
        logits_V = prefill.logits
        while True:
            chosen = torch.tensor([sampling_rules.sample(logits_V, rules, generator)], device=self.device)
            token_id = int(self.collective.broadcast(chosen))
            answer.append(token_id)
            if logprobs is not None and rules.logprobs is not None:
                logprobs.append(sampling_rules.token_logprobs(logits_V, token_id, rules.logprobs))
            if token_id in stop_ids or len(answer) == max_new_tokens:
                break
            logits_V = self.decode_step(torch.tensor([token_id]), [prefill.cache])[0]
        reason = "stop" if answer[-1] in stop_ids else "length"
        return Generation(token_ids=answer, logprobs=logprobs, finish_reason=reason, prefill=prefill)

    @torch.inference_mode()
    def dense_ffn_inputs(self, token_ids: Sequence[int]) -> Iterator[Tensor]:
        """Walks the dense model over a text and yields each layer's FFN input, [N, D], for calibration."""
        self._check_tokens(token_ids, 0)
        stream = self._embed(token_ids)
        for layer in self.layers:
            yield layer.dense(stream, LayerCache(room_tokens=0))

    def check(self, token_ids: Sequence[int], method: Method, max_new_tokens: int) -> Schedule:
        """The schedule a request would run under; raises as `prefill` does, computes nothing."""
        self._check_tokens(token_ids, max_new_tokens)
        schedule = method.schedule_for(len(self.layers))
        if method.needs_proxies:
            lacking = [
                layer.index
                for layer in self.layers
                if schedule.active_tokens(layer.index) is not None and layer.proxy is None
            ]
            if lacking:
                raise ProxyError(
                    f"proxies must cover layers {lacking[0]} to {lacking[-1]} for method {method.name}, "
                    "got none; fit them with python -m jobs.calibrate",
                    field="proxies",
                )
        return schedule

    def _check_tokens(self, token_ids: Sequence[int], max_new_tokens: int) -> None:
        check_tokens(
            token_ids,
            max_new_tokens=max_new_tokens,
            vocab_size=self.vocab_size,
            max_context=self.max_context,
        )

    def _embed(self, token_ids: Sequence[int], *, first_position: int = 0) -> Stream:
        ids_N = torch.tensor(token_ids, dtype=torch.int64, device=self.device)
        return self._stream(self._body.embed_tokens(ids_N), first_position=first_position)

    def _stream(self, x_ND: Tensor, *, first_position: int = 0) -> Stream:
        positions_N = first_position + torch.arange(x_ND.shape[0], device=self.device)
        cos_Nd, sin_Nd = self._rotation(x_ND, positions_N)
        return Stream(x_TD=x_ND, positions_T=positions_N, cos_Td=cos_Nd, sin_Td=sin_Nd)

    def _rotation(self, x_ND: Tensor, positions_N: Tensor) -> tuple[Tensor, Tensor]:
        cos_1Nd, sin_1Nd = self._rotary(x_ND, positions_N.unsqueeze(0))
        return cos_1Nd[0], sin_1Nd[0]

    @torch.inference_mode()
    def logits(self, x_BD: Tensor) -> Tensor:
        """The final norm and the head over rows of the residual stream: float32 [B, V]."""
        # Three dimensions: DeepSpeed's sharded head slices its input as [batch, tokens, features].
        logits_1BV: Tensor = self._head(self._body.norm(x_BD).unsqueeze(0))
        return logits_1BV[0].float()


def _eos_token_ids(hf_model: Any) -> tuple[int, ...]:
    generation = getattr(hf_model, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None)
    if eos is None:
        eos = hf_model.config.eos_token_id
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)
