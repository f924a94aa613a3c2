"""Fits the FFN proxies of a model over text, then measures on text it was not fitted on whether skipping is
safe.

    python -m jobs.calibrate --model MODEL --texts FILES… --out MODEL/proxies --schedule llama-3.1-8b
    python -m jobs.calibrate … --task needle        also on questions that need the whole prompt

Writes proxies.safetensors, proxies.json and calibration.json into --out. Needs no Ray and no DeepSpeed; text
becomes tokens as it does when served.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.tokenizer import TextTokenizer
from jobs.disk.lines import DiskError
from jobs.options import describe_schedule, read_schedule, writable_folder, write_json
from jobs.tuning.verdict import TaskCurve, Verdict, judge, table
from spts.cost import ProxyShape, planned_work, speedup
from spts.errors import ConfigError, SptsError, config_error, require_int
from spts.methods import Dense, Spts

if TYPE_CHECKING:
    from jobs.tasks import Sample
    from spts.model import SptsModel

MIN_FIT_TOKENS = 256  # fewer say little about 64 and more channels


def parser() -> argparse.ArgumentParser:
    """The command line."""
    args = argparse.ArgumentParser(prog="python -m jobs.calibrate", description=__doc__.split("\n")[0])
    args.add_argument("--model", required=True, help="folder or hub id; safetensors only")
    args.add_argument("--texts", required=True, nargs="+", type=Path, help="UTF-8 text files")
    args.add_argument(
        "--out", required=True, help="folder for the proxies and the report, e.g. MODEL/proxies"
    )
    args.add_argument(
        "--schedule", default="llama-3.1-8b", help="preset, scaled to the model, or a YAML file"
    )
    args.add_argument("--tokens", type=int, default=2048, help="length of the prompts it measures on")
    args.add_argument("--windows", type=int, default=16, help="prompts it measures on, held out of the fit")
    args.add_argument("--fit-windows", type=int, default=64, help="prompts it fits on, at most")
    args.add_argument(
        "--live-tokens", type=int, default=32, help="predictions per prompt for the freezing curve"
    )
    args.add_argument("--channels", type=int, help="D_low, FFN channels a proxy keeps (default: F / 28)")
    args.add_argument("--rank", type=int, help="r, rank of a proxy's factors (default: 3/64 of the width)")
    args.add_argument(
        "--top-share",
        type=float,
        default=0.2,
        help="a channel counts by the mean over this share of its most salient tokens (1 = over all)",
    )
    args.add_argument(
        "--first-layer", type=int, help="first layer with a proxy (default: the schedule's first)"
    )
    args.add_argument(
        "--task", nargs="*", default=[], help="also measure on tasks; 'needle' = all of that kind"
    )
    args.add_argument("--samples", type=int, default=20, help="questions per task")
    args.add_argument("--min-agreement", type=float, default=0.9, help="what counts as safe, 0 to 1")
    args.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    args.add_argument("--device", default="cpu")
    args.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    return args


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Token ids of the prompts to measure on, all of the same length, and of the rest, to fit on.

    held_out: False when there was so little text that both are the same.
    """

    measure: list[list[int]]
    fit: list[list[int]]
    held_out: bool


