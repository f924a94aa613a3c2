"""Models from a local folder or a hub id: safetensors only, no code from the model's repository."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from spts.architectures import check_config
from spts.errors import ModelError

if TYPE_CHECKING:
    from spts.model import SptsModel
    from spts.proxy import Proxies

DTYPES = ("float32", "bfloat16", "float16")
PROXIES_FOLDER = "proxies"
_END_BYTES = 1 << 16


def load(
    path: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    device: str = "cpu",
    proxies: str | os.PathLike[str] | None = None,
) -> SptsModel:
    """The model in a local folder, or under a hub id, ready to prefill and to generate.

    `dtype` is one of float32, bfloat16, float16; `device` anything torch names. `proxies` is a folder that
    `jobs.calibrate` wrote; by default the model folder's `proxies`, if it is there.

    Raises ModelError (no such folder, no safetensors, an unsupported configuration) and ProxyError (foreign
    or incomplete proxies), both before any weight is read.
    """
    from spts.model import SptsModel

    folder = resolve(path)
    check_folder(folder)
    identity = fingerprint(folder)
    loaded = load_proxies(folder, proxies, fingerprint=identity)
    return SptsModel(
        load_transformers(folder, dtype=dtype, device=device), fingerprint=identity, proxies=loaded
    )


def load_transformers(folder: str | os.PathLike[str], *, dtype: str = "float32", device: str = "cpu") -> Any:
    """The transformers model in `folder`, in evaluation mode, after the same checks as `load`."""
    import torch
    from transformers import AutoModelForCausalLM

    if dtype not in DTYPES:
        raise ModelError(
            f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}; choose one of them", field="dtype"
        )
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without it
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"device must be one that torch has here, got {device!r} ({reason}); use cpu", field="device"
        ) from None
    check_folder(folder)
    model = AutoModelForCausalLM.from_pretrained(
        os.fspath(folder),
        dtype=getattr(torch, dtype),
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
    )
    return model.to(device).eval()


def proxies_sha256(folder: Path) -> str:
    """sha256 over the weights of the proxies in a folder: names them in records."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def weights(folder: str | os.PathLike[str], proxies: str | os.PathLike[str] | None) -> tuple[str, str | None]:
    """What names all that is loaded: `fingerprint` of the model, and `proxies_sha256` of its proxies, which
    are those of `load_proxies`; None if it has none."""
    path = proxies_folder(folder, proxies)
    return fingerprint(folder), None if path is None else proxies_sha256(path)


def proxies_folder(folder: str | os.PathLike[str], proxies: str | os.PathLike[str] | None) -> Path | None:
    """Where a model's proxies are: `proxies`, else in the model folder; None if it has none."""
    from spts.proxy import MANIFEST_FILE

    if proxies is not None:
        return Path(proxies)
    default = Path(folder) / PROXIES_FOLDER
    return default if (default / MANIFEST_FILE).is_file() else None


def load_proxies(
    folder: str | os.PathLike[str], proxies: str | os.PathLike[str] | None, *, fingerprint: str
) -> Proxies | None:
    """The proxies in `proxies_folder`, None if there is none; raises as `Proxies.load` does."""
    from spts.proxy import Proxies

    path = proxies_folder(folder, proxies)
    return None if path is None else Proxies.load(path, fingerprint=fingerprint)


def resolve(path: str | os.PathLike[str], *, weights: bool = True) -> Path:
    """The local folder of a model: `path` itself, or for a hub id (`owner/name`) its downloaded snapshot.

    A hub model's configuration is fetched and checked first, so an unsupported one costs no download of
    weights. weights: False = configuration and tokenizer are enough.
    """
    folder = Path(path)
    if os.path.isdir(folder):  # Path's own raises for a name that is too long
        return folder
    name = os.fspath(path)
    if folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise ModelError(
            f"model must be a folder or a hub id like owner/name, got {name}; no such folder", field="model"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        _read_config(Path(snapshot_download(name, allow_patterns=["config.json"])))
        patterns = ["*.json", "*.jinja", "*.model", "*.txt", *(["*.safetensors"] if weights else [])]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model must be a folder or a hub id, got {name}; "
            f"there is no such folder and the hub answered: {error}",
            field="model",
        ) from error


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Raises ModelError unless `folder` holds a supported `config.json` and all its safetensors weights."""
    path = Path(folder)
    if not path.is_dir():
        raise ModelError(f"model must be a folder, got {path}; no such folder", field="model")
    _read_config(path)
    files = _weight_files(path)
    if not files:
        raise ModelError(
            f"model must hold *.safetensors, got none in {path}; "
            "convert the weights, other formats are not read",
            field="model",
        )
    index = path / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(shards - {file.name for file in files})
        if missing:
            raise ModelError(
                f"model must hold {missing[0]}, got no such file in {path}; download it again", field="model"
            )


def fingerprint(folder: str | os.PathLike[str]) -> str:
    """SHA-256, in hex, of what makes a model folder this model.

    Over `config.json` and, of every safetensors file by name, its size, its header, and of every tensor the
    first and the last 64 KiB: whatever changes a tensor as a whole (training on, merging an adapter, another
    precision) is noticed without reading all of 16 GB, and a moved folder is still the same model.
    """
    path = Path(folder)
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in _weight_files(path):
        digest.update(f"\0{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as weights:
            header = _header(weights, file)
            digest.update(header)
            begin = weights.tell()
            for start, end in sorted(_spans(header, file)):
                for first, last in (
                    (start, min(start + _END_BYTES, end)),
                    (max(start, end - _END_BYTES), end),
                ):
                    weights.seek(begin + first)
                    digest.update(weights.read(last - first))
    return digest.hexdigest()


def _header(weights: BinaryIO, file: Path) -> bytes:
    """A safetensors file's header, JSON, read from its beginning."""
    prefix = weights.read(8)
    size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 0 < size <= file.stat().st_size - len(prefix):
        raise _no_safetensors(file)
    return weights.read(size)


def _spans(header: bytes, file: Path) -> list[tuple[int, int]]:
    """Where each tensor's bytes begin and end, after the header."""
    try:
        tensors = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
        return [(int(start), int(end)) for start, end in (entry["data_offsets"] for entry in tensors)]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise _no_safetensors(file) from None


def _no_safetensors(file: Path) -> ModelError:
    return ModelError(
        f"{file.name} must be a safetensors file, got another format; download it again", field="model"
    )


def _weight_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.safetensors") if file.is_file())


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(
            f"model must hold config.json, got none in {folder}; give a model's folder", field="model"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # also a UnicodeDecodeError
        raise ModelError(
            f"config.json must be JSON, got {error} in {folder}; download it again", field="model"
        ) from None
    if not isinstance(config, dict):
        raise ModelError(
            f"config.json must be a JSON object, got {type(config).__name__} in {folder}; download it again",
            field="model",
        )
    check_config(config)
    return dict(config)
