"""What one tensor-parallel rank needs from its group, and the group of one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Collective(Protocol):
    """A group of ranks that make the same calls in the same order.

    rank: 0 … world_size - 1. world_size: number of ranks.
    """

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the ranks, in place, and return it. Same shape and dtype on every rank."""

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Overwrite `tensor` with rank 0's, in place, and return it. Same shape and dtype on every rank."""


class Local:
    """One rank: nothing to exchange."""

    rank = 0
    world_size = 1

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        return tensor
