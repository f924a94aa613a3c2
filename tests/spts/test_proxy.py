"""LTP: the fit and the scores against NumPy, the norm shortcut, the files."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from spts.calibration import channel_importance, sample_tokens
from spts.collective import Local
from spts.errors import ProxyError
from spts.methods import Spts
from spts.model import SptsModel
from spts.proxy import LayerProxy, Proxies, ffn_norms
from spts.schedule import Schedule, Stage
from tests.spts.tiny import FINGERPRINT, prompt, transformers_model

CHANNELS, RANK, FIRST_LAYER = 24, 10, 2


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def _cut_to_rank(weight: np.ndarray, rank: int) -> np.ndarray:
    left, scale, right = np.linalg.svd(weight, full_matrices=False)
    return (left[:, :rank] * scale[:rank]) @ right[:rank]


def _weight(linear: Any) -> np.ndarray:
    return linear.weight.detach().double().numpy()


class NumpyProxy:
    """The paper's LTP for one layer: whole matrices of reduced rank, the output formed and then measured."""

    def __init__(self, mlp: Any, y_ND: np.ndarray, *, channels: int, rank: int, top_share: float) -> None:
        gate, up, down = _weight(mlp.gate_proj).T, _weight(mlp.up_proj).T, _weight(mlp.down_proj).T
        saliency = np.sort(np.abs(_silu(y_ND @ gate) * (y_ND @ up)), axis=0)[::-1]
        self.importance = saliency[: max(1, round(top_share * len(y_ND)))].mean(axis=0)
        kept = np.sort(np.argsort(-self.importance, kind="stable")[:channels])
        self.gate, self.up = _cut_to_rank(gate[:, kept], rank), _cut_to_rank(up[:, kept], rank)
        self.down = _cut_to_rank(down[kept], rank)

    def norms(self, y_TD: np.ndarray) -> np.ndarray:
        """Norm of the whole low-rank FFN's output by token."""
        return np.linalg.norm((_silu(y_TD @ self.gate) * (y_TD @ self.up)) @ self.down, axis=-1)


@pytest.fixture(scope="module")
def hf_model() -> Any:
    torch.manual_seed(3)
    return transformers_model("qwen2")


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    torch.manual_seed(4)
    return [prompt(length) for length in (40, 1, 63, 90)]


@pytest.fixture(scope="module")
def proxies(hf_model: Any, texts: list[list[int]]) -> Proxies:
    model = SptsModel(hf_model, fingerprint=FINGERPRINT)
    return Proxies.fit(model, texts, first_layer=FIRST_LAYER, channels=CHANNELS, rank=RANK)


@torch.no_grad()
def _ffn_inputs(hf_model: Any, texts: list[list[int]]) -> dict[int, np.ndarray]:
    """FFN inputs by layer as transformers' own forward computes them."""
    seen: dict[int, list[np.ndarray]] = {index: [] for index in range(len(hf_model.model.layers))}
    hooks = [
        block.mlp.register_forward_pre_hook(lambda _m, args, i=i: seen[i].append(args[0][0].double().numpy()))
        for i, block in enumerate(hf_model.model.layers)
    ]
    for text in texts:
        hf_model(torch.tensor([text]))
    for hook in hooks:
        hook.remove()
    return {index: np.concatenate(parts) for index, parts in seen.items()}


def test_fit_and_scores_equal_numpy(hf_model, texts, proxies):
    inputs = _ffn_inputs(hf_model, texts)
    assert sorted(proxies.layers) == [2, 3, 4, 5]
    for index, proxy in proxies.layers.items():
        mlp = hf_model.model.layers[index].mlp
        truth = NumpyProxy(mlp, inputs[index], channels=CHANNELS, rank=RANK, top_share=0.2)
        y_TD = torch.randn(77, 96)
        ours = ffn_norms(y_TD, proxy, activation=mlp.act_fn, collective=Local())
        assert ours.dtype == torch.float32
        np.testing.assert_allclose(ours, truth.norms(y_TD.double().numpy()), rtol=1e-4)


def test_the_norm_needs_no_last_product():
    """‖z (U S)‖ = ‖z (U S Vᵀ)‖, for factors of any kind."""
    factors = [torch.randn(shape) for shape in ((12, 10), (5, 8), (5, 8), (8, 5))]
    basis_rD = torch.linalg.qr(torch.randn(12, 5))[0].T
    y_TD = torch.randn(100, 12)
    proxy = LayerProxy(
        **{field.name: factor for field, factor in zip(fields(LayerProxy), factors, strict=True)}
    )
    gate_TC, up_TC = y_TD @ factors[0][:, :5] @ factors[1], y_TD @ factors[0][:, 5:] @ factors[2]
    output_TD = (torch.nn.functional.silu(gate_TC) * up_TC) @ factors[3] @ basis_rD
    ours = ffn_norms(y_TD, proxy, activation=torch.nn.functional.silu, collective=Local())
    torch.testing.assert_close(ours, output_TD.norm(dim=-1))


