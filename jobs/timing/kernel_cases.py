"""What jobs.kernels times: each kernel at the sizes of one model, and other ways to its result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from spts.cost import ModelShape
from spts.kernels import reference
from spts.kernels.blocks import BLOCK_TOKENS, pairs_read
from spts.kernels.sparse_attention import choose_blocks

Prepare = Callable[..., Callable[[], Any]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation at one size. arguments: drawn anew at every call. moved_bytes: each input read once, each
    output written once. flop: of its products, 0 = it is there to move bytes. others: further ways to the
    same result, by name; each is given the arguments and returns a call without any. beside: likewise, but
    another result: what the operation replaces, or a part of it. plain: stands for the reference where that
    one asks the host, which a captured call must not. slow: `plain` is compared and not timed.
    """

    operation: str
    size: str
    arguments: Callable[[], tuple[Any, ...]]
    moved_bytes: int
    flop: int = 0
    others: tuple[tuple[str, Prepare], ...] = ()
    beside: tuple[tuple[str, Prepare], ...] = ()
    plain: Callable[..., Any] | None = None
    slow: bool = False


def cases(
    shape: ModelShape, *, tokens: int, active: int, densities: Sequence[float], device: str, compiled: bool
) -> Iterator[Case]:
    """What a layer that skips does on `tokens` candidates of which `active` run; decoding over caches of
    `tokens`; sparse attention over them. compiled: others may need torch.compile."""
    width, inner, head_dim = shape.hidden_size, shape.intermediate_size, shape.head_dim

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device, dtype=torch.bfloat16)

    def angles() -> tuple[Tensor, Tensor]:
        angle_Td = draw(tokens, head_dim)
        return angle_Td.cos(), angle_Td.sin()

    def chosen() -> Tensor:
        return torch.randperm(tokens, device=device)[:active].sort().values

    def flag() -> Tensor:
        return torch.zeros((), dtype=torch.bool, device=device)

    yield Case(
        operation="rms_norm",
        size=f"T{tokens}-D{width}",
        arguments=lambda: (draw(tokens, width), draw(width), 1e-5),
        moved_bytes=4 * tokens * width,
        others=(("F.rms_norm", lambda x, weight, eps: partial(F.rms_norm, x, (width,), weight, eps)),),
    )
    for heads in (shape.num_heads, shape.num_kv_heads):
        yield Case(
            operation="rotate_in_place",
            size=f"T{tokens}-H{heads}-d{head_dim}",
            arguments=lambda heads=heads: (draw(tokens, heads, head_dim), *angles()),  # type: ignore[misc]  # a lambda's default
            moved_bytes=4 * tokens * (heads + 1) * head_dim,
        )
    for rows in (tokens, active):
        yield Case(
            operation="gated_product",
            size=f"M{rows}-F{inner}",
            # Around 2, so that products written over their input stay numbers that differ.
            arguments=lambda rows=rows: (draw(rows, inner), draw(rows, inner) + 2, F.silu),  # type: ignore[misc]  # a lambda's default
            moved_bytes=6 * rows * inner,
            plain=lambda gate, up, activation: activation(gate).mul_(up),  # the reference goes piece by piece
        )
    yield Case(
        operation="add_rows_in_place",
        size=f"T{tokens}-M{active}-D{width}",
        arguments=lambda: (draw(tokens, width), chosen(), draw(active, width)),
        moved_bytes=6 * active * width + 8 * active,
    )
    yield Case(
        operation="top_rows",
        size=f"T{tokens}-M{active}",
        arguments=lambda: (torch.randn(tokens, device=device).softmax(0), active, 1, flag()),
        moved_bytes=4 * tokens + 8 * active,
        # Of equal scores it may take others.
        beside=(
            (
                "topk, sorted",
                lambda scores, kept, recent, flag: lambda: scores.topk(kept).indices.sort().values,
            ),
        ),
    )

    for requests in (1, 16):
        yield _decoding(shape, requests=requests, tokens=tokens, device=device)
    for density in densities:
        yield _sparse(shape, tokens=tokens, density=density, device=device, compiled=compiled)


