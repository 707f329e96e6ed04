"""The table of neighborhood attention: every implementation beside its check, and why one is missing."""

import json

import pytest
import torch
from t5kernels.tools import neighborhoods
from triton_device import CUDA, needs_cuda

TINY = neighborhoods.Case(name="tiny", images=1, rows=6, columns=5, heads=2, width=16, window=3)


@pytest.fixture
def on_the_cpu(monkeypatch):
    draw = neighborhoods.draw
    monkeypatch.setattr(neighborhoods, "draw", lambda case: draw(case, "cpu"))
    monkeypatch.setattr(neighborhoods, "surroundings", dict)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(neighborhoods, "CASES", (TINY,))
    monkeypatch.setattr(neighborhoods, "timings", lambda run, _: {"forward_ms": 1.0, "both_ms": 2.0})


@pytest.mark.skipif(CUDA, reason="a stand-in for the card")
def test_a_wrong_result_is_marked_and_an_implementation_that_cannot_says_why(on_the_cpu, monkeypatch, tmp_path):
    attention = neighborhoods.neighborhood_attention

    def off(*tokens, impl, **sizes):
        return (
            attention(*tokens, impl="reference", **sizes) + 0.1
            if impl == "off"
            else attention(*tokens, impl=impl, **sizes)
        )

    monkeypatch.setattr(neighborhoods, "neighborhood_attention", off)
    monkeypatch.setattr(neighborhoods, "IMPLEMENTATIONS", ("reference", "off", "natten"))
    out = tmp_path / "out.json"
    with pytest.raises(SystemExit, match="further from float64"):
        neighborhoods.main(["--out", str(out)])
    [row] = json.loads(out.read_text())["cases"]
    assert row["runs"]["reference"]["correct"] and not row["runs"]["off"]["correct"]
    assert "expected natten installed" in row["runs"]["natten"]["cannot"]


@pytest.mark.gpu
@needs_cuda
def test_a_case_is_timed_and_checked():
    row = neighborhoods.measure(TINY, milliseconds=1)
    assert row["runs"]["triton"]["correct"] and row["runs"]["triton"]["forward_ms"] > 0
