"""Where methods are timed: a whole model in this process, or an engine on Ray."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.disk.provenance import hardware, versions
from jobs.timing.decoding import room_tokens
from jobs.timing.rounds import Contestant
from spts.cost import ModelShape, ProxyShape
from spts.errors import ConfigError, config_error
from spts.methods import Dense, Method

if TYPE_CHECKING:
    import torch

    from spts.model import SptsModel

DEFAULT_MODEL = "jobs/demo_model"

SHAPES: Mapping[str, ModelShape] = {
    "llama-32x512": ModelShape(
        num_layers=32,
        hidden_size=512,
        intermediate_size=1792,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        vocab_size=32000,
    ),
    "llama-3.1-8b": ModelShape(
        num_layers=32,
        hidden_size=4096,
        intermediate_size=14336,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128256,
    ),
    "qwen2.5-7b": ModelShape(
        num_layers=28,
        hidden_size=3584,
        intermediate_size=18944,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        vocab_size=152064,
    ),
}
"""Shapes for models of random weights, by name."""


@dataclass(frozen=True, kw_only=True)
class Arena:
    """Where methods run.

    about: what a reader of the figures has to know, by title. enter: makes a method a contestant of a name.
    rivals: other implementations of dense on the same weights. local: the model, where it is in this process.
    """

    shape: ModelShape
    max_context: int
    proxy: ProxyShape | None
    about: Mapping[str, str]
    enter: Callable[[str, Method], Contestant]
    rivals: tuple[Contestant, ...] = ()
    local: SptsModel | None = None


@contextmanager
def local_arena(args: argparse.Namespace) -> Iterator[Arena]:
    """A whole model in this process; random weights and random proxies where none are given."""
    import torch

    from jobs.timing.contestants import (
        Own,
        Transformers,
        backends_present,
        check_device,
        random_model,
        random_proxies,
    )
    from spts import loading
    from spts.kernels import dispatch
    from spts.model import SptsModel

    if args.tensor_parallel_size != 1:
        raise ConfigError(
            f"tensor_parallel_size must be 1 with --local, "
            f"got {args.tensor_parallel_size}; leave --local out",
            field="tensor_parallel_size",
        )
    device = check_device(args.device)
    torch.set_num_threads(args.threads)
    longest = max(args.lengths) + max(args.tokens_out, room_tokens(args.batches, args.tokens_out))
    proxies = None
    if args.shape is not None:
        hf_model = random_model(
            named_shape(args.shape), max_tokens=longest, dtype=args.dtype, device=args.device
        )
        fingerprint, name = f"random-{args.shape}", f"{args.shape}, random weights"
    else:
        folder = loading.resolve(args.model or DEFAULT_MODEL)
        loading.check_folder(folder)
        fingerprint, name = loading.fingerprint(folder), str(args.model or DEFAULT_MODEL)
        proxies = loading.load_proxies(folder, args.proxies, fingerprint=fingerprint)
        hf_model = loading.load_transformers(folder, dtype=args.dtype, device=args.device)
    attention = args.attention or "sdpa"
    try:
        hf_model.set_attn_implementation(attention)
    except (ValueError, ImportError) as error:
        raise ConfigError(
            f"attention must be a backend that works here, got {attention!r} ({error}); use sdpa",
            field="attention",
        ) from None
    bare = SptsModel(hf_model, fingerprint=fingerprint)
    if proxies is None:
        size = proxy_size(bare.shape, channels=args.channels, rank=args.rank)
        proxies = random_proxies(bare.shape, size, first_layer=0, fingerprint=fingerprint)
        origin = "random"
    elif (args.channels, args.rank) != (None, None):
        raise ConfigError(
            "channels and rank must be left out for a model with proxies of its own, got "
            f"{args.channels} and {args.rank}; leave them out",
            field="channels",
        )
    else:
        size = proxies.shape
        origin = "fitted"
    model = SptsModel(hf_model, fingerprint=fingerprint, proxies=proxies)
    backends = [name for name in args.backends if name != "every"]
    if "every" in args.backends:
        backends += [name for name in backends_present(model) if name not in backends]
    yield Arena(
        shape=model.shape,
        max_context=model.max_context,
        proxy=size,
        about={
            **_about(name, model.shape, args),
            "hardware": machine(device),
            "proxies": f"{origin}, {size.channels} channels, rank {size.rank}",
            "attention": f"ours: {dispatch.attention(device.type)}; transformers: {attention}",
        },
        enter=lambda name, method: Own(model, method, name=name),
        rivals=(
            *(Own(model, Dense(), name=f"dense, {each}", backend=each) for each in backends),
            Transformers(hf_model),
        ),
        local=model,
    )


@contextmanager
def engine_arena(args: argparse.Namespace) -> Iterator[Arena]:
    """An engine on the Ray cluster of this job, or on one of its own."""
    import ray

    from cluster.config import EngineConfig, resolve_path
    from cluster.engine import start_engine, stop_engine
    from jobs.engines import connected
    from jobs.timing.contestants import OnEngine
    from spts import loading

    for field in ("shape", "channels", "rank", "attention", "backends", "parts", "batches"):
        if getattr(args, field):
            raise ConfigError(
                f"{field} must be left out without --local, got {getattr(args, field)}; add --local",
                field=field,
            )
    model = args.model or DEFAULT_MODEL
    folder = loading.resolve(resolve_path(model))
    loading.check_folder(folder)
    config = EngineConfig(
        model=model,
        dtype=args.dtype,
        device=args.device,
        tensor_parallel_size=args.tensor_parallel_size,
        proxies=args.proxies,
        num_threads=args.threads,
        slice_tokens=None,  # a prompt alone is never sliced
    )
    with connected():
        engine = start_engine(config)
        try:
            info = ray.get(engine.info.remote())
            yield Arena(
                shape=info.shape,
                max_context=info.max_context,
                proxy=fitted_size(Path(resolve_path(args.proxies)) if args.proxies else folder / "proxies"),
                about={
                    **_about(str(model), info.shape, args),
                    "hardware": machine(),
                    "engine": f"Ray {ray.__version__}, {info.world_size} rank(s)",
                    "attention": info.attention,
                },
                enter=lambda name, method: OnEngine(engine, method, name=name),
            )
        finally:
            stop_engine(engine)


def _about(model: str, shape: ModelShape, args: argparse.Namespace) -> dict[str, str]:
    return {
        "model": f"{model}: {shape.num_layers} layers, hidden {shape.hidden_size}, inner "
        f"{shape.intermediate_size}, {shape.num_heads}/{shape.num_kv_heads} heads of {shape.head_dim}",
        "setting": f"{args.dtype} on {args.device}, {args.threads} CPU thread(s), batch 1, {args.tokens_out} "
        f"tokens out, {args.repeats} repeats in turns after one to warm up, random tokens",
        "schedule": f"{args.schedule}, {'as published' if args.published else 'scaled to each length'}",
    }


def machine(device: torch.device | None = None) -> str:
    """What the figures were measured on: the GPU, if `device` is one, processor, cores, versions."""
    found: Mapping[str, Any] = hardware()
    software = ", ".join(f"{name} {version}" for name, version in versions().items())
    text = f"{found['cpu']}, {found['cpu_cores']} cores; {software}"
    if device is not None and device.type == "cuda":
        import torch

        return f"{torch.cuda.get_device_name(device)}, {text}"
    return text


def named_shape(name: str) -> ModelShape:
    """The shape in SHAPES; ConfigError for another name."""
    if name not in SHAPES:
        raise ConfigError(
            f"shape must be one of {', '.join(SHAPES)}, got {name!r}; choose one", field="shape"
        )
    return SHAPES[name]


def proxy_size(shape: ModelShape, *, channels: int | None, rank: int | None) -> ProxyShape:
    """The size of random proxies; None = the paper's proportions. Raises ConfigError for one below 1
    or above what the model has.
    """
    default = ProxyShape.default(shape)
    size = ProxyShape(
        channels=default.channels if channels is None else channels,
        rank=default.rank if rank is None else rank,
    )
    if size.channels > shape.intermediate_size:
        rule = f"be at most {shape.intermediate_size}, the FFN's inner size"
        raise config_error("channels", rule, size.channels, "use fewer")
    if size.rank > shape.hidden_size:
        rule = f"be at most {shape.hidden_size}, the hidden size"
        raise config_error("rank", rule, size.rank, "use a lower one")
    return size


def fitted_size(folder: Path) -> ProxyShape | None:
    """The size of the proxies in a folder, None where there are none."""
    manifest = folder / "proxies.json"
    if not manifest.is_file():
        return None
    data = json.loads(manifest.read_text(encoding="utf-8"))
    return ProxyShape(channels=data["channels"], rank=data["rank"])
