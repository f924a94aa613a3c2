"""What crosses actor boundaries: small frozen dataclasses of plain data, and the one error type with its
kinds.

Standard library and spts's torch-free modules only: the router and the scheduler import this.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from spts.cost import LayerWork, ModelShape, ProxyShape, dense_flops
from spts.errors import ConfigError
from spts.methods import Method
from spts.sampling import Sampling, TokenLogprobs

FinishReason = Literal["stop", "length"]
ErrorKind = Literal[
    "invalid_request", "context_length_exceeded", "unavailable", "overloaded", "deadline", "internal"
]
ERROR_KINDS: tuple[ErrorKind, ...] = get_args(ErrorKind)


class EngineError(Exception):
    """Why a request got no answer. Survives pickling, so it is the same on both sides of an actor call.

    kind: one of ERROR_KINDS; `cluster.errors` maps it to an HTTP status.
    message: for the user. param: the request's field that is at fault, if one is. retry_after_s: when trying
    again may help, where that can be said.
    """

    def __init__(
        self, kind: ErrorKind, message: str, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        if kind not in ERROR_KINDS:
            raise ValueError(
                f"kind must be one of {', '.join(ERROR_KINDS)}, got {kind!r}; choose one of them"
            )
        super().__init__(
            kind, message, param, retry_after_s
        )  # all of them in args: that is what pickle calls the class with
        self.kind: ErrorKind = kind
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


def too_late(limit_s: float) -> EngineError:
    """The answer did not come within `limit_s`."""
    return EngineError("deadline", f"the answer must take at most {limit_s:g} s; it took longer")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to answer.

    request_id: unique among the requests in flight. max_new_tokens: at least 1.
    deadline_s: seconds from arrival at the engine after which the answer is of no use; None = none.
    prefix_tokens: what does not depend on later tokens (every layer before the method's first_skip_layer) is
    computed once for prompts that begin alike, as long as there is room to keep it. None = as much of the
    prompt as has been seen before is reused, and as much of it as there is room for is kept. A number,
    smaller than that of the tokens = the first so many are reused or kept, and no others; where these layers'
    attention is sparse, as many whole blocks of 128 as it has.
    activity_bins: into how many parts of the prompt to sum up what each layer computed (`Activity`); 0 = not
    asked for. ignore_eos: the model's own end tokens do not end the answer.
    follow: token ids taken in place of the model's choice, and compared with the dense model's distributions
    (see Agreement); as many as max_new_tokens, or none. They all come with the first: their times say nothing
    about decoding, and nothing else runs meanwhile. End tokens among them end nothing, and sampling has no
    say but for logprobs.
    """

    request_id: str
    token_ids: tuple[int, ...]
    method: Method
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    deadline_s: float | None = None
    prefix_tokens: int | None = None
    follow: tuple[int, ...] = ()
    activity_bins: int = 0
    ignore_eos: bool = False

    @property
    def num_read_tokens(self) -> int:
        """Tokens to read until its first token: the prompt's, and those to follow, of which the last is never
        read."""
        return len(self.token_ids) + max(0, len(self.follow) - 1)


