"""What a long prompt does to the answers beside it: gaps between their tokens, under dense and under SPTS.

    python -m jobs.stalls --model FOLDER --tokens 131072 --schedule llama-3.1-8b --streams 4

While `--streams` requests decode, dense, the same engine reads one long prompt of random tokens, which it has
read alone before. The engine is in this process, its ranks are on Ray, and tokens are timed as they leave it.
A preset's budgets are those published. Exit status 1 if the token after the long prompt is another one beside
the streams. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import count, pairwise
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from cluster.config import EngineConfig, check_method, resolve_path
from cluster.placement import check_divisible
from cluster.protocol import EngineError, Request, Result
from cluster.strict import parse
from jobs.aligned import aligned
from jobs.latency import DTYPE_BYTES
from jobs.load.summary import spread
from jobs.options import describe_schedule, interruptible, read_schedule
from jobs.timing.arena import fitted_size, machine
from spts.cost import ModelShape, speedup
from spts.errors import SptsError, config_error, require_int
from spts.methods import Dense, Method, Spts
from spts.schedule import PRESETS, Schedule

if TYPE_CHECKING:
    from cluster.engine import Engine

STREAM_TOKENS = 16  # of a stream's prompt
SETTLED_TOKENS = 32  # of each stream before the long prompt comes
MAX_ANSWER_TOKENS = 4096  # for which memory is reserved; a stream that is at its end begins anew


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The long prompt read once alone and once beside the streams; gaps between their tokens, seconds, before
    it came and while it was read."""

    alone: Result
    beside: Result
    before: Sequence[float]
    during: Sequence[float]


def gaps(
    answers: Iterable[Sequence[float]], *, joined: float, start: float, end: float
) -> tuple[list[float], list[float]]:
    """Seconds between two tokens of an answer: before a prompt is read, and while it is, `start` to `end`.

    answers: when the tokens of each came. joined: when the last stream had its first token; gaps that began
    earlier hold prefills of other streams and do not count. A gap belongs to where its middle lies: steps
    begin and end with a reading, and their tokens come a moment later.

    Worked example: tokens at 0, 1, 2, 5.5, 6.5 with joined = 0.5, start = 2, end = 5.5 have one gap of 1
    before and one of 3.5 while it is read.
    """
    before, during = [], []
    for a, b in (pair for times in answers for pair in pairwise(times)):
        if start <= (a + b) / 2 < end:
            during.append(b - a)
        elif joined <= a and (a + b) / 2 < start:
            before.append(b - a)
    return before, during