def _decoding(shape: ModelShape, *, requests: int, tokens: int, device: str) -> Case:
    """One new token for each of some requests, each with its own cache of `tokens` and the new one."""
    kv_heads, head_dim = shape.num_kv_heads, shape.head_dim

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device, dtype=_product_dtype(device))

    def arguments() -> tuple[Any, ...]:
        rows = (tokens + 1, kv_heads, head_dim)
        held = [(draw(*rows), draw(*rows)) for _ in range(requests)]
        table = torch.tensor([(keys.data_ptr(), values.data_ptr(), tokens) for keys, values in held])
        new = [draw(requests, heads, head_dim) for heads in (shape.num_heads, kv_heads, kv_heads)]
        return (*new, held, table.to(device), head_dim**-0.5)

    def one_by_one(q: Tensor, k: Tensor, v: Tensor, held: Any, table: Tensor, scale: float) -> Tensor:
        out = torch.empty_like(q)
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            for row, (keys, values) in enumerate(held):
                keys[tokens], values[tokens] = k[row], v[row]
                out[row] = reference.causal_attention(q[row : row + 1], keys, values, scale)[0]
        return out

    return Case(
        operation="ragged_attention",
        size=f"B{requests}-L{tokens}-H{shape.num_heads}-K{kv_heads}-d{head_dim}",
        arguments=arguments,
        moved_bytes=4 * requests * (tokens + 1) * kv_heads * head_dim,
        plain=one_by_one,
    )


def _sparse(shape: ModelShape, *, tokens: int, density: float, device: str, compiled: bool) -> Case:
    """Sparse attention over a whole prompt; the kernel's own choice is what the others read, as near ties of
    halves may fall otherwise elsewhere."""
    heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim

    def draw(heads: int) -> Tensor:
        return torch.randn(tokens, heads, head_dim, device=device, dtype=_product_dtype(device))

    def same_blocks(q: Tensor, k: Tensor, v: Tensor, scale: float, density: float) -> Tensor:
        return reference.attend_blocks(q, k, v, scale, density, choose_blocks(q, k, scale, density))

    def flex(q: Tensor, k: Tensor, v: Tensor, scale: float, density: float) -> Callable[[], Tensor]:
        mask = block_mask(choose_blocks(q, k, scale, density), tokens)
        attend = torch.compile(flex_attention, dynamic=False)
        q, k, v = (each.transpose(0, 1)[None] for each in (q, k, v))
        return lambda: attend(q, k, v, block_mask=mask, scale=scale, enable_gqa=True)[0].transpose(0, 1)

    return Case(
        operation="sparse_attention",
        size=f"L{tokens}-H{heads}-K{kv_heads}-d{head_dim}-{density:g}",
        arguments=lambda: (draw(heads), draw(kv_heads), draw(kv_heads), head_dim**-0.5, density),
        moved_bytes=4 * tokens * (heads + kv_heads) * head_dim,
        flop=4 * heads * head_dim * pairs_read(tokens, density),
        # Without torch.compile FlexAttention writes all logits out and reads every block.
        others=(("FlexAttention", flex),) if compiled else (),
        beside=(
            ("choice alone", lambda q, k, v, scale, density: partial(choose_blocks, q, k, scale, density)),
            ("dense", lambda q, k, v, scale, density: partial(reference.causal_attention, q, k, v, scale)),
        ),
        plain=same_blocks,
        slow=True,
    )


def _product_dtype(device: str) -> torch.dtype:
    """Triton's interpreter multiplies the bits of bfloat16 as if they were integers."""
    return torch.bfloat16 if device != "cpu" else torch.float16


def block_mask(chosen_HRS: Tensor, tokens: int) -> BlockMask:
    """FlexAttention's form of what `choose_blocks` returned for a whole prompt: the chosen blocks are read
    whole, of its own a query sees what is not later."""
    num_rows, most = chosen_HRS.shape[1:]
    chosen_1HRC = F.pad(chosen_HRS.clamp(min=0), (0, num_rows - most))[None]
    own_1HRC = torch.zeros_like(chosen_1HRC)
    own_1HRC[..., 0] = torch.arange(num_rows, device=chosen_HRS.device)
    return BlockMask.from_kv_blocks(
        torch.ones_like(own_1HRC[..., 0]),
        own_1HRC,
        (chosen_HRS >= 0).sum(dim=-1, dtype=torch.int32)[None],
        chosen_1HRC,
        BLOCK_SIZE=BLOCK_TOKENS,
        mask_mod=lambda batch, head, query, key: query >= key,
        seq_lengths=(tokens, tokens),
    )
