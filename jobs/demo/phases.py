"""The parts of the demo model's training: form the lookups, stretch them over distance, open the windows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of the training: its share of the time left, lengths in tokens, how often each, rates.

    windowed: layers below FIRST_GLOBAL_LAYER see a short window only (jobs.demo.loss).
    enough: smoothed accuracy of the answers' first tokens that ends the phase early. A third of a right
    answer is what a question with three values can give, so about 0.86 is perfect.
    """

    name: str
    share: float
    enough: float = 1.0
    lengths: tuple[int, ...]
    weights: tuple[float, ...]
    windowed: bool
    peak_lr: float
    final_lr: float


LONG = (256, 1024, 2048, 4096, 8192)
PHASES = (
    Phase(
        name="form",
        share=0.40,
        enough=0.8,
        lengths=(128, 256),
        weights=(1, 1),
        windowed=True,
        peak_lr=1e-3,
        final_lr=1e-3,
    ),
    Phase(
        name="stretch",
        share=0.60,
        lengths=LONG,
        weights=(1, 1, 1, 2, 2),
        windowed=True,
        peak_lr=1e-3,
        final_lr=5e-4,
    ),
    Phase(
        name="open",
        share=1.0,
        lengths=LONG,
        weights=(1, 1, 1, 2, 3),
        windowed=False,
        peak_lr=5e-4,
        final_lr=2e-5,
    ),
)
