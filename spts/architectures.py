"""Which models this library computes, and what is refused by name.

The four families share one decoder layer: RMSNorm, rotary grouped-query attention, RMSNorm, gated FFN. They
differ in things their own modules carry (q/k/v biases, q/k norms, tied embeddings), so the table below is
about what a configuration may ask for and not about code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spts.errors import ModelError

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One supported family.

    class_name: its class in transformers. has_windows: its configuration may ask for sliding windows.
    window_switch: the key that turns them on; None = they are on whenever `sliding_window` is set.
    """

    class_name: str
    has_windows: bool = False
    window_switch: str | None = None


ARCHITECTURES = {
    architecture.class_name: architecture
    for architecture in (
        Architecture(class_name="LlamaForCausalLM"),
        Architecture(class_name="MistralForCausalLM", has_windows=True),
        Architecture(class_name="Qwen2ForCausalLM", has_windows=True, window_switch="use_sliding_window"),
        Architecture(class_name="Qwen3ForCausalLM", has_windows=True, window_switch="use_sliding_window"),
    )
}


def check_config(config: dict[str, Any]) -> Architecture:
    """The architecture of a `config.json`, as parsed.

    Refused: other architectures, mixtures of experts, sliding windows shorter than the context, rotary
    embeddings that depend on the length of the input (`dynamic`, `longrope`) or turn only a part of a head.
    Raises ModelError with the field, the rule and the value.
    """
    names = config.get("architectures") or []
    architecture = ARCHITECTURES.get(names[0]) if len(names) == 1 else None
    experts = next(
        (key for key in ("num_experts", "num_local_experts", "n_routed_experts") if config.get(key)), None
    )
    if experts is not None:
        raise ModelError(
            f"{experts} must be absent, got {config[experts]} in {names}; "
            "mixtures of experts are not supported",
            field=experts,
        )
    if architecture is None:
        raise ModelError(
            f"architectures must be one of {', '.join(ARCHITECTURES)}, got {names}; "
            "use a model of one of these families",
            field="architectures",
        )
    _check_window(config, architecture)
    _check_rope(config)
    return architecture


def max_context(config: dict[str, Any]) -> int:
    """Longest sequence in tokens the configuration stands for.

    `max_position_embeddings`, or for yarn the stretched original context where that is longer (Qwen states
    its yarn models with the unstretched length).
    """
    limit = int(config["max_position_embeddings"])
    rope = _rope(config)
    if rope.get("rope_type") == "yarn":
        original = rope.get("original_max_position_embeddings") or limit
        limit = max(limit, int(original * rope.get("factor", 1.0)))
    return limit


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    return rope


def _check_window(config: dict[str, Any], architecture: Architecture) -> None:
    in_use = architecture.has_windows
    if architecture.window_switch is not None:
        windowed_from = config.get("max_window_layers", 0)
        in_use = config.get(architecture.window_switch, False) and windowed_from < config["num_hidden_layers"]
        if config.get("layer_types"):
            in_use = "sliding_attention" in config["layer_types"]
    window, context = config.get("sliding_window"), config.get("max_position_embeddings", 0)
    if in_use and window is not None and window < context:
        raise ModelError(
            f"sliding_window must be null or at least the context of {context} tokens, got {window}; "
            "token skipping over sliding windows is not supported",
            field="sliding_window",
        )


def _check_rope(config: dict[str, Any]) -> None:
    rope = _rope(config)
    if rope["rope_type"] not in ROPE_TYPES:
        raise ModelError(
            f"rope_type must be one of {', '.join(ROPE_TYPES)}, got {rope['rope_type']}; "
            "rotary embeddings that change with the length of the input are not supported",
            field="rope_type",
        )
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1, 1.0):
        raise ModelError(
            f"partial_rotary_factor must be 1, got {partial}; partly rotated heads are not supported",
            field="partial_rotary_factor",
        )
