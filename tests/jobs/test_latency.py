import errno
import json
from pathlib import Path

import pytest
import torch

from jobs import latency
from jobs.timing import arena
from jobs.timing.cases import plan
from jobs.timing.contestants import OnEngine, Own, Transformers, disagreement, random_model, random_proxies
from jobs.timing.rounds import Timed, measure, table, work_faults
from spts.cost import ModelShape, ProxyShape
from spts.errors import ConfigError
from spts.methods import Dense, Spts
from spts.model import SptsModel
from tests.cluster.tiny import write_model
from tests.without import run_without

TINY = ModelShape(
    num_layers=8,
    hidden_size=32,
    intermediate_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=101,
)


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch):
    monkeypatch.setattr(arena, "SHAPES", {**arena.SHAPES, "tiny": TINY})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def run_local(*more: str) -> int:
    return latency.main(["--local", "--repeats", "2", "--tokens-out", "3", *more])


def interrupted(*_, **__):
    raise KeyboardInterrupt


def last_line(text: str) -> dict:
    return json.loads(text.rstrip().splitlines()[-1])


def test_random_shape_against_transformers(capsys):
    assert run_local("--shape", "tiny", "--lengths", "63", "200", "--methods", "spts", "random") == 0
    printed = capsys.readouterr().out
    rows = last_line(printed)["rows"]
    assert [(row["method"], row["length_tokens"]) for row in rows] == [
        (method, length) for length in (63, 200) for method in ("dense", "spts", "random", "transformers")
    ]
    for row in rows:
        assert row["ttft_min_s"] <= row["ttft_median_s"] <= row["ttft_max_s"]
        assert row["kv_bytes"] == row["predicted_kv_bytes"]
        assert row["repeats"] == 2
        assert row["tpot_median_s"] > 0
    assert all((row["predicted_peak_bytes"] is None) == (row["method"] == "transformers") for row in rows)
    dense, spts, _, rival = rows[4:]
    assert spts["predicted_peak_bytes"] < dense["predicted_peak_bytes"]
    assert dense["speedup_vs_dense_ratio"] == 1.0
    assert rival["speedup_vs_transformers_ratio"] == 1.0
    assert spts["predicted_flop"] < dense["predicted_flop"]
    assert spts["kv_bytes"] < dense["kv_bytes"]
    assert printed.index("model ") < printed.index("predicted ") < printed.index("TTFT s")


def test_the_papers_steps_and_where_their_time_goes(tmp_path, capsys):
    out = tmp_path / "latency.json"
    steps = ("pap", "pap+ltp", "spts")
    assert (
        run_local("--shape", "tiny", "--lengths", "200", "--methods", *steps, "--parts", "--out", str(out))
        == 0
    )
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert last_line(printed) == report
    flop = {row["method"]: row["predicted_flop"] for row in report["rows"]}
    assert flop["dense"] > flop["pap"] > flop["pap+ltp"] > flop["spts"]
    parts = [part for part in report["parts"] if part["method"] == "spts"]
    assert {part["layers"] for part in parts} == {"0-2", "3-3", "4-4", "5-5", "6-6", "7-7"}
    calls = {(part["layers"], part["part"]): part["calls"] for part in parts}
    assert calls["0-2", "norms"] == 6
    assert calls["0-2", "attention"] == 3
    assert calls["3-3", "select"] == 3  # attention, FFN, cut
    assert ("0-2", "select") not in calls
    assert all(part["seconds"] > 0 for part in parts)
    assert "200 tokens, spts, ms" in printed


