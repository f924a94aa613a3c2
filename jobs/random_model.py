"""A model folder of random weights and random proxies, to measure serving without anybody's weights.

    python -m jobs.random_model --shape llama-3.1-8b --dtype bfloat16 --max-tokens 140000 --out FOLDER

`spts.load` and engines take it as any other; an endpoint also needs a tokenizer in it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from jobs.latency import DTYPE_BYTES
from jobs.options import interruptible, writable_folder
from jobs.timing.arena import SHAPES, named_shape, proxy_size
from spts.cost import ModelShape, ProxyShape
from spts.errors import SptsError, config_error, require_int
from spts.schedule import PRESETS, Schedule


@interruptible()
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 for refused input, 130 Ctrl-C."""
    args = argparse.ArgumentParser(prog="python -m jobs.random_model", description=__doc__.split("\n")[0])
    args.add_argument("--shape", required=True, help=", ".join(SHAPES))
    args.add_argument("--max-tokens", type=int, required=True, help="context: prompt and answer together")
    args.add_argument("--out", required=True, help="a folder that is empty or not there yet")
    args.add_argument("--channels", type=int, help="D_low of the proxies (default: F / 28)")
    args.add_argument("--rank", type=int, help="of their factors (default: 3/64 of the width)")
    args.add_argument("--dtype", default="float32", choices=tuple(DTYPE_BYTES))
    args.add_argument("--device", default="cpu", help="where the weights are drawn: cpu or cuda")
    chosen = args.parse_args(argv)
    try:
        shape = named_shape(chosen.shape)
        require_int("max_tokens", chosen.max_tokens, minimum=1)
        size = proxy_size(shape, channels=chosen.channels, rank=chosen.rank)
        facts = write(shape, size, chosen.max_tokens, chosen.dtype, chosen.device, chosen.out)
    except SptsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(facts))
    return 0


def write(
    shape: ModelShape, size: ProxyShape, max_tokens: int, dtype: str, device: str, out: str
) -> dict[str, object]:
    """Fills the folder; returns what is in it. A failure takes the folder away again.

    Raises ConfigError for a device that is not there, a folder that cannot be written or is not empty.
    """
    from jobs.timing.contestants import check_device

    check_device(device)
    folder = writable_folder(out)
    if any(folder.iterdir()):
        raise config_error("out", "be a folder that is empty", folder, "choose another")
    try:
        return _fill(folder, shape, size, max_tokens, dtype, device)
    except BaseException:  # Ctrl-C too
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _fill(
    folder: Path, shape: ModelShape, size: ProxyShape, max_tokens: int, dtype: str, device: str
) -> dict[str, object]:
    """Proxies begin at the first layer in which any preset, scaled to the depth, skips."""
    from jobs.timing.contestants import random_model, random_proxies
    from spts import loading

    random_model(shape, max_tokens=max_tokens, dtype=dtype, device=device).save_pretrained(folder)
    first_layer = min(Schedule.preset(name, num_layers=shape.num_layers).first_skip_layer for name in PRESETS)
    identity = loading.fingerprint(folder)
    proxies = random_proxies(shape, size, first_layer=first_layer, fingerprint=identity)
    proxies.save(folder / loading.PROXIES_FOLDER)
    return {
        "out": str(folder),
        "shape": asdict(shape),
        "max_context_tokens": max_tokens,
        "dtype": dtype,
        "proxies": {"first_layer": first_layer, **asdict(size)},
        "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
    }


if __name__ == "__main__":
    sys.exit(main())
