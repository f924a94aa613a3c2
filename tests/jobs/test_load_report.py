"""The files of a load: they come back as they were, and the pages say all of it and load nothing."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.console import Console

from jobs.load.__main__ import main
from jobs.load.progress import LoadProgress
from jobs.load.record import Moment, Record, Run, load, save
from jobs.load.report import print_report, write_report
from jobs.load.served import changed_config
from jobs.load.settings import Settings
from jobs.load.summary import summarise
from spts.errors import ConfigError
from tests.cluster.conftest import REPOSITORY

EVIL = "<script>alert(1)</script> | $x$"
SETTINGS = Settings(
    url="http://127.0.0.1:8000", tokenizer="x", lengths=((512, 0.5), (8192, 0.5)), requests=8, streams=4
)


def made_up(*, slow: float = 1.0, changed: tuple[str, ...] = ()) -> Run:
    """Eight requests of two lengths, one refused and one faulty."""
    records = [
        Record(
            index=index,
            length=(512, 8192)[index % 2],
            task="single",
            sent_s=index / 2,
            late_s=0.0,
            end_s=slow * (1.5 + index / 8),
            outcome="complete",
            times_s=tuple(slow * (1 + index / 8 + step / 8) for step in range(5)),
            prompt_tokens=500,
            completion_tokens=5,
            method=("dense", "spts")[index % 2],
            score=1.0,
        )
        for index in range(6)
    ]
    records += [
        replace(records[0], index=6, outcome="refused", message="full", times_s=(), score=None),
        replace(records[1], index=7, outcome="fault", message=EVIL, times_s=(0.1,), score=None),
    ]
    moments = tuple(
        Moment(
            at_s=float(i),
            memory={"Shard": 2**29, "Router": 2**27 + i},
            gauges={"kv_cache_bytes": 2.0**20 * i},
        )
        for i in range(6)
    )
    return Run(
        settings=SETTINGS,
        wall_s=8.0,
        lag_s=0.001,
        records=tuple(records),
        moments=moments,
        provenance={
            "started_unix_s": 1.7e9,
            "command": ["python", "-m", "jobs.load"],
            "config": {"serve": "ray_config.yaml", "set": list(changed)},
            "code": {"commit": "0" * 40},
            "hardware": {"cpu": "made up", "cpu_cores": 2},
        },
    )


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.sources: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.add(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data) -> None:
        self.text += data


def test_a_run_comes_back_from_its_folder(tmp_path):
    save(made_up(), tmp_path)
    assert load(tmp_path) == made_up()


def test_the_report_says_all_and_loads_nothing(tmp_path):
    run = made_up()
    summary = summarise(run)
    page = Page(write_report(run, summary, tmp_path).read_text())
    markdown = (tmp_path / "report.md").read_text()
    assert "script" not in page.tags
    assert len(page.sources) == 5, "plots: times, gaps, tokens, memory, KV; no gauges of requests were seen"
    assert all(source.startswith("data:") for source in page.sources)
    assert EVIL in page.text
    assert "<script" not in markdown
    for said in (
        "6 complete, 1 refused, 0 errors, 1 faults",
        "TTFT p50",
        "longest gap in any stream",
        "spts",
    ):
        assert said in page.text
        assert said in markdown
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert numbers["outcomes"]["refused"] == 1
    assert numbers["lines"][0]["ttft"]["p50"] == pytest.approx(1.25)


def test_the_terminal_is_not_outgrown():
    out = io.StringIO()
    run = made_up(slow=30)
    print_report(run, summarise(run), Console(file=out, width=80))
    assert "…" not in out.getvalue()
    assert re.search(r"512 +dense +3 +37\.50 s +43\.50 s +44\.85 s +100\.0", out.getvalue())


def test_two_runs_are_compared(tmp_path, capsys):
    for name, slow, layers in (("one", 1.0, 1), ("two", 2.0, 12)):
        (tmp_path / name).mkdir()
        save(made_up(slow=slow, changed=(f"engines.default.slice_tokens={layers}",)), tmp_path / name)
    assert main(["--compare", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    page = Page((tmp_path / "two" / "compare.html").read_text())
    markdown = (tmp_path / "two" / "compare.md").read_text()
    assert "| engines.default.slice_tokens | 1 | 12 |" in markdown
    [row] = [line for line in markdown.splitlines() if line.startswith("| TTFT, 512 dense")]
    assert row.endswith("| 1.25 s | 2.50 s | 1.50 s | 2.99 s | 1.50 s | 3.00 s | 0.50× |")
    assert "TTFT, 512 while 8K waits" in page.text
    assert not page.sources
    printed = capsys.readouterr().out
    assert "slice_tokens" in printed
    assert "TTFT, 512 while" in printed


@pytest.mark.parametrize("content", [None, "{", "{}", '{"schema": 9}'])
def test_a_folder_without_a_run_is_named(tmp_path, content, capsys):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    assert main(["--compare", str(tmp_path), str(tmp_path)]) == 2
    assert f"compare must be given folders that jobs.load wrote, got {tmp_path}" in capsys.readouterr().err


def test_progress_counts_and_says_the_first_faults():
    out = io.StringIO()
    times = iter(range(0, 1000, 3))
    with LoadProgress(SETTINGS, out=out, clock=lambda: float(next(times))) as progress:
        on_record = progress.start()
        for record in made_up().records:
            on_record(record)
    text = out.getvalue()
    assert f"fault at request 7: {EVIL}" in text
    assert "[8/8 100%]" in text
    assert "6 complete, 1 refused, 0 error, 1 fault" in text


def test_a_configuration_is_changed_where_it_is_said():
    path = REPOSITORY / "ray_config.yaml"
    changes = ["engines.default.slice_tokens=12", "request_timeout_s=30.5"]
    data = changed_config(path, changes, port=4321)
    args = data["applications"][0]["args"]
    assert args["engines"]["default"]["slice_tokens"] == 12
    assert args["request_timeout_s"] == 30.5
    assert data["http_options"] == {"host": "127.0.0.1", "port": 4321}


@pytest.mark.parametrize(
    "change", ["engines.default.slice_tokens", "engines.other.dtype=x", "pools.0.engine=x"]
)
def test_a_change_of_nothing_is_refused(change):
    with pytest.raises(ConfigError, match="set must be KEY=VALUE"):
        changed_config(REPOSITORY / "ray_config.yaml", [change], port=1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray uses what pydantic deprecates
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--serve", "nowhere.yaml"], "nowhere.yaml must be a readable YAML file"),
        (["--serve", "pyproject.toml"], "pyproject.toml must be a YAML file"),
        (["--serve", "jobs/configs/demo.yaml"], "serve must be a file like ray_config.yaml"),
        (["--serve", "ray_config.yaml", "--set", "engines.default.layer=3"], "layer must be one of model"),
    ],
)
def test_an_endpoint_that_cannot_be_started_is_one_error(argv, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert main([*argv, "--out", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err
