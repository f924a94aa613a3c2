"""What fitting a proxy takes: FFN inputs of the dense model, the channels that matter, low-rank factors.

Legend: N calibration tokens, D width, F FFN inner size, C channels kept (D_low), r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spts.kernels.reference import gated_product

if TYPE_CHECKING:
    from spts.model import SptsModel


def channel_importance(y_ND: Tensor, mlp: Any, *, top_share: float, block_channels: int = 512) -> Tensor:
    """Importance of every FFN channel, float32 [F]: the mean over its most salient tokens.

    The saliency is |act(y Wg) * (y Wu)|; the top `top_share` of the N tokens are averaged, at least one.
    Example: saliencies of a channel [4, 1, 3, 2, 0] at a share of 0.4 give 3.5.
    """
    num_top = max(1, round(top_share * y_ND.shape[0]))
    parts = []
    for start in range(0, mlp.gate_proj.weight.shape[0], block_channels):
        rows = slice(start, start + block_channels)
        gate_NC, up_NC = (y_ND @ linear.weight[rows].T for linear in (mlp.gate_proj, mlp.up_proj))
        saliency_NC = gated_product(gate_NC, up_NC, mlp.act_fn).abs_().float()
        parts.append(saliency_NC.topk(num_top, dim=0, sorted=False).values.mean(dim=0))
    return torch.cat(parts)


def collect_ffn_inputs(
    model: SptsModel,
    texts_token_ids: Sequence[Sequence[int]],
    first_layer: int,
    sample_N: Tensor,
    progress: Callable[[int], None],
) -> dict[int, Tensor]:
    """FFN inputs by layer, [N, D] on the CPU, of the tokens `sample_N`, numbered over all texts in turn."""
    collected: dict[int, list[Tensor]] = {layer: [] for layer in range(first_layer, model.shape.num_layers)}
    offset = 0
    for done, text in enumerate(texts_token_ids, start=1):
        rows = sample_N[(sample_N >= offset) & (sample_N < offset + len(text))] - offset
        offset += len(text)
        if len(rows) > 0:
            for layer, y_TD in enumerate(model.dense_ffn_inputs(text)):
                if layer >= first_layer:
                    collected[layer].append(y_TD[rows.to(y_TD.device)].cpu())
        progress(done)
    return {layer: torch.cat(parts) for layer, parts in collected.items()}


def sample_tokens(num_tokens: int, max_tokens: int, seed: int) -> Tensor:
    """Numbers of the tokens to calibrate on, ascending: all of them, or a uniform sample of `max_tokens`."""
    if num_tokens <= max_tokens:
        return torch.arange(num_tokens)
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_tokens, generator=generator)[:max_tokens].sort().values


def low_rank_factors(mlp: Any, kept_C: Tensor, rank: int) -> dict[str, Tensor]:
    """The factors of a `LayerProxy` by name: truncated SVDs of the kept channels, in float64."""
    gate_first_Dr, gate_rC = _truncated(mlp.gate_proj.weight[kept_C].T, rank)
    up_first_Dr, up_rC = _truncated(mlp.up_proj.weight[kept_C].T, rank)
    left_Cr, scale_r, _ = torch.linalg.svd(mlp.down_proj.weight[:, kept_C].T.double(), full_matrices=False)
    return {
        "first_D2r": torch.cat((gate_first_Dr, up_first_Dr), dim=1),
        "gate_rC": gate_rC,
        "up_rC": up_rC,
        "down_Cr": (left_Cr[:, :rank] * scale_r[:rank]).float(),
    }


def _truncated(weight_DC: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    left, scale, right = torch.linalg.svd(weight_DC.double(), full_matrices=False)
    return left[:, :rank].float(), (scale[:rank, None] * right[:rank]).float()
