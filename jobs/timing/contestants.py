"""Who can be timed: this library under a method, transformers' own forward on the same weights, an engine on
Ray.

Speed does not depend on what weights and tokens say, since budgets are fixed: random ones do (never zeros,
which some hardware multiplies faster).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from jobs.timing.rounds import Timed
from spts.cost import ModelShape, ProxyShape
from spts.errors import ConfigError
from spts.methods import Dense, Method
from spts.model import SptsModel
from spts.proxy import VERSION, LayerProxy, Manifest, Proxies

# What summing in another order may change in a logit, as a share of the largest one. Two attention backends
# of torch differ by up to 0.08 after 32 random layers in bfloat16; a wrong result differs by about 1.
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1.5e-1}

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""torch's own implementations of attention, by name."""


class Own:
    """This library under a method; answers with the logits after the prompt and after the last token.

    backend: the attention backend of torch that its prefill has to use, None = the one torch chooses.
    """

    def __init__(
        self, model: SptsModel, method: Method, *, name: str | None = None, backend: str | None = None
    ) -> None:
        self.name = name or method.name
        self._model = model
        self._method = method
        self._backend = backend

    def run(self, prompt: Sequence[int], follow: Sequence[int]) -> Timed:
        """Prefill, then one decode step per token of `follow`. Raises ConfigError for a backend that torch
        does not have for this model here.
        """
        device = self._model.device
        before = _start_peak(device)
        tokens = [torch.tensor([token_id], device=device) for token_id in follow]
        start, cpu = clock(device), time.process_time()
        with backend_context(self._backend):
            prefill = self._model.prefill(prompt, self._method, max_new_tokens=len(follow))
        first, cpu_s = clock(device), time.process_time() - cpu
        kv_bytes, logits_V = prefill.cache.num_bytes, prefill.logits
        decode_start = clock(device)
        for token in tokens:
            logits_V = self._model.decode_step(token, [prefill.cache])[0]
        decode_s = clock(device) - decode_start
        return Timed(
            ttft_s=first - start,
            tpot_s=decode_s / len(follow) if follow else None,
            kv_bytes=kv_bytes,
            answer=(prefill.logits, logits_V),
            work=tuple(prefill.work),
            cpu_s=cpu_s if device.type == "cpu" else None,
            peak_bytes=_peak(device, before),
        )


@contextmanager
def backend_context(backend: str | None) -> Iterator[None]:
    """Within it torch's attention uses one of BACKENDS; ConfigError where that one cannot run."""
    if backend is None:
        yield
        return
    try:
        with sdpa_kernel(BACKENDS[backend]):
            yield
    except RuntimeError as error:
        if "No available kernel" not in str(error) and "No viable backend" not in str(error):
            raise
        raise ConfigError(
            f"backends must be ones that torch has for this model on this device, got {backend}; "
            "leave it out",
            field="backends",
        ) from None


def backends_present(model: SptsModel) -> list[str]:
    """Of BACKENDS those that can prefill `model` here, without "math", which writes all logits out."""
    present = []
    for name in BACKENDS.keys() - {"math"}:
        try:
            with backend_context(name):
                model.prefill([0] * min(256, model.max_context), Dense())
        except ConfigError:
            continue
        present.append(name)
    return sorted(present)


class Transformers:
    """transformers' own forward with its own cache; one row of the head in prefill, like ours."""

    name = "transformers"

    def __init__(self, hf_model: Any) -> None:
        self._model = hf_model

    @torch.inference_mode()
    def run(self, prompt: Sequence[int], follow: Sequence[int]) -> Timed:
        """Prefill, then one decode step per token of `follow`."""
        device = self._model.device
        before = _start_peak(device)
        ids_1N = torch.tensor([list(prompt)], device=device)
        tokens = [torch.tensor([[token_id]], device=device) for token_id in follow]
        start, cpu = clock(device), time.process_time()
        out = self._model(input_ids=ids_1N, use_cache=True, logits_to_keep=1)
        first, cpu_s = clock(device), time.process_time() - cpu
        cache, prompt_V = out.past_key_values, out.logits[0, -1].float()
        kv_bytes = sum(each.nbytes for layer in cache.layers for each in (layer.keys, layer.values))
        logits_V = prompt_V
        decode_start = clock(device)
        for token in tokens:
            logits_V = self._model(input_ids=token, past_key_values=cache, use_cache=True).logits[0, -1]
        decode_s = clock(device) - decode_start
        return Timed(
            ttft_s=first - start,
            tpot_s=decode_s / len(follow) if follow else None,
            kv_bytes=kv_bytes,
            answer=(prompt_V, logits_V.float()),
            work=None,
            cpu_s=cpu_s if device.type == "cpu" else None,
            peak_bytes=_peak(device, before),
        )


