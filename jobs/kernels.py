"""Each kernel of spts.kernels against its reference and torch.compile of it, at the sizes of one model.

    python -m jobs.kernels --shape llama-3.1-8b --tokens 32768 --active 9216

Time on the device alone (calls captured in a graph and replayed), bytes per second, and their share of what a
large copy reaches here. An operation is timed only if all agree; the last
line is JSON. Without a GPU it runs under TRITON_INTERPRET=1, which says nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from jobs.arena import machine, named_shape
from jobs.provenance import versions
from spts.cost import ModelShape
from spts.errors import ConfigError, SptsError, require_int
from spts.kernels import dispatch, reference

_TOLERANCE = 1e-2  # bfloat16, ‖out - reference‖ / ‖reference‖
_CALLS = 5  # in a graph


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation at one size. arguments: drawn anew at every call. moved_bytes: each input read once, each
    output written once. others: further ways to the same result, by name. plain: stands for the reference
    where that one asks the host, which a captured call must not.
    """

    operation: str
    size: str
    arguments: Callable[[], tuple[Any, ...]]
    moved_bytes: int
    others: tuple[tuple[str, Callable[..., Any]], ...] = ()
    plain: Callable[..., Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured: medians."""

    operation: str
    size: str
    eager_s: float
    compiled_s: float | None
    kernel_s: float
    others_s: dict[str, float]
    kernel_bytes_per_s: float
    share_of_copy: float


def cases(shape: ModelShape, *, tokens: int, active: int, device: str) -> Iterator[Case]:
    """What a layer that skips does on `tokens` candidates of which `active` run."""
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
        others=(("F.rms_norm", lambda x, weight, eps: F.rms_norm(x, (width,), weight, eps)),),
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
        others=(
            ("topk, sorted", lambda scores, kept, recent, flag: scores.topk(kept).indices.sort().values),
        ),
    )

    for requests in (1, 16):
        yield _decoding(shape, requests=requests, tokens=tokens, device=device)


def _decoding(shape: ModelShape, *, requests: int, tokens: int, device: str) -> Case:
    """One new token for each of some requests, each with its own cache of `tokens` and the new one."""
    kv_heads, head_dim = shape.num_kv_heads, shape.head_dim

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device, dtype=torch.bfloat16 if device != "cpu" else torch.float16)

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


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 when a kernel is wrong, 2 for refused input."""
    args = argparse.ArgumentParser(prog="python -m jobs.kernels", description=(__doc__ or "").split("\n")[0])
    args.add_argument("--shape", default="llama-3.1-8b", help="a shape of jobs.latency")
    args.add_argument("--tokens", type=int, nargs="+", default=[32768], help="candidates T")
    args.add_argument("--active", type=int, nargs="+", default=[9216], help="active tokens M, one for each T")
    args.add_argument("--device", default="cuda", help="cuda, or cpu under TRITON_INTERPRET=1")
    args.add_argument("--repeats", type=int, default=20)
    args.add_argument("--eager-only", action="store_true", help="leave torch.compile out")
    chosen = args.parse_args(argv)
    try:
        shape = named_shape(chosen.shape)
        require_int("repeats", chosen.repeats, minimum=1)
        if len(chosen.tokens) != len(chosen.active):
            raise ConfigError("active must have one number for each of tokens; give as many", field="active")
        for tokens, active in zip(chosen.tokens, chosen.active, strict=True):
            require_int("active", active, minimum=1)
            if active > tokens:
                raise ConfigError(
                    f"active must be at most the {tokens} tokens, got {active}; use fewer", field="active"
                )
        copied = copy_bandwidth(chosen.device)
        print(f"copy {copied / 1e12:.2f} TB/s")
        rows = []
        for tokens, active in zip(chosen.tokens, chosen.active, strict=True):
            for case in cases(shape, tokens=tokens, active=active, device=chosen.device):
                rows.append(measure(case, copied, repeats=chosen.repeats, compile_too=not chosen.eager_only))
                print(_line(rows[-1]), flush=True)
    except SptsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ArithmeticError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    about = {"shape": chosen.shape, "hardware": machine(torch.device(chosen.device))}
    print(
        json.dumps(
            {
                **about,
                "versions": versions(),
                "copy_bytes_per_s": copied,
                "rows": [asdict(row) for row in rows],
            }
        )
    )
    return 0


def measure(case: Case, copied: float, *, repeats: int, compile_too: bool) -> Row:
    """Checks that all ways agree, then times them. copied: bytes per second of a large copy.

    Raises ArithmeticError for a wrong result.
    """
    plain, kernel = case.plain or getattr(reference, case.operation), dispatch.kernel(case.operation)
    eager_s = timed(plain, case.arguments(), repeats)
    compiled_s = None
    if compile_too:
        torch._dynamo.reset()
        compiled = torch.compile(plain, dynamic=False)
        _agree(case, "torch.compile", compiled, plain)
        compiled_s = timed(compiled, case.arguments(), repeats)
    _agree(case, "the kernel", kernel, plain)
    kernel_s = timed(kernel, case.arguments(), repeats)
    return Row(
        operation=case.operation,
        size=case.size,
        eager_s=eager_s,
        compiled_s=compiled_s,
        kernel_s=kernel_s,
        others_s={name: timed(other, case.arguments(), repeats) for name, other in case.others},
        kernel_bytes_per_s=case.moved_bytes / kernel_s,
        share_of_copy=case.moved_bytes / kernel_s / copied,
    )


def timed(operation: Callable[..., Any], arguments: tuple[Any, ...], repeats: int) -> float:
    """Median seconds of one call: on a GPU of calls captured in a graph, so that launching costs nothing."""
    for _ in range(3):
        operation(*arguments)
    spans = []
    if not any(isinstance(each, Tensor) and each.is_cuda for each in arguments):
        for _ in range(repeats):
            begin = time.perf_counter()
            operation(*arguments)
            spans.append(time.perf_counter() - begin)
        return median(spans)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS):
            operation(*arguments)
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        spans.append(start.elapsed_time(stop) / 1e3 / _CALLS)
    return median(spans)


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read and written, of a copy that fills the device."""
    gpu = torch.device(device).type == "cuda"
    source = torch.randn((1 << 31) if gpu else (1 << 20), device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    # Not copy_: captured in a graph it is left to a copy engine, which is slower than a kernel.
    return 2 * source.nbytes / timed(lambda x: torch.neg(x, out=target), (source,), 10)


def _agree(case: Case, who: str, operation: Callable[..., Any], plain: Callable[..., Any]) -> None:
    arguments = case.arguments()
    copies = tuple(each.clone() if isinstance(each, Tensor) else each for each in arguments)
    out, expected = operation(*arguments), plain(*copies)
    if expected.dtype == torch.int64:
        wrong = 0.0 if torch.equal(out, expected) else 1.0
    else:
        wrong = float((out.double() - expected.double()).norm() / expected.double().norm())
    if not wrong <= _TOLERANCE:
        raise ArithmeticError(
            f"{who} must equal the reference of {case.operation} at {case.size}, is off by {wrong:.1e}"
        )


def _line(row: Row) -> str:
    compiled = "-" if row.compiled_s is None else f"{row.compiled_s * 1e6:9.1f}"
    others = "".join(f", {name} {seconds * 1e6:.1f}" for name, seconds in row.others_s.items())
    return (
        f"{row.operation:<18} {row.size:<26} eager {row.eager_s * 1e6:9.1f}  compile {compiled}  "
        f"kernel {row.kernel_s * 1e6:9.1f} us  {row.eager_s / row.kernel_s:6.2f}x  "
        f"{row.kernel_bytes_per_s / 1e12:5.2f} TB/s"
        f"  {row.share_of_copy:4.0%} of copy{others}"
    )


if __name__ == "__main__":
    sys.exit(main())
