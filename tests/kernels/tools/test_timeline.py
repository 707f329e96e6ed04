"""The timeline of a layer: what counts as a kernel's time, and that nothing is told without a card."""

import pytest
import torch
from t5kernels.tools import timeline


def event(name, start, end):
    return {"name": name, "ts": start, "dur": end - start, "args": {"grid": [4, 2, 1], "registers per thread": 32}}


def test_kernels_that_overlap_add_up_to_the_whole():
    events = [event("FillFunctor", 0, 10), event("first", 12, 20), event("second", 13, 26), event("third", 21, 25)]
    events += [event("FillFunctor", 30, 40), event("first", 41, 50), event("second", 42, 55), event("third", 51, 56)]
    runs = list(timeline._replays(events[::-1]))
    assert [[kernel.us for kernel in run] for run in runs] == [[10, 6, 0], [10, 5, 1]]
    assert runs[0][0] == timeline.Kernel("first", (4, 2, 1), 32, 10)
    assert timeline.table(runs[0]).splitlines()[-1].split() == ["16.0", "us", "in", "all"]


def test_without_a_card_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        timeline.main(["--out", str(tmp_path / "timeline.json")])
    assert "no CUDA device" in capsys.readouterr().err and not list(tmp_path.iterdir())
