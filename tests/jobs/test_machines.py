"""A sweep over the engines of two machines, as a Ray job."""

from __future__ import annotations

import pytest

from jobs.disk.record import read_rows
from tests.cluster.tiny import write_model
from tests.jobs.swept import answers
from tests.machines import Machines, machines

pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.timeout(600)]


def sweep(two: Machines, config, out) -> tuple[int, str]:
    command = ["python", "-m", "jobs.sweep", "--config", str(config), "--out", str(out)]
    done = two.run("ray", "job", "submit", "--working-dir", ".", "--", *command)
    return done.returncode, done.stdout + done.stderr


def test_engines_on_two_machines_answer_as_one_does_and_must_have_the_same_files(
    config, write_config, tiny_model, tmp_path
):
    other = write_model(tmp_path / "other" / "tiny", seed=1)
    config["samples"] = 8
    with machines() as two:
        two.start(0)
        status, said = sweep(two, write_config(config), tmp_path / "one")
        assert status == 0, said
        two.start(1, folders={other: tiny_model})
        config["engine"] = {"count": 2}
        status, said = sweep(two, write_config(config), tmp_path / "two")
        assert status == 0, said
        config["model"] = str(other)
        status, said = sweep(two, write_config(config), tmp_path / "other_files")
    assert status != 0
    assert "error: model must be the same files on every machine, got others on 10.77.0.2; copy them" in said
    assert {row.engine for row in read_rows(tmp_path / "two").values()} == {"engine-0", "engine-1"}
    assert answers(tmp_path / "two") == answers(tmp_path / "one")
