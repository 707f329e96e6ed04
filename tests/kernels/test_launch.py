"""Programs share the tokens so that a card is busy, and none is left out."""

import pytest
import torch
from t5kernels import launch


class StandIn:
    """A kernel that notes when Triton would choose a compilation, and the launches of one that is known."""

    def __init__(self):
        self.chosen, self.launched = [], []

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.chosen.append((grid, arguments, options))
            return StandInCompiled(self.launched)

        return run


class StandInCompiled:
    def __init__(self, launched):
        self.launched = launched

    def __getitem__(self, grid):
        return lambda *arguments: self.launched.append((grid, arguments))


@pytest.mark.parametrize("blocks", [1, 4, 64, 300])
@pytest.mark.parametrize(("heads", "images"), [(1, 1), (48, 1), (24, 2), (6, 128), (72, 32)])
def test_programs_share_all_tokens_and_keep_a_large_card_busy(blocks, heads, images):
    programs = 132
    blocks_each, images_each = launch._shares((blocks,), heads, images, programs)
    chunks, groups = -(-blocks // blocks_each), -(-images // images_each)
    assert chunks <= launch.MOST_CHUNKS
    assert (chunks - 1) * blocks_each < blocks <= chunks * blocks_each
    assert (groups - 1) * images_each < images <= groups * images_each
    # The work of the busiest place, against everything shared out evenly and what a program costs by itself.
    busiest = -(-heads * chunks * groups // programs) * (blocks_each * images_each + launch.OVERHEAD)
    assert busiest <= 1.5 * (blocks * heads * images / programs) + 3 * launch.OVERHEAD + blocks / launch.MOST_CHUNKS


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "_known", {})
    return StandIn()


def test_triton_chooses_a_compilation_once_a_grid_and_every_launch_has_its_own_tensors(kernel):
    x, y, tile = torch.zeros(64), torch.ones(64), launch.Tile(block=16, warps=4)
    for tensor, grid in ((x, (2, 3)), (x, (4, 1, 5)), (y, (2, 3)), (y, (4, 1, 5))):
        launch.launch(kernel, grid, tensor, tile, tensor, 7, 0.5)
    assert kernel.chosen == [(grid, (x, 7, 0.5, False), tile.options) for grid in ((2, 3, 1), (4, 1, 5))]
    assert [grid for grid, _ in kernel.launched] == [(2, 3, 1), (4, 1, 5)]
    assert all(arguments[0] is y and arguments[1:] == (7, 0.5, False) for _, arguments in kernel.launched)


def test_whatever_triton_compiles_for_makes_another_compilation(kernel):
    x, tile = torch.zeros(64), launch.Tile(block=16, warps=4)
    calls = [
        *((x, tile, 7), (x.half(), tile, 7), (x[1:], tile, 7), (x, tile, 8)),
        (x, launch.Tile(block=16, warps=8), 7),
    ]
    for tensor, each, number in calls * 2:
        launch.launch(kernel, (1, 1), tensor, each, tensor, number)
    launch.launch(StandIn(), (1, 1), x, tile, x, 7)
    assert len(kernel.chosen) == len(calls) == len(kernel.launched)


def test_sizes_that_never_repeat_take_no_more_and_more_memory(kernel, monkeypatch):
    monkeypatch.setattr(launch, "MOST_KNOWN", 10)
    x, tile = torch.zeros(64), launch.Tile(block=16, warps=4)
    for number in range(100):
        launch.launch(kernel, (1, 1), x, tile, x, number)
    assert len(launch._known) <= 10
