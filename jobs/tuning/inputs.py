"""What a schedule search is given: the model it is for, and the prompts to measure schedules on."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

from cluster.config import EngineConfig, resolve_path
from cluster.strict import parse
from jobs.options import writable_folder
from jobs.sweeping.prompts import Prompts
from jobs.sweeping.spec import is_uploaded_copy
from jobs.tasks import Task, make_tasks
from jobs.tasks.agreement import FOLLOW_TOKENS
from jobs.tuning.pool import Prompt
from spts import loading
from spts.architectures import max_context
from spts.cost import ModelShape, ProxyShape, prefix_bytes
from spts.errors import ConfigError, config_error, require_int

_LOGIT_BYTES = 4  # of a dense distribution that an engine keeps to compare with


def parser(doc: str) -> argparse.ArgumentParser:
    """The command line of `jobs.tune`. doc: its module's docstring."""
    args = argparse.ArgumentParser(prog="python -m jobs.tune", description=doc.split("\n")[0])
    args.add_argument("--model", required=True, help="folder or hub id, with fitted proxies")
    args.add_argument("--proxies", help="folder of the proxies (default: MODEL/proxies)")
    args.add_argument("--target-speedup", type=float, help="prefill FLOP of dense over the schedule's")
    args.add_argument("--max-drop", type=float, help="points of token agreement with dense that may be lost")
    args.add_argument("--length", type=int, default=4096, help="longest prompt to measure on, tokens")
    args.add_argument(
        "--task", nargs="+", default=["agreement"], help="tasks to measure on; 'needle' = all of that kind"
    )
    args.add_argument("--texts", nargs="+", help="files or folders of task agreement (default: shipped)")
    args.add_argument("--windows", type=int, default=16, help="samples of each task to search with")
    args.add_argument(
        "--held-out", type=int, default=32, help="others, to choose among the best; and once more"
    )
    args.add_argument("--trials", type=int, default=100, help="schedules to measure")
    args.add_argument("--seed", type=int, default=0, help="of the samples and of the search")
    args.add_argument("--engines", type=int, default=1, help="engines, each measuring one schedule at a time")
    args.add_argument("--threads", type=int, default=1, help="CPU threads per rank")
    args.add_argument("--tensor-parallel-size", type=int, default=1)
    args.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    args.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args.add_argument("--out", required=True, help="folder of the results")
    return args


