"""How many blocks of keys a block of queries reads in sparse causal attention.

Counts only, by position and density alone: so work and memory are known before a prompt runs. Which blocks
they are depends on the content (`spts.kernels.reference.sparse_attention`). Standard library only.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil

BLOCK_TOKENS = 128
_ALWAYS = 3  # the first block, the one before the queries' own, and their own


def blocks_read(block: int, density: float) -> int:
    """Blocks of keys that the queries of `block` (counted from 0) read, of the block + 1 that they may see.

    The share `density` of them, rounded up, and at least the first block, their own and the one before.
    Example: block 99 at density 0.1 reads 10 of 100 blocks, block 1 both.
    """
    visible = block + 1
    return min(visible, max(_ALWAYS, ceil(density * visible)))


@lru_cache(maxsize=1024)  # the same for each layer of a prompt
def pairs_read(num_tokens: int, density: float, before: int = 0) -> int:
    """Pairs of a query and a key that causal attention over `num_tokens` tokens reads at `density`.

    before: the queries of the first so many tokens, a multiple of BLOCK_TOKENS, are left out. Earlier blocks
    are read whole, of its own a query sees what is not later. At density 1 it is N (N + 1) / 2. Example: 256
    tokens, any density: 128 * 129 / 2 for each block's own, and 128 * 128 for the second block reading the
    first.
    """
    first = before // BLOCK_TOKENS
    blocks, rest = divmod(num_tokens, BLOCK_TOKENS)
    own = (blocks - first) * BLOCK_TOKENS * (BLOCK_TOKENS + 1) // 2 + rest * (rest + 1) // 2
    earlier = sum(BLOCK_TOKENS * (blocks_read(block, density) - 1) for block in range(first, blocks))
    earlier += rest * (blocks_read(blocks, density) - 1) if rest else 0
    return own + earlier * BLOCK_TOKENS
