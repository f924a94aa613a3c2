"""Compiles every Triton kernel for GPUs that need not be there and prints what each takes, as JSON.

    python -m tests.spts.compiled

Run in a process of its own, without TRITON_INTERPRET. At the sizes of LLaMA-3.1-8B in bfloat16: {"kernel
sm_90": {"registers": per thread, "spilled_bytes": per thread, "shared_bytes": per program, "threads": …,
"wgmma": instructions for the product of matrices that sm_90 has, "wgmma_groups": that run without a wait}}.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spts.kernels.add_rows_in_place import _add_rows
from spts.kernels.block_attention import Tiling, _block_attention
from spts.kernels.gated_product import _gated_product
from spts.kernels.ragged_attention import _add_splits, _ragged_attention
from spts.kernels.rms_norm import _rms_norm
from spts.kernels.rotate_in_place import _rotate
from spts.kernels.sparse_attention import _block_scores, _choose_blocks
from spts.kernels.top_rows import _top_rows

CAPABILITIES = (80, 90)
HALF, FLOAT, INDEX, BYTE = "*bf16", "*fp32", "*i64", "*u8"


def launches(capability: int) -> list[tuple[Any, list[Any], dict[str, int]]]:
    """Each kernel with the types of its arguments in order (a plain value is a constant) and the options that
    GPUs of one compute capability launch it with."""
    at_once, warps = Tiling.on(2, capability // 10)
    out, keys = (f"tensordesc<bf16[{rows}, 128]>" for rows in (128, at_once))  # a host's descriptors
    return [
        (_rms_norm, [HALF, HALF, HALF, "i32", "fp32", "i32", 4096], {"num_warps": 8}),
        (_rotate, [HALF, HALF, HALF, "i32", "i32", "i32", "i32", "i32", "i32", 32, 64], {"num_warps": 4}),
        (_gated_product, [HALF, HALF, "i32", "i32", "i32", "i32", 2048], {"num_warps": 8}),
        (_add_rows, [HALF, INDEX, HALF, "i32", "i32", "i32", 4096], {"num_warps": 8}),
        (
            _ragged_attention,
            [HALF, HALF, HALF, INDEX, FLOAT, FLOAT, FLOAT, "fp32", *["i32"] * 7, 16, 16, 128, 64],
            {"num_warps": 4, "num_stages": 3},
        ),
        (_add_splits, [FLOAT, FLOAT, FLOAT, HALF, "i32", "i32", 64, 128], {"num_warps": 4}),
        (_top_rows, [FLOAT, INDEX, BYTE, "i32", "i32", "i32", 8192], {"num_warps": 16}),
        (_block_scores, [HALF, HALF, FLOAT, "fp32", *["i32"] * 4, 128, 128, 64], {"num_warps": 4}),
        (_choose_blocks, [FLOAT, "*i32", *["i32"] * 5, 3, 1 << 16, 1024], {"num_warps": 4}),
        (
            _block_attention,
            [HALF, keys, keys, "*i32", out, "fp32", *["i32"] * 6, 128, 3, 1 << 16, 128, at_once],
            {"num_warps": warps, "num_stages": 2},
        ),
    ]


def compile_for(capability: int, kernel: Any, types: list[Any], options: dict[str, int]) -> dict[str, int]:
    """The resources of one kernel on GPUs of one compute capability (80 = A100, 90 = H100 and H200)."""
    names = list(kernel.arg_names)
    assert len(names) == len(types), (kernel.__name__, names)
    constants = set(kernel.constexprs)
    signature = {
        name: "constexpr" if index in constants else kind
        for index, (name, kind) in enumerate(zip(names, types, strict=True))
    }
    # What a launch with torch's own memory promises: addresses and sizes divisible by 16.
    aligned = {
        (param.num,): [["tt.divisibility", 16]]
        for param, kind in zip(kernel.params, types, strict=True)
        if str(kind).startswith(("*", "i32")) and not param.do_not_specialize
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(index,): types[index] for index in constants},
        attrs=aligned,
    )
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(built.asm["cubin"])
        cubin.flush()
        report = _print("cuobjdump", "--dump-resource-usage", cubin.name)
        code = _print("nvdisasm", cubin.name)
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return {
        "registers": used["REG"],
        "spilled_bytes": used["STACK"] + used["LOCAL"],
        "shared_bytes": built.metadata.shared,
        "threads": 32 * options["num_warps"],
        "wgmma": code.count(" HGMMA."),
        "wgmma_groups": code.count(" WARPGROUP.ARRIVE"),
    }


def _print(tool: str, *arguments: str) -> str:
    """What one of the CUDA tools that Triton brings along prints."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Prints the report."""
    report = {
        f"{kernel.__name__.strip('_')} sm_{capability}": compile_for(capability, kernel, types, options)
        for capability in CAPABILITIES
        for kernel, types, options in launches(capability)
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
