"""The numbers of a report as files for other programs: report.csv, report.parquet, samples.parquet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jobs.disk.columns import LINE_FIELDS, SAMPLE_FIELDS, Field
from jobs.reporting.scoring import Scored
from jobs.reporting.stats import Estimate
from jobs.reporting.summary import Line, ModelSummary, Results

if TYPE_CHECKING:
    import pyarrow


def csv_text(results: Results) -> str:
    """One line per method over all samples, per length, per task, and per cell.

    A name that a spreadsheet would take for a formula begins with an apostrophe.
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, [field.name for field in LINE_FIELDS], lineterminator="\n")
    writer.writeheader()
    for values in _lines(results):
        writer.writerow(
            {name: round(value, 9) if isinstance(value, float) else value for name, value in values.items()}
            | {name: f"'{value}" for name, value in values.items() if _is_formula(value)}
        )
    return out.getvalue()


def _is_formula(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))


def lines_parquet(results: Results) -> bytes:
    """The lines of report.csv, with types."""
    return _parquet(list(_lines(results)), LINE_FIELDS)


def samples_parquet(results: Results) -> bytes:
    """Every row of the sweep with what was asked and its score: the folder's rows in one file."""
    rows = [_sample(model, one) for model in results.models for one in model.scored]
    return _parquet(rows, SAMPLE_FIELDS)


def _lines(results: Results) -> Iterator[dict[str, Any]]:
    for model in results.models:
        for line in model.lines():
            yield _line(model, line)


def _line(model: ModelSummary, line: Line) -> dict[str, Any]:
    total = line.task is None and line.length is None
    test = model.comparisons.get(line.label) if total else None
    costs = line.costs
    return {
        "model": model.model,
        "label": line.label,
        "method": line.method,
        "task": line.task or "all",
        "length_tokens": "all" if line.length is None else str(line.length),
        "samples": line.score.count,
        "contexts": line.score.clusters,
        "failed": line.failed,
        **_estimate(line.score, "score", "score_low", "score_high", "interval"),
        **_estimate(line.delta, "delta_vs_dense", "delta_low", "delta_high", "delta_interval"),
        "p_value": test.p if test else None,
        "p_holm": test.holm if test else None,
        "flop_share": costs.flop_share,
        "flop_share_after_reuse": costs.done_share,
        "kv_share": costs.kv_share,
        "reused_samples": costs.reused,
        "ttft_median_s": costs.ttft_s,
        "ttft_speedup_vs_dense": costs.speedup,
        "tpot_median_s": costs.tpot_s,
        "e2e_median_s": costs.total_s,
        "e2e_speedup_vs_dense": costs.e2e_speedup,
        "e2e_speedup_equal_tokens": costs.equal_speedup,
        "answer_tokens_mean": costs.answer_tokens,
        "answer_tokens_vs_dense": costs.answer_ratio,
        "peak_memory_bytes": costs.peak_memory_bytes,
        "kl_mean_nats": costs.kl_nats,
        "rank_mean": costs.rank_mean,
        "rank_median": costs.rank_median,
    }


def _estimate(estimate: Estimate | None, value: str, low: str, high: str, how: str) -> dict[str, Any]:
    if estimate is None:
        return dict.fromkeys((value, low, high, how))
    return {value: estimate.value, low: estimate.low, high: estimate.high, how: estimate.interval}


_FROM_ROW = ("key", "cell", "error", "error_kind", "text", "token_ids", "finish_reason", "queue_s", "ttft_s",
             "decode_s", "total_s", "flops", "dense_flops", "reused_tokens", "reused_flops", "kv_bytes",
             "dense_kv_bytes", "peak_memory_bytes", "engine", "run", "attempts",
             "finished_unix_s")  # fmt: skip


def _sample(model: ModelSummary, one: Scored) -> dict[str, Any]:
    agreement = one.row.agreement or {}
    return {
        "model": model.model,
        "label": one.cell.label,
        "method": one.cell.method,
        "task": one.cell.task,
        "length_tokens": one.cell.length,
        "seed": int(one.cell.content["seed"]),
        "sample": one.planned.sample,
        "context": one.planned.context,
        "prompt_sha256": one.planned.prompt_sha256,
        "question": one.planned.question,
        "references": list(one.planned.references),
        "meta": json.dumps(dict(one.planned.meta), ensure_ascii=False),
        "score": one.score,
        "prompt_tokens": one.planned.prompt_tokens,
        "kl_nats": agreement.get("kl"),
        "rank": agreement.get("rank"),
        **{name: getattr(one.row, name) for name in _FROM_ROW},
    }


def _parquet(rows: Sequence[Mapping[str, Any]], fields: Iterable[Field]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([(field.name, _arrow(field.type)) for field in fields])
    columns = [
        pyarrow.array([row[field.name] for row in rows], type=field.type, from_pandas=False)
        for field in schema
    ]
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, schema=schema), out, compression="zstd")
    return out.getvalue()


def _arrow(name: str) -> pyarrow.DataType:
    import pyarrow

    if name.startswith("list<"):
        return pyarrow.list_(_arrow(name[5:-1]))
    return pyarrow.type_for_alias(name)
