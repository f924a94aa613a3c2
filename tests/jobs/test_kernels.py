import json

import pytest
import torch

from jobs import kernels
from jobs.timing import arena
from jobs.timing.kernel_cases import block_mask
from spts.cost import ModelShape
from spts.kernels import dispatch
from tests.jobs.test_latency import interrupted

TINY = ModelShape(
    num_layers=2,
    hidden_size=64,
    intermediate_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=101,
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there under Triton's interpreter: tests/conftest.py


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch):
    monkeypatch.setattr(arena, "SHAPES", {**arena.SHAPES, "tiny": TINY})
    for name in ("_PROGRAMS", "_FEWEST"):  # the interpreter runs programs one by one
        monkeypatch.setattr(f"spts.kernels.ragged_attention.{name}", 2)


def run(*more: str) -> int:
    return kernels.main(["--shape", "tiny", "--device", DEVICE, "--repeats", "2", "--eager-only", *more])


@pytest.mark.slow
def test_every_kernel_is_checked_and_timed(capsys):
    assert run("--tokens", "390", "40", "--active", "30", "7", "--density", "0.1") == 0
    printed = capsys.readouterr().out
    report = json.loads(printed.splitlines()[-1])
    timed = {row["operation"] for row in report["rows"]}
    assert timed == {
        *("rms_norm", "rotate_in_place", "gated_product", "add_rows_in_place", "top_rows"),
        *("ragged_attention", "sparse_attention"),
    }
    assert all(row["kernel_s"] > 0 for row in report["rows"])
    assert all((row["eager_s"] is None) == (row["operation"] == "sparse_attention") for row in report["rows"])
    sizes = [row["size"] for row in report["rows"] if row["operation"] == "top_rows"]
    assert sizes == ["T390-M30", "T40-M7"]
    sparse = [row for row in report["rows"] if row["operation"] == "sparse_attention"]
    assert [row["size"] for row in sparse] == ["L390-H4-K2-d16-0.1", "L40-H4-K2-d16-0.1"]
    assert all(row["others_s"].keys() == {"choice alone", "dense"} for row in sparse)
    assert sparse[0]["kernel_flop_per_s"] > 0
    assert printed.count("TFLOP/s") == len(sparse)


def test_flex_attention_is_given_the_blocks_that_the_kernel_reads():
    """Two heads, three blocks of queries, the last with a part; -1 fills what a row does not use."""
    chosen_HRS = torch.tensor([[[-1, -1], [0, -1], [0, 1]], [[-1, -1], [0, -1], [1, -1]]], dtype=torch.int32)
    mask = block_mask(chosen_HRS, 300)
    assert mask.to_dense()[0].tolist() == [
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]],
        [[1, 0, 0], [1, 1, 0], [0, 1, 1]],
    ]
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_num_blocks[0].tolist() == [[0, 1, 2], [0, 1, 1]]
    assert mask.kv_indices[0, :, :, 0].tolist() == [[0, 1, 2]] * 2


def test_a_device_that_cannot_run_kernels_is_refused_before_anything(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "copy_bandwidth", None)
    assert run("--device", "zz") == 2
    assert "error: device must be there, got 'zz'" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert kernels.main([]) == 2
        assert "error: device must be there, got 'cuda'" in capsys.readouterr().err
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert run("--device", "cpu") == 2
    message = "error: device must be cuda unless TRITON_INTERPRET=1 is set, got 'cpu'"
    assert message in capsys.readouterr().err


def test_ctrl_c_ends_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "copy_bandwidth", interrupted)
    assert run() == 130
    assert capsys.readouterr().err == "interrupted: the same command again starts from the beginning\n"


def test_a_wrong_kernel_is_not_timed(monkeypatch, capsys):
    right = dispatch.kernel

    def wrong(name):
        return (lambda x, weight, eps: 1.1 * x) if name == "rms_norm" else right(name)

    monkeypatch.setattr(dispatch, "kernel", wrong)
    assert run("--tokens", "70", "--active", "30") == 1
    assert "the kernel must equal the reference of rms_norm at T70-D64" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tokens", "70", "80", "--active", "30"], "active must have one number for each of tokens"),
        (["--tokens", "70", "--active", "71"], "active must be at most the 70 tokens, got 71"),
        (["--tokens", "70", "--active", "0"], "active must be an integer of at least 1"),
        (["--density", "1.0"], "density must be above 0 and below 1, got 1.0"),
        (["--repeats", "0"], "repeats must be an integer of at least 1"),
        (["--shape", "no-such"], "shape must be one of"),
    ],
)
def test_bad_input_is_refused(args, message, capsys):
    assert run(*args) == 2
    assert message in capsys.readouterr().err
