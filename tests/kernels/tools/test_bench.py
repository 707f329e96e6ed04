"""The benchmark prints no time without the check it passed, and refuses to run where there is no card."""

import json
import math
from dataclasses import replace

import pytest
import torch
from t5kernels.tools import bench
from t5kernels.tools.cases import CASES, Case, Inputs
from t5kernels.ttt.api import FUSED_INNERS

CASE = Case(
    name="small",
    images=1,
    rows=3,
    columns=4,
    heads=2,
    width=8,
    text=5,
    targets={"forward_ms": (0.6, 0.4), "memory": (1.5, None)},
)


@pytest.fixture
def inputs():
    return Inputs.draw(CASE, torch.float32, "cpu")


def scaled(inputs, factor):
    """A run whose outputs are so many times what they should be."""
    right = bench.layer(inputs, "reference")
    return bench.Run(lambda: tuple(factor * o for o in right.forward()), right.leaves, right.d_outs)


def test_a_right_run_passes_and_a_wrong_one_fails(inputs):
    runs = {name: scaled(inputs, by) for name, by in (("right", 1), ("wrong", 1.001), ("nan", math.nan))}
    verdict = bench.check(inputs, runs)
    assert verdict["correct"] == {"right": True, "wrong": False, "nan": False}
    assert set(verdict["errors"]["right"]) == {"out", "text_out", *(f"d_{name}" for name in inputs.leaves)}


def report(inputs, monkeypatch, **runs):
    """Every version of one case's row that `measure` wrote, with runs and a clock of our own."""
    versions = []
    monkeypatch.setattr(bench.Inputs, "draw", lambda case: inputs)
    monkeypatch.setattr(bench, "make", lambda name, inputs: runs[name])
    monkeypatch.setattr(bench, "peak_bytes", lambda run: run.forward() and 3 * CASE.elements)
    monkeypatch.setattr(bench, "recorded", lambda run: run)
    monkeypatch.setattr(bench, "median_ms", lambda run, milliseconds: (run(), 0.5)[1])
    machine = {"bytes_a_second": 1e9, "flops_a_second": 1e12}
    bench.measure(CASE, list(runs), machine, 1, lambda row: versions.append(json.loads(json.dumps(row))))
    return versions


def test_the_table_stands_every_time_beside_its_bounds_its_targets_and_its_check(inputs, monkeypatch):
    *_, row = report(inputs, monkeypatch, kernels=scaled(inputs, 1), compiled=scaled(inputs, 2))
    *_, name, _, right, wrong = bench.table([row]).splitlines()
    assert name == "small: swiglu, 1 x 12+5 tokens, 2 x 8"
    assert row["bounds"]["forward_bytes_ms"] == pytest.approx(5 * 17 * 2 * 8 * 2 / 1e9 * 1e3)
    assert row["bounds"]["forward_products_ms"] == pytest.approx(9 * 17 * 2 * 2 * 8 * 8 / 1e12 * 1e3)
    assert right.split()[:2] == ["kernels", "0.500"]
    assert "1.50  error 1.00x plain, forward must (0.6/0.4), memory must (1.5/-)" in right
    assert "WRONG" in wrong
    assert "must" not in wrong


def test_an_inner_model_is_given_as_many_weights_as_it_has():
    leaves = Inputs.draw(replace(CASE, inner="linear_proj_qk"), torch.float32, "cpu").leaves
    assert "w2" in leaves and "w3" not in leaves


def test_what_was_measured_is_written_as_it_comes_and_can_be_shown(inputs, monkeypatch):
    versions = report(inputs, monkeypatch, kernels=scaled(inputs, 1))
    assert [len(row["runs"]["kernels"]) for row in versions] == [1, 2, 3, 4, 5]  # memory and check, then four times
    assert "-" in bench.table([versions[0]]).splitlines()[-1]


def test_a_run_that_cannot_do_a_case_is_left_out(inputs, monkeypatch, capsys):
    def refuse():
        raise RuntimeError("no kernel")

    *_, row = report(inputs, monkeypatch, cudnn=bench.Run(refuse, [], ()), kernels=scaled(inputs, 1))
    assert list(row["runs"]) == ["kernels"]
    assert "cudnn cannot do it and is left out: no kernel" in capsys.readouterr().out


def test_attention_gets_image_and_text_as_one_sequence(inputs, monkeypatch):
    monkeypatch.setattr(bench, "sdpa_kernel", lambda backend: torch.no_grad())
    (out,) = bench.attention(inputs).forward()
    assert out.shape == (1, 2, 17, 8)


def test_the_cases_are_those_of_the_targets_and_of_other_models():
    with_targets = {case.name for case in CASES if case.targets}
    by_inner = {f"{size}{kind}" for size in ("n4096", "n16384") for kind in ("", "-last", "-linear")}
    assert with_targets == {*by_inner, "flux", "so400m"}
    assert {case.width for case in CASES} == {64, 72, 128}
    assert {case.inner for case in CASES} == set(FUSED_INNERS) == set(bench.PRODUCTS)
    assert any(case.text for case in CASES)
    assert any(case.prefix for case in CASES)


def test_without_a_card_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        bench.main(["--out", str(tmp_path / "bench.json")])


def test_a_report_is_written_whole(tmp_path):
    bench.write(tmp_path / "new/bench.json", {"cases": []})
    assert json.loads((tmp_path / "new/bench.json").read_text()) == {"cases": []}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["bench.json"]
