"""How many blocks of keys a block of queries reads in sparse causal attention, and from which sizes on other
kernels take over.

Counts only, by position and density alone: so work and memory are known before a prompt runs. Which blocks
they are depends on the content (`spts.kernels.reference.sparse_attention`). Standard library only.
"""

from __future__ import annotations

from functools import lru_cache

BLOCK_TOKENS = 128
ALWAYS = 3  # blocks read at any density: the first, the one before the queries' own, and their own
SHARES = 1 << 16
MANY_QUERIES = 1024  # of a slice, from which on blocks of them fill a GPU (`spts.kernels.causal_attention`)
CACHED_ELEMENTS = 1 << 19  # of a tensor that a CPU takes through some steps before it goes on to the next
MANY_ROWS = 32768  # more candidates are chosen among by plain torch (`spts.kernels.top_rows`)


def share_of(density: float) -> int:
    """A density in parts of SHARES, so that a kernel counts as the host does: 1 is 65,536, 0.1 is 6,553."""
    return int(density * SHARES)


def blocks_read(block: int, density: float) -> int:
    """Blocks of keys that the queries of `block` (counted from 0) read, of the block + 1 that they may see.

    The share `density` of them, rounded up, and at least the first block, their own and the one before.
    Example: block 99 at density 0.1 reads 10 of 100 blocks, block 1 both.
    """
    visible = block + 1
    return min(visible, max(ALWAYS, -(-share_of(density) * visible // SHARES)))


def check_blocks(num_queries: int, num_keys: int, density: float) -> None:
    """Raises ValueError unless the last `num_queries` of `num_keys` tokens are at least one and begin a
    block, and 0 < density <= 1."""
    if not 1 <= num_queries <= num_keys or (num_keys - num_queries) % BLOCK_TOKENS:
        raise ValueError(
            f"q_MHd must be the last tokens of k_LKd after a multiple of {BLOCK_TOKENS}, "
            f"got {num_queries} of {num_keys}; begin at a block"
        )
    if not 0 < density <= 1:
        raise ValueError(f"density must be above 0 and at most 1, got {density}; correct the call")


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
