"""One real Ray cluster and one tiny model per session; whatever needs processes shares them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.tiny import write_model

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """The folder of a tiny random model with proxies and a tokenizer."""
    return write_model(tmp_path_factory.mktemp("tiny") / "tiny")


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class RayCluster:
    """A cluster that `ray start --head` made on loopback, with token authentication, and its command line."""

    def __init__(self, folder: Path) -> None:
        gcs, dashboard, agent, client, self.http_port = free_ports(5)
        self.address = f"127.0.0.1:{gcs}"
        self.dashboard = f"http://127.0.0.1:{dashboard}"
        self.bin = Path(sys.executable).parent
        self.env = {
            **os.environ,
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ADDRESS": self.address,
            "OMP_NUM_THREADS": "1",
        }
        self.run("ray", "get-auth-token", "--generate")
        self.log = folder / "ray.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    self.bin / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1",
                    f"--port={gcs}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
                    f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}",
                    # More than the machine has: tests run one after the other, and idle engines hold theirs.
                    "--num-cpus=8", "--object-store-memory=200000000", "--disable-usage-stats",
                ],
                cwd=REPOSITORY, env=self.env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self._wait_for(dashboard)

    def run(self, *command: str, timeout_s: float = 240) -> str:
        """A command of Ray's, with this cluster's address and token; returns what it printed."""
        done = subprocess.run(
            [self.bin / command[0], *command[1:]],
            cwd=REPOSITORY,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def stop(self) -> None:
        """End every process of the cluster: they share the session of the one that was started."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)

    def _wait_for(self, port: int) -> None:
        for _ in range(240):
            assert self.process.poll() is None, self.log.read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.25)
        pytest.fail(f"the cluster did not start:\n{self.log.read_text()}")


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory):
    cluster = RayCluster(tmp_path_factory.mktemp("ray"))
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def driver(ray_cluster):
    """This process as a driver of the cluster."""
    import ray

    saved = {name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED")}
    os.environ.update(RAY_AUTH_MODE="token", RAY_USAGE_STATS_ENABLED="0")
    ray.init(address=ray_cluster.address, namespace="tests", log_to_driver=False)
    yield ray
    ray.shutdown()
    for name, value in saved.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
