"""From logits to the next token: greedy, temperature, top-k, top-p, seeded; and log-probabilities.

Shape suffix: V vocabulary. Importing this module does not import torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spts.errors import ModelError, RequestError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen; field names and meanings as in the OpenAI API, the default is greedy.

    temperature: 0 = greedy.
    top_p: share of probability that may be drawn from, in (0, 1].
    top_k: how many of the most likely tokens may be drawn from; 0 = all.
    seed: makes draws repeatable; None = fresh entropy.
    stop_token_ids: tokens that end the answer besides the model's own.
    logprobs: alternatives to report per token, at most 20 (0 = the chosen token only; None = nothing).

    Raises RequestError, code "invalid_sampling".
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        seed_ok = self.seed is None or (_is_int(self.seed) and -(2**63) <= self.seed < 2**63)
        stop_ok = isinstance(self.stop_token_ids, tuple) and all(
            _is_int(token_id) and token_id >= 0 for token_id in self.stop_token_ids
        )
        logprobs_ok = self.logprobs is None or (_is_int(self.logprobs) and 0 <= self.logprobs <= MAX_LOGPROBS)
        rules = (
            ("temperature", _is_finite(self.temperature) and self.temperature >= 0,
             "be a finite number of at least 0", "use 0 for greedy decoding"),
            ("top_p", _is_finite(self.top_p) and 0 < self.top_p <= 1,
             "be above 0 and at most 1", "use 1 for no limit"),
            ("top_k", _is_int(self.top_k) and self.top_k >= 0,
             "be an integer of at least 0", "use 0 for no limit"),
            ("seed", seed_ok, "be a 64-bit integer or null", "use null for fresh entropy"),
            ("stop_token_ids", stop_ok,
             "be a tuple of token ids of at least 0", "use () for the model's own end tokens"),
            ("logprobs", logprobs_ok, f"be an integer from 0 to {MAX_LOGPROBS} or null", "use null for none"),
        )  # fmt: skip  # one rule a line reads as the table it is
        for field, holds, rule, remedy in rules:
            if not holds:
                raise RequestError(
                    f"{field} must {rule}, got {getattr(self, field)!r}; {remedy}",
                    code="invalid_sampling",
                    field=field,
                )


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities (natural log) at one position, of the model: before temperature, top-k and top-p.

    top: (token id, log-probability) of the most likely tokens, best first, lower id first among equals.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def make_generator(sampling: Sampling) -> torch.Generator:
    """The CPU generator of one request: from its seed, or from fresh entropy when it has none."""
    import torch

    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return generator


def sample(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token's id. Uses `generator` for exactly one draw, and for none at temperature 0.

    Order of the filters: temperature, then the top_k most likely, then of those, renormalised, the fewest
    whose probability reaches top_p. The lower id wins ties everywhere, also in greedy decoding.

    logits_V: [V] any floating dtype and device; -inf = never. Raises ModelError when a logit is NaN or none
    is finite.

    Worked example: probabilities (0.1, 0.5, 0.15, 0.25), temperature 1.
    top_k = 3 leaves ids 1, 3, 2 at 0.5/0.9, 0.25/0.9, 0.15/0.9; top_p = 0.8 then leaves ids 1 and 3 (0.56 +
    0.28 = 0.83 reaches 0.8), drawn with probabilities 2/3 and 1/3.
    """
    import torch

    # torch documents that argmax takes the first of equals; it takes a NaN before any number.
    best_id = int(torch.argmax(logits_V))
    best = float(logits_V[best_id])
    if not math.isfinite(best):
        raise ModelError(
            f"logits_V must have a finite maximum, got {best}; the activations overflowed, "
            "load the model in float32 or bfloat16",
            field="logits_V",
        )
    if sampling.temperature == 0:
        return best_id
    # float64, and the maximum taken off first: then no temperature above 0, however small, gives NaN.
    scaled_V = (logits_V.double() - best) / sampling.temperature
    ranked_V, ids_V = torch.sort(scaled_V, descending=True, stable=True)
    if sampling.top_k:
        ranked_V = ranked_V[: sampling.top_k]
    cumulative_V = torch.cumsum(torch.softmax(ranked_V, dim=0), dim=0)
    num_kept = ranked_V.shape[0]
    if sampling.top_p < 1:
        num_kept = min(num_kept, int((cumulative_V < sampling.top_p).sum()) + 1)
    draw = torch.rand((), generator=generator, dtype=torch.float64, device=generator.device)
    target = draw.to(cumulative_V.device) * cumulative_V[num_kept - 1]
    # The first token whose cumulative probability reaches the target. There is one, since the target is at
    # most the last of them; and it is never one of probability 0, which reaches no more than its forerunner.
    return int(ids_V[torch.searchsorted(cumulative_V[:num_kept], target)])


def token_logprobs(logits_V: Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    """Log-probability of `token_id`, and the `num_top` most likely tokens. logits_V: [V], any float dtype."""
    import torch

    logprobs_V = torch.log_softmax(logits_V.float(), dim=0)
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        # Sorting the whole vocabulary takes 15 ms on a CPU, and topk does not say which of equals it takes.
        least = torch.topk(logprobs_V, min(num_top, logprobs_V.shape[0])).values[-1]
        ids = (logprobs_V >= least).nonzero().flatten()
        values, order = torch.sort(logprobs_V[ids], descending=True, stable=True)
        top = tuple(zip(ids[order][:num_top].tolist(), values[:num_top].tolist(), strict=True))
    return TokenLogprobs(token_id=token_id, logprob=float(logprobs_V[token_id]), top=top)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