def _start_peak(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device, before: int) -> int | None:
    return torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None


class OnEngine:
    """An engine from `cluster.engine.start_engine` under a method; answers with the tokens it chose,
    greedily.
    """

    def __init__(self, engine: Any, method: Method, *, name: str | None = None) -> None:
        self.name = name or method.name
        self._engine = engine
        self._method = method
        self._num_runs = 0

    def run(self, prompt: Sequence[int], follow: Sequence[int]) -> Timed:
        """One request for as many tokens as `follow` has, and one; their values are the engine's choice."""
        import ray

        from cluster.protocol import Request

        self._num_runs += 1
        request = Request(
            request_id=f"latency-{self.name}-{id(self)}-{self._num_runs}",
            token_ids=tuple(prompt),
            method=self._method,
            max_new_tokens=len(follow) + 1,
            prefix_tokens=0,  # each run computes all of the prompt
        )
        result = ray.get(self._engine.run.remote(request))
        num_decoded = len(result.token_ids) - 1
        return Timed(
            ttft_s=result.ttft_s,
            tpot_s=result.decode_s / num_decoded if num_decoded else None,
            kv_bytes=result.kv_bytes,
            answer=result.token_ids,
            work=result.work,
        )


def disagreement(answer: Any, reference: Any, tolerance: float) -> str | None:
    """How an answer differs from one it has to equal, None if it does not: tokens exactly, logits by
    `tolerance`, a share of the largest. NaN differs from everything.
    """
    if not isinstance(answer[0], Tensor):
        return None if answer == reference else f"chose {answer[:8]}, not {reference[:8]}"
    for where, a_V, b_V in zip(("prefill", "decode"), answer, reference, strict=True):
        share = float((a_V - b_V).abs().max() / b_V.abs().max())
        if not share <= tolerance:
            return f"logits after {where} differ by {share:.1e} of the largest, more than {tolerance:.0e}"
    return None


def clock(device: torch.device) -> float:
    """Seconds, once everything queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def random_model(shape: ModelShape, *, max_tokens: int, dtype: str, device: str, seed: int = 0) -> Any:
    """A transformers Llama of a shape with random weights, in evaluation mode."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=max_tokens,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


def random_proxies(shape: ModelShape, size: ProxyShape, *, first_layer: int, fingerprint: str) -> Proxies:
    """Proxies that cost what fitted ones of this size cost, and choose at random."""
    generator = torch.Generator().manual_seed(0)

    def factor(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) / rows**0.5

    layers = {
        layer: LayerProxy(
            first_D2r=factor(shape.hidden_size, 2 * size.rank),
            gate_rC=factor(size.rank, size.channels),
            up_rC=factor(size.rank, size.channels),
            down_Cr=factor(size.channels, size.rank),
        )
        for layer in range(first_layer, shape.num_layers)
    }
    manifest = Manifest(
        version=VERSION,
        fingerprint=fingerprint,
        first_layer=first_layer,
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        channels=size.channels,
        rank=size.rank,
        top_share=0.2,
        calibration_tokens=0,
    )
    return Proxies(manifest, layers)


def check_device(device: str) -> torch.device:
    """The device a name stands for. Raises ConfigError when it is not there."""
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device must be there, got {device!r} ({str(error).splitlines()[0]}); use cpu", field="device"
        ) from None
    return found