def test_full_rank_and_all_channels_give_the_true_norm(hf_model, texts):
    model = SptsModel(hf_model, fingerprint=FINGERPRINT)
    whole = Proxies.fit(model, texts, first_layer=5, channels=80, rank=80)
    mlp = hf_model.model.layers[5].mlp
    y_TD = torch.randn(50, 96)
    ours = ffn_norms(y_TD, whole.layers[5], activation=mlp.act_fn, collective=Local())
    with torch.no_grad():
        torch.testing.assert_close(ours, mlp(y_TD).norm(dim=-1), rtol=1e-4, atol=1e-5)


def test_importance_worked_example():
    class Mlp:
        gate_proj = torch.nn.Linear(1, 1, bias=False)
        up_proj = torch.nn.Linear(1, 1, bias=False)
        act_fn = staticmethod(torch.ones_like)

    with torch.no_grad():
        Mlp.up_proj.weight.fill_(-1.0)
        y_ND = torch.tensor([[4.0], [1.0], [3.0], [2.0], [0.0]])
        assert channel_importance(y_ND, Mlp, top_share=0.4).tolist() == [3.5]
        assert channel_importance(y_ND, Mlp, top_share=0.01).tolist() == [4.0], "one token at least"
        assert channel_importance(y_ND, Mlp, top_share=1.0).tolist() == [2.0]


def test_importance_does_not_depend_on_the_block_size(hf_model):
    y_ND, mlp = torch.randn(30, 96), hf_model.model.layers[0].mlp
    with torch.no_grad():
        blocks = [channel_importance(y_ND, mlp, top_share=0.2, block_channels=b) for b in (7, 80, 512)]
    torch.testing.assert_close(blocks[0], blocks[1])
    torch.testing.assert_close(blocks[0], blocks[2])


def test_more_tokens_than_fit_are_sampled_evenly():
    assert sample_tokens(10, 10, 0).tolist() == list(range(10))
    sample = sample_tokens(10_000, 1000, 0)
    assert sample.tolist() == sorted(set(sample.tolist()))
    assert len(sample) == 1000
    assert abs(float(sample.double().mean()) - 5000) < 400
    assert (
        sample_tokens(10_000, 1000, 0).tolist() == sample.tolist() != sample_tokens(10_000, 1000, 1).tolist()
    )


