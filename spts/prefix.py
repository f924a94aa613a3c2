"""What prompts that begin alike can share: a prefix, computed once, exactly.

Layers before a method's first skipping layer run every token, and causal attention keeps earlier tokens free
of later ones. So after `depth` such layers the first tokens of a prompt have left keys, values and residual
rows that any other prompt beginning with them would leave too. For a dense schedule that is every layer, and
as only later tokens are still to come, keys and values are all of it. Where attention is sparse, the queries
of a block choose together what they read: then it is true of whole blocks, and at one density.

Legend: S tokens of one piece, K key/value heads on this rank, d head size, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spts.cache import RaggedCache
from spts.errors import RequestError
from spts.request import check_prefix_tokens
from spts.schedule import Schedule


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefix:
    """The first tokens of a prompt after `depth` layers. Copies: no request that uses them changes them.

    A prompt that began with another's prefix adds a piece to it and holds only what is new, so that a
    document is there once, however many questions about it are kept.

    fingerprint: the model's. density: of the attention in these layers (`Schedule.attention_density`).
    before, before_tokens: the prefix that this one goes on from, and after how many of its tokens. token_ids:
    what comes then, S tokens. keys_values: theirs, of each of the `depth` layers, [S, K, d] each, keys after
    RoPE. x_SD: their rows that enter layer `depth`; None where no layer comes after.
    """

    fingerprint: str
    depth: int
    density: float
    token_ids: tuple[int, ...]
    keys_values: tuple[tuple[Tensor, Tensor], ...]
    x_SD: Tensor | None
    before: Prefix | None = None
    before_tokens: int = 0

    @classmethod
    def copied(
        cls,
        token_ids: Sequence[int],
        *,
        before: Prefix | None,
        before_tokens: int,
        depth: int,
        density: float,
        cache: RaggedCache,
        x_ND: Tensor | None,
        fingerprint: str,
    ) -> Prefix:
        """Copies the part of `token_ids` after `before_tokens` out of a prompt that begins with them and has
        run `depth` layers."""
        part = slice(before_tokens, len(token_ids))
        keys_values = []
        for layer in cache.layers[:depth]:
            k_LKd, v_LKd = layer.rows()
            keys_values.append((k_LKd[part].clone(), v_LKd[part].clone()))
        return cls(
            fingerprint=fingerprint,
            depth=depth,
            density=density,
            token_ids=tuple(token_ids[part]),
            keys_values=tuple(keys_values),
            x_SD=None if x_ND is None else x_ND[part].clone(),
            before=before,
            before_tokens=before_tokens,
        )

    @property
    def num_tokens(self) -> int:
        """Tokens from the beginning of the prompt."""
        return self.before_tokens + len(self.token_ids)

    @property
    def num_bytes(self) -> int:
        """Bytes of this piece's tensors, on this rank."""
        tensors = [tensor for pair in self.keys_values for tensor in pair]
        tensors += [] if self.x_SD is None else [self.x_SD]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def rows(self, num_tokens: int) -> list[list[tuple[Tensor, Tensor]]]:
        """By layer, keys and values of the first `num_tokens`, as the views that follow one another."""
        pieces = self._pieces(num_tokens)
        return [
            [tuple(rows[:taken] for rows in piece.keys_values[layer]) for piece, taken in pieces]  # type: ignore[misc]  # a pair stays one
            for layer in range(self.depth)
        ]

    def joined(self, num_tokens: int, x_TD: Tensor) -> Tensor:
        """The rows of the first `num_tokens` that enter layer `depth`, and then `x_TD`."""
        parts = [piece.x_SD[:taken] for piece, taken in self._pieces(num_tokens) if piece.x_SD is not None]
        return torch.cat((*parts, x_TD)) if parts else x_TD

    def check(
        self, token_ids: Sequence[int], num_tokens: int, *, schedule: Schedule, fingerprint: str
    ) -> None:
        """Raises RequestError, code invalid_prefix, unless a prompt on this model may begin with the first
        `num_tokens` of it under `schedule`."""
        check_prefix_tokens(num_tokens, token_ids, schedule.block_tokens)
        faults = [
            f"prefix must {name} {theirs}, got {ours}"
            for name, ours, theirs in (
                ("be of the model with fingerprint", self.fingerprint, fingerprint),
                ("end where the method first skips, after layers:", self.depth, schedule.first_skip_layer),
                ("be of the method's attention_density", self.density, schedule.attention_density),
            )
            if ours != theirs
        ]
        if num_tokens > self.num_tokens:
            faults.append(f"prefix must hold {num_tokens} tokens, got {self.num_tokens}")
        start = 0
        for piece, taken in self._pieces(num_tokens):
            if piece.token_ids[:taken] != tuple(token_ids[start : start + taken]):
                faults.append(f"prefix must be of the prompt's first tokens, got others from {start} on")
                break
            start += taken
        if faults:
            raise RequestError(
                f"{faults[0]}; run the prompt without it", code="invalid_prefix", field="prefix"
            )

    def _pieces(self, num_tokens: int) -> list[tuple[Prefix, int]]:
        """The pieces that hold the first `num_tokens`, first to last, and how many of its own each gives."""
        pieces: list[tuple[Prefix, int]] = []
        piece: Prefix | None = self
        while piece is not None and num_tokens:
            if num_tokens > piece.before_tokens:
                pieces.append((piece, num_tokens - piece.before_tokens))
                num_tokens = piece.before_tokens
            piece = piece.before
        return pieces[::-1]