class Reader:
    """Has an engine read a long prompt, alone and beside streams. max_context: of the engine, tokens."""

    def __init__(self, engine: Engine, prompt: Sequence[int], num_streams: int, max_context: int) -> None:
        self._engine = engine
        self._prompt = tuple(prompt)
        self._num_streams = num_streams
        self._answer_tokens = min(MAX_ANSWER_TOKENS, max_context - STREAM_TOKENS)
        self._numbers = count()

    def request(self, method: Method | None = None) -> Request:
        """For the token after the long prompt; without a method, one of a stream."""
        return Request(
            request_id=f"stalls-{next(self._numbers)}",
            token_ids=self._prompt[:STREAM_TOKENS] if method is None else self._prompt,
            method=method or Dense(),
            max_new_tokens=self._answer_tokens if method is None else 1,
            prefix_tokens=0,  # each computes all of its prompt
            ignore_eos=True,
        )

    async def read(self, method: Method) -> Reading:
        """Both readings. Raises EngineError."""
        alone = await self._engine.run(self.request(method))
        streams: list[list[list[float]]] = [[] for _ in range(self._num_streams)]
        reading = asyncio.create_task(self._read_beside(method, streams))
        tasks = [reading, *(asyncio.create_task(self._stream(answers)) for answers in streams)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:  # a stream ends by an exception alone
                task.result()
            beside, sent = reading.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        before, during = gaps(
            (times for answers in streams for times in answers),
            joined=max(answers[0][0] for answers in streams),
            start=sent + beside.queue_s,
            end=sent + beside.ttft_s,
        )
        return Reading(alone=alone, beside=beside, before=before, during=during)

    async def _read_beside(self, method: Method, streams: list[list[list[float]]]) -> tuple[Result, float]:
        while any(sum(map(len, answers)) < SETTLED_TOKENS for answers in streams):
            await asyncio.sleep(0.01)
        sent = perf_counter()
        return await self._engine.run(self.request(method)), sent

    async def _stream(self, answers: list[list[float]]) -> None:
        while True:
            answers.append([])
            async with aclosing(self._engine.generate(self.request())) as chunks:
                async for _ in chunks:  # of one token each
                    answers[-1].append(perf_counter())


def row(name: str, readings: Sequence[Reading]) -> dict[str, Any]:
    """The figures of a method: gaps of all readings together, TTFT as medians."""
    found: dict[str, Any] = {
        "method": name,
        "ttft_alone_s": median(each.alone.ttft_s for each in readings),
        "ttft_beside_s": median(each.beside.ttft_s for each in readings),
    }
    for when in ("before", "during"):
        figures = spread(gap for each in readings for gap in getattr(each, when))
        assert figures is not None, "every stream has a token per step"
        found |= {
            f"gaps_{when}": figures.count,
            f"gap_{when}_p50_s": figures.p50,
            f"gap_{when}_p99_s": figures.p99,
            f"gap_{when}_longest_s": figures.most,
        }
    return found | {"same_token": all(each.alone.token_ids == each.beside.token_ids for each in readings)}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows, aligned."""
    figures = ["p50 ms", "p99 ms", "longest ms"]
    lines = [["method", "TTFT alone s", "beside s", "gaps before", *figures, "gaps during", *figures]]
    for each in rows:
        lines.append([each["method"], f"{each['ttft_alone_s']:.3f}", f"{each['ttft_beside_s']:.3f}"])
        for when in ("before", "during"):
            lines[-1].append(str(each[f"gaps_{when}"]))
            lines[-1] += [f"{1e3 * each[f'gap_{when}_{name}_s']:.1f}" for name in ("p50", "p99", "longest")]
    return "\n".join(aligned(lines))


async def measure(
    config: EngineConfig, methods: Mapping[str, Method], num_tokens: int, num_streams: int, repeats: int
) -> dict[str, Any]:
    """What the engine is, and a row per method after one reading that does not count. Ray is connected."""
    from cluster.admission import request_bytes
    from cluster.engine import Engine

    engine = Engine(config)
    info = await engine.start()
    try:
        prompt = random.Random(0).choices(range(1, info.vocab_size), k=num_tokens)
        reader = Reader(engine, prompt, num_streams, info.max_context)
        needed = num_streams * request_bytes(reader.request(), info)
        needed += max(request_bytes(reader.request(method), info) for method in methods.values())
        if needed > info.kv_bytes_limit:
            rule = f"fit beside the prompt into {info.kv_bytes_limit} bytes of KV memory on each rank"
            raise config_error("streams", rule, f"{num_streams}, {needed} bytes in all", "use fewer")
        rows = []
        for name, method in methods.items():
            readings = []
            for number in range(repeats + 1):
                readings.append(await reader.read(method))
                print(f"{name}, reading {number}: {readings[-1].beside.ttft_s:.3f} s", file=sys.stderr)
            rows.append(row(name, readings[1:]))
        return {
            "accelerator": info.accelerator,
            "attention": info.attention,
            "slice_tokens": info.slice_tokens,
            "rows": rows,
        }
    finally:
        await engine.shutdown()


def plan(args: argparse.Namespace) -> tuple[EngineConfig, dict[str, Method]]:
    """The engine and the methods; prints what they should cost. Raises SptsError for what cannot run."""
    from spts import loading
    from spts.architectures import max_context

    for field, minimum in (("tokens", 2 * SETTLED_TOKENS), ("streams", 1), ("repeats", 1)):
        require_int(field, getattr(args, field), minimum=minimum)
    folder = loading.resolve(resolve_path(args.model))
    loading.check_folder(folder)
    data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape, context = ModelShape.from_config(data), max_context(data)
    if args.tokens >= context:
        rule = f"leave room for an answer in the context of {context} tokens"
        raise config_error("tokens", rule, args.tokens, f"use at most {context - 1}")
    values = {"model": str(folder), "max_running": args.streams + 1}
    values |= {name: getattr(args, name) for name in ("device", "dtype", "tensor_parallel_size")}
    if args.whole or args.slice_tokens is not None:
        values["slice_tokens"] = args.slice_tokens
    config = parse(values, EngineConfig, source="command line")
    check_divisible(shape, config.tensor_parallel_size)
    if args.schedule in PRESETS:
        schedule = Schedule.preset(args.schedule)
    else:
        schedule = read_schedule(args.schedule, num_layers=shape.num_layers, num_tokens=args.tokens)
    spts = Spts(schedule=schedule)
    check_method(spts, folder)
    work, proxy = spts.planned_work(shape.num_layers, args.tokens), fitted_size(folder / "proxies")
    print(f"schedule   {describe_schedule(schedule)}")
    print(f"predicted  {speedup(shape, work, proxy):.2f}x fewer FLOP than dense", flush=True)
    return config, {"dense": Dense(), "spts": spts}


@interruptible()
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 when a token was another one, 2 for refused input, 130 Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m jobs.stalls", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="jobs/demo_model", help="folder or hub id, with proxies")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", default="float32", choices=tuple(DTYPE_BYTES))
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="ranks")
    parser.add_argument("--tokens", type=int, default=8192, help="of the long prompt")
    parser.add_argument("--schedule", default="demo-12l", help="preset, as published, or a YAML file")
    parser.add_argument("--streams", type=int, default=4, help="requests that decode beside it")
    parser.add_argument("--repeats", type=int, default=1, help="readings that count, after one")
    slices = parser.add_mutually_exclusive_group()
    slices.add_argument("--slice-tokens", type=int, help="of an engine (default: the engine's)")
    slices.add_argument("--whole", action="store_true", help="prefills are not sliced")
    args = parser.parse_args(argv)
    try:
        config, methods = plan(args)
        from jobs.engines import connected

        with connected():
            found = asyncio.run(measure(config, methods, args.tokens, args.streams, args.repeats))
    except (SptsError, EngineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("", table(found["rows"]), "", sep="\n")
    print(json.dumps({**vars(args), "hardware": machine(), **found}))
    return 0 if all(each["same_token"] for each in found["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
