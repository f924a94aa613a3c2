"""More than 2^31 elements: an address that is counted in 32 bits would wrap around, to before the tensor."""

from __future__ import annotations

import mmap

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spts.kernels import dispatch, reference
from spts.kernels.sparse_attention import choose_blocks
from tests.spts.kernel_inputs import DEVICE, close, draw

STEP = 1 << 30  # elements from row to row: the third begins at 2^31
NO_RESERVE = 0x4000  # Linux's MAP_NORESERVE: three rows are touched, not four gibibytes


def far_rows(*shape: int) -> Tensor:
    """Random rows of half precision that lie STEP elements apart, at most three."""
    num_elements = 2 * STEP + 4096
    if DEVICE == "cuda":
        memory = torch.empty(num_elements, dtype=torch.float16, device=DEVICE)
    else:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
        memory = torch.frombuffer(mmap.mmap(-1, 2 * num_elements, flags=flags), dtype=torch.float16)
    rows = memory.as_strided(shape, (STEP, *torch.empty(shape[1:], device="meta").stride()))
    return rows.copy_(draw(*shape, dtype=torch.float16))


def test_rms_norm_of_rows_far_apart():
    x_TD, weight_D = far_rows(3, 48), draw(48, dtype=torch.float16)
    close(
        dispatch.kernel("rms_norm")(x_TD, weight_D, 1e-5),
        F.rms_norm(x_TD.double(), (48,), weight_D.double(), 1e-5),
        torch.float16,
    )


def test_gated_product_of_rows_far_apart():
    gate_MF, up_MF = far_rows(3, 48), far_rows(3, 48)
    exact = F.silu(gate_MF.double()) * up_MF.double()
    close(dispatch.kernel("gated_product")(gate_MF, up_MF, F.silu), exact, torch.float16)


def test_rotate_in_place_of_tokens_far_apart():
    x_THd, angles = far_rows(3, 2, 16), draw(3, 16)
    cos_Td, sin_Td = angles.cos().half(), angles.sin().half()
    exact = reference.rotate_in_place(x_THd.double(), cos_Td.double(), sin_Td.double())
    close(dispatch.kernel("rotate_in_place")(x_THd, cos_Td, sin_Td), exact, torch.float16)


def test_add_rows_in_place_to_rows_far_apart():
    x_TD, delta_MD, index_M = far_rows(3, 48), draw(2, 48, dtype=torch.float16), torch.tensor([0, 2])
    expected = reference.add_rows_in_place(x_TD.clone(), index_M.to(DEVICE), delta_MD)
    assert torch.equal(dispatch.kernel("add_rows_in_place")(x_TD, index_M.to(DEVICE), delta_MD), expected)


def caches_of(tokens: int, num_kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Keys and values, 4 GiB each and more."""
    shape = (tokens, num_kv_heads, head_dim)
    assert tokens * num_kv_heads * head_dim > 2**31
    keys_LKd, values_LKd = (torch.randn(shape, dtype=torch.bfloat16, device=DEVICE) for _ in "kv")
    return keys_LKd, values_LKd


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: every element is read")
def test_ragged_attention_over_a_long_cache():
    keys_CKd, values_CKd = caches_of(2**20 + 65, 16, 128)
    held = [(keys_CKd, values_CKd)]
    table_B3 = torch.tensor([[keys_CKd.data_ptr(), values_CKd.data_ptr(), 2**20 + 64]], device=DEVICE)
    q_BHd, k_BKd, v_BKd = (draw(1, 16, 128, dtype=torch.bfloat16) for _ in "qkv")
    expected_BHd = reference.ragged_attention(q_BHd, k_BKd, v_BKd, held, table_B3, 0.3)
    keys_CKd[-1] = values_CKd[-1] = 0.0
    out_BHd = dispatch.kernel("ragged_attention")(q_BHd, k_BKd, v_BKd, held, table_B3, 0.3)
    close(out_BHd, expected_BHd, torch.bfloat16)
    assert torch.equal(keys_CKd[-1], k_BKd[0]) and torch.equal(values_CKd[-1], v_BKd[0])


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: every key is read")
def test_sparse_attention_over_a_long_prompt():
    """Blocks behind 2^31 elements have what the queries look for."""
    k_LKd, v_LKd = caches_of(128 * 8300, 16, 128)
    q_MHd = draw(128, 16, 128, dtype=torch.bfloat16)
    planted = range(8200, 8260)
    k_LKd[128 * planted.start : 128 * planted.stop] += 40 * q_MHd.mean(dim=0)
    chosen_HRS = choose_blocks(q_MHd, k_LKd, 0.09, 0.01)
    assert all({0, *planted, 8298} <= set(blocks) for blocks in chosen_HRS[:, 0].tolist())
    out_MHd = dispatch.kernel("sparse_attention")(q_MHd, k_LKd, v_LKd, 0.09, 0.01)
    for head in range(16):
        blocks = [*chosen_HRS[head, 0].tolist(), 8299]
        k_L1d, v_L1d = (
            torch.cat([each[128 * block : 128 * block + 128, head : head + 1] for block in blocks]).double()
            for each in (k_LKd, v_LKd)
        )
        exact_M1d = reference.causal_attention(q_MHd[:, head : head + 1].double(), k_L1d, v_L1d, 0.09)
        close(out_MHd[:, head : head + 1], exact_M1d, torch.bfloat16)