@dataclass(frozen=True, kw_only=True)
class Activity:
    """Where in a prompt each layer computed: [layer][bin], share in % of the bin's tokens that ran the block.

    Bins are equal parts of the prompt in its order, never more of them than it has tokens.
    """

    attention: tuple[tuple[int, ...], ...]
    ffn: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The method's next-token distribution against the dense model's, where both follow the same tokens.

    kl: KL(dense || method), nats. rank: place of dense's most likely token among the method's, 1 = first.
    """

    kl: float
    rank: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished request, and what it cost as measured.

    queue_s: arrival to the start of prefill. ttft_s: arrival to the first token. decode_s: first token to
    last. total_s: arrival to last token. work: per layer, what the prefill really did. kv_tokens: prompt
    tokens in the KV cache, summed over layers. kv_bytes, flops: of the prompt, over all ranks; dense_*: of a
    dense prefill of the same prompt. logprobs: one entry per token when they were asked for, else None.
    reused_tokens: tokens of the prompt whose shallow layers were kept from an earlier request.
    reused_flops: the part of flops that was therefore not done again. peak_memory_bytes: most device memory
    in use on rank 0 from the request's start to its end, the dense run to compare with aside; None on a CPU.
    agreement: one per followed token.
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    queue_s: float
    ttft_s: float
    decode_s: float
    total_s: float
    work: tuple[LayerWork, ...]
    kv_tokens: int
    kv_bytes: int
    flops: float
    dense_flops: float
    dense_kv_bytes: int
    logprobs: tuple[TokenLogprobs, ...] | None = None
    reused_tokens: int = 0
    reused_flops: float = 0.0
    peak_memory_bytes: int | None = None
    agreement: tuple[Agreement, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Prefilled:
    """A prefill that has ended. The numbers are those of `Result`; activity: if it was asked for."""

    request_id: str
    work: tuple[LayerWork, ...]
    kv_tokens: int
    kv_bytes: int
    flops: float
    dense_flops: float
    dense_kv_bytes: int
    reused_tokens: int = 0
    reused_flops: float = 0.0
    activity: Activity | None = None


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """New tokens of one request, in order. The last chunk, and only it, has `finish_reason` and `result`;
    the first, and only it, has `prefilled` and `queue_s`, which is that of `Result`."""

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    result: Result | None = None
    prefilled: Prefilled | None = None
    queue_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """An engine at this moment. running: requests in prefill or decoding. waiting: requests not begun.

    Bytes are over all ranks. kv_bytes: of the running requests' caches, counted from the end of a prefill.
    reserved_bytes: what requests in prefill or running may take at most. document_bytes: what is kept of
    prompts for others. kv_bytes_limit: what the last two may take together. queued_prefill_tokens: tokens
    to read of the requests whose prefill has not ended. held_requests, held_documents: not from the engine's
    books, but what rank 0 had after its latest step. restarts: how often the ranks have started again.
    """

    running: int
    waiting: int
    kv_bytes: int
    kv_bytes_limit: int | None
    queued_prefill_tokens: int
    reserved_bytes: int = 0
    document_bytes: int = 0
    held_requests: int = 0
    held_documents: int = 0
    restarts: int = 0


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What an engine runs, and on what; versions, attention and accelerator are rank 0's.

    hosts: address of each rank's machine. fingerprint, proxies_sha256: what `spts.loading.weights` says.
    max_context: prompt plus new tokens. versions: package name -> version. attention: what computes it.
    accelerator: name of the device, None = the CPU. proxy: size of the model's FFN proxies; None = it has
    none. first_proxy_layer: from which on every layer has one. kv_bytes_limit: bytes on each rank for
    requests and documents. slice_tokens: a slice of a prefill costs at most a dense prefill of so many
    tokens; None = a prefill is never sliced.
    """

    model_name: str
    hosts: tuple[str, ...]
    fingerprint: str
    proxies_sha256: str | None
    shape: ModelShape
    max_context: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    device: str
    world_size: int
    versions: dict[str, str]
    attention: str
    accelerator: str | None
    proxy: ProxyShape | None
    first_proxy_layer: int | None
    kv_bytes_limit: int
    slice_tokens: int | None

    @property
    def weights(self) -> tuple[str, str | None]:
        """`fingerprint` and `proxies_sha256`."""
        return self.fingerprint, self.proxies_sha256

    def check_weights(self, expected: tuple[str, str | None]) -> None:
        """Raise ConfigError for other `weights` than those: machines may have other files of one name."""
        for field_name, got, wanted in zip(("model", "proxies"), self.weights, expected, strict=True):
            if got != wanted:
                raise ConfigError(
                    f"{field_name} must be the same files on every machine, got others on {self.hosts[0]}; "
                    "copy them there",
                    field=field_name,
                )

    @property
    def has_proxies(self) -> bool:
        """Whether methods that read FFN proxies can run."""
        return self.proxy is not None

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one element of the model's tensors."""
        return 4 if self.dtype == "float32" else 2

    @property
    def slice_flops(self) -> int | None:
        """`slice_tokens` in FLOP."""
        return None if self.slice_tokens is None else dense_flops(self.shape, self.slice_tokens).total


@dataclass(frozen=True, kw_only=True)
class Step:
    """What every rank of a group does next, in this order: release, forget, start, advance, decode.

    release: requests whose caches are dropped. forget: documents that are dropped. start: a request whose
    prefill begins; reuse: (document, its first tokens to begin with); keep: (name of the document to leave,
    first tokens of the prompt that it holds). advance: (the request in prefill, FLOP to run, None = all).
    decode: (request id, its latest token) of every running request.
    """

    release: tuple[str, ...] = ()
    forget: tuple[int, ...] = ()
    start: Request | None = None
    reuse: tuple[int, int] | None = None
    keep: tuple[int, int] | None = None
    advance: tuple[str, int | None] | None = None
    decode: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class NewToken:
    """The next token of one request."""

    request_id: str
    token_id: int
    logprobs: TokenLogprobs | None = None
    agreement: Agreement | None = None


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """Rank 0's answer to a `Step`.

    tokens: one of each request that decoded or ended its prefill; all at once of one that follows. refused:
    requests that the model would not start or cannot go on with, and why; the others are not touched.
    kept: the document that the ended prefill was to leave. held_requests, held_documents: of which rank 0 has
    tensors after the step.
    peak_memory_bytes: most device memory in use on rank 0 during the step; None on a CPU.
    """

    tokens: tuple[NewToken, ...] = ()
    peak_memory_bytes: int | None = None
    prefilled: Prefilled | None = None
    refused: tuple[tuple[str, EngineError], ...] = ()
    kept: int | None = None
    held_requests: int = 0
    held_documents: int = 0
