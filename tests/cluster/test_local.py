import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster.local import free_ports

ROOT = Path(__file__).resolve().parents[2]
PROBE = "import ray; ray.init(); print('cpus', int(ray.cluster_resources()['CPU']), flush=True)"


def start(*command):
    return subprocess.Popen(
        [sys.executable, "-m", "cluster.local", "--num-cpus", "3", "--", *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def test_free_ports_are_distinct():
    assert len(set(free_ports(20))) == 20


@pytest.mark.real
@pytest.mark.slow
def test_command_sees_its_own_cluster_and_its_status_is_kept():
    process = start(sys.executable, "-c", PROBE + "; raise SystemExit(7)")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 7
    assert "cpus 3" in output


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop", "number", "status"),
    [(os.killpg, signal.SIGINT, 130), (os.kill, signal.SIGTERM, 143)],
    ids=["ctrl-c", "term"],
)
def test_nothing_is_left_when_it_is_stopped(stop, number, status):
    process = start(sys.executable, "-c", PROBE + "; import time; time.sleep(600)")
    try:
        assert "cpus 3" in process.stdout.readline()
        family = psutil.Process(process.pid).children(recursive=True)
        assert any(each.name() == "raylet" for each in family)
        listening = {
            c.laddr.ip for each in family for c in connections(each) if c.status == psutil.CONN_LISTEN
        }
        assert listening <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
        stop(process.pid, number)  # a terminal sends Ctrl-C to the whole group
        assert process.wait(180) == status
    finally:
        process.kill()
        process.stdout.close()
    deadline = time.monotonic() + 20
    while (left := [each for each in family if each.is_running()]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []


def connections(process: psutil.Process) -> list:
    try:
        return process.net_connections(kind="tcp")
    except psutil.NoSuchProcess:
        return []
