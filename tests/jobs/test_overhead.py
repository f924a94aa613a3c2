"""What a sweep costs beside its engines, measured on a small one: every row is there, every number said."""

from __future__ import annotations

import json

import pytest

from jobs.overhead import main


def test_a_small_sweep_is_measured(capsys):
    assert main(["--samples", "64", "--engines", "2", "--answer-ms", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    figures = json.loads(lines[-1])
    assert (figures["samples"], figures["engines"], figures["answer_ms"]) == (64, 2, 2.0)
    assert 0 < figures["outside_engines_share"] < 1
    assert figures["wall_s"] >= 64 * 0.002 / 2
    assert figures["memory_first_mib"] > 0
    assert any(line.startswith("[64/64 100%]") for line in lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--samples", "0"], "samples must be"), (["--engines", "0"], "engines must be")],
)
def test_numbers_out_of_range_are_refused(options, message, capsys):
    assert main(options) == 2
    assert message in capsys.readouterr().err
