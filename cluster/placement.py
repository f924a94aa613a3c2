"""Where the ranks of a group go: resource bundles, the address where they meet, and the sizes that cannot be
split. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from spts.cost import ModelShape
from spts.errors import ConfigError

LOOPBACK = "127.0.0.1"
# Ranks of a model talk in every layer: on one machine if one has room, else on as few as Ray finds.
STRATEGY: Literal["PACK"] = "PACK"


def rank_resources(*, device: Literal["cpu", "cuda"], num_threads: int) -> dict[str, float]:
    """Ray resources of one rank.

    >>> rank_resources(device="cpu", num_threads=2)
    {'CPU': 2.0}
    >>> rank_resources(device="cuda", num_threads=2)
    {'CPU': 2.0, 'GPU': 1.0}
    """
    resources = {"CPU": float(num_threads)}
    if device == "cuda":
        resources["GPU"] = 1.0
    return resources


def bundles(*, world_size: int, device: Literal["cpu", "cuda"], num_threads: int) -> list[dict[str, float]]:
    """One placement-group bundle per rank, in rank order. The engine itself asks for nothing and sits in
    bundle 0.

    >>> bundles(world_size=2, device="cpu", num_threads=1)
    [{'CPU': 1.0}, {'CPU': 1.0}]
    """
    return [rank_resources(device=device, num_threads=num_threads) for _ in range(world_size)]


def meeting_host(hosts: Sequence[str]) -> str:
    """The address at which the ranks on `hosts`, in rank order, meet: rank 0's; loopback if they share a
    machine.

    >>> meeting_host(["10.0.0.1", "10.0.0.1"]), meeting_host(["10.0.0.1", "10.0.0.2"])
    ('127.0.0.1', '10.0.0.1')
    """
    return LOOPBACK if len(set(hosts)) == 1 else hosts[0]


def check_divisible(shape: ModelShape, world_size: int) -> None:
    """Raise ConfigError unless every rank gets the same whole number of query heads, key/value heads and FFN
    channels.

    4 query heads and 2 key/value heads split over 1 or 2 ranks; over 4 ranks the key/value heads do not.
    """
    for name, value in (
        ("num_attention_heads", shape.num_heads),
        ("num_key_value_heads", shape.num_kv_heads),
        ("intermediate_size", shape.intermediate_size),
    ):
        if value % world_size:
            raise ConfigError(
                f"tensor_parallel_size must divide the model's {name} = {value}, got {world_size}; "
                f"use one of {', '.join(str(n) for n in range(1, value + 1) if splits(shape, n))}",
                field="tensor_parallel_size",
            )


def splits(shape: ModelShape, world_size: int) -> bool:
    """Whether a model of this shape can run on `world_size` ranks.

    A shape of 4 query heads, 2 key/value heads and inner size 512: True for 1 and 2, False for 3 and 4.
    """
    return all(
        size % world_size == 0 for size in (shape.num_heads, shape.num_kv_heads, shape.intermediate_size)
    )


def check_fits(bundles: Sequence[Mapping[str, float]], cluster: Mapping[str, float]) -> None:
    """Raise ConfigError when the whole `cluster`, everything on it ended, has not what `bundles` ask for.

    Two bundles of one CPU fit into {"CPU": 2.0}, not into {"CPU": 1.0}.
    """
    for resource in ("GPU", "CPU"):
        asked = sum(bundle.get(resource, 0) for bundle in bundles)
        if asked > cluster.get(resource, 0):
            raise ConfigError(
                f"tensor_parallel_size x num_threads must fit into the cluster's "
                f"{cluster.get(resource, 0):g} "
                f"{resource}, got {asked:g} {resource} for {len(bundles)} ranks; use fewer, or add nodes",
                field="tensor_parallel_size",
            )
