"""What a running sweep prints: lines with what is done, what is left, and the scores so far."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.disk.record import Row
from jobs.sweeping.progress import PromptProgress, SweepProgress, clock_time
from jobs.tasks import get_task


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def work(label: str, flops: float, reference: str = "amber") -> Any:
    record = SimpleNamespace(label=label, task="single", length=4096)
    cell = SimpleNamespace(record=record, task=get_task("single"))
    planned = SimpleNamespace(references=(reference,), meta={})
    return SimpleNamespace(cell=cell, flops=flops, sample="s-1", planned=planned)


def progress_of(items, *, already=0, out, clock):
    return SweepProgress(
        labels=dict.fromkeys(item.cell.record.label for item in items),
        total=already + len(items),
        already=already,
        flops=sum(item.flops for item in items),
        planned=lambda one: one.planned,  # type: ignore[arg-type,return-value]  # a stand-in
        out=out,
        clock=clock,
    )


def row(text: str | None, error: str | None = None) -> Row:
    return Row(
        key="k",
        cell="c",
        sample="s",
        engine="e",
        run="r",
        attempts=1,
        finished_unix_s=1.0,
        text=text,
        error=error,
    )


def test_lines_say_done_left_and_scores():
    clock, out = Clock(), io.StringIO()
    items = [work("dense", 60.0), work("spts", 20.0), work("dense", 15.0), work("spts", 5.0)]
    progress = progress_of(items, out=out, clock=clock)
    for item, text in zip(items, [" Amber.", " granite", " amber", " amber, or not"], strict=True):
        clock.now += 6
        progress.on_row(item, row(text))
    progress.close()
    lines = out.getvalue().splitlines()
    assert [line.split("]")[0] for line in lines] == ["[1/4  25%", "[2/4  50%", "[3/4  75%", "[4/4 100%"]
    assert "0:06 elapsed, 0:04 left" in lines[0]  # 60 of 100 FLOP in 6 s
    assert "0:12 elapsed, 0:03 left" in lines[1]
    assert "score so far: dense 100, spts 50" in lines[3]
    assert "0:00 left" in lines[3]


def test_not_more_than_a_line_every_five_seconds_but_always_the_last():
    clock, out = Clock(), io.StringIO()
    items = [work("dense", 1.0)] * 50
    progress = progress_of(items, out=out, clock=clock)
    for item in items:
        clock.now += 0.5
        progress.on_row(item, row("amber"))
    lines = out.getvalue().splitlines()
    assert len(lines) == 5
    assert lines[-1].startswith("[50/50 100%]")


def test_failures_are_told_at_once_but_not_for_ever():
    clock, out = Clock(), io.StringIO()
    items = [work("spts", 1.0)] * 9
    progress = progress_of(items, out=out, clock=clock)
    for item in items:
        progress.on_row(item, row(None, "deadline: late"))
    lines = out.getvalue().splitlines()
    assert lines[:3] == ["failed: s-1 with spts: deadline: late"] * 3
    assert lines[3:] == ["[9/9 100%] 0:00 elapsed, 0:00 left | score so far: spts 0 | 4K single spts"]


def test_a_resumed_sweep_counts_what_was_done_before():
    clock, out = Clock(), io.StringIO()
    progress = progress_of([work("dense", 1.0)], already=99, out=out, clock=clock)
    clock.now += 3
    progress.on_row(work("dense", 1.0), row("amber"))
    assert out.getvalue().startswith("[100/100 100%] 0:03 elapsed, 0:00 left")


def test_a_terminal_gets_a_bar():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    clock, out = Clock(), Terminal()
    progress = progress_of([work("dense", 1.0)] * 2, out=out, clock=clock)
    clock.now += 2
    progress.on_row(work("dense", 1.0), row("amber"))
    progress.on_row(work("dense", 1.0), row(None, "internal: [red]x[/red]"))
    progress.close()
    assert "2/2" in out.getvalue()
    assert "dense 50" in out.getvalue()
    assert "[red]x[/red]" in out.getvalue()


def test_making_prompts_is_shown_too():
    clock, out = Clock(), io.StringIO()
    progress = PromptProgress(40, out=out, clock=clock)
    for _ in range(10):
        clock.now += 1
        progress.on_prompt(4)
    progress.close()
    assert out.getvalue().splitlines() == [
        "[20/40  50%] 0:05 elapsed, making the prompts",
        "[40/40 100%] 0:10 elapsed, making the prompts",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (75.2, "1:15"), (3725, "1:02:05"), (59.6, "1:00")]
)
def test_clock_time(seconds, text):
    assert clock_time(seconds) == text


class Raising:
    def score(self, text, references, meta):
        raise ValueError("no such metric")


def test_a_scorer_that_raises_is_said_and_ends_nothing():
    clock, out = Clock(), io.StringIO()
    items = [work("dense", 1.0), work("dense", 1.0)]
    items[0].cell.task = Raising()
    progress = progress_of(items, out=out, clock=clock)
    for item in items:
        progress.on_row(item, row("amber"))
    progress.close()
    lines = out.getvalue().splitlines()
    assert lines[0] == "not scored yet: s-1 with dense: no such metric"
    assert "score so far: dense 100 |" in lines[1]
