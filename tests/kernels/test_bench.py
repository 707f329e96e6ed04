"""The benchmark prints no time without the check it passed, and refuses to run where there is no card."""

import json
import math

import pytest
import torch
from t5kernels import bench

CASE = bench.Case(1, 12, 2, 8)


@pytest.fixture
def inputs():
    return bench.Inputs.draw(CASE, torch.float32, "cpu")


def test_a_right_run_passes_and_a_wrong_one_fails(inputs):
    right = bench.layer("reference")
    runs = {
        "right": right,
        "wrong": lambda *leaves: 1.001 * right(*leaves),
        "nan": lambda *leaves: right(*leaves) * torch.tensor(math.nan),
    }
    checked = bench.check(inputs, runs)
    assert checked["correct"] == {"right": True, "wrong": False, "nan": False}
    assert set(checked["errors"]["right"]) == set(bench.NAMES)


def test_the_table_stands_every_time_beside_its_bound_and_its_check(inputs, monkeypatch):
    monkeypatch.setattr(bench, "median_ms", lambda run, milliseconds: (run(), 0.5)[1])
    runs = {"triton": bench.layer("reference"), "bad": lambda *leaves: 2 * bench.layer("reference")(*leaves)}
    times = {name: bench.timings(run, inputs, 1) | {"peak_bytes": 768} for name, run in runs.items()}
    row = {
        "case": str(CASE),
        "tensor_bytes": 384,
        **bench.bounds(CASE, 1e9),
        "runs": times | {"cudnn attention": times["bad"]},
        "check": bench.check(inputs, runs),
    }
    note, _, right, wrong, other = bench.table([row]).splitlines()
    assert "key norm" in note
    assert row["forward_bound_ms"] == pytest.approx(4 * 12 * 2 * 8 * 2 / 1e9 * 1e3)
    assert "0.500" in right
    assert " 2.00  error 1.00x plain" in right
    assert "WRONG" in wrong
    assert "another function" in other


def test_without_a_card_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        bench.main(["--out", str(tmp_path / "bench.json")])


def test_a_report_is_written_whole(tmp_path):
    bench.write(tmp_path / "new/bench.json", {"cases": []})
    assert json.loads((tmp_path / "new/bench.json").read_text()) == {"cases": []}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["bench.json"]
