"""The sweep over tiles: any tile gives the same results, and the one in use is in use again afterwards."""

import functools

import pytest
import torch
from t5kernels.tools import sweep
from t5kernels.tools.cases import Case
from triton_device import DEVICE

CASE = Case(name="small", images=2, rows=5, columns=7, heads=1, width=24)


@pytest.fixture(scope="module")
def calls():
    draw = functools.partial(sweep.Inputs.draw, dtype=torch.float16, device=DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "Inputs", type("Drawn", (), {"draw": staticmethod(draw)}))
        return sweep.calls(CASE)


@pytest.mark.parametrize("kernel", sweep.EVERY_TILE)
def test_any_tile_gives_the_same_and_the_one_in_use_stays(kernel, calls, monkeypatch):
    in_use = sweep.EVERY_TILE[kernel][32]
    other = sweep.Tile(hidden=16 if in_use.hidden else 0, block=in_use.block // 2, warps=4)
    monkeypatch.setattr(sweep, "median_ms", lambda call, milliseconds: sweep.EVERY_TILE[kernel][32].block)
    monkeypatch.setattr(sweep, "candidates", lambda kernel, width: [other, in_use])
    timed = []
    rows = sweep.sweep(kernel, calls[kernel], 32, timed.append)
    assert [row["tile"] for row in rows] == [str(other), str(in_use)]
    assert [row["in_use"] for row in timed] == [True, False]
    assert rows[0]["deviation"] < 3e-3
    assert rows[1]["deviation"] == 0
    assert sweep.EVERY_TILE[kernel][32] == in_use


@pytest.mark.parametrize(
    ("kernel", "width"), [(kernel, w) for kernel in sweep.EVERY_TILE for w in sweep.EVERY_TILE[kernel]]
)
def test_candidates_are_different_and_hold_what_is_in_use_or_its_like(kernel, width):
    tiles = list(sweep.candidates(kernel, width))
    assert len(set(tiles)) == len(tiles) > 10
    assert len(tiles) <= 24 or width not in (80, 96)  # a sweep of what has not been timed is short
    assert all((tile.hidden > 0) == (sweep.EVERY_TILE[kernel][width].hidden > 0) for tile in tiles)


def test_without_a_card_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        sweep.main(["--case", "n4096", "--out", str(tmp_path / "sweep.json")])
