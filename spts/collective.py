"""What one tensor-parallel rank needs from its group, and the group of one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Collective(Protocol):
    """A group of ranks that make the same calls in the same order."""

    @property
    def rank(self) -> int:
        """This rank's number, 0 … world_size - 1."""

    @property
    def world_size(self) -> int:
        """Number of ranks in the group."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the ranks, in place, and return it. Same shape and dtype on every rank."""

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Overwrite `tensor` with rank 0's, in place, and return it. Same shape and dtype on every rank."""


class Local:
    """One rank: nothing to exchange."""

    rank = 0
    world_size = 1

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over one rank."""
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's own tensor."""
        return tensor
