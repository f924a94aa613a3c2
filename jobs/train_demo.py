"""Trains the bundled demo model from a seed.

    python -m jobs.train_demo --out jobs/demo_model

How it works, and what failed before it: docs/demo_model.md. The same seed, batch size and number of workers
give the same initial model and the same batches; how many of them fit into --minutes is the machine's. The
recorded run took 8.4 minutes on one H100.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from jobs.demo.batches import Batches
from jobs.demo.circuit import new_model
from jobs.demo.loss import DemoLoss, Losses
from jobs.demo.phases import PHASES, Phase
from jobs.demo.tokenizer import train_tokenizer
from jobs.tasks.haystack import haystack_hash
from spts.errors import ConfigError, require_int

TEXT_WEIGHT = 0.15  # of the text loss beside the answers'
WARMUP_STEPS = 200  # of each phase
LOG_STEPS = 100
PROGRESS = (
    "{phase:<8} step {step:>5}, {minutes:5.2f} min, {length:>4} tokens: "
    "answers {answer_accuracy:6.1%} right, loss {answer_loss:.3f}, text loss {text_loss:.3f}, "
    "{tokens_per_s:,} tokens/s"
)
FORMED = 0.5  # accuracy without which a phase with an `enough` has failed


class TrainingError(RuntimeError):
    """Training did not lead to a model that answers."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    args = argparse.ArgumentParser(prog="python -m jobs.train_demo", description=__doc__.split("\n")[0])
    args.add_argument("--out", required=True, type=Path, help="model folder to write")
    args.add_argument("--minutes", type=float, default=8.4, help="training time, without set-up")
    args.add_argument("--seed", type=int, default=0)
    args.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args.add_argument("--batch-tokens", type=int, default=65536)
    args.add_argument("--workers", type=int, default=12, help="processes that make batches, each its own")
    return args


