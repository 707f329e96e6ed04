"""Mixers at home in PyTorch's machinery: compiled whole, exported, mapped over, checkpointed, in half precision."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from t5lib.layers.config import TTTConfig
from t5lib.layers.factory import make_mixer
from t5lib.layers.grid import TokenGrid

H, D = 2, 8
GRIDS = [TokenGrid(3, 4, num_prefix_tokens=1), TokenGrid(3, 4, num_suffix_tokens=5)]
by_grid = pytest.mark.parametrize("grid", GRIDS, ids=["prefix", "text"])


def mixer(**settings):
    torch.manual_seed(0)
    return make_mixer(H, D, TTTConfig(**settings)).double()


def tokens(grid, seed=0):
    count = grid.patches.stop + grid.num_suffix_tokens
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 2, H, count, D, dtype=torch.float64, generator=generator).unbind(0)


@by_grid
@pytest.mark.parametrize("locality", ["none", "dwc_qk", "dwc_v", "dconv_v"])
def test_it_compiles_as_one_graph_also_when_the_grid_changes(locality, grid):
    mix = mixer(locality=locality)
    torch._dynamo.reset()
    compiled = torch.compile(mix, backend="eager", fullgraph=True)
    larger = TokenGrid(5, 6, grid.num_prefix_tokens, grid.num_suffix_tokens)
    for size in (grid, larger):
        torch.testing.assert_close(compiled(*tokens(size), size), mix(*tokens(size), size))


@by_grid
def test_it_is_exported(grid):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = mixer()

        def forward(self, q, k, v):
            return self.mix(q, k, v, grid)

    layer, given = Layer(), tokens(grid)
    torch.testing.assert_close(torch.export.export(layer, given).module()(*given), layer(*given))


@by_grid
def test_it_is_mapped_over_and_differentiated_by_torch_func(grid):
    mix, (q, k, v) = mixer(), tokens(grid)
    values = torch.stack([v, 2 * v, -v])
    mapped = torch.func.vmap(lambda v: mix(q, k, v, grid))(values)
    for out, value in zip(mapped, values, strict=True):
        torch.testing.assert_close(out, mix(q, k, value, grid))
    along = torch.func.jvp(lambda v: mix(q, k, v, grid), (v,), (v,))[1]
    step = 1e-6
    slope = (mix(q, k, (1 + step) * v, grid) - mix(q, k, (1 - step) * v, grid)) / (2 * step)
    torch.testing.assert_close(along, slope, rtol=1e-6, atol=1e-8)


@by_grid
def test_checkpointing_gives_the_same_gradients(grid):
    mix, given = mixer(), tokens(grid)

    def gradients(run):
        leaves = [t.clone().requires_grad_() for t in given]
        return torch.autograd.grad(run(*leaves, grid).square().sum(), [*leaves, *mix.parameters()])

    again = gradients(lambda *inputs: checkpoint(mix, *inputs, use_reentrant=False))
    for first, second in zip(gradients(mix), again, strict=True):
        assert torch.equal(first, second)


@by_grid
def test_autocast_stays_near_full_precision(grid):
    mix, given = mixer().float(), [t.float() for t in tokens(grid)]
    expected = mix(*given, grid)
    with torch.autocast("cpu", torch.bfloat16):
        halves = mix(*(t.bfloat16() for t in given), grid)
    assert halves.dtype == torch.bfloat16
    assert (halves - expected).norm() < 0.03 * expected.norm()
