"""The columns of report.csv, report.parquet and samples.parquet, each with its type and meaning.

Types are named as Arrow names them. Imports nothing, so that the folder's README can list them.
"""

from __future__ import annotations

from typing import NamedTuple


class Field(NamedTuple):
    """One column."""

    name: str
    type: str
    doc: str


LINE_FIELDS = (
    Field("model", "string", "name of the model"),
    Field("label", "string", "name of the method in reports"),
    Field("method", "string", "kind of method"),
    Field("task", "string", '"all", or one task'),
    Field("length_tokens", "string", '"all", or one nominal prompt length'),
    Field("samples", "int64", "samples tried, failed ones too"),
    Field("contexts", "int64", "independent contexts that they come from"),
    Field("failed", "int64", "samples that ended in an error; each scores 0"),
    Field("score", "double", "mean score, 0 to 1"),
    Field("score_low", "double", "lower end of the 95 % interval"),
    Field("score_high", "double", "upper end"),
    Field(
        "interval",
        "string",
        "how it was made: bootstrap over contexts; wilson for scores of 0 and 1, and where all contexts have "
        "one mean, graded or not: as if each context were one right or wrong answer",
    ),
    Field("delta_vs_dense", "double", "mean difference to dense on the same samples, -1 to 1"),
    Field("delta_low", "double", "lower end of the 95 % interval"),
    Field("delta_high", "double", "upper end"),
    Field("delta_interval", "string", "the same; agresti-min for differences of -1, 0 and 1"),
    Field("p_value", "double", "two-sided paired test of no difference to dense; of totals only"),
    Field("p_holm", "double", "the same after Holm's correction for all methods of the model"),
    Field("flop_share", "double", "prefill FLOP, counted from the work really done, divided by dense FLOP"),
    Field("flop_share_after_reuse", "double", "the same without what was kept from prompts before"),
    Field("kv_share", "double", "bytes of the KV cache after the prefill divided by a dense one's"),
    Field("reused_samples", "int64", "samples with something kept; left out of all times but tpot_median_s"),
    Field("ttft_median_s", "double", "median seconds to the first token; agreement tasks have no times"),
    Field("ttft_speedup_vs_dense", "double", "median over samples of dense time / this method's"),
    Field("tpot_median_s", "double", "median seconds per further token"),
    Field("e2e_median_s", "double", "median seconds from arrival to the last token"),
    Field(
        "e2e_speedup_vs_dense", "double", "median over samples of dense time / this method's, as they came"
    ),
    Field("e2e_speedup_equal_tokens", "double", "the same if the answer were as long as dense's"),
    Field("answer_tokens_mean", "double", "mean tokens of an answer"),
    Field("answer_tokens_vs_dense", "double", "tokens of the answers / those of dense, same samples"),
    Field("peak_memory_bytes", "double", "most device memory in use; null on a CPU"),
    Field("kl_mean_nats", "double", "mean KL(dense || method) per followed token; agreement tasks only"),
    Field("rank_mean", "double", "mean rank of dense's token, 1 = first; agreement tasks only"),
    Field("rank_median", "double", "median of the same"),
)

SAMPLE_FIELDS = (
    Field("model", "string", "name of the model"),
    Field("label", "string", "name of the method in reports"),
    Field("method", "string", "kind of method"),
    Field("task", "string", "name of the task"),
    Field("length_tokens", "int64", "nominal prompt length"),
    Field("seed", "int64", "seed of the samples"),
    Field("sample", "string", "id of the sample, the same for every method"),
    Field("context", "string", "text that several samples begin with; null = its own"),
    Field("key", "string", "key of the row"),
    Field("cell", "string", "id of the cell"),
    Field("prompt_sha256", "string", "hash of the rendered prompt"),
    Field("question", "string", "the prompt's last characters"),
    Field("references", "list<string>", "what a right answer contains"),
    Field("meta", "string", "what the task says of the sample, JSON"),
    Field("score", "double", "0 to 1; 0 for a failed sample"),
    Field("error", "string", "why there is no answer; null for an answered sample"),
    Field("error_kind", "string", "kind of the error"),
    Field("text", "string", "the answer, untouched"),
    Field("token_ids", "list<int64>", "the answer's tokens"),
    Field("finish_reason", "string", "stop or length"),
    Field("prompt_tokens", "int64", "tokens of the prompt"),
    Field("queue_s", "double", "seconds from arrival at the engine to the start of the prefill"),
    Field("ttft_s", "double", "seconds from arrival to the first token"),
    Field("decode_s", "double", "seconds from the first token to the last"),
    Field("total_s", "double", "seconds from arrival to the last token"),
    Field("flops", "double", "FLOP of the prefill, from the work really done"),
    Field("dense_flops", "double", "the same for a dense prefill of this prompt"),
    Field("reused_tokens", "int64", "prompt tokens whose shallow layers came from a prompt before"),
    Field("reused_flops", "double", "FLOP of `flops` that were therefore not done again"),
    Field("kv_bytes", "int64", "bytes of the KV cache after the prefill"),
    Field("dense_kv_bytes", "int64", "the same for a dense prefill of this prompt"),
    Field("peak_memory_bytes", "int64", "most device memory in use; null on a CPU"),
    Field("kl_nats", "list<double>", "of a sample that follows given tokens: KL(dense || method) per token"),
    Field("rank", "list<int64>", "of the same: rank of dense's token, 1 = first"),
    Field("engine", "string", "engine that ran it"),
    Field("run", "string", "id of the start of the sweep that wrote the row, see provenance.jsonl"),
    Field("attempts", "int64", "times the sample was tried"),
    Field("finished_unix_s", "double", "seconds since 1970"),
)


def describe() -> str:
    """The columns as Markdown tables."""
    parts = [
        "Written by jobs.report: report.html, report.md and the tables below; compare.html and compare.md "
        "when another run is compared with this one.",
        "",
    ]
    for title, fields in (
        ("report.csv, report.parquet: a line per method over all samples, per length, per task, per cell",
         LINE_FIELDS),
        ("samples.parquet: a line per sample and method that was tried", SAMPLE_FIELDS),
    ):  # fmt: skip
        parts += [f"## {title}", "", "| column | type | meaning |", "|---|---|---|"]
        parts += [
            f"| {field.name} | {field.type} | {field.doc.replace('|', chr(92) + '|')} |" for field in fields
        ]
        parts.append("")
    return "\n".join(parts)