class Training:
    """A model on its way through phases: `history` holds a row of figures per LOG_STEPS."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, *, seed: int, device: str, batch_tokens: int, workers: int
    ) -> None:
        self.tokenizer, self.seed, self.device = tokenizer, seed, torch.device(device)
        self.batch_tokens, self.workers = batch_tokens, workers
        self.on_gpu = self.device.type == "cuda"
        self.model = new_model(seed).to(self.device)
        self.loss = DemoLoss(self.model, colon=tokenizer.encode(":")[0], compiled=self.on_gpu)
        matrices = [each for each in self.model.parameters() if each.dim() > 1]
        vectors = [each for each in self.model.parameters() if each.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
            lr=1e-3,
            betas=(0.9, 0.95),
            fused=self.on_gpu,
        )
        self.history: list[dict[str, Any]] = []
        self.num_steps = 0
        self.began = time.monotonic()

    def run(self, phases: Sequence[Phase], *, minutes: float, out: Path) -> None:
        """Trains through the phases, each at least one step, and writes the model into `out` after each.

        Raises:
            TrainingError: the loss is not finite, or a phase ended before the model answered.
        """
        self.began = time.monotonic()
        for phase in phases:
            batches = self._batches(phase)
            left_s = 60 * minutes - (time.monotonic() - self.began)
            accuracy = self._run_phase(phase, batches, left_s * phase.share)
            self.save(out)
            if phase.enough < 1 and accuracy < FORMED:
                raise TrainingError(
                    f"phase {phase.name!r} must reach an accuracy of {FORMED}, got {accuracy:.2f} after "
                    f"{self.num_steps} steps; give it more minutes"
                )

    def _batches(self, phase: Phase) -> Iterator[tuple[Tensor, Tensor]]:
        data = Batches(self.tokenizer, tokens_per_batch=self.batch_tokens, phase=phase, seed=self.seed)
        return iter(
            torch.utils.data.DataLoader(
                data, batch_size=None, num_workers=self.workers, pin_memory=self.on_gpu
            )
        )

    def _run_phase(self, phase: Phase, batches: Iterator[tuple[Tensor, Tensor]], seconds: float) -> float:
        """Trains until the time is up or the answers are good enough; returns their smoothed accuracy."""
        accuracy, logged = 0.0, time.monotonic()
        for index, done in enumerate(_shares(seconds)):
            tokens, targets = (each.to(self.device, non_blocking=True) for each in next(batches))
            lr = (
                phase.peak_lr
                * (phase.final_lr / phase.peak_lr) ** done
                * min(1.0, (index + 1) / WARMUP_STEPS)
            )
            losses = self._step(tokens, targets, lr=lr, windowed=phase.windowed)
            if (index + 1) % LOG_STEPS == 0:
                rate = LOG_STEPS * targets.numel() / (time.monotonic() - logged)
                logged = time.monotonic()
                row = {
                    "phase": phase.name,
                    "step": self.num_steps,
                    "minutes": round((time.monotonic() - self.began) / 60, 2),
                    "length": targets.shape[1],
                    "answer_loss": round(losses.answers.item(), 3),
                    "text_loss": round(losses.text.item(), 3),
                    "answer_accuracy": round(losses.accuracy.item(), 3),
                    "lr": round(lr, 6),
                    "tokens_per_s": int(rate),
                }
                if not math.isfinite(row["answer_loss"]):
                    raise TrainingError(f"loss must stay finite, got {row}; lower the learning rate")
                accuracy = 0.8 * accuracy + 0.2 * row["answer_accuracy"]
                self.history.append(row)
                print(PROGRESS.format(**row), flush=True)
                if accuracy >= phase.enough:
                    break
        return accuracy

    def _step(self, tokens: Tensor, targets: Tensor, *, lr: float, windowed: bool) -> Losses:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.on_gpu):
            losses = self.loss.losses(tokens, targets, windowed=windowed)
        self.optimizer.zero_grad(set_to_none=True)
        (losses.answers + TEXT_WEIGHT * losses.text).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.num_steps += 1
        return losses

    def save(self, folder: Path) -> None:
        """Writes model folder and log, weights in bfloat16; the model in training keeps its precision."""
        folder.mkdir(parents=True, exist_ok=True)
        copy = Qwen2ForCausalLM(self.model.config).to(torch.bfloat16)
        copy.load_state_dict(self.model.state_dict())
        copy.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        rows = ",\n".join(json.dumps(row) for row in self.history)
        (folder / "training.json").write_text(f"[\n{rows}\n]\n")


def _shares(seconds: float) -> Iterator[float]:
    """The share of the time that has passed, until all of it has; 0 first, however little time there is."""
    began = time.monotonic()
    yield 0.0
    while (passed := time.monotonic() - began) < seconds:
        yield passed / seconds


def train(args: argparse.Namespace) -> None:
    """Checks the options, then trains; the last line printed is JSON.

    Raises:
        ConfigError: an option out of range.
        TrainingError: as `Training.run`.
    """
    longest = max(length for phase in PHASES for length in phase.lengths)
    require_int("batch_tokens", args.batch_tokens, minimum=longest)
    require_int("workers", args.workers, minimum=0)
    if not args.minutes > 0:
        raise ConfigError(f"minutes must be above 0, got {args.minutes}; the default is 8.4", field="minutes")
    torch.set_float32_matmul_precision("high")
    began = time.monotonic()
    training = Training(
        train_tokenizer(),
        seed=args.seed,
        device=args.device,
        batch_tokens=args.batch_tokens,
        workers=args.workers,
    )
    print(
        f"{training.model.num_parameters():,} parameters, {args.batch_tokens:,} tokens a batch, "
        f"{args.minutes:g} minutes on {args.device}",
        flush=True,
    )
    training.run(PHASES, minutes=args.minutes, out=args.out)
    about = {
        "steps": training.num_steps,
        "tokens": training.num_steps * args.batch_tokens,
        "total_s": round(time.monotonic() - began, 1),
        "haystack_sha256": haystack_hash("train"),
    }
    print(json.dumps(about))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 when training failed, 2 for refused input."""
    args = parser().parse_args(argv)
    try:
        train(args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
