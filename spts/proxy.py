"""LTP, low-rank transformation probing: which tokens an FFN changes most.

Legend: T candidates, N calibration tokens, D width, F FFN inner size, C channels kept (D_low), r rank.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spts.calibration import channel_importance, collect_ffn_inputs, low_rank_factors, sample_tokens
from spts.collective import Collective
from spts.cost import ProxyShape
from spts.errors import ProxyError
from spts.kernels import dispatch as ops

if TYPE_CHECKING:
    from spts.model import SptsModel

VERSION = 1
WEIGHTS_FILE = "proxies.safetensors"
MANIFEST_FILE = "proxies.json"


@dataclass(frozen=True, kw_only=True)
class LayerProxy:
    """The low-rank FFN of one layer, without the orthonormal [r, D] at its end, which changes no norm.

    first_D2r: first factors of gate and up, side by side. gate_rC, up_rC: their second factors. down_Cr: the
    down factor U·S of the kept channels.
    """

    first_D2r: Tensor
    gate_rC: Tensor
    up_rC: Tensor
    down_Cr: Tensor

    def to(self, *, device: torch.device, dtype: torch.dtype) -> LayerProxy:
        """The same factors on another device and in another dtype."""
        return LayerProxy(
            **{f.name: getattr(self, f.name).to(device=device, dtype=dtype) for f in fields(self)}
        )


def ffn_norms(
    y_TD: Tensor, proxy: LayerProxy, *, activation: Callable[[Tensor], Tensor], collective: Collective
) -> Tensor:
    """LTP's C: the estimated norm of every candidate's FFN output, float32 [T], for FFN inputs `y_TD`.

    Every rank holds the whole proxy and scores its own slice of the candidates; the zero-padded slices are
    summed.
    """
    num_tokens, ranks = y_TD.shape[0], collective.world_size
    start = num_tokens * collective.rank // ranks
    stop = num_tokens * (collective.rank + 1) // ranks
    slice_T = ops.low_rank_norm(
        y_TD[start:stop], proxy.first_D2r, proxy.gate_rC, proxy.up_rC, proxy.down_Cr, activation
    )
    if ranks == 1:
        return slice_T
    norm_T = slice_T.new_zeros(num_tokens)
    norm_T[start:stop] = slice_T
    return collective.all_reduce(norm_T)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Which model the proxies belong to and how they were made; saved beside them as JSON.

    channels, rank: D_low and r of the paper. top_share: its ρ. calibration_tokens: tokens averaged over.
    """

    version: int
    fingerprint: str
    first_layer: int
    num_layers: int
    hidden_size: int
    channels: int
    rank: int
    top_share: float
    calibration_tokens: int

    def factor_shapes(self) -> dict[str, tuple[int, int]]:
        """The shape of every factor of a layer, by name."""
        return {
            "first_D2r": (self.hidden_size, 2 * self.rank),
            "gate_rC": (self.rank, self.channels),
            "up_rC": (self.rank, self.channels),
            "down_Cr": (self.channels, self.rank),
        }


