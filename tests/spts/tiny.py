"""Tiny random transformers models of every supported family, and methods over random schedules."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from spts.model import SptsModel
from spts.proxy import Proxies
from spts.schedule import Schedule, Stage

FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 256,
    },
}
FINGERPRINT = "tiny"


def transformers_model(family: str, *, rope: str = "default", layers: int = 6, **overrides: Any) -> Any:
    """Random weights, large enough for uneven attention; random norms and biases, so none is forgotten."""
    config_class, model_class = FAMILIES[family]
    settings: dict[str, Any] = {
        "vocab_size": 211,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": layers,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1100,
        "rope_parameters": dict(ROPES[rope]),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "sliding_window": None,
        "attn_implementation": "sdpa",
    }
    if family == "qwen2":
        del settings["head_dim"]
        settings["hidden_size"] = 96
    model = model_class(config_class(**{**settings, **overrides})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0.0, 1.4 / parameter.shape[1] ** 0.5 if parameter.dim() > 1 else 0.5)
    return model


def spts_model(hf_model: Any, *, first_layer: int | None = None) -> SptsModel:
    """The model wrapped, with proxies from `first_layer` on fitted over random text, if asked for."""
    model = SptsModel(hf_model, fingerprint=FINGERPRINT)
    if first_layer is None:
        return model
    proxies = Proxies.fit(model, [prompt(120)], first_layer=first_layer, channels=40, rank=12)
    return SptsModel(hf_model, fingerprint=FINGERPRINT, proxies=proxies)


def prompt(num_tokens: int, vocab_size: int = 211) -> list[int]:
    """Random token ids."""
    return torch.randint(0, vocab_size, (num_tokens,)).tolist()


def random_schedule(draw: random.Random, *, layers: int, num_tokens: int) -> Schedule:
    """Any valid schedule of one to three stages, budgets and cuts around and below the prompt's length."""
    first = draw.randint(0, layers - 2)
    ends = sorted(draw.sample(range(first, layers), k=min(draw.randint(1, 3), layers - first)))
    budget = kept = num_tokens + num_tokens // 4
    stages = []
    for end in ends:
        budget = draw.randint(max(1, budget // 3), budget)
        keep = draw.choice([None, draw.randint(max(1, kept // 3), kept)])
        stages.append(Stage(last_layer=end, active_tokens=budget, keep_tokens=keep))
        kept = keep or kept
    smallest = min(budget, kept)
    return Schedule(
        num_layers=layers,
        first_skip_layer=first,
        stages=tuple(stages),
        recent_tokens=draw.choice([1, draw.randint(1, smallest)]),
    )


def ample_schedule(layers: int, num_tokens: int) -> Schedule:
    """A schedule whose every budget covers the prompt."""
    stages: Sequence[Stage] = (
        Stage(last_layer=layers // 2, active_tokens=num_tokens + 1, keep_tokens=num_tokens),
        Stage(last_layer=layers - 1, active_tokens=num_tokens, keep_tokens=num_tokens),
    )
    return Schedule(num_layers=layers, first_skip_layer=1, stages=tuple(stages))
