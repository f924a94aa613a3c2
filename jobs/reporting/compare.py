"""Two runs side by side: are the same samples answered the same, and if not, what else is different?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from jobs.disk.record import CellRecord, Row
from jobs.reporting.facts import commit
from jobs.reporting.measures import Costs, Measures
from jobs.reporting.scoring import Scored
from jobs.reporting.stats import Column, Estimate, estimates
from jobs.reporting.summary import Results
from spts.errors import ConfigError

_KL_TOLERANCE_NATS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Change:
    """One recorded thing that is not the same in both runs. where: what it is of: "code", "cells", a key."""

    where: str
    first: str
    second: str


@dataclass(frozen=True, kw_only=True)
class MethodPair:
    """A method over the samples that both runs have. delta: second less first, on the same samples."""

    name: str
    samples: int
    same: int
    first: Estimate
    second: Estimate
    delta: Estimate
    first_costs: Costs
    second_costs: Costs


@dataclass(frozen=True, kw_only=True)
class RunComparison:
    """What two runs have in common and what not.

    Attributes:
        reasons: why they are not equal, in sentences; none = equal.
        changes: what else is recorded as different, whether it changed an answer or not.
        cells: (in both, only in the first, only in the second), names of cells with another content apart.
        differing: samples of both with different answers, references or scores, those first whose score
            changed most.
    """

    first: Results
    second: Results
    reasons: tuple[str, ...]
    changes: tuple[Change, ...]
    cells: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    methods: tuple[MethodPair, ...]
    differing: tuple[tuple[Scored, Scored], ...]
    shared: int

    @property
    def equal(self) -> bool:
        """The same samples, and the same answer to each."""
        return not self.reasons

    @property
    def verdict(self) -> str:
        """The outcome in a sentence."""
        if self.equal:
            return f"Equal: both runs have the same {self.shared} samples and the same answer to each."
        return f"Different: {'; '.join(self.reasons)}."


def compare(first: Results, second: Results) -> RunComparison:
    """Compares two runs sample by sample. Cells match by model, label, task, length and seed; if each run has
    one model, whatever its name. Samples match if their prompts are the same too.

    Raises:
        ConfigError: the same task in different versions: their scores do not compare.
    """
    _check_versions(first, second)
    alone = len(first.models) == len(second.models) == 1
    cells = [_cells(results, alone) for results in (first, second)]
    planned = [_planned(results, alone) for results in (first, second)]
    scored = [
        {_question(one, alone): one for model in results.models for one in model.scored}
        for results in (first, second)
    ]
    pairs = [(one, scored[1][key]) for key, one in scored[0].items() if key in scored[1]]
    other = [pair for pair in pairs if not _same(*pair)]
    differing = tuple(sorted(other, key=lambda pair: -abs(pair[0].score - pair[1].score)))
    changed = {name: _changed(cells[0][name], cells[1][name]) for name in cells[0] if name in cells[1]}
    return RunComparison(
        first=first,
        second=second,
        reasons=tuple(_reasons(planned, scored, len(pairs), len(differing))),
        changes=(*_recorded(first, second), *_contents(changed)),
        cells=(
            tuple(_name(key) for key in changed),
            tuple(_name(key) for key in cells[0] if key not in cells[1]),
            tuple(_name(key) for key in cells[1] if key not in cells[0]),
        ),
        methods=tuple(_methods(pairs, alone)),
        differing=differing,
        shared=len(pairs),
    )


def same_answer(first: Row, second: Row) -> bool:
    """Whether two rows say the same: the same tokens (the same text where there are none), or errors of one
    kind; of samples that follow given tokens, the same ranks and KL to 1e-6 nats."""
    if first.error is not None or second.error is not None:
        return first.error is not None and second.error is not None and first.error_kind == second.error_kind
    if first.agreement is not None and second.agreement is not None:
        return list(first.agreement["rank"]) == list(second.agreement["rank"]) and all(
            a is not None and b is not None and math.isclose(a, b, abs_tol=_KL_TOLERANCE_NATS)
            for a, b in zip_longest(first.agreement["kl"], second.agreement["kl"])
        )
    if first.token_ids is not None and second.token_ids is not None:
        return first.token_ids == second.token_ids
    return first.text == second.text


def _same(first: Scored, second: Scored) -> bool:
    """The same answer, asked for by the same references, with the same score."""
    asked = [
        (one.planned.references, dict(one.planned.meta), one.score, one.row.text) for one in (first, second)
    ]
    return asked[0] == asked[1] and same_answer(first.row, second.row)


def _check_versions(first: Results, second: Results) -> None:
    versions: list[dict[str, Any]] = [
        {cell.task: cell.content["task_version"] for cell in results.plan.cells}
        for results in (first, second)
    ]
    for task, version in versions[0].items():
        if versions[1].get(task, version) != version:
            raise ConfigError(
                f"version of task {task!r} must be the same in both runs, got {version} and "
                f"{versions[1][task]}; run one of them again",
                field="task_version",
            )


_Key = tuple[Any, ...]


def _key(cell: CellRecord, alone: bool) -> _Key:
    return ("" if alone else cell.model, cell.label, cell.task, cell.length, cell.content["seed"])


def _name(key: _Key) -> str:
    model, label, task, length, seed = key
    return f"{model + ', ' if model else ''}{label}, {task}, {length} tokens, seed {seed}"


def _question(one: Scored, alone: bool) -> _Key:
    return (*_key(one.cell, alone), one.planned.sample, one.planned.prompt_sha256)


def _cells(results: Results, alone: bool) -> dict[_Key, CellRecord]:
    return {_key(cell, alone): cell for cell in results.plan.cells}


def _planned(results: Results, alone: bool) -> dict[_Key, set[str]]:
    """Hashes of prompts by sample: two runs may have other prompts under one name."""
    cells = {cell.id: cell for cell in results.plan.cells}
    found: dict[_Key, set[str]] = {}
    for sample in results.plan.samples:
        found.setdefault((*_key(cells[sample.cell], alone), sample.sample), set()).add(sample.prompt_sha256)
    return found


def _reasons(
    planned: list[dict[_Key, set[str]]], scored: list[dict[_Key, Scored]], shared: int, differing: int
) -> Iterator[str]:
    for this, that, name in ((0, 1, "first"), (1, 0, "second")):
        if only := sum(sample not in planned[that] for sample in planned[this]):
            yield f"{only} samples are asked for in the {name} run only"
        if missing := sum(map(len, planned[this].values())) - len(scored[this]):
            yield f"{missing} samples of the {name} run are not done"
    both = [sample for sample in planned[0] if sample in planned[1]]
    if other := sum(planned[0][sample] != planned[1][sample] for sample in both):
        yield f"{other} samples of the same name have different prompts"
    if not shared:
        yield "no sample is in both"
    if differing:
        yield f"{differing} of {shared} samples in both have different answers, references or scores"


def _methods(pairs: Iterable[tuple[Scored, Scored]], alone: bool) -> Iterator[MethodPair]:
    groups: dict[str, list[tuple[Scored, Scored]]] = {}
    for first, second in pairs:
        name = first.cell.label if alone else f"{first.cell.model}, {first.cell.label}"
        groups.setdefault(name, []).append((first, second))
    columns: list[Column] = []
    measures = []
    for group in groups.values():
        ones, others = (Measures.of([pair[side] for pair in group], None) for side in (0, 1))
        columns += [Column.of(side.score, ones.context) for side in (ones, others)]
        columns.append(Column.of(others.score - ones.score, ones.context, difference=True))
        measures.append((ones, others))
    found = iter(estimates(columns))
    for (name, group), sides in zip(groups.items(), measures, strict=True):
        first_score, second_score, delta = next(found), next(found), next(found)
        first_costs, second_costs = (side.costs(side.everything) for side in sides)
        yield MethodPair(
            name=name,
            samples=len(group),
            same=sum(_same(a, b) for a, b in group),
            first=first_score,
            second=second_score,
            delta=delta,
            first_costs=first_costs,
            second_costs=second_costs,
        )


def _recorded(first: Results, second: Results) -> Iterator[Change]:
    """What the last starts of both runs recorded differently."""
    one, other = (results.starts[-1] if results.starts else {} for results in (first, second))
    if commit(one) != commit(other):
        yield Change(where="code", first=commit(one), second=commit(other))
    sources = [str((start.get("code") or {}).get("sha256")) for start in (one, other)]
    if sources[0] != sources[1]:
        yield Change(where="sources", first=sources[0], second=sources[1])
    for part in ("versions", "hardware", "engine", "config"):
        a, b = (dict(_flat(start.get(part) or {}, part)) for start in (one, other))
        for key in dict.fromkeys((*a, *b)):
            if a.get(key) != b.get(key):
                yield Change(where=key, first=_shown(a.get(key)), second=_shown(b.get(key)))


def _changed(one: CellRecord, other: CellRecord) -> dict[str, tuple[str, str]]:
    a, b = dict(_flat(one.content, "")), dict(_flat(other.content, ""))
    return {
        key: (_shown(a.get(key)), _shown(b.get(key)))
        for key in dict.fromkeys((*a, *b))
        if a.get(key) != b.get(key)
    }


def _contents(changed: Mapping[_Key, Mapping[str, tuple[str, str]]]) -> Iterator[Change]:
    """What differs in the contents of cells of one name, each difference once."""
    counts: dict[tuple[str, str, str], int] = {}
    for differences in changed.values():
        for key, (a, b) in differences.items():
            counts[key, a, b] = counts.get((key, a, b), 0) + 1
    for (key, a, b), number in counts.items():
        yield Change(where=f"{key} of {number} of {len(changed)} cells", first=a, second=b)


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """{"a": {"b": 1}} -> ("a.b", 1)."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _shown(value: Any) -> str:
    return "nothing" if value is None else str(value)
