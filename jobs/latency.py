"""Time to first token, time per output token and KV bytes, per method and length, beside what `spts.cost`
predicts.

    python -m jobs.latency --local --shape llama-32x512 --lengths 4096 --threads 1
    ray job submit --working-dir . -- python -m jobs.latency --model jobs/demo_model --lengths 1024 4096

--local runs in this process, against transformers' own forward on the same weights, and needs torch and
transformers alone. Without it an engine on Ray answers. Nothing is timed unless the results are right; the
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cluster.protocol import EngineError
from jobs.disk.lines import DiskError
from jobs.disk.provenance import versions
from jobs.options import describe_schedule, interruptible, writable_file, write_json
from jobs.timing.arena import DEFAULT_MODEL, SHAPES, Arena, engine_arena, local_arena
from jobs.timing.cases import Case, plan
from jobs.timing.decoding import DecodeRow, decode_rows, decode_table, room_tokens
from jobs.timing.rounds import Part, Row, measure, parts_table, table, work_faults
from spts.errors import ConfigError, SptsError, require_int

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class GateError(Exception):
    """A result that is wrong, so that its speed says nothing."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    args = argparse.ArgumentParser(prog="python -m jobs.latency", description=(__doc__ or "").split("\n")[0])
    args.add_argument("--local", action="store_true", help="in this process, without Ray")
    args.add_argument("--model", help=f"folder or hub id (default: {DEFAULT_MODEL})")
    args.add_argument("--shape", help=f"random weights instead, with --local: {', '.join(SHAPES)}")
    args.add_argument("--lengths", type=int, nargs="+", default=[4096], help="prompt lengths, tokens")
    args.add_argument(
        "--methods", nargs="+", default=["spts"], help="beside dense: spts, pap, pap+ltp, random, recency"
    )
    args.add_argument(
        "--schedule", default="llama-3.1-8b", help="preset, scaled to the model, or a YAML file"
    )
    args.add_argument("--published", action="store_true", help="a preset's own budgets at every length")
    args.add_argument(
        "--density", type=float, nargs="+", default=[],
        help="spts also with sparse attention before its first skipping layer: shares of blocks to read",
    )  # fmt: skip
    args.add_argument("--repeats", type=int, default=5, help="timed runs of each, after one to warm up")
    args.add_argument("--tokens-out", type=int, default=16, help="tokens per answer, the first included")
    args.add_argument("--dtype", default="float32", choices=tuple(DTYPE_BYTES))
    args.add_argument("--device", default="cpu", help="cpu or cuda")
    args.add_argument("--threads", type=int, default=1, help="CPU threads, per rank")
    args.add_argument("--proxies", help="folder of proxies (default: the model's own)")
    args.add_argument("--channels", type=int, help="D_low of random proxies, with --local")
    args.add_argument("--rank", type=int, help="rank of random proxies, with --local")
    args.add_argument("--attention", help="transformers' attention backend, with --local (default: sdpa)")
    args.add_argument(
        "--backends", nargs="+", default=[], choices=("every", "flash", "cudnn", "efficient", "math"),
        help="attention backends of torch to time dense with, beside the one torch chooses, with --local; "
        "every: all that are there but math",
    )  # fmt: skip
    args.add_argument("--parts", action="store_true", help="where the time goes, with --local")
    args.add_argument(
        "--batches", type=int, nargs="+", default=[], help="requests to decode at once as well, with --local"
    )
    args.add_argument("--out", type=Path, help="a file to write the JSON to as well")
    args.add_argument("--tensor-parallel-size", type=int, default=1, help="ranks, on an engine")
    return args


def race(args: argparse.Namespace, arena: Arena) -> list[Row]:
    """Prints the setting, the prediction, and per length the measurement; the last line printed is JSON.

    Raises ConfigError and RequestError before anything runs, GateError before anything is timed.
    """
    room = max(args.tokens_out, room_tokens(args.batches, args.tokens_out))
    for length in args.lengths:
        if length + room > arena.max_context:
            raise ConfigError(
                f"lengths must leave room for {room} tokens in the context of "
                f"{arena.max_context}, got {length}; use at most {arena.max_context - room}",
                field="lengths",
            )
    cases = [
        plan(
            arena.shape,
            length,
            names=args.methods,
            schedule=args.schedule,
            proxy=arena.proxy,
            dtype_bytes=DTYPE_BYTES[args.dtype],
            published=args.published,
            densities=args.density,
            max_new_tokens=args.tokens_out - 1,
            world_size=args.tensor_parallel_size,
        )
        for length in args.lengths
    ]
    print(*(f"{title:<10} {text}" for title, text in arena.about.items()), sep="\n")
    for case in cases:
        print("", f"predicted  {case.length} tokens: {describe_schedule(case.schedule)}", sep="\n")
        print(*(f"           {line}" for line in case.predictions()), sep="\n", flush=True)
    rows: list[Row] = []
    parts: list[Part] = []
    decoded: list[DecodeRow] = []
    for case in cases:
        rows += _race_one(args, arena, case)
        if args.parts:
            parts += _break_down(args, arena, case)
        if args.batches:
            decoded += _decode(args, arena, case)
        report = {
            **arena.about,
            "versions": versions(),
            "rows": [asdict(row) for row in rows],
            "parts": [asdict(part) for part in parts],
            "decode": [asdict(row) for row in decoded],
        }
        if args.out is not None:  # after every length: a later one may not fit
            write_json(args.out, report)
    for case in cases if parts else ():
        print("", parts_table([part for part in parts if part.length_tokens == case.length]), sep="\n")
    if decoded:
        print("", decode_table(decoded), sep="\n")
    print("", table(rows), "", sep="\n")
    print(json.dumps(report))
    return rows