def test_a_sampled_fit_says_how_many_tokens_it_saw(hf_model, texts):
    model = SptsModel(hf_model, fingerprint=FINGERPRINT)
    steps: list[tuple[int, int]] = []
    fitted = Proxies.fit(
        model,
        texts,
        first_layer=4,
        channels=8,
        rank=2,
        max_tokens=50,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert fitted.manifest.calibration_tokens == 50
    assert steps == [(done, 6) for done in range(1, 7)]


@pytest.mark.parametrize("ranks", [2, 3, 7])
@pytest.mark.parametrize("num_tokens", [1, 5, 63])
def test_slices_of_the_ranks_add_up_to_the_whole(proxies, ranks, num_tokens):
    proxy, y_TD = proxies.layers[2], torch.randn(num_tokens, 96)
    whole_T = ffn_norms(y_TD, proxy, activation=torch.nn.functional.silu, collective=Local())
    padded: list[torch.Tensor] = []

    class Rank:
        world_size = ranks

        def __init__(self, rank: int) -> None:
            self.rank = rank

        def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
            padded.append(tensor)
            return tensor

        def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor

    for rank in range(ranks):
        ffn_norms(y_TD, proxy, activation=torch.nn.functional.silu, collective=Rank(rank))
    torch.testing.assert_close(torch.stack(padded).sum(dim=0), whole_T)
    assert all(int((torch.stack(padded)[:, token] != 0).sum()) == 1 for token in range(num_tokens))


def test_saved_and_loaded_proxies_agree_bit_for_bit(hf_model, proxies, tmp_path):
    proxies.save(tmp_path / "new" / "folder")
    loaded = Proxies.load(tmp_path / "new" / "folder", fingerprint=FINGERPRINT)
    assert loaded.manifest == proxies.manifest
    assert loaded.shape == proxies.shape
    assert sorted(file.name for file in (tmp_path / "new" / "folder").iterdir()) == [
        "proxies.json",
        "proxies.safetensors",
    ]
    for index, layer in proxies.layers.items():
        for field in fields(LayerProxy):
            assert torch.equal(getattr(layer, field.name), getattr(loaded.layers[index], field.name))
    schedule = Schedule(
        num_layers=6, first_skip_layer=2, stages=(Stage(last_layer=5, active_tokens=20, keep_tokens=None),)
    )
    token_ids = prompt(100)
    first, second = (
        SptsModel(hf_model, fingerprint=FINGERPRINT, proxies=p).prefill(token_ids, Spts(schedule=schedule))
        for p in (proxies, loaded)
    )
    assert torch.equal(first.logits, second.logits)


BAD_FITS: list[tuple[dict[str, Any], str]] = [
    ({"first_layer": 6}, r"first_layer must be in 0\.\.5 for this model, got 6"),
    ({"channels": 81}, r"channels must be in 1\.\.80 for this model, got 81"),
    ({"channels": 0}, "channels must be in"),
    ({"rank": 25}, r"rank must be in 1\.\.24 for this model, got 25"),
    ({"top_share": 0.0}, r"top_share must be in \(0, 1\], got 0.0"),
    ({"top_share": 1.5}, r"top_share must be in \(0, 1\], got 1.5"),
    ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
]


@pytest.mark.parametrize(("change", "message"), BAD_FITS)
def test_fits_out_of_range_are_refused(hf_model, change, message):
    settings = {"first_layer": FIRST_LAYER, "channels": CHANNELS, "rank": RANK, **change}
    with pytest.raises(ProxyError, match=message):
        Proxies.fit(SptsModel(hf_model, fingerprint=FINGERPRINT), [[1, 2]], **settings)


@pytest.mark.parametrize("texts", [[], [[]]])
def test_a_fit_without_text_is_refused(hf_model, texts):
    with pytest.raises(ProxyError, match="texts must hold at least one token"):
        Proxies.fit(SptsModel(hf_model, fingerprint=FINGERPRINT), texts, first_layer=2, channels=8, rank=2)


def test_an_ffn_with_biases_is_refused():
    model = SptsModel(transformers_model("llama", mlp_bias=True), fingerprint=FINGERPRINT)
    with pytest.raises(ProxyError, match="mlp_bias must be false"):
        Proxies.fit(model, [[1, 2]], first_layer=2, channels=8, rank=2)


def _edit_manifest(folder: Any, **changes: Any) -> None:
    path = folder / "proxies.json"
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


def _edit_weights(folder: Any, edit: Any) -> None:
    path = folder / "proxies.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path)


BAD_FOLDERS: list[tuple[Any, str]] = [
    (lambda f: (f / "proxies.json").unlink(), "proxies must be a folder with proxies.json"),
    (lambda f: (f / "proxies.safetensors").unlink(), "proxies must be a folder with proxies.safetensors"),
    (lambda f: _edit_manifest(f, version=99), "version must be 1, got 99"),
    (lambda f: _edit_manifest(f, extra=1), "must be a proxies manifest, got .*extra"),
    (lambda f: _edit_manifest(f, rank=...), "must be a proxies manifest, got .*rank"),
    (lambda f: (f / "proxies.json").write_text("{"), "must be a proxies manifest"),
    (lambda f: (f / "proxies.json").write_text("[]"), "must be a proxies manifest"),
    (lambda f: _edit_manifest(f, fingerprint="other"), "fingerprint tiny, got proxies of other"),
    (lambda f: _edit_manifest(f, first_layer=1), "layers.1.first_D2r must be a factor"),
    (lambda f: _edit_weights(f, lambda w: w.pop("layers.4.up_rC")), r"layers.4.up_rC must be .* got None"),
    (
        lambda f: _edit_weights(f, lambda w: w.update({"layers.3.down_Cr": torch.zeros(2, 3)})),
        r"layers.3.down_Cr must be a factor of shape \(24, 10\), got \(2, 3\)",
    ),
    (lambda f: (f / "proxies.safetensors").write_bytes(b"no"), "must be safetensors"),
]


@pytest.mark.parametrize(("damage", "message"), BAD_FOLDERS, ids=[message for _, message in BAD_FOLDERS])
def test_damaged_or_foreign_proxies_are_refused(proxies, tmp_path, damage, message):
    proxies.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ProxyError, match=message):
        Proxies.load(tmp_path, fingerprint=FINGERPRINT)
