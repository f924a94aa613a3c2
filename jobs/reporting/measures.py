"""What answers cost, as measured: medians, shares and speed-ups over any selection of samples.

Times are compared within one start of a sweep and only where a prompt was computed from its first token: one
whose shallow layers came from a prompt before it has no time to first token of its own. A sample that follows
given tokens has no times or memory of its method: its engine also runs the dense model beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jobs.disk.record import Row
from jobs.reporting.scoring import Scored
from jobs.reporting.stats import Column

LENGTHS_DIFFER = 0.05


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What some answers of one method took; None where nothing was measured.

    Attributes:
        flop_share, kv_share: sum over the samples divided by the same sum for a dense prefill.
        done_share: as flop_share, less the FLOP saved by what was kept from prompts with the same beginning.
        reused: samples with something kept; they are left out of every time but tpot_s.
        ttft_s: median seconds to the first token. tpot_s: median seconds per further token.
        total_s: median seconds from arrival to the last token.
        speedup: median over samples of the baseline's time to first token divided by this method's.
        e2e_speedup: the same of the whole answer, as it came.
        equal_speedup: the same, had the method's answer as many tokens as the baseline's, at its own tpot.
        answer_tokens: mean length of the answers.
        answer_ratio: tokens of the answers over those of the baseline's answers to the same samples.
        peak_memory_bytes: most device memory in use.
        kl_nats: mean KL(dense || method) per followed token. rank_mean, rank_median: of dense's token, 1 =
            first.
    """

    flop_share: float | None
    kv_share: float | None
    done_share: float | None
    reused: int
    ttft_s: float | None
    tpot_s: float | None
    total_s: float | None
    speedup: float | None
    e2e_speedup: float | None
    equal_speedup: float | None
    answer_tokens: float | None
    answer_ratio: float | None
    peak_memory_bytes: float | None
    kl_nats: float | None
    rank_mean: float | None
    rank_median: float | None

    @property
    def lengths_differ(self) -> bool:
        """Answers are longer or shorter than the baseline's by more than 5 %: whole times do not compare."""
        return self.answer_ratio is not None and abs(self.answer_ratio - 1) > LENGTHS_DIFFER


_NUMBERS = ("flops", "dense_flops", "reused_flops", "reused_tokens", "kv_bytes", "dense_kv_bytes", "ttft_s",
            "decode_s", "total_s", "peak_memory_bytes")  # fmt: skip
_NOT_WHILE_FOLLOWING = ("ttft_s", "decode_s", "total_s", "peak_memory_bytes")


