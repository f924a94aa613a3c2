"""Bundles, strategies and what cannot be split."""

from __future__ import annotations

import dataclasses
import doctest

import pytest

from cluster import placement
from spts.errors import ConfigError
from tests.fakes import SHAPE


def test_the_docstrings_examples_are_true():
    assert doctest.testmod(placement).failed == 0


def test_gpu_ranks_ask_for_one_gpu_each():
    assert placement.bundles(world_size=2, device="cuda", num_threads=4) == [{"CPU": 4.0, "GPU": 1.0}] * 2


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_shape_that_splits_is_accepted(world_size):
    placement.check_divisible(SHAPE, world_size)


@pytest.mark.parametrize(
    ("world_size", "sizes", "message"),
    [
        (4, {}, "must divide the model's num_key_value_heads = 2, got 4; use one of 1, 2"),
        (3, {}, "must divide the model's num_attention_heads = 4, got 3; use one of 1, 2"),
        (2, {"num_heads": 3, "num_kv_heads": 3}, "num_attention_heads = 3, got 2; use one of 1, 3"),
        (2, {"intermediate_size": 97}, "intermediate_size = 97, got 2; use one of 1"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_both_numbers(world_size, sizes, message):
    with pytest.raises(ConfigError, match=message) as refused:
        placement.check_divisible(dataclasses.replace(SHAPE, **sizes), world_size)
    assert refused.value.field == "tensor_parallel_size"


def test_more_than_the_whole_cluster_is_refused_at_once():
    bundles = placement.bundles(world_size=2, device="cpu", num_threads=2)
    placement.check_fits(bundles, {"CPU": 4.0})
    with pytest.raises(ConfigError, match=r"cluster's 2 CPU, got 4 CPU for 2 ranks"):
        placement.check_fits(bundles, {"CPU": 2.0})
    with pytest.raises(ConfigError, match=r"cluster's 0 GPU, got 1 GPU"):
        placement.check_fits(placement.bundles(world_size=1, device="cuda", num_threads=1), {"CPU": 2.0})
