"""Two machines of a Ray cluster as network namespaces of this one, each with an address, a CPU and folders of
its own. Needs root and `ip`."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
ADDRESSES = ("10.77.0.1", "10.77.0.2")
_PORT = 6379
_BIND = 'while [ "$1" != -- ]; do mount --bind "$1" "$2" && shift 2 || exit; done; shift; exec "$@"'


class Machines:
    """The first is the cluster's head. Use `machines`."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="spts-ray-"))
        self._names = [f"spts-{os.getpid()}-{index}" for index in range(2)]
        self._rays: list[subprocess.Popen[bytes] | None] = [None, None]
        self.env = {
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
            "RAY_ADDRESS": f"{ADDRESSES[0]}:{_PORT}",
            "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:8265",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",  # of other tests: 0, which keeps Ray on loopback
        }

    def connect(self) -> None:
        """Make both machines and the cable between them. Raises OSError or CalledProcessError."""
        for name in self._names:
            _ip("netns", "add", name)
        ends = [f"spts{os.getpid()}{end}" for end in "ab"]
        _ip("link", "add", ends[0], "netns", self._names[0], "type", "veth",
            "peer", "name", ends[1], "netns", self._names[1])  # fmt: skip
        for name, end, address in zip(self._names, ends, ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            for device in ("lo", end):
                _ip("-n", name, "link", "set", device, "up")

    def start(
        self,
        index: int,
        *,
        folders: Mapping[Path, Path] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Start Ray on a machine, with one CPU. folders: path -> the folder that is there on this machine.
        env: what is more in its environment."""
        role = ["--head", "--port", str(_PORT), "--temp-dir", str(self._folder / "ray")]
        if index:
            role = ["--address", self.env["RAY_ADDRESS"]]
        mounts = [str(path) for there, here in (folders or {}).items() for path in (here, there)]
        command = [
            *(
                sys.executable,
                "-m",
                "ray.scripts.scripts",
                "start",
                "--block",
                *role,
                "--node-ip-address",
                ADDRESSES[index],
            ),
            *("--num-cpus", "1", "--object-store-memory", str(2**27)),
        ]
        log = self._folder / f"machine-{index}.log"
        with log.open("wb") as output:
            ray = self.popen(
                index, "sh", "-c", _BIND, "sh", *mounts, "--", *command,
                env={**self.env, **(env or {})}, stdout=output, stderr=output,
            )  # fmt: skip
        self._rays[index] = ray
        deadline = time.monotonic() + 60
        while "runtime started" not in log.read_text():
            assert ray.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)

    def popen(self, index: int, *command: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start a command on a machine."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self._names[index], *command],
            cwd=REPOSITORY, start_new_session=True, **{"env": self.env, **options},
        )  # fmt: skip

    def run(self, *command: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
        """Run a command on the head to its end."""
        return subprocess.run(
            ["ip", "netns", "exec", self._names[0], *command],
            cwd=REPOSITORY, env=self.env, capture_output=True, text=True, timeout=timeout_s,
        )  # fmt: skip

    def lose(self, index: int) -> None:
        """Kill every process of a machine at once."""
        for pid in _pids(self._names[index]):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        ray = self._rays[index]
        if ray is not None:
            ray.wait()

    def close(self) -> None:
        """Lose both, and what was made of them."""
        for index, name in enumerate(self._names):
            if Path("/run/netns", name).exists():
                self.lose(index)
                _ip("netns", "del", name)
        shutil.rmtree(self._folder, ignore_errors=True)


@contextmanager
def machines() -> Iterator[Machines]:
    """Two that are connected and run nothing; skips the test where they cannot be made."""
    made = Machines()
    try:
        try:
            made.connect()
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"needs root, `ip` and network namespaces: {error}")
        yield made
    finally:
        made.close()


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def _pids(name: str) -> Sequence[int]:
    return [int(pid) for pid in _ip("netns", "pids", name).split()]
