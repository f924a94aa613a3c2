"""kill -9 of a rank, an engine and the driver of a real sweep: nothing is lost, nothing doubled."""

from __future__ import annotations

import pytest

from tests.jobs.kill_sweep import KINDS, run


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.timeout(600)
def test_a_sweep_killed_at_random_moments_equals_one_in_peace(config, write_config, tmp_path):
    config.update(samples=12, engine={"count": 2})
    kills, differences = run(write_config(config), tmp_path, kills=3, gap_s=0.5)
    assert differences == []
    assert {kill.kind for kill in kills} == set(KINDS)
