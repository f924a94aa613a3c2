"""What prompts that begin alike can share: a prefix, computed once, exactly.

Layers before a method's first skipping layer run every token, and causal attention keeps earlier tokens free
of later ones. So after `depth` such layers the first tokens of a prompt have left keys, values and residual
rows that any other prompt beginning with them would leave too. For a dense schedule that is every layer, and
as only later tokens are still to come, keys and values are all of it.

Legend: P prefix tokens, K key/value heads on this rank, d head size, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from spts.cache import RaggedCache
from spts.errors import RequestError
from spts.request import check_prefix_tokens, digest


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """The first tokens of a prompt after `depth` layers. Copies: no request that uses them changes them.

    fingerprint: the model's. token_digest: `spts.request.digest` of the tokens. keys_values: of each of the
    `depth` layers, [P, K, d] each, keys after RoPE. x_PD: the rows that enter layer `depth`; None where no
    layer comes after.
    """

    fingerprint: str
    token_digest: str
    num_tokens: int
    depth: int
    keys_values: tuple[tuple[Tensor, Tensor], ...]
    x_PD: Tensor | None

    @classmethod
    def copied(
        cls,
        token_ids: Sequence[int],
        *,
        depth: int,
        cache: RaggedCache,
        x_ND: Tensor | None,
        fingerprint: str,
    ) -> Prefix:
        """Copies the tokens' part out of a prompt that begins with them and has run `depth` layers."""
        num_tokens = len(token_ids)
        keys_values = []
        for layer in cache.layers[:depth]:
            k_LKd, v_LKd = layer.rows()
            keys_values.append((k_LKd[:num_tokens].clone(), v_LKd[:num_tokens].clone()))
        return cls(
            fingerprint=fingerprint,
            token_digest=digest(token_ids),
            num_tokens=num_tokens,
            depth=depth,
            keys_values=tuple(keys_values),
            x_PD=None if x_ND is None else x_ND[:num_tokens].clone(),
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, on this rank."""
        tensors = [tensor for pair in self.keys_values for tensor in pair]
        tensors += [] if self.x_PD is None else [self.x_PD]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def check(self, token_ids: Sequence[int], *, depth: int, fingerprint: str) -> None:
        """Raises RequestError, code invalid_prefix, unless a prompt on this model may begin with it."""
        check_prefix_tokens(self.num_tokens, token_ids)
        first = digest(token_ids[: self.num_tokens])
        for name, ours, theirs in (
            ("be of the model with fingerprint", self.fingerprint, fingerprint),
            ("end where the method first skips, after layers:", self.depth, depth),
            ("be of the prompt's first tokens, sha256", self.token_digest, first),
        ):
            if ours != theirs:
                raise RequestError(
                    f"prefix must {name} {theirs}, got {ours}; run the prompt without it",
                    code="invalid_prefix",
                    field="prefix",
                )