def check_numbers(args: argparse.Namespace) -> None:
    """Raises ConfigError for options that are out of range or exclude each other."""
    for name in ("length", "windows", "held_out", "trials", "engines"):
        require_int(name, getattr(args, name), minimum=1)
    require_int("seed", args.seed, minimum=0)
    if (args.target_speedup is None) == (args.max_drop is None):
        raise config_error(
            "goal",
            "be one of --target-speedup and --max-drop",
            "neither" if args.max_drop is None else "both",
            "name the cost, or what may be lost",
        )
    if args.max_drop is not None and not 0 <= args.max_drop < 100:
        raise config_error(
            "max_drop", "be points from 0 to below 100", args.max_drop, "1.0 is one token in a hundred"
        )


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model folder, looked at but not loaded.

    source: as engines on other machines find it. first_layer: the first layer that has a proxy.
    """

    source: str
    folder: Path
    shape: ModelShape
    max_context: int
    fingerprint: str
    proxy: ProxyShape
    first_layer: int
    proxies_sha256: str

    @classmethod
    def read(cls, source: str, proxies: str | None) -> Model:
        """Raises SptsError for a folder that cannot be used, or that has no fitted proxies."""
        folder = loading.resolve(resolve_path(source))
        loading.check_folder(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        fingerprint = loading.fingerprint(folder)
        path = folder / loading.PROXIES_FOLDER if proxies is None else Path(resolve_path(proxies))
        loaded = loading.load_proxies(folder, path, fingerprint=fingerprint)
        assert loaded is not None, "a folder that is named is loaded or refused"
        return cls(
            source=source if is_uploaded_copy() else str(folder),
            folder=folder,
            shape=ModelShape.from_config(config),
            max_context=max_context(config),
            fingerprint=fingerprint,
            proxy=loaded.shape,
            first_layer=loaded.manifest.first_layer,
            proxies_sha256=loading.proxies_sha256(path),
        )


def engine_config(args: argparse.Namespace, model: Model, samples: Samples) -> EngineConfig:
    """What an engine is started with: it keeps the dense distributions of all prompts of one set at a time.

    Raises ConfigError.
    """
    sets = (samples.calibration, samples.selection, samples.held_out)
    followed = max(sum(prompt.max_new_tokens for prompt in prompts) for prompts in sets)
    options = {
        "model": model.source,
        "proxies": args.proxies,
        "dtype": args.dtype,
        "device": args.device,
        "num_threads": args.threads,
        "tensor_parallel_size": args.tensor_parallel_size,
        "slice_tokens": None,  # one prompt at a time: nobody waits for a slice's end
        "reference_cache_bytes": followed * model.shape.vocab_size * _LOGIT_BYTES,
    }
    return parse(options, EngineConfig, source="engine")


def results_folder(out: str) -> Path:
    """--out, made if it is not there. Raises ConfigError; in a Ray job also for a path that would vanish."""
    if is_uploaded_copy() and not Path(out).expanduser().is_absolute():
        raise config_error("out", "be an absolute path in a Ray job", repr(out), "name a folder that stays")
    return writable_folder(out)


def chosen_tasks(args: argparse.Namespace) -> list[Task]:
    """The tasks of --task; --texts are those of task agreement. Raises ConfigError."""
    names = list(dict.fromkeys(args.task))
    if args.texts and "agreement" not in names:
        raise config_error(
            "texts", "come with task agreement", f"--task {' '.join(names)}", "leave one of them out"
        )
    texts = {"texts": list(args.texts)} if args.texts else {}
    entries = [{"name": name, **texts} if name == "agreement" else name for name in names]
    tasks = [task for entry in entries for task in make_tasks(entry)]
    return list({task.name: task for task in tasks}.values())


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The prompts of a search, three sets that share no sample: to search with, to choose among the best of
    the search, and for the comparison at the end."""

    calibration: tuple[Prompt, ...]
    selection: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]

    @classmethod
    def draw(cls, args: argparse.Namespace, model: Model) -> Samples:
        """Of each task the first --windows samples, the next --held-out, and as many again.

        Raises ConfigError when a task has fewer, or a prompt with its answer exceeds the model's context.
        """
        prompts = Prompts(model.folder)
        by_task = [_draw(args, model, prompts, task) for task in chosen_tasks(args)]
        first, second = args.windows, args.windows + args.held_out
        return cls(
            calibration=tuple(prompt for drawn in by_task for prompt in drawn[:first]),
            selection=tuple(prompt for drawn in by_task for prompt in drawn[first:second]),
            held_out=tuple(prompt for drawn in by_task for prompt in drawn[second:]),
        )

    def kept(self, config: EngineConfig, model: Model) -> Samples:
        """The same, with as many prompts marked as kept as an engine has room for. Results do not change."""

        def mark(prompts: tuple[Prompt, ...]) -> tuple[Prompt, ...]:
            sizes = accumulate(
                prefix_bytes(
                    model.shape,
                    len(prompt.token_ids),
                    model.first_layer,
                    dtype_bytes=4 if config.dtype == "float32" else 2,
                    world_size=config.tensor_parallel_size,
                )
                for prompt in prompts
            )
            return tuple(
                replace(prompt, kept=size <= config.prefix_cache_bytes)
                for prompt, size in zip(prompts, sizes, strict=True)
            )

        return replace(self, calibration=mark(self.calibration), selection=mark(self.selection))


def _draw(args: argparse.Namespace, model: Model, prompts: Prompts, task: Task) -> list[Prompt]:
    wanted = args.windows + 2 * args.held_out
    samples = list(task.samples(prompts.tokens, length=args.length, count=wanted, seed=args.seed))
    if len(samples) < wanted:
        raise ConfigError(
            f"texts must give task {task.name!r} {args.windows} + 2 x {args.held_out} samples of "
            f"{args.length} tokens, got {len(samples)}; give more text, or a smaller --windows, "
            "--held-out or --length",
            field="texts",
        )
    drawn = [
        Prompt(
            id=sample.id,
            task=task.name,
            token_ids=prompts.encode(sample),
            follow=sample.follow,
            max_new_tokens=len(sample.follow) or min(task.max_new_tokens, FOLLOW_TOKENS),
        )
        for sample in samples
    ]
    longest = max(len(prompt.token_ids) + prompt.max_new_tokens for prompt in drawn)
    if longest > model.max_context:
        raise config_error(
            "length",
            f"leave room for the answer in the model's context of {model.max_context} tokens",
            f"{longest} with the answer of task {task.name!r}",
            "use a smaller --length",
        )
    return drawn
