"""What is kept of a load: run.json and a line per request, from which every figure of the report is made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jobs.disk.lines import read_lines, to_line
from jobs.disk.record import write_file
from jobs.load.answer import Outcome
from jobs.load.settings import Settings
from jobs.options import write_json
from spts.errors import ConfigError

SCHEMA_VERSION = 1
_RUN, _REQUESTS = "run.json", "requests.jsonl"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One request.

    length: asked for, tokens; prompt_tokens is what the endpoint counted. sent_s: seconds after the load
    began; late_s: how much later that was than it was due. times_s: seconds after sent_s at which each chunk
    of the answer came; end_s: at which the request was over. message: of a refusal, an error or a fault.
    cached_tokens: of the prompt, left by earlier requests. score: of a complete answer, 0 to 1.
    """

    index: int
    length: int
    task: str
    sent_s: float
    late_s: float
    end_s: float
    outcome: Outcome
    message: str | None = None
    times_s: tuple[float, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    method: str | None = None
    score: float | None = None


@dataclass(frozen=True, kw_only=True)
class Moment:
    """The server at one moment. memory: bytes by kind of process, resident less shared. gauges: its own."""

    at_s: float
    memory: Mapping[str, int] = field(default_factory=dict)
    gauges: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A load that has ended.

    wall_s: from its begin to the end of its last request. lag_s: the longest that this client itself was late
    in looking at its clock; a gap in a stream is known to no better. provenance: see `jobs.disk.provenance`.
    """

    settings: Settings
    wall_s: float
    lag_s: float
    records: tuple[Record, ...]
    moments: tuple[Moment, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)


def save(run: Run, folder: Path) -> None:
    """Writes a run into a folder."""
    lines = b"".join(to_line(asdict(record)) for record in run.records)
    write_file(folder / _REQUESTS, lines)
    content = {
        "schema": SCHEMA_VERSION,
        "settings": asdict(run.settings),
        "wall_s": run.wall_s,
        "lag_s": run.lag_s,
        "moments": [asdict(moment) for moment in run.moments],
        "provenance": dict(run.provenance),
    }
    write_json(folder / _RUN, content)


def load(folder: Path) -> Run:
    """The run in a folder. Raises ConfigError when there is none."""
    try:
        content = json.loads((folder / _RUN).read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA_VERSION:
            raise ValueError(f"schema {content['schema']}")
        settings = content["settings"]
        lengths = tuple((int(length), float(share)) for length, share in settings.pop("lengths"))
        return Run(
            settings=Settings(lengths=lengths, **settings),
            wall_s=content["wall_s"],
            lag_s=content["lag_s"],
            records=tuple(
                Record(**{**line, "times_s": tuple(line["times_s"])})
                for line in read_lines(folder / _REQUESTS)
            ),
            moments=tuple(Moment(**moment) for moment in content["moments"]),
            provenance=content["provenance"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"compare must be given folders that jobs.load wrote, got {folder} ({error!r}); choose others",
            field="compare",
        ) from None