def test_sparse_shallow_layers_beside_the_papers_steps(capsys):
    args = ("--shape", "tiny", "--lengths", "700", "--methods", "pap", "spts", "--density", "0.5", "0.1")
    assert run_local(*args, "--parts") == 0
    printed = capsys.readouterr().out
    report = last_line(printed)
    rows = {row["method"]: row for row in report["rows"]}
    assert list(rows) == ["dense", "pap", "spts", "spts, density 0.5", "spts, density 0.1", "transformers"]
    assert rows["spts"]["predicted_flop"] > rows["spts, density 0.1"]["predicted_flop"]
    assert rows["spts"]["kv_bytes"] == rows["spts, density 0.1"]["kv_bytes"]
    density = {name: row["attention_density"] for name, row in rows.items()}
    assert density["dense"] == density["spts"] == density["transformers"] == 1.0
    # At 0.1 of 6 blocks the last three each leave out what the three that are always read are not.
    left_out = (128 + 2 * 128) * 128 + 3 * 128 * 60
    assert density["spts, density 0.1"] == pytest.approx(1 - left_out / (700 * 701 / 2))
    assert f"reads {density['spts, density 0.1']:.1%} of the first layers' pairs" in printed
    calls = {
        (part["method"], part["layers"]): part["calls"]
        for part in report["parts"]
        if part["part"] == "attention"
    }
    assert calls["spts", "0-2"] == calls["spts, density 0.1", "0-2"] == 3


def test_sparse_attention_that_reads_everything_wrongly_is_not_timed(capsys, monkeypatch):
    args = ("--shape", "tiny", "--lengths", "200", "--density", "0.5")

    def wrong(q_MHd, k_LKd, v_LKd, scale, density):
        return torch.zeros_like(q_MHd)

    monkeypatch.setattr("spts.kernels.dispatch.sparse_attention", wrong)
    assert run_local(*args) == 1
    assert "spts with sparse attention that reads everything does not equal dense" in capsys.readouterr().err


def test_published_budgets_are_not_scaled(capsys):
    names = ("--shape", "llama-3.1-8b", "--lengths", "100000", "--published", "--tokens-out", "1")
    assert latency.main(["--local", *names, "--device", "nowhere"]) == 2
    case = plan(
        arena.SHAPES["llama-3.1-8b"],
        8192,
        names=["spts"],
        schedule="llama-3.1-8b",
        proxy=ProxyShape(channels=512, rank=192),
        dtype_bytes=2,
        published=True,
    )
    assert case.schedule.active_tokens(10) == 9216
    assert case.flops["dense"] / case.flops["spts"] == pytest.approx(1.44, abs=0.01)


def test_backends_are_rivals_that_answer_alike(capsys):
    args = ("--shape", "tiny", "--lengths", "50", "--backends", "math", "flash")
    assert run_local(*args) == 0
    rows = last_line(capsys.readouterr().out)["rows"]
    assert [row["method"] for row in rows] == ["dense", "spts", "dense, math", "dense, flash", "transformers"]
    assert rows[2]["kv_bytes"] == rows[0]["kv_bytes"]
    assert run_local("--shape", "tiny", "--lengths", "50", "--backends", "every") == 0
    assert "dense, flash" in [row["method"] for row in last_line(capsys.readouterr().out)["rows"]]
    assert run_local("--shape", "tiny", "--lengths", "50", "--backends", "cudnn") == 2
    assert "backends must be ones that torch has" in capsys.readouterr().err


def test_batches_are_decoded_over_caches_of_their_own(capsys):
    args = ("--shape", "tiny", "--lengths", "50", "--batches", "1", "3")
    assert run_local(*args) == 0
    printed = capsys.readouterr().out
    rows = last_line(printed)["decode"]
    assert [(row["method"], row["batch"]) for row in rows] == [
        (method, batch) for method in ("dense", "spts") for batch in (1, 3)
    ]
    for row in rows:
        assert row["step_min_s"] <= row["step_median_s"] <= row["step_max_s"]
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / row["step_median_s"])
        assert (row["length_tokens"], row["steps"]) == (50, 3)
    # Decoding the smaller batch has lengthened the first of its caches by 3 steps and 3 to warm up.
    token_bytes = 8 * 2 * 2 * 8 * 4
    assert [row["kv_bytes"] for row in rows[:2]] == [50 * token_bytes, (3 * 50 + 6) * token_bytes]
    assert "tokens/s" in printed


def test_model_folder_uses_its_fitted_proxies(folder, capsys):
    assert run_local("--model", str(folder), "--lengths", "100") == 0
    about = last_line(capsys.readouterr().out)
    assert about["proxies"] == "fitted, 48 channels, rank 16"