class Proxies:
    """The proxies of every layer from `manifest.first_layer` to the last, float32, of one model."""

    def __init__(self, manifest: Manifest, layers: Mapping[int, LayerProxy]) -> None:
        self.manifest = manifest
        self.layers = dict(layers)

    @classmethod
    def fit(
        cls,
        model: SptsModel,
        texts_token_ids: Sequence[Sequence[int]],
        *,
        first_layer: int,
        channels: int,
        rank: int,
        top_share: float = 0.2,
        max_tokens: int = 8192,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> Proxies:
        """Builds the proxies from a dense run over tokenised texts, without gradients.

        A channel's saliency on a token is |act(y Wg) * (y Wu)|, its importance the mean of the top
        `top_share` of its saliencies over the calibration tokens; the `channels` most important are kept and
        each kept matrix is cut to `rank` by SVD. The mean is exact over all tokens up to `max_tokens`; of
        more, a uniform sample of that size is used, drawn with `seed`, since FFN inputs of every layer are
        held at once (layers * tokens * D values).

        `progress(done, total)` counts texts, then layers. Raises ProxyError for a layer, channel count, rank
        or share out of range, for no text, for an FFN with biases (the low-rank form has none), and on a
        tensor-parallel rank (a shard holds only some channels).
        """
        shape = model.shape
        if model.collective.world_size != 1:
            raise ProxyError(
                f"world_size must be 1 to fit proxies, got {model.collective.world_size}; "
                "fit them on an unsharded model, every rank then loads them",
                field="world_size",
            )
        if getattr(model.config, "mlp_bias", False):
            raise ProxyError(
                "mlp_bias must be false, got true; proxies of an FFN with biases are not supported",
                field="mlp_bias",
            )
        _check_range("first_layer", first_layer, 0, shape.num_layers - 1)
        _check_range("channels", channels, 1, shape.intermediate_size)
        _check_range("rank", rank, 1, min(channels, shape.hidden_size))
        if max_tokens < 1:
            raise ProxyError(
                f"max_tokens must be at least 1, got {max_tokens}; the default is 8192", field="max_tokens"
            )
        if not 0.0 < top_share <= 1.0:
            raise ProxyError(
                f"top_share must be in (0, 1], got {top_share}; the paper uses 0.2", field="top_share"
            )
        lengths = [len(text) for text in texts_token_ids]
        if sum(lengths) == 0:
            raise ProxyError(
                "texts must hold at least one token, got none; give calibration text", field="texts"
            )

        total_steps = len(texts_token_ids) + shape.num_layers - first_layer
        step = progress or (lambda done, total: None)
        inputs_ND = collect_ffn_inputs(
            model,
            texts_token_ids,
            first_layer,
            sample_tokens(sum(lengths), max_tokens, seed),
            lambda n: step(n, total_steps),
        )
        layers = {}
        with torch.inference_mode():
            for layer in range(first_layer, shape.num_layers):
                mlp = model.layers[layer].block.mlp
                importance_F = channel_importance(inputs_ND[layer].to(model.device), mlp, top_share=top_share)
                kept_C = importance_F.topk(channels).indices.sort().values
                layers[layer] = LayerProxy(**low_rank_factors(mlp, kept_C, rank))
                step(len(texts_token_ids) + layer - first_layer + 1, total_steps)
        manifest = Manifest(
            version=VERSION,
            fingerprint=model.fingerprint,
            first_layer=first_layer,
            num_layers=shape.num_layers,
            hidden_size=shape.hidden_size,
            channels=channels,
            rank=rank,
            top_share=top_share,
            calibration_tokens=min(sum(lengths), max_tokens),
        )
        return cls(manifest, layers)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `proxies.safetensors` and `proxies.json` into `folder`; each appears whole or not at all."""
        from safetensors.torch import save_file

        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"layers.{index}.{field.name}": getattr(layer, field.name).contiguous().cpu()
            for index, layer in self.layers.items()
            for field in fields(layer)
        }
        weights, manifest = path / (WEIGHTS_FILE + ".part"), path / (MANIFEST_FILE + ".part")
        save_file(tensors, weights, metadata={"format": "pt"})
        manifest.write_text(json.dumps(asdict(self.manifest), indent=2) + "\n", encoding="utf-8")
        weights.replace(path / WEIGHTS_FILE)
        manifest.replace(path / MANIFEST_FILE)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, fingerprint: str) -> Proxies:
        """Reads what `save` wrote, for the model with this fingerprint.

        Raises ProxyError when a file or a factor is missing or misshapen, or the proxies belong to another
        model or version.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = Path(folder)
        for name in (MANIFEST_FILE, WEIGHTS_FILE):
            if not os.path.isfile(path / name):  # Path's own raises for a name that is too long
                raise ProxyError(
                    f"proxies must be a folder with {name}, got {path}; "
                    "fit them with python -m jobs.calibrate",
                    field="proxies",
                )
        manifest = _read_manifest(path / MANIFEST_FILE)
        if manifest.fingerprint != fingerprint:
            raise ProxyError(
                f"proxies must belong to the model with fingerprint {fingerprint}, "
                f"got proxies of {manifest.fingerprint} in {path}; "
                "fit them for this model with python -m jobs.calibrate",
                field="fingerprint",
            )
        try:
            stored = load_file(path / WEIGHTS_FILE)
        except SafetensorError as error:
            raise ProxyError(
                f"{path / WEIGHTS_FILE} must be safetensors, got {error}; fit the proxies again",
                field="proxies",
            ) from None
        layers = {}
        for index in range(manifest.first_layer, manifest.num_layers):
            factors = {}
            for name, shape in manifest.factor_shapes().items():
                factor = stored.get(f"layers.{index}.{name}")
                if factor is None or tuple(factor.shape) != shape:
                    raise ProxyError(
                        f"layers.{index}.{name} must be a factor of shape {shape}, "
                        f"got {tuple(factor.shape) if factor is not None else None} in {path}; "
                        "fit the proxies again",
                        field=f"layers.{index}.{name}",
                    )
                factors[name] = factor
            layers[index] = LayerProxy(**factors)
        return cls(manifest, layers)

    @property
    def shape(self) -> ProxyShape:
        """The size of one layer's proxy, for `spts.cost`."""
        return ProxyShape(channels=self.manifest.channels, rank=self.manifest.rank)


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ProxyError(
            f"{name} must be in {low}..{high} for this model, got {value}; choose one in range", field=name
        )


def _read_manifest(path: Path) -> Manifest:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("version") != VERSION:
            raise ProxyError(
                f"version must be {VERSION}, got {data.get('version')} in {path}; fit the proxies again",
                field="version",
            )
        return Manifest(**data)
    except (json.JSONDecodeError, TypeError, AttributeError) as error:
        raise ProxyError(
            f"{path} must be a proxies manifest, got {error}; fit the proxies again", field="proxies"
        ) from None