def _prompt(args: argparse.Namespace, arena: Arena, case: Case) -> tuple[list[int], list[int]]:
    """The prompt and the tokens that follow it, random."""
    draw = random.Random(case.length)
    vocab_size = arena.shape.vocab_size
    prompt = [draw.randrange(vocab_size) for _ in range(case.length)]
    return prompt, [draw.randrange(vocab_size) for _ in range(args.tokens_out - 1)]


def _break_down(args: argparse.Namespace, arena: Arena, case: Case) -> list[Part]:
    from jobs.timing.breakdown import clocked

    assert arena.local is not None, "engine_arena refuses --parts"
    prompt, _ = _prompt(args, arena, case)
    parts = []
    for name, method in case.methods.items():
        with clocked(arena.local) as clock:
            arena.local.prefill(prompt, method)
        parts += clock.parts(name, case.length, case.schedule)
    return parts


def _decode(args: argparse.Namespace, arena: Arena, case: Case) -> list[DecodeRow]:
    assert arena.local is not None, "engine_arena refuses --batches"
    prompt, _ = _prompt(args, arena, case)
    return decode_rows(arena.local, case, prompt, batches=args.batches, steps=args.tokens_out)


def _race_one(args: argparse.Namespace, arena: Arena, case: Case) -> list[Row]:
    from tqdm import tqdm

    from jobs.timing.contestants import TOLERANCE, disagreement

    prompt, follow = _prompt(args, arena, case)
    contestants = [arena.enter(name, method) for name, method in case.methods.items()]
    contestants += arena.rivals
    total = len(contestants) * (args.repeats + 1) + 1 + case.is_sparse
    with tqdm(desc=f"{case.length} tokens", unit="run", total=total) as bar:
        warm = {}
        for each in contestants:
            warm[each.name] = each.run(prompt, follow)
            bar.update()
        full = arena.enter("full", case.full()).run(prompt, follow)
        bar.update()
        faults = work_faults(case, warm, arena.shape)
        equal = {"spts with budgets that cover the prompt": full}
        if case.is_sparse:
            sparse = arena.enter("full, sparse", case.full(sparse=True)).run(prompt, follow)
            equal["spts with sparse attention that reads everything"] = sparse
            bar.update()
        equal |= {rival.name: warm[rival.name] for rival in arena.rivals}
        for name, run in equal.items():
            if problem := disagreement(run.answer, warm["dense"].answer, TOLERANCE[args.dtype]):
                faults.append(f"{name} does not equal dense: {problem}")
        if faults:
            raise GateError(f"at {case.length} tokens: {'; '.join(faults)}")
        return measure(
            case,
            contestants,
            warm=warm,
            prompt=prompt,
            follow=follow,
            repeats=args.repeats,
            progress=bar.update,
        )


@interruptible()
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 for a wrong result (nothing is timed then), 2 for refused input, 130 Ctrl-C."""
    args = parser().parse_args(argv)
    try:
        for field, minimum in (("repeats", 1), ("tokens_out", 1), ("threads", 1)):
            require_int(field, getattr(args, field), minimum=minimum)
        for field in ("lengths", "batches"):
            for number in getattr(args, field):
                require_int(field, number, minimum=1)
        for field in ("model", "proxies"):
            if args.shape is not None and getattr(args, field) is not None:
                raise ConfigError(
                    f"{field} must be left out with --shape, got {getattr(args, field)}; give one",
                    field=field,
                )
        if args.out is not None:
            writable_file(args.out)
        with local_arena(args) if args.local else engine_arena(args) as arena:
            race(args, arena)
    except (SptsError, EngineError, DiskError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except GateError as error:
        print(f"error: a wrong result, so nothing was timed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
