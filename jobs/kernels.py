"""Each kernel of spts.kernels against its reference and torch.compile of it, at the sizes of one model.

    python -m jobs.kernels --shape llama-3.1-8b --tokens 32768 --active 9216

Time on the device alone (calls captured in a graph and replayed), bytes per second, and their share of what a
large copy reaches here, or FLOP per second. An operation is timed only if all agree; the last line is JSON.
Without a GPU it runs under TRITON_INTERPRET=1, which says nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from jobs.disk.provenance import versions
from jobs.options import interruptible
from jobs.timing.arena import machine, named_shape
from jobs.timing.contestants import check_device
from jobs.timing.kernel_cases import Case, cases
from spts.errors import ConfigError, SptsError, config_error, require_int
from spts.kernels import dispatch, reference

_TOLERANCE = 1e-2  # bfloat16, ‖out - reference‖ / ‖reference‖
_CALLS = 5  # in a graph


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured: medians. None: not timed, or not what the operation is there for."""

    operation: str
    size: str
    eager_s: float | None
    compiled_s: float | None
    kernel_s: float
    others_s: dict[str, float]
    kernel_bytes_per_s: float
    share_of_copy: float
    kernel_flop_per_s: float | None


@interruptible()
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 when a kernel is wrong, 2 for refused input, 130 Ctrl-C."""
    args = argparse.ArgumentParser(prog="python -m jobs.kernels", description=(__doc__ or "").split("\n")[0])
    args.add_argument("--shape", default="llama-3.1-8b", help="a shape of jobs.latency")
    args.add_argument("--tokens", type=int, nargs="+", default=[32768], help="candidates T")
    args.add_argument("--active", type=int, nargs="+", default=[9216], help="active tokens M, one for each T")
    args.add_argument("--density", type=float, nargs="*", default=[0.1], help="of sparse attention")
    args.add_argument("--device", default="cuda", help="cuda, or cpu under TRITON_INTERPRET=1")
    args.add_argument("--repeats", type=int, default=20)
    args.add_argument("--eager-only", action="store_true", help="leave torch.compile out")
    chosen = args.parse_args(argv)
    try:
        device = check_device(chosen.device)
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            rule = "be cuda unless TRITON_INTERPRET=1 is set"
            raise config_error("device", rule, repr(chosen.device), "set it to check without a GPU")
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
        for density in chosen.density:
            if not 0 < density < 1:
                raise ConfigError(
                    f"density must be above 0 and below 1, got {density}; leave it out for dense attention",
                    field="density",
                )
        copied = copy_bandwidth(chosen.device)
        print(f"copy {copied / 1e12:.2f} TB/s")
        rows = []
        for tokens, active in zip(chosen.tokens, chosen.active, strict=True):
            for case in cases(
                shape,
                tokens=tokens,
                active=active,
                densities=chosen.density,
                device=chosen.device,
                compiled=not chosen.eager_only,
            ):
                rows.append(measure(case, copied, repeats=chosen.repeats, compile_too=not chosen.eager_only))
                print(_line(rows[-1]), flush=True)
    except SptsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ArithmeticError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    about = {"shape": chosen.shape, "hardware": machine(device)}
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
    eager_s = compiled_s = None
    if not case.slow:
        eager_s = timed(plain, case.arguments(), repeats)
    if compile_too and not case.slow:
        torch._dynamo.reset()
        compiled = torch.compile(plain, dynamic=False)
        _agree(case, "torch.compile", compiled, plain)
        compiled_s = timed(compiled, case.arguments(), repeats)
    _agree(case, "the kernel", kernel, plain)
    kernel_s = timed(kernel, case.arguments(), repeats)
    others_s = {}
    for name, prepare in case.others:
        _agree(case, name, lambda *arguments, prepare=prepare: prepare(*arguments)(), plain)
    for name, prepare in (*case.others, *case.beside):
        arguments = case.arguments()
        others_s[name] = timed(prepare(*arguments), (), repeats, on_gpu=_on_gpu(arguments))
    return Row(
        operation=case.operation,
        size=case.size,
        eager_s=eager_s,
        compiled_s=compiled_s,
        kernel_s=kernel_s,
        others_s=others_s,
        kernel_bytes_per_s=case.moved_bytes / kernel_s,
        share_of_copy=case.moved_bytes / kernel_s / copied,
        kernel_flop_per_s=case.flop / kernel_s if case.flop else None,
    )


def _on_gpu(arguments: tuple[Any, ...]) -> bool:
    return any(isinstance(each, Tensor) and each.is_cuda for each in arguments)


def timed(
    operation: Callable[..., Any], arguments: tuple[Any, ...], repeats: int, *, on_gpu: bool | None = None
) -> float:
    """Median seconds of one call: on a GPU of calls captured in a graph, so that launching costs nothing.
    on_gpu: None = where the arguments are."""
    for _ in range(3):
        operation(*arguments)
    spans = []
    if not (_on_gpu(arguments) if on_gpu is None else on_gpu):
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
    eager, compiled = (
        f"{'-':>9}" if each is None else f"{each * 1e6:9.1f}" for each in (row.eager_s, row.compiled_s)
    )
    speedup = f"{'':7}" if row.eager_s is None else f"{row.eager_s / row.kernel_s:6.2f}x"
    reached = f"{row.kernel_bytes_per_s / 1e12:5.2f} TB/s  {row.share_of_copy:4.0%} of copy"
    if row.kernel_flop_per_s is not None:
        reached = f"{row.kernel_flop_per_s / 1e12:5.0f} TFLOP/s"
    others = "".join(
        f", {name} {seconds * 1e6:.1f} ({seconds / row.kernel_s:.2f}x)"
        for name, seconds in row.others_s.items()
    )
    return (
        f"{row.operation:<18} {row.size:<26} eager {eager}  compile {compiled}  "
        f"kernel {row.kernel_s * 1e6:9.1f} us  {speedup}  {reached}{others}"
    )


if __name__ == "__main__":
    sys.exit(main())
