"""What a client gets: completion and chat objects, whole or as chunks of a stream, with usage."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.api import StreamOptions
from cluster.protocol import FinishReason, Prefilled
from cluster.tokenizer import TextTokenizer
from spts.cost import pairs_share
from spts.sampling import TokenLogprobs

Endpoint = Literal["completion", "chat"]


@dataclass(frozen=True, kw_only=True)
class Unpredicted:
    """In place of the log-probability of a prompt's first token, before which there is nothing."""

    token_id: int


@dataclass(frozen=True, kw_only=True)
class Piece:
    """New text of one choice. prefilled: with its first piece. finish_reason: with its last.

    num_tokens: tokens that this piece stands for, those without text included. logprobs: an entry for each of
    them if asked for. offsets: where in the answer's text the text of each of them begins, in characters.
    """

    index: int
    text: str
    num_tokens: int
    logprobs: tuple[TokenLogprobs | Unpredicted, ...] | None = None
    offsets: tuple[int, ...] = ()
    prefilled: Prefilled | None = None
    finish_reason: FinishReason | None = None


@dataclass(kw_only=True)
class Usage:
    """Token counts of one HTTP request, added up over its choices. Prompt tokens count once per prompt,
    and so do those of them that an earlier request had left in memory."""

    prompt_tokens: int
    method: str
    choices_per_prompt: int = 1
    cached_tokens: int = 0
    completion_tokens: int = 0
    prefills: list[Prefilled] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        """Count a piece."""
        self.completion_tokens += piece.num_tokens
        if piece.prefilled is not None:
            self.prefills.append(piece.prefilled)
            if piece.index % self.choices_per_prompt == 0:
                self.cached_tokens += piece.prefilled.reused_tokens

    def to_dict(self) -> dict[str, Any]:
        """OpenAI's counts, and `spts`: what the prefills of all choices kept and skipped.

        kv_tokens: prompt tokens in the KV cache, summed over layers; kv_tokens_full: those of a dense
        prefill. attention_density: share of their pairs of a query and a key that layers with sparse
        attention read, 1.0 without any. skipped_share: share of (token, block) computations that were
        skipped, attention and FFN blocks of all layers. flops_share: FLOP of the prefill, as a share of a
        dense one's. kv_bytes: of the prompts; kv_bytes_full: those of dense prefills. activity: of the one
        choice that may ask for it.
        """
        work = [layer for prefilled in self.prefills for layer in prefilled.work]
        full = sum(prefilled.work[0].candidates * len(prefilled.work) for prefilled in self.prefills)
        ran = sum(layer.attention_tokens + layer.ffn_tokens for layer in work)
        dense = sum(prefilled.dense_flops for prefilled in self.prefills)
        usage: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "spts": {
                "method": self.method,
                "kv_tokens": sum(prefilled.kv_tokens for prefilled in self.prefills),
                "kv_tokens_full": full,
                "attention_density": round(pairs_share(work), 6),
                "skipped_share": round(1 - ran / (2 * full), 6) if full else 0.0,
                "flops_share": round(sum(p.flops for p in self.prefills) / dense, 6) if dense else 1.0,
                "kv_bytes": sum(prefilled.kv_bytes for prefilled in self.prefills),
                "kv_bytes_full": sum(prefilled.dense_kv_bytes for prefilled in self.prefills),
            },
        }
        for prefilled in self.prefills:
            if (activity := prefilled.activity) is not None:
                bins = len(activity.attention[0])
                usage["spts"]["activity"] = {
                    "bins": bins,
                    "attention": activity.attention,
                    "ffn": activity.ffn,
                }
        return usage


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Builds the objects of one HTTP request."""

    endpoint: Endpoint
    request_id: str
    model: str
    tokenizer: TextTokenizer
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Sequence[Piece]], usage: Usage) -> dict[str, Any]:
        """The answer to a request that does not stream. choices: the pieces of each choice, in order."""
        return self._object(streaming=False) | {
            "choices": [self._choice(pieces, streaming=False) for pieces in choices],
            "usage": usage.to_dict(),
        }

    def chunk(
        self, piece: Piece, *, first: bool, options: StreamOptions | None, usage: Usage
    ) -> dict[str, Any]:
        """One chunk of a stream. first: of its choice. usage: so far; the chunk has it, or null in its place,
        as `options` ask."""
        chunk = self._object(streaming=True) | {
            "choices": [self._choice([piece], streaming=True, first=first)]
        }
        if options is not None and options.continuous_usage_stats:
            chunk["usage"] = usage.to_dict()
        elif options is not None and options.include_usage:
            chunk["usage"] = None
        return chunk

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """The last chunk of a stream that asked for its usage."""
        return self._object(streaming=True) | {"choices": [], "usage": usage.to_dict()}

    def _object(self, *, streaming: bool) -> dict[str, Any]:
        kind = {"completion": "text_completion", "chat": "chat.completion"}[self.endpoint]
        prefix = {"completion": "cmpl", "chat": "chatcmpl"}[self.endpoint]
        return {
            "id": f"{prefix}-{self.request_id}",
            "object": f"{kind}.chunk" if streaming and self.endpoint == "chat" else kind,
            "created": self.created,
            "model": self.model,
        }

    def _choice(self, pieces: Sequence[Piece], *, streaming: bool, first: bool = False) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        asked = any(piece.logprobs is not None for piece in pieces)
        choice: dict[str, Any] = {"index": pieces[-1].index, "finish_reason": pieces[-1].finish_reason}
        if self.endpoint == "completion":
            return choice | {"text": text, "logprobs": self._completion_logprobs(pieces) if asked else None}
        entries = [self._chat_logprob(entry) for piece in pieces for entry in piece.logprobs or ()]
        choice["logprobs"] = {"content": entries} if asked else None
        if streaming:
            return choice | {"delta": ({"role": "assistant"} if first else {}) | {"content": text}}
        return choice | {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _completion_logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        entries = [entry for piece in pieces for entry in piece.logprobs or ()]
        tokens = [self.tokenizer.token_text(entry.token_id) for entry in entries]
        return {
            "tokens": tokens,
            "token_logprobs": [
                None if isinstance(entry, Unpredicted) else entry.logprob for entry in entries
            ],
            "top_logprobs": [
                None
                if isinstance(entry, Unpredicted)
                else {self.tokenizer.token_text(token_id): logprob for token_id, logprob in entry.top}
                for entry in entries
            ],
            "text_offset": [offset for piece in pieces for offset in piece.offsets],
        }

    def _chat_logprob(self, entry: TokenLogprobs | Unpredicted) -> dict[str, Any]:
        assert isinstance(entry, TokenLogprobs), "a chat has no echo"
        top = [self._token(token_id, logprob) for token_id, logprob in entry.top]
        return self._token(entry.token_id, entry.logprob) | {"top_logprobs": top}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self.tokenizer.token_text(token_id)
        # Part of a character has no text of its own, and what its bytes are is not known here.
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


def sse(data: dict[str, Any]) -> bytes:
    """One event of a stream."""
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


SSE_END = b"data: [DONE]\n\n"
