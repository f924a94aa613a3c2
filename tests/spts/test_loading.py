"""Loading from a folder: what is read, what names a model, and what is refused before any weight is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import spts
from spts import loading
from spts.architectures import check_config, max_context
from spts.errors import ModelError, ProxyError
from spts.methods import Dense
from spts.proxy import Proxies
from tests.spts.tiny import FAMILIES, ROPES, prompt, transformers_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("model")
    transformers_model("qwen2", eos_token_id=7).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rope", ROPES)
def test_a_saved_model_computes_what_it_did(family, rope, tmp_path):
    hf_model = transformers_model(family, rope=rope, tie_word_embeddings=family in ("qwen2", "qwen3"))
    hf_model.save_pretrained(tmp_path)
    model = spts.load(tmp_path)
    token_ids = prompt(64)
    with torch.no_grad():
        expected = hf_model(torch.tensor([token_ids])).logits[0, -1]
    torch.testing.assert_close(model.prefill(token_ids, Dense()).logits, expected, atol=1e-5, rtol=1e-5)
    assert model.proxies is None


def test_what_a_model_says_about_itself(folder):
    model = spts.load(str(folder))
    assert model.vocab_size == model.shape.vocab_size == 211
    assert model.max_context == 1100
    assert model.eos_token_ids == (7,)
    assert model.dtype == torch.float32
    assert str(model.device) == "cpu"
    assert model.fingerprint == loading.fingerprint(folder)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_and_answers_in_float32(folder, dtype):
    token_ids = prompt(64)
    full, half = (spts.load(folder, dtype=d).prefill(token_ids, Dense()) for d in ("float32", dtype))
    assert half.logits.dtype == torch.float32
    assert half.cache.num_bytes == full.cache.num_bytes // 2
    assert float((half.logits - full.logits).norm() / full.logits.norm()) < 0.1


def test_the_folders_own_proxies_are_found_and_others_can_be_named(folder, tmp_path):
    bare = spts.load(folder)
    fit = Proxies.fit(bare, [prompt(50)], first_layer=2, channels=8, rank=2)
    fit.save(tmp_path / "elsewhere")
    assert spts.load(folder).proxies is None
    named = spts.load(folder, proxies=tmp_path / "elsewhere")
    assert named.proxies is not None
    fit.save(folder / "proxies")
    found = spts.load(folder)
    assert found.proxies is not None
    assert found.fingerprint == bare.fingerprint, "proxies beside a model do not change which model it is"
    with pytest.raises(ProxyError, match=r"proxies must be a folder with proxies.json, got .*nowhere"):
        spts.load(folder, proxies=tmp_path / "nowhere")


def test_the_fingerprint_names_the_model(folder, saved, tmp_path):
    original = loading.fingerprint(saved)
    assert loading.fingerprint(folder) == original, "a copy is the same model"
    (folder / "README.md").write_text("a card")
    assert loading.fingerprint(folder) == original
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    changed = loading.fingerprint(folder)
    assert changed != original, "changed weights"
    _edit_config(folder, rms_norm_eps=1e-5)
    assert loading.fingerprint(folder) not in (original, changed), "changed configuration"


def test_the_fingerprint_covers_both_ends_of_every_tensor(tmp_path):
    import torch
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text("{}")
    found = set()
    for changed, place in ((None, 0), *((name, place) for name in "abc" for place in (10, -10))):
        tensors = {name: torch.zeros(200_000) for name in "abc"}
        if changed is not None:
            tensors[changed][place] = 1
        save_file(tensors, tmp_path / "m.safetensors")
        found.add(loading.fingerprint(tmp_path))
    assert len(found) == 7


BAD_CONFIGS: list[tuple[dict[str, Any], str]] = [
    (
        {"architectures": ["GPT2LMHeadModel"]},
        r"architectures must be one of LlamaForCausalLM, .* got \['GPT2",
    ),
    ({"architectures": None}, r"architectures must be one of .*, got \[\]"),
    ({"architectures": ["Qwen2MoeForCausalLM"], "num_experts": 8}, "num_experts must be absent, got 8"),
    (
        {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4},
        "num_local_experts must be absent, got 4",
    ),
    (
        {"use_sliding_window": True, "sliding_window": 512, "layer_types": None, "max_window_layers": 2},
        "sliding_window must be null or at least .* got 512",
    ),
    (
        {"layer_types": ["sliding_attention"] * 6, "sliding_window": 64},
        "sliding_window must be null .* got 64",
    ),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type must be one of .* got dynamic"),
    (
        {"rope_parameters": None, "rope_scaling": {"type": "longrope"}},
        "rope_type must be one of .* got longrope",
    ),
    (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary_factor must be 1",
    ),
]


@pytest.mark.parametrize(
    ("changes", "message"), BAD_CONFIGS, ids=[message[:40] for _, message in BAD_CONFIGS]
)
def test_configurations_that_are_not_supported_are_refused_by_name(folder, changes, message, monkeypatch):
    _edit_config(folder, **changes)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", _unreachable)
    with pytest.raises(ModelError, match=message):
        spts.load(folder)


def test_windows_switched_off_or_longer_than_the_context_are_fine():
    base = {
        "architectures": ["Qwen2ForCausalLM"],
        "max_position_embeddings": 4096,
        "sliding_window": 1024,
        "num_hidden_layers": 6,
    }
    check_config({**base, "use_sliding_window": True, "max_window_layers": 6})
    check_config({**base, "architectures": ["LlamaForCausalLM"]})
    with pytest.raises(ModelError, match="sliding_window"):
        check_config({**base, "use_sliding_window": True, "max_window_layers": 5})
    check_config({**base, "use_sliding_window": False})
    check_config({**base, "architectures": ["MistralForCausalLM"], "sliding_window": None})
    check_config({**base, "architectures": ["MistralForCausalLM"], "sliding_window": 4096})
    with pytest.raises(ModelError, match="sliding_window"):
        check_config({**base, "architectures": ["MistralForCausalLM"]})


def test_context_of_stretched_models():
    base: dict[str, Any] = {"max_position_embeddings": 32768}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert max_context(base) == 32768
    assert max_context({**base, "rope_scaling": yarn}) == 131072
    assert max_context({"max_position_embeddings": 131072, "rope_parameters": yarn}) == 131072
    assert (
        max_context(
            {"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
        )
        == 131072
    )


def test_folders_that_hold_no_model_are_refused(folder, tmp_path):
    with pytest.raises(ModelError, match="model must be a folder or a hub id like owner/name, got /no/such"):
        spts.load("/no/such")
    with pytest.raises(ModelError, match=r"model must hold config.json, got none"):
        spts.load(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"model must hold \*.safetensors, got none"):
        spts.load(folder)


def test_a_missing_shard_is_named(folder):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"model must hold model-00002-of-00002.safetensors"):
        spts.load(folder)


def test_broken_files_are_refused(folder):
    good = (folder / "config.json").read_text()
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config.json must be JSON"):
        spts.load(folder)
    (folder / "config.json").write_bytes(b"\xff")
    with pytest.raises(ModelError, match=r"config.json must be JSON, got 'utf-8'"):
        spts.load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"config.json must be a JSON object, got list"):
        spts.load(folder)
    (folder / "config.json").write_text(good)
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ModelError, match=r"model.safetensors must be a safetensors file"):
        spts.load(folder)


def test_an_unknown_dtype_is_refused(folder):
    with pytest.raises(ModelError, match="dtype must be one of float32, bfloat16, float16, got 'int8'"):
        spts.load(folder, dtype="int8")


def test_a_hub_id_is_downloaded_once_its_configuration_is_known_to_be_supported(folder, monkeypatch):
    asked: list[list[str]] = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        assert name == "owner/name"
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert spts.load("owner/name").fingerprint == loading.fingerprint(folder)
    assert [("*.safetensors" in patterns) for patterns in asked] == [False, True]
    asked.clear()
    assert loading.resolve("owner/name", weights=False) == folder
    assert not any("*.safetensors" in patterns for patterns in asked)
    asked.clear()
    _edit_config(folder, architectures=["GPT2LMHeadModel"])
    with pytest.raises(ModelError, match="architectures must be one of"):
        spts.load("owner/name")
    assert asked == [["config.json"]]


@pytest.mark.parametrize("device", ["tpu", "meta:x", "xpu"], ids=["unknown", "no index", "not built in"])
def test_a_device_that_is_not_here_is_refused(folder, device):
    with pytest.raises(ModelError, match=rf"device must be one that torch has here, got '{device}'"):
        spts.load(folder, device=device)


def test_a_hub_id_that_cannot_be_reached_says_so():
    with pytest.raises(ModelError, match="model must be a folder or a hub id, got nobody/nothing"):
        spts.load("nobody/nothing")


def _unreachable(*_: object, **__: object) -> None:
    raise AssertionError("weights were read")
