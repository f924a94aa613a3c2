"""A bounded load on an OpenAI endpoint, with a report; exit status 1 when a stream was neither complete nor
refused in form, none was complete, or the server has memory of a request afterwards.

    python -m jobs.load --url http://127.0.0.1:8000 --streams 64 --seconds 120 --out results/load
    python -m jobs.load --serve ray_config.yaml --set engines.default.slice_tokens=null --out results/whole
    python -m jobs.load --compare results/load results/whole

--serve starts the endpoint of a deployment file on loopback, and ends it. The key of an endpoint that asks
for one is read from OPENAI_API_KEY.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from jobs.disk.provenance import collect
from jobs.load.asks import Asks, read_tokens
from jobs.load.compare import Loads, print_loads, write_loads
from jobs.load.drive import run
from jobs.load.progress import LoadProgress
from jobs.load.record import load, save
from jobs.load.report import print_report, write_report
from jobs.load.served import served, tokenizer_folder
from jobs.load.settings import Settings, parse_lengths
from jobs.load.summary import summarise
from jobs.options import writable_folder
from spts.errors import ConfigError

DEMO_MODEL = "jobs/demo_model"
LENGTHS = "512:0.5,2048:0.3,8192:0.2"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    args = argparse.ArgumentParser(
        prog="python -m jobs.load",
        description="A bounded load on an OpenAI endpoint, with a report.",
        epilog="Exit status: 0 requests were answered, the others refused in form, and the server "
        "has no memory of them; 1 not so; 2 bad input.",
    )
    what = args.add_mutually_exclusive_group(required=True)
    what.add_argument("--url", help="of an endpoint that runs, without /v1")
    what.add_argument("--serve", type=Path, help="a deployment file whose endpoint to start and end")
    what.add_argument("--compare", type=Path, nargs=2, metavar="RUN", help="folders of two loads")
    args.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="with --serve: another value below the application's args, as engines.default.max_running=4",
    )  # fmt: skip
    args.add_argument("--out", type=Path, default=Path("results/load"), help="folder (default: %(default)s)")
    args.add_argument("--streams", type=int, default=64, help="requests in flight at most (default: 64)")
    args.add_argument(
        "--seconds", type=float, help="begin no request later (default: 120 without --requests)"
    )
    args.add_argument("--requests", type=int, help="send no more than so many")
    args.add_argument(
        "--rate", type=float, help="arrivals per second, Poisson (default: when a stream is free)"
    )
    args.add_argument("--lengths", default=LENGTHS, help="prompt tokens:share, … (default: %(default)s)")
    args.add_argument("--max-tokens", type=int, default=32, help="of an answer (default: 32)")
    args.add_argument(
        "--ignore-eos", action="store_true", help="answers have --max-tokens tokens (vLLM's field)"
    )
    args.add_argument(
        "--method", help="ask for this method, as spts or dense (default: the endpoint's choice)"
    )
    args.add_argument("--chat", action="store_true", help="/v1/chat/completions in place of /v1/completions")
    args.add_argument("--model", help="name (default: the one that is served)")
    args.add_argument(
        "--tokenizer", help=f"folder of the model's tokenizer (default: {DEMO_MODEL}, or --serve's)"
    )
    args.add_argument("--seed", type=int, default=0, help="of lengths, questions and arrivals (default: 0)")
    args.add_argument(
        "--timeout", type=float, default=600.0, help="seconds a request may take (default: 600)"
    )
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs or compares; returns the exit status."""
    args = parser().parse_args(argv)
    console = Console()
    try:
        if args.compare is not None:
            return _compare(args.compare[0], args.compare[1], console)
        if args.set and args.serve is None:
            raise ConfigError("set must only be given with serve, got a url; remove it", field="set")
        # A stand-in address: what else is wrong is said before an endpoint is started.
        settings = _settings(args, args.url or "http://127.0.0.1", args.tokenizer or DEMO_MODEL)
        folder = writable_folder(args.out)
        command = ["python", "-m", "jobs.load", *(sys.argv[1:] if argv is None else argv)]
        return _load(args, settings, folder, command, console)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _load(
    args: argparse.Namespace, settings: Settings, folder: Path, command: Sequence[str], console: Console
) -> int:
    config = {"serve": None if args.serve is None else str(args.serve), "set": list(args.set)}
    provenance = collect(command=command, config=config, commit=None)
    with _endpoint(args, settings) as settings:
        asks = Asks(settings, read_tokens(settings.tokenizer), mark=secrets.token_hex(4))
        with LoadProgress(settings) as progress:
            key = os.environ.get("OPENAI_API_KEY")
            done = asyncio.run(run(settings, asks, key=key, start=progress.start))
        done = replace(done, provenance=provenance)
        save(done, folder)  # before the endpoint is ended, which takes a while
    summary = summarise(done)
    print_report(done, summary, console)
    print(f"report: {write_report(done, summary, folder).resolve()}")
    return 0 if summary.clean else 1


@contextmanager
def _endpoint(args: argparse.Namespace, settings: Settings) -> Iterator[Settings]:
    """The settings with the address of an endpoint that runs."""
    if args.serve is None:
        yield settings
        return
    print(f"starting the endpoint of {args.serve} ...", file=sys.stderr, flush=True)
    with served(args.serve, args.set) as (url, app):
        tokenizer = args.tokenizer or tokenizer_folder(app)
        yield replace(settings, url=url, tokenizer=tokenizer)


def _settings(args: argparse.Namespace, url: str, tokenizer: str) -> Settings:
    bounded = args.seconds is not None or args.requests is not None
    return Settings(
        url=url,
        tokenizer=tokenizer,
        lengths=parse_lengths(args.lengths),
        model=args.model,
        streams=args.streams,
        seconds=args.seconds if bounded else 120.0,
        requests=args.requests,
        rate=args.rate,
        max_tokens=args.max_tokens,
        ignore_eos=args.ignore_eos,
        method=args.method,
        chat=args.chat,
        seed=args.seed,
        timeout_s=args.timeout,
    )


def _compare(first: Path, second: Path, console: Console) -> int:
    runs = (load(first), load(second))
    found = Loads(runs=runs, summaries=(summarise(runs[0]), summarise(runs[1])), folders=(first, second))
    print_loads(found, console)
    print(f"report: {write_loads(found).resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