@dataclass(frozen=True, kw_only=True, eq=False)
class Measures:
    """The samples of one model as columns, for arithmetic on selections of them.

    Attributes:
        score: [n]. context: [n] numbers that are equal where samples are not independent.
        base: [n] index of the baseline's answer to the same question, itself for the baseline's own; -1 =
            none.
        run: [n] number of the start of the sweep. tokens: [n] of the answer.
        of_row: [n] each number of Row that is averaged here; NaN = not measured.
    """

    score: np.ndarray
    context: np.ndarray
    base: np.ndarray
    run: np.ndarray
    error: np.ndarray
    tokens: np.ndarray
    of_row: dict[str, np.ndarray]
    agreement: list[tuple[Sequence[float], Sequence[int]]]

    @classmethod
    def of(cls, scored: Sequence[Scored], baseline: str | None) -> Measures:
        """The columns of `scored`, paired with the answers labelled `baseline`."""
        base = {one.question: index for index, one in enumerate(scored) if one.cell.label == baseline}
        contexts: dict[tuple[str, str, str], int] = {}
        runs: dict[str, int] = {}
        rows = [one.row for one in scored]
        return cls(
            score=np.array([one.score for one in scored]),
            context=np.array([contexts.setdefault(one.context, len(contexts)) for one in scored], dtype=int),
            base=np.array([base.get(one.question, -1) for one in scored], dtype=int),
            run=np.array([runs.setdefault(row.run, len(runs)) for row in rows], dtype=int),
            error=np.array([row.error is not None for row in rows], dtype=bool),
            tokens=_numbers(None if row.token_ids is None else len(row.token_ids) for row in rows),
            of_row={name: _numbers(_of_row(row, name) for row in rows) for name in _NUMBERS},
            agreement=[
                (row.agreement["kl"], row.agreement["rank"]) if row.agreement else ((), ()) for row in rows
            ],
        )

    @property
    def everything(self) -> np.ndarray:
        """Indices of all samples."""
        return np.arange(len(self.score))

    def scores(self, indices: np.ndarray) -> Column:
        """The scores of some samples."""
        return Column.of(self.score[indices], self.context[indices])

    def differences(self, indices: np.ndarray) -> Column | None:
        """Paired differences against the baseline; None for its own answers, and where nothing pairs up."""
        paired = indices[self.base[indices] >= 0]
        base = self.base[paired]
        if not len(paired) or (base == paired).all():
            return None
        return Column.of(self.score[paired] - self.score[base], self.context[paired], difference=True)

    def failed(self, indices: np.ndarray) -> int:
        """Samples that ended in an error."""
        return int(self.error[indices].sum())

    def costs(self, indices: np.ndarray) -> Costs:
        """What some samples of one method took. Failed ones have no numbers."""
        value = {name: column[indices] for name, column in self.of_row.items()}
        reused = np.nan_to_num(value["reused_tokens"]) > 0
        saved = np.nan_to_num(value["reused_flops"])
        tokens = self.tokens[indices]
        own = ~reused
        kl = [number for index in indices for number in self.agreement[index][0]]
        rank = [number for index in indices for number in self.agreement[index][1]]
        with np.errstate(divide="ignore", invalid="ignore"):
            tpot = np.where(tokens > 1, value["decode_s"] / (tokens - 1), np.nan)
        return Costs(
            flop_share=_share(value["flops"], value["dense_flops"]),
            kv_share=_share(value["kv_bytes"], value["dense_kv_bytes"]),
            done_share=_share(value["flops"] - saved, value["dense_flops"]),
            reused=int(reused.sum()),
            ttft_s=_median(value["ttft_s"][own]),
            tpot_s=_median(tpot),
            total_s=_median(value["total_s"][own]),
            answer_tokens=_over(np.mean, tokens),
            peak_memory_bytes=_over(np.max, value["peak_memory_bytes"]),
            kl_nats=_over(np.mean, np.asarray(kl, dtype=float)),
            rank_mean=_over(np.mean, np.asarray(rank, dtype=float)),
            rank_median=_over(np.median, np.asarray(rank, dtype=float)),
            **self._against_baseline(indices),
        )

    def _against_baseline(self, indices: np.ndarray) -> dict[str, float | None]:
        paired = indices[self.base[indices] >= 0]
        base = self.base[paired]
        tokens, base_tokens = self.tokens[paired], self.tokens[base]
        ratio = _share(tokens, base_tokens)
        reused = self.of_row["reused_tokens"]
        comparable = (self.run[paired] == self.run[base]) & ~(
            (np.nan_to_num(reused[paired]) > 0) | (np.nan_to_num(reused[base]) > 0)
        )
        mine, theirs = paired[comparable], base[comparable]
        tokens, base_tokens = tokens[comparable], base_tokens[comparable]
        first, decode, whole = (self.of_row[name] for name in ("ttft_s", "decode_s", "total_s"))
        with np.errstate(divide="ignore", invalid="ignore"):
            # A single token says nothing of the time that more of them would take.
            stretch = np.where(base_tokens == 1, 0.0, (base_tokens - 1) / (tokens - 1))
            stretch[~np.isfinite(stretch)] = np.nan
            equal = first[mine] + np.where(stretch == 0, 0.0, decode[mine] * stretch)
            return {
                "speedup": _median(first[theirs] / first[mine]),
                "e2e_speedup": _median(whole[theirs] / whole[mine]),
                "equal_speedup": _median((first[theirs] + decode[theirs]) / equal),
                "answer_ratio": ratio,
            }


def _of_row(row: Row, name: str) -> float | None:
    """A number of a row, as far as it says something of the method."""
    if row.agreement is not None and name in _NOT_WHILE_FOLLOWING:
        return None
    value: float | None = getattr(row, name)
    return value


def _numbers(values: Iterable[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _over(reduce: Callable[[np.ndarray], Any], values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(reduce(known)) if len(known) else None


def _median(values: np.ndarray) -> float | None:
    return _over(np.median, values)


def _share(parts: np.ndarray, wholes: np.ndarray) -> float | None:
    known = np.isfinite(parts) & np.isfinite(wholes) & (wholes > 0)
    return float(parts[known].sum() / wholes[known].sum()) if known.any() else None