def test_one_token_out_has_no_time_per_token(capsys):
    assert run_local("--shape", "tiny", "--lengths", "10", "--tokens-out", "1") == 0
    assert last_line(capsys.readouterr().out)["rows"][0]["tpot_median_s"] is None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--shape", "no-such"], "shape must be one of"),
        (["--shape", "tiny", "--density", "0"], "error: density must be above 0 and at most 1, got 0.0"),
        (["--shape", "tiny", "--density", "nan"], "error: density must be above 0 and at most 1, got nan"),
        (
            ["--shape", "tiny", "--density", "0.1", "0.1000000001"],
            "density must have each share once, got 0.1",
        ),
        (
            ["--shape", "tiny", "--channels", "65"],
            "channels must be at most 64, the FFN's inner size, got 65",
        ),
        (["--shape", "tiny", "--rank", "33"], "rank must be at most 32, the hidden size, got 33"),
        (
            ["--shape", "tiny", "--published", "--schedule", "mine.yaml"],
            "schedule must be a preset's name (llama-3.1-8b",
        ),
        (["--shape", "tiny", "--model", "x"], "model must be left out with --shape"),
        (["--shape", "tiny", "--proxies", "x"], "proxies must be left out with --shape"),
        (["--shape", "tiny", "--rank", "0"], "rank must be an integer of at least 1, got 0"),
        (["--shape", "tiny", "--methods", "dense"], "methods must be of pap, pap+ltp, spts, random, recency"),
        (["--shape", "tiny", "--schedule", "no-such"], "schedule must be one of"),
        (["--shape", "tiny", "--repeats", "0"], "repeats must be an integer of at least 1"),
        (["--shape", "tiny", "--batches", "0"], "batches must be an integer of at least 1, got 0"),
        (["--shape", "tiny", "--lengths", "0"], "lengths must be an integer of at least 1"),
        (["--shape", "tiny", "--device", "nowhere"], "device must be there"),
        (["--shape", "tiny", "--attention", "no-such"], "attention must be a backend that works here"),
        (["--shape", "tiny", "--tensor-parallel-size", "2"], "tensor_parallel_size must be 1 with --local"),
        (["--model", "/no/such/model"], "model must be a folder or a hub id"),
    ],
)
def test_bad_input_is_refused(args, message, capsys):
    assert run_local(*args) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "TTFT" not in printed.out


