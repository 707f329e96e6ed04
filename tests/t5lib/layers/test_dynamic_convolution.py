"""Locality "dconv_v": every token convolves its surroundings with a kernel of its own, nothing at first."""

import pytest
import torch
from torch.nn import functional as F

from t5lib.layers.config import TTTConfig
from t5lib.layers.dynamic_convolution import DynamicConvolution
from t5lib.layers.factory import make_mixer
from t5lib.layers.grid import TokenGrid
from t5lib.layers.mixers import convolved

B, H, D = 2, 2, 16
GRIDS = [TokenGrid(3, 5, num_prefix_tokens=2), TokenGrid(1, 4), TokenGrid(4, 3, 1, num_suffix_tokens=3)]
by_grid = pytest.mark.parametrize("grid", GRIDS, ids=["prefix", "row", "prefix and text"])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tokens(grid: TokenGrid, seed: int = 0, width: int = D) -> torch.Tensor:
    return draw(B, H, grid.patches.stop + grid.num_suffix_tokens, width, seed=seed)


def trained(width: int = D) -> DynamicConvolution:
    """With every weight off its start."""
    conv = DynamicConvolution(H, width).double()
    with torch.no_grad():
        for seed, parameter in enumerate(conv.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=seed))
    return conv


@by_grid
def test_each_token_applies_its_own_kernel_and_tokens_beside_the_grid_pass_by(grid):
    conv, x = trained(), tokens(grid)
    out, expected = conv(x, grid), torch.zeros_like(x)
    first = grid.num_prefix_tokens
    for row in range(grid.rows):
        for column in range(grid.columns):
            here = first + row * grid.columns + column
            hidden = F.silu(x[:, :, here, None] @ conv.down)
            for tap in range(9):
                r, c = row + tap // 3 - 1, column + tap % 3 - 1
                if 0 <= r < grid.rows and 0 <= c < grid.columns:
                    kernel = (hidden @ conv.up[:, tap] + conv.bias[:, tap])[:, :, 0]
                    expected[:, :, here] += kernel * x[:, :, first + r * grid.columns + c]
    torch.testing.assert_close(out, expected)


@by_grid
def test_a_layer_starts_as_it_would_without(grid):
    torch.manual_seed(0)
    plain, dynamic = (make_mixer(H, D, TTTConfig(locality=name)).double() for name in ("none", "dconv_v"))
    dynamic.load_state_dict(plain.state_dict(), strict=False)
    given = [tokens(grid, seed) for seed in range(3)]
    assert torch.equal(dynamic(*given, grid), plain(*given, grid))


def test_with_a_bias_alone_it_is_the_static_convolution():
    conv, grid = DynamicConvolution(H, D).double(), GRIDS[0]
    static = torch.nn.Conv2d(H * D, H * D, 3, padding=1, groups=H * D).double()
    with torch.no_grad():
        static.bias.zero_()
        conv.bias.copy_(static.weight.view(H, D, 9, 1).permute(0, 2, 3, 1))
    torch.testing.assert_close(conv(tokens(grid), grid), convolved(tokens(grid), static, grid))


def test_gradients_are_exact():
    conv, grid = trained(4), TokenGrid(2, 3, num_prefix_tokens=1)
    inputs = (tokens(grid, width=4).requires_grad_(), *conv.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: conv(x, grid), inputs, fast_mode=True)


def test_half_precision_and_a_batch_of_none():
    conv, grid = trained().bfloat16(), GRIDS[0]
    out = conv(tokens(grid).bfloat16(), grid)
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
    assert conv(tokens(grid).bfloat16()[:0], grid).shape == (0, H, 17, D)
