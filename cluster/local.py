"""A Ray cluster of its own for one command: on the loopback address, behind a token, gone at the end.

    python -m cluster.local -- ray job submit --working-dir . -- python -m jobs.sweep --config CONFIG
    python -m cluster.local -- serve run ray_config.yaml

Other clusters on the machine are neither used nor stopped. For a cluster that outlives a command, or
spans machines, start one with `ray start` (README, "More than one machine").
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

HOST = "127.0.0.1"
START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 15.0
OBJECT_STORE_BYTES = 256 * 2**20  # prompts and results are small; Ray's default is 30 % of the memory


def free_ports(count: int) -> list[int]:
    """`count` distinct TCP ports that nothing listens on, from the operating system."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((HOST, 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def local_ray(*, num_cpus: int | None = None) -> Iterator[dict[str, str]]:
    """Start a head node, give the environment in which commands reach it, stop it by its process group.

    Args:
        num_cpus: CPUs that Ray may hand out; None = the machine's, at least 2 (one engine and its driver).
    Yields:
        a copy of `os.environ` with `RAY_ADDRESS`, `RAY_API_SERVER_ADDRESS`, a token (the environment's own,
        as a process can hold but one; else a fresh one), and with this interpreter's folder first in `PATH`.
    Raises:
        RuntimeError: the head did not come up; the message ends with the last lines of its log.
    """
    folder = Path(tempfile.mkdtemp(prefix="spts-ray-"))
    port, client_port, dashboard_port = free_ports(3)
    env = dict(
        os.environ,
        PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        PYTHONUNBUFFERED="1",
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32),
        RAY_USAGE_STATS_ENABLED="0",
        # Ray turns 127.0.0.1 into an outside address unless this is off; it acts on Linux too.
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
    )
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        env.pop(name, None)
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        *("--node-ip-address", HOST, "--port", str(port), "--ray-client-server-port", str(client_port)),
        *("--dashboard-host", HOST, "--dashboard-port", str(dashboard_port)),
        # By default a fixed port: of two clusters on a machine, one would not accept jobs.
        *("--dashboard-agent-listen-port", "0"),
        *("--min-worker-port", "0", "--max-worker-port", "0", "--temp-dir", str(folder)),
        *("--num-cpus", str(num_cpus or max(2, os.cpu_count() or 2))),
        *("--object-store-memory", str(OBJECT_STORE_BYTES)),
    ]
    log = folder / "head.log"
    with log.open("wb") as output:
        head = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        _wait_until_started(head, log)
        env["RAY_ADDRESS"] = f"{HOST}:{port}"
        env["RAY_API_SERVER_ADDRESS"] = f"http://{HOST}:{dashboard_port}"
        yield env
    finally:
        _stop(head)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_started(head: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    # Jobs are run by the node's agent, which may come up after the rest and then puts its port into a file.
    agent = "session_latest/dashboard_agent_listen_port_*"
    while "Ray runtime started" not in (text := log.read_text(errors="replace")) or not any(
        log.parent.glob(agent)
    ):
        if head.poll() is not None or time.monotonic() > deadline:
            state = f"exited with {head.returncode}" if head.poll() is not None else "did not start in time"
            raise RuntimeError(f"the local Ray head {state}; its last words:\n{text[-2000:]}")
        time.sleep(0.2)


def _stop(head: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the head, which stops its own processes; whatever is left of its process group is killed."""
    head.terminate()
    with suppress(subprocess.TimeoutExpired):
        head.wait(STOP_TIMEOUT_S)
    with suppress(ProcessLookupError):
        os.killpg(head.pid, signal.SIGKILL)
    head.wait()


def run(command: Sequence[str], *, num_cpus: int | None = None) -> int:
    """Run `command` against a cluster of its own; its exit status. Ctrl-C, SIGTERM and SIGHUP stop both."""

    def terminate(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, terminate)
    print("starting a local Ray cluster ...", file=sys.stderr, flush=True)
    try:
        with local_ray(num_cpus=num_cpus) as env:
            child = subprocess.Popen(command, env=env)
            try:
                return child.wait()
            except KeyboardInterrupt:
                with suppress(subprocess.TimeoutExpired):
                    child.wait(STOP_TIMEOUT_S)  # Ctrl-C reached it too, and it ends in its own way
                raise
            finally:
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    signal.signal(number, signal.SIG_IGN)  # a second one must not cut the clean-up short
                _end(child)
                print("stopping the local Ray cluster ...", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: `python -m cluster.local [--num-cpus N] -- COMMAND ...`."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.local",
        description="Run a command against a Ray cluster of its own, on the loopback address.",
    )
    parser.add_argument(
        "--num-cpus", type=int, default=None, help="CPUs Ray may hand out (default: all, at least 2)"
    )
    parser.add_argument("command", nargs="+", help="the command, after --")
    args = parser.parse_args(argv)
    return run(args.command, num_cpus=args.num_cpus)


if __name__ == "__main__":
    sys.exit(main())