@pytest.mark.parametrize("name", [".", "missing/report.json", "file/report.json", "x" * 300])
def test_a_report_that_cannot_be_written_is_refused_before_a_model_is_made(
    tmp_path, monkeypatch, capsys, name
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(latency, "local_arena", None)
    assert run_local("--shape", "tiny", "--out", str(tmp_path / name)) == 2
    assert "error: out must be a file" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_fills_up_ends_in_one_line(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("jobs.disk.record.os.fsync", full)
    out = tmp_path / "report.json"
    assert run_local("--shape", "tiny", "--lengths", "10", "--repeats", "1", "--out", str(out)) == 2
    assert f"error: results must be written to {out}, got No space left" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["pap", "pap+ltp"])
def test_the_papers_steps_need_a_layer_that_skips(tmp_path, capsys, method):
    path = tmp_path / "schedule.yaml"
    path.write_text("{num_layers: 8, first_skip_layer: 8, stages: []}")
    args = ("--shape", "tiny", "--lengths", "20", "--schedule", str(path), "--methods", "spts")
    assert run_local(*args, method) == 2
    rule = "methods must not have pap or pap+ltp with a schedule that skips in no layer"
    assert f"error: {rule}, got {method}; leave them out\n" in capsys.readouterr().err
    assert run_local(*args) == 0


def test_ctrl_c_ends_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(latency, "race", interrupted)
    assert run_local("--shape", "tiny") == 130
    assert capsys.readouterr().err == "interrupted: the same command again starts from the beginning\n"


def test_lengths_over_the_context_are_refused_before_anything_runs(folder, capsys):
    assert run_local("--model", str(folder), "--lengths", "100", "512") == 2
    assert "lengths must leave room for 3 tokens in the context of 512" in capsys.readouterr().err


def test_sizes_of_random_proxies_are_refused_for_fitted_ones(folder, capsys):
    assert run_local("--model", str(folder), "--lengths", "100", "--rank", "8") == 2
    assert "channels and rank must be left out" in capsys.readouterr().err


def test_a_wrong_result_is_never_timed(monkeypatch, capsys):
    class Wrong(Transformers):
        def run(self, prompt, follow):
            timed = super().run(prompt, follow)
            return Timed(**{**vars(timed), "answer": (timed.answer[0], timed.answer[1] * 1.5)})

    monkeypatch.setattr("jobs.timing.contestants.Transformers", Wrong)
    assert run_local("--shape", "tiny", "--lengths", "50") == 1
    printed = capsys.readouterr()
    assert "transformers does not equal dense: logits after decode differ by" in printed.err
    assert "TTFT" not in printed.out


def model_of(shape: ModelShape, max_tokens: int) -> tuple[SptsModel, object]:
    hf_model = random_model(shape, max_tokens=max_tokens, dtype="float32", device="cpu")
    size = ProxyShape.default(shape)
    proxies = random_proxies(shape, size, first_layer=0, fingerprint="random")
    return SptsModel(hf_model, fingerprint="random", proxies=proxies), hf_model


def case_at(length: int):
    return plan(
        TINY,
        length,
        names=["spts"],
        schedule="llama-3.1-8b",
        proxy=ProxyShape.default(TINY),
        dtype_bytes=4,
    )


def test_own_and_transformers_answer_alike():
    model, hf_model = model_of(TINY, 80)
    prompt, follow = torch.randint(101, (60,)).tolist(), [5, 6, 7]
    own, rival = Own(model, Dense()).run(prompt, follow), Transformers(hf_model).run(prompt, follow)
    assert disagreement(own.answer, rival.answer, 1e-4) is None
    assert own.kv_bytes == rival.kv_bytes == 60 * 8 * 2 * 2 * 8 * 4
    chosen = Own(model, case_at(60).methods["spts"]).run(prompt, follow)
    assert disagreement(chosen.answer, rival.answer, 1e-4) is not None
    assert disagreement(Own(model, case_at(60).full()).run(prompt, follow).answer, own.answer, 0.0) is None


def test_disagreement_sees_nan_and_tokens():
    good = (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
    assert disagreement(good, good, 0.0) is None
    assert disagreement((good[0], torch.tensor([1.0, float("nan")])), good, 1.0) is not None
    assert disagreement((1, 2), (1, 2), 0.0) is None
    assert disagreement((1, 2), (1, 3), 0.0) == "chose (1, 2), not (1, 3)"


def test_work_that_was_not_planned_is_a_fault():
    model, _ = model_of(TINY, 80)
    case = case_at(60)
    warm = {name: Own(model, method).run(list(range(60)), []) for name, method in case.methods.items()}
    assert work_faults(case, warm, TINY) == []
    swapped = {"dense": warm["spts"], "spts": warm["dense"]}
    assert len(work_faults(case, swapped, TINY)) == 4


class Fixed:
    """Takes the times it is told."""

    def __init__(self, name: str, times: list[float], order: list[str]) -> None:
        self.name = name
        self._times = iter(times)
        self._order = order

    def run(self, prompt, follow) -> Timed:
        self._order.append(self.name)
        return Timed(ttft_s=next(self._times), tpot_s=None, kv_bytes=8, answer=(), work=None)


def test_runs_take_turns_and_ratios_are_medians_within_a_round():
    order: list[str] = []
    contestants = [
        Fixed("dense", [10.0, 20.0, 40.0], order),
        Fixed("spts", [5.0, 5.0, 10.0], order),
        Fixed("transformers", [12.0, 20.0, 48.0], order),
    ]
    first = Timed(ttft_s=99.0, tpot_s=None, kv_bytes=8, answer=(), work=None)
    rows = measure(
        case_at(60),
        contestants,
        warm={each.name: first for each in contestants},
        prompt=[],
        follow=[],
        repeats=3,
        progress=lambda: order.append("|"),
    )
    assert "".join(name[0] for name in order if name != "|") == "dst" + "std" + "tds"
    _, spts, rival = rows
    assert (spts.ttft_median_s, spts.ttft_min_s, spts.ttft_max_s) == (5.0, 5.0, 10.0)
    assert spts.speedup_vs_dense_ratio == 4.0  # of 2, 4, 4
    assert spts.speedup_vs_transformers_ratio == 4.0  # of 2.4, 4, 4.8
    assert spts.speedup_vs_fastest_dense_ratio == 4.0  # dense and transformers have the same median
    assert spts.first_ttft_s == 99.0
    assert spts.achieved_flop_per_s == spts.predicted_flop / 5.0
    assert rival.speedup_vs_dense_ratio == pytest.approx(10 / 12)  # of 10/12, 1, 40/48
    lines = table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1


def test_unknown_method_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"methods must be of .*, got 'lazy'"):
        plan(TINY, 60, names=["lazy"], schedule="llama-3.1-8b", proxy=None, dtype_bytes=4)


def test_local_needs_neither_ray_nor_deepspeed_nor_pydantic(folder):
    missing = ("ray", "deepspeed", "pydantic", "fastapi", "openai", "scipy", "rich", "datasets")
    args = ["--local", "--model", str(folder), "--lengths", "50", "--repeats", "1"]
    done = run_without(missing, f"from jobs.latency import main; sys.exit(main({args!r}))")
    assert done.returncode == 0, done.stderr
    assert len(last_line(done.stdout)["rows"]) == 3


@pytest.mark.parametrize(
    "option",
    [
        ("--shape", "tiny"),
        ("--rank", "8"),
        ("--attention", "eager"),
        ("--backends", "math"),
        ("--parts",),
        ("--batches", "2"),
    ],
)
def test_options_of_the_local_race_need_local(option, capsys):
    assert latency.main([*option, "--lengths", "10"]) == 2
    assert f"{option[0][2:]} must be left out without --local" in capsys.readouterr().err


def test_a_prompt_shorter_than_the_tokens_it_should_keep(tmp_path, capsys):
    stages = "[{last_layer: 6, active_tokens: 32, keep_tokens: 32}]"
    path = tmp_path / "schedule.yaml"
    path.write_text(f"{{num_layers: 8, first_skip_layer: 2, stages: {stages}, recent_tokens: 32}}")
    assert run_local("--shape", "tiny", "--lengths", "20", "--schedule", str(path)) == 0
    printed = capsys.readouterr().out
    assert "2-6: 32 tokens, then keep 32; the last 32 in every choice" in printed
    assert last_line(printed)["rows"][1]["predicted_speedup_ratio"] == 1.0


@pytest.mark.real
@pytest.mark.slow
def test_on_a_real_engine(folder, capsys):
    args = ["--model", str(folder), "--lengths", "100", "--repeats", "1", "--tokens-out", "3"]
    assert latency.main(args) == 0
    report = last_line(capsys.readouterr().out)
    dense, chosen = report["rows"]
    assert (dense["method"], chosen["method"]) == ("dense", "spts")
    assert chosen["kv_bytes"] == chosen["predicted_kv_bytes"] < dense["kv_bytes"]
    assert "1 rank" in report["engine"]


def test_engine_contestant_reads_the_result(monkeypatch):
    from cluster.protocol import Result

    class Handle:
        class run:  # stands for an actor's method
            @staticmethod
            def remote(request):
                return Result(
                    request_id=request.request_id,
                    token_ids=(1, 2, 3),
                    finish_reason="length",
                    prompt_tokens=len(request.token_ids),
                    queue_s=0.0,
                    ttft_s=0.5,
                    decode_s=0.2,
                    total_s=0.7,
                    work=(),
                    kv_tokens=4,
                    kv_bytes=64,
                    flops=1.0,
                    dense_flops=1.0,
                    dense_kv_bytes=64,
                )

    import ray

    monkeypatch.setattr(ray, "get", lambda value: value)
    timed = OnEngine(Handle, Spts(schedule=case_at(60).full().schedule)).run([1, 2], [3, 4])
    assert (timed.ttft_s, timed.tpot_s, timed.kv_bytes) == (0.5, 0.1, 64)
    assert timed.answer == (1, 2, 3)
