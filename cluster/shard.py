"""One tensor-parallel rank: a Ray actor that holds its part of the model and does what every other rank does.

DeepSpeed shards the linears (AutoTP) and sums their outputs inside the forward; `spts.model` walks the
layers. Heavy imports are inside the methods, so that an engine's own process needs no torch.
"""

from __future__ import annotations

import json
import os
import platform
import time
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import ray

from cluster import placement
from cluster.config import EngineConfig, resolve_path
from cluster.protocol import EngineInfo, Step, StepOutput
from spts import cost
from spts.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from cluster.stepper import Stepper
    from spts.model import SptsModel

# Of the memory that is free: on a GPU all but what libraries take later, on a CPU machine what leaves room
# for other engines, object stores and page caches.
_GPU_SHARE = 0.9
_CPU_SHARE = 0.2


class TorchCollective:
    """`spts.collective.Collective` over torch.distributed's default group."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the ranks, in place, and return it."""
        import torch.distributed

        torch.distributed.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Overwrite `tensor` with rank 0's, in place, and return it."""
        import torch.distributed

        torch.distributed.broadcast(tensor, src=0)
        return tensor


class Shard:
    """Rank `rank` of `config.tensor_parallel_size`. Call `meet` on rank 0, `load` on every rank, then
    `step`."""

    def __init__(self, config: EngineConfig, rank: int) -> None:
        self._config = config
        self._rank = rank
        self._world_size = config.tensor_parallel_size
        self._store: Any = None
        self._model: SptsModel | None = None
        self._stepper: Stepper | None = None

    @ray.method(concurrency_group="watch")
    def watch(self) -> None:
        """Never returns: the caller's wait on it ends when this process does."""
        while True:
            time.sleep(3600)

    def host(self) -> str:
        """Address of this rank's machine, as the cluster knows it."""
        return ray.util.get_node_ip_address()

    def meet(self, host: str) -> tuple[str, int]:
        """Open the meeting point of the ranks at `host` on a port that the system chooses; returns its
        address. One rank: none."""
        if self._world_size == 1:
            return (host, 0)
        self._store = self._meeting_point(host, 0)
        return (host, self._store.port)

    def load(self, address: tuple[str, int]) -> EngineInfo:
        """Load this rank's part of the model. Raises SptsError, the same on every rank, before any weight is
        read."""
        from cluster.stepper import Stepper
        from spts import loading
        from spts.architectures import max_context
        from spts.model import SptsModel

        config = self._config
        folder = loading.resolve(resolve_path(config.model))
        loading.check_folder(folder)
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        placement.check_divisible(cost.ModelShape.from_config(settings), self._world_size)
        self._check_length(max_context(settings))
        chosen = None if config.proxies is None else resolve_path(config.proxies)
        weights = loading.weights(folder, chosen)
        proxies = loading.load_proxies(folder, chosen, fingerprint=weights[0])
        self._prepare_process(*address)
        hf_model = loading.load_transformers(folder, dtype=config.dtype, device=config.device)
        self._model = SptsModel(
            self._shard(hf_model),
            fingerprint=weights[0],
            proxies=proxies,
            collective=None if self._world_size == 1 else TorchCollective(self._rank, self._world_size),
        )
        self._stepper = Stepper(self._model, config, self._rank)
        return self._info(folder.name, weights)

    def step(self, step: Step) -> StepOutput | None:
        """Do one step; the answer on rank 0, None on the others, which do not choose tokens."""
        assert self._stepper is not None, "load comes before everything else"
        return self._stepper.step(step)

    # -- loading ---------------------------------------------------------------------------------------------

    def _prepare_process(self, host: str, port: int) -> None:
        """Threads, environment and process group, as DeepSpeed expects to find them. One rank has no
        group."""
        import torch

        torch.set_num_threads(self._config.num_threads)
        # Ray shows each rank its own devices only, so the local rank is always 0.
        os.environ.update(
            RANK=str(self._rank), WORLD_SIZE=str(self._world_size), LOCAL_RANK="0", LOCAL_SIZE="1"
        )
        os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port))
        os.environ["DS_ACCELERATOR"] = self._config.device
        if self._world_size == 1:
            return
        # Left alone, Gloo takes the interface that the host's name stands for, NCCL the first it finds.
        interface = _interface(host if host == placement.LOOPBACK else self.host())
        if interface is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # without "=" a prefix of names
        if self._rank != 0:
            self._store = self._meeting_point(host, port)
        torch.distributed.init_process_group(
            "gloo" if self._config.device == "cpu" else "nccl",
            store=self._store,
            rank=self._rank,
            world_size=self._world_size,
        )

    def _meeting_point(self, host: str, port: int) -> Any:
        """The ranks' key-value store: served by rank 0 on `port` (0 = a free one), joined by the others."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in its __all__

        return TCPStore(host, port, self._world_size, is_master=self._rank == 0, wait_for_workers=False)

    def _shard(self, hf_model: Any) -> Any:
        """`hf_model` with its linears sharded by DeepSpeed. Changes nothing when there is one rank."""
        import deepspeed
        import deepspeed.ops
        import torch

        # On CPU DeepSpeed would compile a shared-memory all-reduce at first start: 30 to 45 seconds, and a
        # crash on a machine without g++ and ninja. Gloo is always there.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        engine = deepspeed.init_inference(
            hf_model,
            tensor_parallel={"tp_size": self._world_size},
            dtype=getattr(torch, self._config.dtype),
            replace_with_kernel_inject=False,
        )
        return engine.module

    def _check_length(self, max_context: int) -> None:
        limit = self._config.max_model_len
        if limit is not None and limit > max_context:
            raise ConfigError(
                f"max_model_len must be at most the model's context of {max_context} tokens, got {limit}; "
                "use null for all of it",
                field="max_model_len",
            )

    def _info(self, model_name: str, weights: tuple[str, str | None]) -> EngineInfo:
        import torch

        from spts.kernels.dispatch import attention

        model = self._loaded
        packages = ("torch", "deepspeed", "transformers", "ray")
        return EngineInfo(
            model_name=model_name,
            hosts=(self.host(),),
            fingerprint=weights[0],
            proxies_sha256=weights[1],
            shape=model.shape,
            max_context=self._config.max_model_len or model.max_context,
            vocab_size=model.vocab_size,
            eos_token_ids=tuple(model.eos_token_ids),
            dtype=self._config.dtype,
            device=self._config.device,
            world_size=self._world_size,
            versions={"python": platform.python_version(), **{name: version(name) for name in packages}},
            proxy=None if model.proxies is None else model.proxies.shape,
            first_proxy_layer=None if model.proxies is None else model.proxies.manifest.first_layer,
            kv_bytes_limit=self._config.kv_cache_bytes or self._free_bytes(),
            slice_tokens=self._config.slice_tokens,
            attention=attention(self._config.device),
            accelerator=torch.cuda.get_device_name() if self._config.device == "cuda" else None,
        )

    def _free_bytes(self) -> int:
        """This rank's part of the memory that is free now, with the model in it."""
        import psutil
        import torch

        if self._config.device == "cuda":
            return int(_GPU_SHARE * torch.cuda.mem_get_info()[0])
        return int(_CPU_SHARE * psutil.virtual_memory().available / self._world_size)

    @property
    def _loaded(self) -> SptsModel:
        assert self._model is not None, "load comes before everything else"
        return self._model


def _interface(address: str) -> str | None:
    """The network interface of this machine that has `address`; None if none has."""
    import psutil

    interfaces = psutil.net_if_addrs().items()
    return next((name for name, has in interfaces if any(one.address == address for one in has)), None)
