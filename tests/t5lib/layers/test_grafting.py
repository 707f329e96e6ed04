"""The operators of Diffusion Grafting: square windows and gated convolutions; tokens beside the grid see everything."""

import pytest
import torch
from torch.nn import functional as F

from t5lib.layers.config import TTTConfig
from t5lib.layers.factory import make_mixer
from t5lib.layers.grid import TokenGrid
from t5lib.utils.errors import T5Error

B, H, D = 2, 2, 4
GRIDS = [
    TokenGrid(4, 6, num_prefix_tokens=2),
    TokenGrid(1, 7),
    TokenGrid(2, 5, 1, num_suffix_tokens=3),
    TokenGrid(3, 4, num_suffix_tokens=2),
]
by_grid = pytest.mark.parametrize("grid", GRIDS, ids=["prefix", "row", "both", "text"])
both = pytest.mark.parametrize("preset", ["graft-swa", "graft-conv"])


def tokens(grid: TokenGrid, dtype=torch.float64, batch: int = B) -> list[torch.Tensor]:
    generator, count = torch.Generator().manual_seed(0), grid.patches.stop + grid.num_suffix_tokens
    return list(torch.randn(3, batch, H, count, D, dtype=torch.float64, generator=generator).to(dtype).unbind(0))


def mixer(preset: str, dtype=torch.float64, **changes):
    torch.manual_seed(0)
    return make_mixer(H, D, TTTConfig.preset(preset, **changes)).to(dtype)


def in_window(i: int, j: int, size: int, reach: int) -> bool:
    window = min(2 * reach + 1, size)
    start = min(max(i - window // 2, 0), size - window)
    return start <= j < start + window


@by_grid
@pytest.mark.parametrize("radius", [1.0, 2.0, 8.0])
def test_a_window_is_softmax_attention_under_its_mask(grid, radius):
    q, k, v = tokens(grid)
    seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)
    for i in range(grid.rows * grid.columns):
        for j in range(grid.rows * grid.columns):
            (r, c), (s, d) = divmod(i, grid.columns), divmod(j, grid.columns)
            near = in_window(r, s, grid.rows, int(radius)) and in_window(c, d, grid.columns, int(radius))
            seen[grid.patches.start + i, grid.patches.start + j] = near
    assert radius == 2 or seen.all() == (radius == 8)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    torch.testing.assert_close(mixer("graft-swa", radius=radius)(q, k, v, grid), expected)


@by_grid
def test_a_gated_convolution_is_q_times_the_convolution_of_k_times_v(grid):
    mix, (q, k, v) = mixer("graft-conv"), tokens(grid)
    own = grid.patches

    def plane(x, conv):
        image = x.transpose(2, 3).reshape(B, H * D, grid.rows, grid.columns)
        return conv(image).reshape(B, H, D, -1).transpose(2, 3)

    shorts = zip((q, k, v), (mix.q_short, mix.k_short, mix.v_short), strict=True)
    short_q, short_k, short_v = (x[:, :, own] + plane(x[:, :, own], conv) for x, conv in shorts)
    apart = torch.ones(q.shape[2], dtype=torch.bool)
    apart[own] = False
    product = short_k * short_v
    if apart.any():
        product = product + (k * v)[:, :, apart].mean(2, keepdim=True)
    expected = F.scaled_dot_product_attention(q, k, v)
    expected[:, :, own] = short_q * plane(product, mix.filters)
    torch.testing.assert_close(mix(q, k, v, grid), expected)


def test_a_filter_reaches_as_far_as_its_radius_says():
    grid = TokenGrid(9, 9)
    mix, (q, k, v) = mixer("graft-conv", radius=2.0), tokens(grid)
    v.requires_grad_()
    (gradient,) = torch.autograd.grad(mix(q, k, v, grid)[0, 0, 40].sum(), v)  # the middle
    reached = gradient[0, 0].abs().sum(-1).reshape(9, 9) > 0
    assert reached[1:8, 1:8].all() and reached.sum() == 49  # two, and one more by the short convolution of v


@both
def test_patches_and_tokens_beside_them_see_each_other(preset):
    grid = GRIDS[2]
    mix, (q, k, v) = mixer(preset, radius=1.0), tokens(grid)
    before, changed = mix(q, k, v, grid), v.clone()
    changed[:, :, -1] += 1  # a text token
    assert (mix(q, k, changed, grid) != before).any(-1).all()
    changed = v.clone()
    changed[:, :, 1] += 1  # the first patch
    different = (mix(q, k, changed, grid) != before).any(-1).all(0).all(0)
    assert different[[0, -1]].all() and not different[grid.patches].all()


@both
def test_half_precision_and_a_batch_of_none(preset):
    grid = GRIDS[0]
    mix = mixer(preset, torch.bfloat16)
    out = mix(*tokens(grid, torch.bfloat16), grid)
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
    assert mix(*tokens(grid, torch.bfloat16, batch=0), grid).shape == (0, H, 26, D)


@both
def test_it_compiles_as_one_graph_also_when_the_grid_changes_and_is_exported(preset):
    mix = mixer(preset)
    torch._dynamo.reset()
    compiled = torch.compile(mix, backend="eager", fullgraph=True)
    for grid in GRIDS[::2]:
        torch.testing.assert_close(compiled(*tokens(grid), grid), mix(*tokens(grid), grid))

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = mix

        def forward(self, q, k, v):
            return self.mix(q, k, v, GRIDS[0])

    layer, given = Layer(), tuple(tokens(GRIDS[0]))
    torch.testing.assert_close(torch.export.export(layer, given).module()(*given), layer(*given))


def test_a_filter_of_millions_of_weights_is_refused():
    with pytest.raises(T5Error, match=r"radius is 500, and inner 'gated_conv' .* expected at most 32"):
        TTTConfig.preset("graft-conv", radius=500.0)