def split(documents: Sequence[Sequence[int]], *, tokens: int, windows: int, fit_windows: int) -> Texts:
    """Cuts documents into windows of `tokens`, and takes `windows` of them, evenly apart, to measure on.

    What is left over at the end of a document is fitted on. Example: one document of 10 tokens, tokens = 3
    and windows = 1 measures on the first of three windows and fits on the two others and the last token.

    Raises ConfigError when no document is as long as a window, or nothing worth fitting is there.
    """
    whole, rest = [], []
    for document in documents:
        parts = [list(document[at : at + tokens]) for at in range(0, len(document), tokens)]
        whole += [part for part in parts if len(part) == tokens]
        rest += [part for part in parts if len(part) < tokens]
    if not whole:
        longest = max((len(document) for document in documents), default=0)
        raise ConfigError(
            f"texts must have a document of at least {tokens} tokens, got at most {longest}; "
            "give longer texts or a smaller --tokens",
            field="texts",
        )
    count = min(windows, max(1, len(whole) // 2))
    chosen = {len(whole) * index // count for index in range(count)}
    fit = [part for index, part in enumerate(whole) if index not in chosen] + rest
    held_out = sum(map(len, fit)) >= MIN_FIT_TOKENS
    fit = fit if held_out else whole + rest
    if sum(map(len, fit)) < MIN_FIT_TOKENS:
        raise ConfigError(
            f"texts must hold at least {MIN_FIT_TOKENS} tokens, got {sum(map(len, fit))}; give more text",
            field="texts",
        )
    step = max(1, -(-len(fit) // fit_windows))
    return Texts(measure=[whole[index] for index in sorted(chosen)], fit=fit[::step], held_out=held_out)


def read_documents(paths: Sequence[Path], tokenizer: TextTokenizer) -> list[list[int]]:
    """Token ids of every text file, without special tokens. Raises ConfigError naming the file."""
    documents = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"texts must be readable UTF-8 files, got {path} ({error}); correct the path", field="texts"
            ) from None
        documents.append(_encode(tokenizer, text))
    return documents


def task_names(chosen: Sequence[str]) -> list[str]:
    """Task names for `--task`; "needle" stands for all needle tasks with one answer. Raises ConfigError."""
    from jobs.tasks import get_task
    from jobs.tasks.agreement import AgreementTask
    from jobs.tasks.needle import NEEDLE_TASKS

    family = [task.name for task in NEEDLE_TASKS if task.num_values == 1]
    names = [name for each in chosen for name in (family if each == "needle" else [each])]
    for name in names:
        if isinstance(task := get_task(name), AgreementTask):
            raise ConfigError(
                f"task must have answers to be right or wrong, got {task.name!r}; every calibration measures "
                "agreement by itself",
                field="task",
            )
    return list(dict.fromkeys(names))


def _encode(tokenizer: TextTokenizer, text: str) -> list[int]:
    return tokenizer.tokenizer.encode(text, add_special_tokens=False).ids


def draw_samples(tokenizer: TextTokenizer, name: str, *, length: int, count: int) -> list[Sample]:
    """Questions of a task whose prompt and answer have at most `length` tokens.

    Raises ConfigError when they have no room for the question.
    """
    from jobs.tasks import get_task
    from jobs.tasks.tokens import PlainTokens

    task = get_task(name)
    room = length - task.max_new_tokens - 1
    tokens = PlainTokens(tokenizer.tokenizer)
    return list(task.samples(tokens, length=room, count=count, seed=0))


def measure_task(
    model: SptsModel, tokenizer: TextTokenizer, name: str, method: Spts, samples: Sequence[Sample]
) -> TaskCurve:
    """Accuracy on a task: dense, under `method`, and with the context frozen from each layer on.

    A frozen answer is forced: it is right when each token of the first reference is the most likely one after
    those before it. Dense and `method` generate, and the task scores that.
    """
    from tqdm import tqdm

    from jobs.tasks import get_task
    from spts.safety import run_frozen

    task = get_task(name)
    right = [0] * len(model.layers)
    dense = chosen = 0.0
    for sample in tqdm(samples, desc=f"task {name}", unit="question"):
        prompt = list(tokenizer.encode(sample.prompt))
        answer = _encode(tokenizer, " " + sample.references[0])
        live = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        frozen = run_frozen(model, [*prompt, *answer[:-1]], live, together=True)
        for layer, logits_LV in enumerate(frozen.frozen_LV):
            right[layer] += logits_LV.argmax(dim=-1).tolist() == answer
        said = [model.generate(prompt, each, task.max_new_tokens).token_ids for each in (Dense(), method)]
        texts = [tokenizer.tokenizer.decode(token_ids) for token_ids in said]
        dense += task.score(texts[0], sample.references, sample.meta)
        chosen += task.score(texts[1], sample.references, sample.meta)
    return TaskCurve(
        name=name,
        samples=len(samples),
        dense=dense / len(samples),
        method=chosen / len(samples),
        frozen=tuple(count / len(samples) for count in right),
    )


def calibrate(args: argparse.Namespace) -> Verdict:
    """The whole job. What can be refused is refused before the first layer is computed."""
    import torch
    from tqdm import tqdm

    from jobs.timing.contestants import check_device
    from spts import loading
    from spts.model import SptsModel
    from spts.proxy import Proxies
    from spts.safety import measure

    for field in ("tokens", "windows", "fit_windows", "live_tokens", "samples"):
        require_int(field, getattr(args, field), minimum=1)
    if not 0 <= args.min_agreement <= 1:
        raise ConfigError(
            f"min_agreement must be from 0 to 1, got {args.min_agreement}; the default is 0.9",
            field="min_agreement",
        )
    check_device(args.device)
    out, tasks = writable_folder(args.out), task_names(args.task)
    if args.threads is not None:
        require_int("threads", args.threads, minimum=1)
        torch.set_num_threads(args.threads)
    folder = loading.resolve(args.model)
    loading.check_folder(folder)
    tokenizer = TextTokenizer(folder)
    texts = split(
        read_documents(args.texts, tokenizer),
        tokens=args.tokens,
        windows=args.windows,
        fit_windows=args.fit_windows,
    )
    questions = {
        name: draw_samples(tokenizer, name, length=args.tokens, count=args.samples) for name in tasks
    }
    hf_model = loading.load_transformers(folder, dtype=args.dtype, device=args.device)
    # Without the proxies that may lie in the folder: they may be the ones to replace.
    bare = SptsModel(hf_model, fingerprint=loading.fingerprint(folder))
    bare.check(texts.measure[0], Dense(), 0)
    num_layers = bare.shape.num_layers
    schedule = read_schedule(args.schedule, num_layers=num_layers, num_tokens=args.tokens)
    method = Spts(schedule=schedule)
    method.schedule_for(num_layers)
    size = ProxyShape.default(bare.shape)
    size = ProxyShape(
        channels=size.channels if args.channels is None else args.channels,
        rank=size.rank if args.rank is None else args.rank,
    )
    first_layer = min(schedule.first_skip_layer, num_layers - 1)
    if args.first_layer is not None:
        if not 0 <= args.first_layer <= first_layer:
            raise config_error(
                "first_layer",
                f"be 0 to {first_layer}, the first layer that the schedule skips tokens in",
                args.first_layer,
                "use less, or another schedule",
            )
        first_layer = args.first_layer
    work = planned_work(schedule, args.tokens)
    print(
        f"model      {args.model}: {num_layers} layers, hidden {bare.shape.hidden_size}, {args.dtype} on "
        f"{args.device}, {torch.get_num_threads()} threads",
        f"schedule   {describe_schedule(schedule)}; {speedup(bare.shape, work, size):.2f}x fewer FLOP "
        f"than dense at {args.tokens} tokens",
        f"proxies    layers {first_layer}-{num_layers - 1}, {size.channels} channels, rank {size.rank}, "
        f"channels chosen over the top {args.top_share:.0%} of tokens",
        f"text       fit on {sum(map(len, texts.fit))} tokens, "
        f"measure on {len(texts.measure)} x {args.tokens}"
        + ("" if texts.held_out else " (the same text: there is too little to hold some out)"),
        sep="\n",
        flush=True,
    )
    with tqdm(desc="fit proxies", unit="step") as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        proxies = Proxies.fit(
            bare,
            texts.fit,
            first_layer=first_layer,
            channels=size.channels,
            rank=size.rank,
            top_share=args.top_share,
            progress=advance,
        )
    proxies.save(out)
    model = SptsModel(hf_model, fingerprint=bare.fingerprint, proxies=proxies)
    with tqdm(desc="measure", unit="prompt", total=len(texts.measure)) as bar:
        safety = measure(model, texts.measure, method, live_tokens=args.live_tokens, progress=bar.update)
    curves = [measure_task(model, tokenizer, name, method, samples) for name, samples in questions.items()]
    verdict = judge(safety, curves, schedule, min_agreement=args.min_agreement)
    write_json(
        out / "calibration.json",
        {
            "fingerprint": model.fingerprint,
            "tokens": args.tokens,
            "schedule": schedule.to_dict(),
            "proxy": {**asdict(size), "top_share": args.top_share},
            "texts": [
                {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
                for path in args.texts
            ],
            "held_out": texts.held_out,
            "verdict": asdict(verdict),
            "safety": asdict(safety),
            "tasks": [asdict(curve) for curve in curves],
        },
    )
    print("", table(safety, curves, work), "", *verdict.lines, sep="\n")
    print(f"written to {out}: proxies.safetensors, proxies.json, calibration.json")
    return verdict


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 also when the schedule is not safe (a result, not a fault); 2 for refused input."""
    args = parser().parse_args(argv)
    try:
        calibrate(args)
    except (SptsError, DiskError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
