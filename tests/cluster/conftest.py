"""One real Ray cluster and one tiny model per session; whatever needs processes shares them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from cluster.local import free_ports, local_ray
from cluster.tokenizer import TextTokenizer
from tests.cluster.tiny import write_model, write_tokenizer

KEY = "sk-demo-1"
SITE = "https://chat.example.org"
REPOSITORY = Path(__file__).resolve().parents[2]
# Workers import this checkout, also where it is not installed, and whatever this process finds that way.
PYTHONPATH = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """The folder of a tiny random model with proxies and a tokenizer."""
    return write_model(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_tokenizer(path)
    return path


@pytest.fixture
def tokenizer(folder):
    return TextTokenizer(folder)


class RayCluster:
    """A cluster on loopback with token authentication, and Ray's command line for it."""

    def __init__(self, env: dict[str, str]) -> None:
        self.env = {**env, "PYTHONPATH": PYTHONPATH}
        self.address = env["RAY_ADDRESS"]

    def run(self, *command: str, timeout_s: float = 240) -> str:
        """Run one of Ray's commands; returns what it printed."""
        done = subprocess.run(
            [Path(sys.executable).parent / command[0], *command[1:]],
            cwd=REPOSITORY,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="session")
def ray_cluster():
    # More CPUs than the machine has: tests run one after the other, and idle engines keep theirs.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PYTHONPATH)
        with local_ray(num_cpus=8) as env:
            yield RayCluster(env)


@pytest.fixture(scope="module")
def driver(ray_cluster):
    """This process as a driver of the cluster, until the module's end: other tests connect elsewhere."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
            patch.setenv(name, ray_cluster.env[name])
        ray.init(address=ray_cluster.address, namespace="tests", log_to_driver=False)
        yield ray
        ray.shutdown()


@pytest.fixture(scope="session")
def demo_url(tmp_path_factory) -> Iterator[str]:
    """Address of ray_config.yaml as `make serve` runs it: the bundled model on a cluster of its own, here
    with an API key, a site whose pages may ask, and a free port."""
    folder = tmp_path_factory.mktemp("demo")
    port = free_ports(1)[0]
    config = yaml.safe_load((REPOSITORY / "ray_config.yaml").read_text())
    config["http_options"]["port"] = port
    (folder / "keys").write_text(KEY)
    config["applications"][0]["args"] |= {"api_keys_file": str(folder / "keys"), "cors_origins": [SITE]}
    (folder / "ray_config.yaml").write_text(yaml.safe_dump(config))
    log = folder / "serve.log"
    with log.open("wb") as output:
        served = subprocess.Popen(
            [sys.executable, "-m", "cluster.local", "--", "serve", "run", str(folder / "ray_config.yaml")],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": PYTHONPATH},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 180
        while not is_ready(address):
            assert served.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")
            time.sleep(0.5)
        yield address
    finally:
        os.killpg(served.pid, signal.SIGINT)
        served.wait(240)


def is_ready(address: str) -> bool:
    try:
        return httpx.get(f"{address}/ready", timeout=10).status_code == 200
    except httpx.TransportError:
        return False
