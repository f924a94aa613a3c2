import json

import pytest

from jobs import latency_figure


def report(*, length: int, parts: bool) -> dict:
    rows = [
        {
            "method": method,
            "length_tokens": length,
            "speedup_vs_fastest_dense_ratio": ratio,
            "predicted_speedup_ratio": ratio,
        }
        for method, ratio in (
            ("dense", 1.0),
            ("spts", 2.5),
            ("spts, density 0.1", 3.4),
            ("transformers", 0.9),
        )
    ]
    spent = [
        {"method": method, "length_tokens": length, "layers": "0-3", "part": part, "seconds": 0.2, "calls": 4}
        for method in ("dense", "spts")
        for part in ("attention", "norms", "other")
    ]
    return {"model": "a: b", "hardware": "c, d", "rows": rows, "parts": spent if parts else []}


def test_runs_of_several_lengths_become_one_png(tmp_path):
    files = [tmp_path / "short.json", tmp_path / "long.json"]
    files[0].write_text(json.dumps(report(length=4096, parts=True)))
    files[1].write_text(json.dumps(report(length=131072, parts=False)))
    out = tmp_path / "figure.png"
    assert latency_figure.main([*map(str, files), "--out", str(out), "--length", "4096"]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


WHOLE = report(length=4096, parts=True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"rows": []}',
        "[" * 100_000,
        json.dumps({**WHOLE, "rows": {}}),
        json.dumps({**WHOLE, "rows": [1]}),
        json.dumps({**WHOLE, "rows": [{"method": "spts"}]}),
        json.dumps({**WHOLE, "rows": [{**WHOLE["rows"][0], "length_tokens": "4096"}]}),
        json.dumps({**WHOLE, "parts": None}),
        json.dumps({**WHOLE, "parts": [[]]}),
        json.dumps({**WHOLE, "parts": [{**WHOLE["parts"][0], "seconds": None}]}),
        json.dumps({**WHOLE, "model": 1}),
    ],
)
def test_what_is_no_report_is_refused_by_name(tmp_path, text, capsys):
    path = tmp_path / "other.json"
    path.write_text(text)
    assert latency_figure.main([str(path), "--out", str(tmp_path / "x.png")]) == 2
    assert f"reports must be files of jobs.latency --out, got {path}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("parts", "remedy"), [(False, "run jobs.latency with --parts"), (True, "choose from 2048, 4096")]
)
def test_a_length_without_parts_is_refused(tmp_path, capsys, parts, remedy):
    files = [tmp_path / "long.json", tmp_path / "short.json"]
    for path, length in zip(files, (4096, 2048), strict=True):
        path.write_text(json.dumps(report(length=length, parts=parts)))
    assert latency_figure.main([*map(str, files), "--out", str(tmp_path / "x.png"), "--length", "512"]) == 2
    message = f"length must be one that was run with --parts, got 512; {remedy}\n"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["x", "x.txt", "x.jpg", "no/x.png", "folder.png"])
def test_a_figure_that_cannot_be_written_is_refused(tmp_path, capsys, name):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(WHOLE))
    (tmp_path / "folder.png").mkdir()
    assert latency_figure.main([str(path), "--out", str(tmp_path / name), "--length", "4096"]) == 2
    assert "error: out must be a " in capsys.readouterr().err
    assert {file.name for file in tmp_path.iterdir()} == {"report.json", "folder.png"}
