"""Every test runs with poisoned fresh memory, a network of loopback only, and no Ray process left behind."""

from __future__ import annotations

import os

# Before torch, transformers or ray are imported anywhere.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_AUTH_MODE="token",
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",  # despite its name: Ray stays on 127.0.0.1, on Linux too
    DS_ACCELERATOR="cpu",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault(
    "RAY_AUTH_TOKEN", "0123456789abcdef" * 4
)  # clusters of tests leave no token in the home folder

import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported anywhere: kernels run on the CPU, slowly

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a shell's background job ignores Ctrl-C, so would all that tests start, and never stop when told to.
    signal.signal(signal.SIGINT, signal.default_int_handler)

RAY_PROCESSES = ("raylet", "gcs_server")


def _poisoned(create: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def fresh(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = create(*args, **kwargs)
        if tensor.is_meta or tensor.numel() == 0 or torch.compiler.is_compiling():
            return tensor
        with torch.no_grad():
            if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
                return tensor.fill_(float("nan"))
            if tensor.dtype == torch.bool:
                return tensor.fill_(True)
            return tensor.fill_(torch.iinfo(tensor.dtype).max)

    return fresh


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory from torch.empty holds NaN (integers: their maximum), so that a slot nobody wrote is seen."""
    for owner, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
    ]:
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches for the network fails by name instead of passing where there happens to be one."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and self.type == socket.SOCK_STREAM:
            host = str(address[0])
            if not (host.startswith("127.") or host in ("::1", "localhost")):
                raise OSError(f"a test tried to connect to {address}; tests run without network")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test draws its own inputs; what it draws without saying a seed is the same in every run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def no_ray_left() -> Iterator[None]:
    """Fails the run if a Ray process that it started is there after the last test, and ends that process."""
    yield
    if "ray" in sys.modules:
        import ray

        connected = ray.is_initialized()
        ray.shutdown()
    else:
        connected = False
    left = [each for each in psutil.Process().children(recursive=True) if each.name() in RAY_PROCESSES]
    names = [f"{each.name()} (pid {each.pid})" for each in left]
    for each in left:
        each.kill()
    assert not connected, "a test left ray.init() without ray.shutdown()"
    assert not names, f"tests left Ray processes running: {', '.join(names)}"
