"""What the second question on a document costs, beside the first: predicted from FLOP, and measured.

    python -m jobs.reuse --model jobs/demo_model --tokens 8192

The document is random tokens; each round takes a new one, so that the first question finds nothing of it. The
answers are compared with those of an engine that keeps nothing: exit status 1 if they differ. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from statistics import median
from typing import Any

from cluster.config import EngineConfig, parse_method
from cluster.protocol import EngineError, Request, Result
from spts.errors import SptsError
from spts.methods import Method

QUESTION_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class Round:
    """Two questions on one document: FLOP computed and seconds to the first token, and whether the second
    answer is the one without reuse."""

    first: Result
    second: Result
    same: bool

    @property
    def predicted(self) -> float:
        """FLOP of the second prefill over those of the first."""
        return (self.second.flops - self.second.reused_flops) / (self.first.flops - self.first.reused_flops)

    @property
    def measured(self) -> float:
        """Time to first token of the second over that of the first, the wait before each left out."""
        second, first = (each.ttft_s - each.queue_s for each in (self.second, self.first))
        return second / first


class Asker:
    """Sends prompts to an engine, one after the other."""

    def __init__(self, engine: Any, method: Method, answer_tokens: int) -> None:
        self._engine = engine
        self._method = method
        self._answer_tokens = answer_tokens
        self._numbers = count()

    def ask(self, token_ids: Sequence[int], *, prefix_tokens: int | None = None) -> Result:
        """The answer to one prompt."""
        import ray

        request = Request(
            request_id=f"reuse-{next(self._numbers)}",
            token_ids=tuple(token_ids),
            method=self._method,
            max_new_tokens=self._answer_tokens,
            prefix_tokens=prefix_tokens,
            ignore_eos=True,
        )
        result: Result = ray.get(self._engine.run.remote(request))
        return result

    def round(self, document: Sequence[int], questions: tuple[Sequence[int], Sequence[int]]) -> Round:
        """Both questions on a document that the engine has not seen."""
        first, second = (self.ask([*document, *question]) for question in questions)
        alone = self.ask([*document, *questions[1]], prefix_tokens=0)
        return Round(first=first, second=second, same=second.token_ids == alone.token_ids)


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jobs.reuse", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="jobs/demo_model", help="folder or hub id")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--schedule", default="demo-12l", help="a preset for the model")
    parser.add_argument("--tokens", type=int, default=8192, help="of the document and a question together")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--answer-tokens", type=int, default=8)
    args = parser.parse_args(argv)
    try:
        methods = [parse_method({"name": "spts", "schedule": args.schedule}), parse_method({"name": "dense"})]
        config = EngineConfig(model=args.model, device=args.device, dtype=args.dtype, slice_tokens=None)
        rows = measure(config, methods, args.tokens, args.rounds, args.answer_tokens)
    except (SptsError, EngineError) as error:
        print(error, file=sys.stderr)
        return 2
    for row in rows:
        print(
            "{method}: TTFT {first_s:.2f} s, then {second_s:.2f} s with {reused_tokens:,} of {tokens:,} "
            "tokens reused: {measured:.3f} of it, {predicted:.3f} by FLOP; same answers: {same}".format(**row)
        )
    print(json.dumps(rows))
    return 0 if all(row["same"] for row in rows) else 1


def measure(
    config: EngineConfig, methods: Sequence[Method], num_tokens: int, rounds: int, answer_tokens: int
) -> list[dict[str, Any]]:
    """A row per method: medians over `rounds`, after one that nobody counts."""
    import ray

    from cluster.engine import start_engine, stop_engine

    own_cluster = not ray.is_initialized()
    if own_cluster:
        ray.init(log_to_driver=False)
    try:
        engine = start_engine(config)
        try:
            vocab_size = ray.get(engine.info.remote()).vocab_size
            return [
                _row(Asker(engine, method, answer_tokens), method, num_tokens, rounds, vocab_size)
                for method in methods
            ]
        finally:
            stop_engine(engine)
    finally:
        if own_cluster:
            ray.shutdown()


def _row(asker: Asker, method: Method, num_tokens: int, rounds: int, vocab_size: int) -> dict[str, Any]:
    draw = random.Random(0)
    done = []
    for _ in range(rounds + 1):
        document, *questions = (
            draw.choices(range(1, vocab_size), k=size)
            for size in (num_tokens - QUESTION_TOKENS, QUESTION_TOKENS, QUESTION_TOKENS)
        )
        done.append(asker.round(document, (questions[0], questions[1])))
    counted = done[1:]
    return {
        "method": method.name,
        "tokens": num_tokens,
        "rounds": rounds,
        "first_s": median(each.first.ttft_s for each in counted),
        "second_s": median(each.second.ttft_s for each in counted),
        "measured": median(each.measured for each in counted),
        "predicted": median(each.predicted for each in counted),
        "reused_tokens": counted[0].second.reused_tokens,
        "same": all(each.same for each in counted),
    }


if __name__ == "__main__":
    sys.exit(main())
