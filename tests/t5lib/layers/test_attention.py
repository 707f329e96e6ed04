"""The layer: inherited projections around a TTT mixer, on any grid, with any number of prefix tokens."""

from functools import partial

import pytest
import torch
from t5kernels import KEY_NORMS, key_norm, ttt
from timm.layers import Attention, RmsNorm
from torch import nn

from t5lib.layers.attention import TTTAttention, project
from t5lib.layers.config import TTTConfig
from t5lib.layers.grid import TokenGrid
from t5lib.layers.mixers import convolved
from t5lib.layers.ttt_mixer import TTTMixer
from t5lib.utils.errors import T5Error

B, H, D = 2, 3, 4
C = H * D


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer(config: TTTConfig | None = None, **attention) -> partial:
    """A layer called on a grid of its own."""
    torch.manual_seed(0)
    softmax = Attention(C, H, **attention).double()
    return partial(TTTAttention(softmax, config or TTTConfig(), 2), grid=TokenGrid(3, 5, num_prefix_tokens=2))


def per_pixel(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """x + depthwise 3×3 convolution of patches x (B, H, rows·columns, D), one pixel and neighbour at a time."""
    out = x + bias.view(H, 1, D)
    kernel = weight.view(H, D, 3, 3)
    for row in range(rows):
        for column in range(columns):
            for i in range(3):
                for j in range(3):
                    r, c = row + i - 1, column + j - 1
                    if 0 <= r < rows and 0 <= c < columns:
                        out[:, :, row * columns + column] += kernel[:, :, i, j] * x[:, :, r * columns + c]
    return out


@pytest.mark.parametrize(("rows", "columns", "prefix"), [(3, 5, 0), (5, 3, 2), (1, 7, 1), (4, 4, 5)])
def test_convolution_runs_over_the_grid_and_leaves_prefix_tokens_alone(rows, columns, prefix):
    x = draw(B, H, prefix + rows * columns, D)
    conv = nn.Conv2d(C, C, 3, padding=1, groups=C).double()
    out = x + convolved(x, conv, TokenGrid(rows, columns, prefix))
    torch.testing.assert_close(out[:, :, :prefix], x[:, :, :prefix], rtol=0, atol=0)
    expected = per_pixel(x[:, :, prefix:], conv.weight.detach(), conv.bias.detach(), rows, columns)
    torch.testing.assert_close(out[:, :, prefix:], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("inner_loss", ["dot", "residual"])
@pytest.mark.parametrize("inner", ["swiglu", "two_layer"])
@pytest.mark.parametrize("locality", ["none", "dwc_qk"])
def test_mixer_is_key_norm_then_locality_then_one_inner_step(locality, inner, inner_loss):
    torch.manual_seed(0)
    config = TTTConfig(inner=inner, inner_loss=inner_loss, locality=locality, key_norm_eps=0.5)
    mixer, grid = TTTMixer(H, D, config).double(), TokenGrid(3, 5, num_prefix_tokens=2)
    q, k, v = (draw(B, H, 17, D, seed=seed) for seed in range(3))
    weights = [getattr(mixer, name) for name in ("w1", "w2", "w3")[: 3 if inner == "swiglu" else 2]]
    q_hat, k_hat = q, key_norm(k, "instance", 0.5)
    if locality == "dwc_qk":
        q_hat, k_hat = q + convolved(q, mixer.q_conv, grid), k_hat + convolved(k_hat, mixer.k_conv, grid)
    expected = ttt(q_hat, k_hat, v, weights, inner=inner, loss=inner_loss, scale=D**-0.5 / 17)
    torch.testing.assert_close(mixer(q, k, v, grid), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KEY_NORMS)
def test_layer_ignores_a_key_shift_with_a_centring_norm_alone(kind):
    """Softmax ignores a key bias; so must the layer that inherits its keys. This is the method's main point."""
    ttt_layer = layer(TTTConfig(key_norm=kind), qkv_bias=True)
    x = draw(B, 17, C)
    before = ttt_layer(x)
    with torch.no_grad():
        ttt_layer.func.qkv.bias[C : 2 * C] += 5 * draw(C, seed=1)
    change = ((ttt_layer(x) - before).norm() / before.norm()).item()
    assert change < 1e-12 if kind in ("instance", "instance_no_std") else change > 0.05


@pytest.mark.parametrize(
    "options",
    [
        {"qkv_bias": True},
        {"qkv_bias": False, "proj_bias": False},
        {"qk_norm": True, "norm_layer": nn.LayerNorm},
        {"qk_norm": True, "norm_layer": RmsNorm},
        {"scale_norm": True, "norm_layer": nn.LayerNorm},
        {"gated": True},
        {"attn_head_dim": 2},
    ],
    ids=str,
)
def test_pretrained_parts_around_the_mixer_are_those_of_softmax_attention(options):
    """With softmax in the mixer's place, the layer gives what the timm attention it came from gives."""
    torch.manual_seed(0)
    softmax = Attention(C, H, **options).double().eval()
    ours = TTTAttention(softmax, TTTConfig(locality="none"), 2)
    x = draw(B, 17, C)
    q, k, v = project(ours, x)
    expected_heads = nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(ours.merge(expected_heads, x), softmax(x), rtol=1e-12, atol=1e-12)
    assert {n.partition(".")[0] for n, _ in ours.named_parameters()} - {"mixer"} == {
        n.partition(".")[0] for n, _ in softmax.named_parameters()
    }


def test_scale_uses_the_number_of_tokens_so_that_output_size_does_not_grow_with_it():
    ttt_layer = layer(TTTConfig(locality="none"))
    x = draw(B, 8, C)
    torch.testing.assert_close(ttt_layer(x.repeat(1, 4, 1))[:, :8], ttt_layer(x), rtol=1e-10, atol=1e-12)


def test_tokens_that_do_not_fit_the_grid_are_refused_with_both_counts():
    with pytest.raises(T5Error, match="grid 3×5 holds 15 tokens and num_prefix_tokens is 2, got 16 tokens"):
        layer()(draw(B, 16, C))


@pytest.mark.parametrize("mask", [{"attn_mask": torch.ones(17, 17, dtype=torch.bool)}, {"is_causal": True}], ids=str)
def test_masks_are_refused(mask):
    with pytest.raises(T5Error, match="attn_mask and is_causal are not supported"):
        layer()(draw(B, 17, C), **mask)


def test_new_weights_take_the_device_and_dtype_of_the_pretrained_ones():
    softmax = Attention(C, H).to("meta", torch.bfloat16)
    ttt_layer = TTTAttention(softmax, TTTConfig(), 0)
    assert {(p.device.type, p.dtype) for p in ttt_layer.parameters()} == {("meta", torch.bfloat16)}


def test_new_weights_start_as_the_config_says():
    mixers = [TTTMixer(8, 16, TTTConfig(init_std=std)) for std in (None, 0.02)]
    for mixer, std in zip(mixers, (16**-0.5, 0.02), strict=True):
        assert mixer.w1.std().item() == pytest.approx(0.88 * std, rel=0.1)  # a normal cut at two sigma
        assert mixer.w1.abs().max().item() <= 2 * std


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"inner": "swigl"}, "inner 'swigl' is unknown.*did you mean 'swiglu'"),
        ({"inner_loss": "mse"}, "inner_loss 'mse' is unknown; expected one of dot, residual"),
        ({"key_norm": "instanse"}, "did you mean 'instance'"),
        ({"locality": "dwc_kq"}, "did you mean 'dwc_qk'"),
        ({"key_norm_eps": 0.0}, "key_norm_eps is 0.0"),
        ({"init_std": 0.0}, "init_std is 0.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_make_no_layer_are_refused(setting, message):
    with pytest.raises(T5Error, match=message):
        TTTConfig(**setting)
