"""The ragged key/value cache: every layer holds the tokens it computed and no other.

Legend: C capacity, P prompt tokens kept by a layer, M tokens stored at once, L tokens in a layer now, K
key/value heads on this rank, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor


class LayerCache:
    """Keys (after RoPE) and values of one layer, with room for the tokens still to come.

    Example: a layer that computed the prompt tokens 0, 3 and 7 of 8 holds 3 rows; after two decoded tokens it
    holds 5, at the positions 0, 3, 7, 8, 9.

    before: keys and values of the prompt's first tokens where other prompts have computed them, piece by
    piece; they are copied in when the first of the prompt's own rows are stored.
    """

    def __init__(self, *, room_tokens: int, before: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        self.room_tokens = room_tokens
        self._before = before
        self.num_tokens = 0
        self.prompt_positions_P: Tensor | None = None
        self._keys_CKd: Tensor | None = None
        self._values_CKd: Tensor | None = None

    def fill(self, k_MKd: Tensor, v_MKd: Tensor, positions_P: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the first rows of the prompt's own tokens, which are at `positions_P`, and returns what is
        stored. Called once, by prefill; where M < P, `append` takes the others."""
        assert self._keys_CKd is None, "a layer's prompt is begun once"
        before, self._before = self._before, ()
        num_before = sum(k_SKd.shape[0] for k_SKd, _ in before)
        num_rows, num_own = k_MKd.shape[0], positions_P.shape[0]
        self.prompt_positions_P = positions_P
        if before:
            first = torch.arange(num_before, device=positions_P.device)
            self.prompt_positions_P = torch.cat((first, positions_P))
        capacity = num_before + num_own + self.room_tokens
        if capacity == num_rows:  # nothing comes before or after them: no copy
            self._keys_CKd, self._values_CKd, self.num_tokens = k_MKd, v_MKd, num_rows
            return self.rows()
        self._keys_CKd = k_MKd.new_empty(capacity, *k_MKd.shape[1:])
        self._values_CKd = v_MKd.new_empty(capacity, *v_MKd.shape[1:])
        for k_SKd, v_SKd in before:
            self.append(k_SKd, v_SKd)
        return self.append(k_MKd, v_MKd)

    def append(self, k_MKd: Tensor, v_MKd: Tensor) -> tuple[Tensor, Tensor]:
        """Stores M tokens that come next and returns everything stored, keys and values [L, K, d].

        Raises ValueError when they do not fit into the room asked for at prefill.
        """
        keys_CKd, values_CKd = self.buffers
        num_tokens = self.num_tokens + k_MKd.shape[0]
        _check_room(num_tokens - self.num_prompt_tokens, self.room_tokens)
        keys_CKd[self.num_tokens : num_tokens] = k_MKd
        values_CKd[self.num_tokens : num_tokens] = v_MKd
        self.num_tokens = num_tokens
        return self.rows()

    def store(self, k_MKd: Tensor, v_MKd: Tensor, positions_P: Tensor) -> tuple[Tensor, Tensor]:
        """`fill` with the first rows of a prompt, `append` with any later ones."""
        if self._keys_CKd is None:
            return self.fill(k_MKd, v_MKd, positions_P)
        return self.append(k_MKd, v_MKd)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Keys and values stored so far, [L, K, d] each, as views."""
        keys_CKd, values_CKd = self.buffers
        return keys_CKd[: self.num_tokens], values_CKd[: self.num_tokens]

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        """Keys and values with room for tokens to come, [C, K, d] each; contiguous where there is room."""
        assert self._keys_CKd is not None, "nothing is stored yet"
        assert self._values_CKd is not None
        return self._keys_CKd, self._values_CKd

    @property
    def num_prompt_tokens(self) -> int:
        """Prompt tokens this layer keeps."""
        return 0 if self.prompt_positions_P is None else self.prompt_positions_P.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of the keys and values in use on this rank."""
        if self._keys_CKd is None:
            return 0
        return 2 * self.num_tokens * self._keys_CKd[0].numel() * self._keys_CKd.element_size()

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the keys and values in use and of the room for new tokens, on this rank."""
        if self._keys_CKd is None:
            return 0
        return 2 * self._keys_CKd.numel() * self._keys_CKd.element_size()


class RaggedCache:
    """One request's cache: a `LayerCache` per layer, and the position the next token will have.

    before: of the first layers, what other prompts have computed of this one's first tokens.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        prompt_tokens: int,
        room_tokens: int,
        before: Sequence[Sequence[tuple[Tensor, Tensor]]] = (),
    ) -> None:
        self.layers = [
            LayerCache(room_tokens=room_tokens, before=before[layer] if layer < len(before) else ())
            for layer in range(num_layers)
        ]
        self.prompt_tokens = prompt_tokens
        self.room_tokens = room_tokens
        self.next_position = prompt_tokens

    def positions(self, layer: int) -> Tensor:
        """Positions a layer holds, int64 [L]: the prompt tokens it computed, then every decoded one."""
        held = self.layers[layer]
        assert held.prompt_positions_P is not None, "nothing is stored yet"
        num_new = held.num_tokens - held.num_prompt_tokens
        new = torch.arange(num_new, device=held.prompt_positions_P.device) + self.prompt_tokens
        return torch.cat((held.prompt_positions_P, new))

    @cached_property
    def table(self) -> Tensor:
        """What a decode step has to know, int64 [1 + N, 3] on the host: twice 0 and the prompt's length, then
        for each of N layers the addresses of its keys and of its values and the prompt tokens it keeps.

        The last column plus `new_tokens` is the next position, and the tokens each layer holds. First asked
        for after prefill; nothing in it changes afterwards.
        """
        rows = [(0, 0, self.prompt_tokens)]
        for layer in self.layers:
            keys_CKd, values_CKd = layer.buffers
            rows.append((keys_CKd.data_ptr(), values_CKd.data_ptr(), layer.num_prompt_tokens))
        return torch.tensor(rows, dtype=torch.int64)

    @property
    def new_tokens(self) -> int:
        """Tokens appended since prefill, in every layer."""
        return self.next_position - self.prompt_tokens

    def check_room(self) -> None:
        """Raises ValueError when there is no room for another token."""
        _check_room(self.new_tokens + 1, self.room_tokens)

    def claim(self) -> None:
        """Counts a token that the caller is about to write behind those held, in every layer."""
        for layer in self.layers:
            layer.num_tokens += 1
        self.next_position += 1

    @property
    def kv_tokens(self) -> int:
        """Prompt tokens kept, summed over the layers."""
        return sum(layer.num_prompt_tokens for layer in self.layers)

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values in use on this rank, all layers."""
        return sum(layer.num_bytes for layer in self.layers)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of keys and values allocated on this rank, all layers, room for new tokens included."""
        return sum(layer.allocated_bytes for layer in self.layers)


def _check_room(new_tokens: int, room_tokens: int) -> None:
    if new_tokens > room_tokens:
        raise ValueError(
            f"max_new_tokens must cover every decoded token, got {room_tokens} and {new_tokens} tokens; "
            "ask for more room at prefill"
        )
