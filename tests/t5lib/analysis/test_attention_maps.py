"""The map of a layer without one is that of the Jacobian of its outputs by its values; of softmax it is attention."""

import pytest
import torch
from tiny import random_images, tiny_vit
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import t5lib
from t5lib.analysis.attention_maps import attention_distance, over_patches, projected, spread_queries
from t5lib.layers.config import TTTConfig
from t5lib.layers.grid import TokenGrid
from t5lib.utils.errors import T5Error

WIDTH = 16  # of a head of the tiny models
CONFIGS = {
    "default": TTTConfig(),
    "dit5 without neighborhood": TTTConfig.preset("dit5", locality="dwc_qk"),
    "cpe": TTTConfig(inner="two_layer", locality="cpe"),
    "dwc_v": TTTConfig(inner="one_layer_gate", locality="dwc_v"),
    "hedgehog": TTTConfig.preset("hedgehog"),
    "vit3": TTTConfig.preset("vit3"),
    "neighborhood": TTTConfig.preset("t5", locality="dwc_qk+nat3"),
    "clear": TTTConfig.preset("clear", radius=2),
}


GRID = TokenGrid(4, 4, num_prefix_tokens=1)


def layer_of(config: TTTConfig) -> tuple[nn.Module, torch.Tensor]:
    """A converted attention of a tiny model (4 × 4 patches and a class token) and its input."""
    model, kept = t5lib.convert(tiny_vit(), config), []
    model.blocks[1].attn.register_forward_pre_hook(lambda _, given: kept.append(given[0].detach()))
    model(random_images(2))
    return model.blocks[1].attn, kept[0]


def exact(attention: nn.Module, x: torch.Tensor, image: int, head: int) -> torch.Tensor:
    """‖∂o_i/∂v_j‖_F / √D of one image and head from the whole Jacobian, (N, N)."""
    q, k, v = (t.detach() for t in projected(attention, x[image : image + 1], GRID))

    def outputs(values: torch.Tensor) -> torch.Tensor:
        every = torch.cat([v[:, :head], values[None, None], v[:, head + 1 :]], 1)
        mixer = getattr(attention, "mixer", None)
        return (mixer(q, k, every, GRID) if mixer else scaled_dot_product_attention(q, k, every))[0, head]

    jacobian = torch.autograd.functional.jacobian(outputs, v[0, head])  # (N, D, N, D)
    return jacobian.square().sum((1, 3)).div(WIDTH).sqrt()


@pytest.mark.parametrize("name", CONFIGS)
def test_with_a_probe_for_every_channel_the_map_is_the_norm_of_the_jacobian(name):
    attention, x = layer_of(CONFIGS[name])
    found = t5lib.implicit_attention(attention, x, GRID, probes=WIDTH)
    assert found.shape == (2, 2, 17, 17) and not found.requires_grad
    torch.testing.assert_close(found[1, 1], exact(attention, x, image=1, head=1), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["augreg", "qk_norm"])
def test_of_softmax_it_is_the_attention_map(kind):
    attention, x = tiny_vit(kind).blocks[0].attn, torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(1))
    found = t5lib.implicit_attention(attention, x, GRID)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 2, 17))
    torch.testing.assert_close(found[0, 1], exact(attention, x, image=0, head=1), rtol=1e-4, atol=1e-6)


def test_linear_attentions_map_needs_one_probe():
    attention, x = layer_of(CONFIGS["hedgehog"])
    torch.testing.assert_close(*(t5lib.implicit_attention(attention, x, GRID, probes=p) for p in (1, WIDTH)))


def test_circular_windows_are_seen_as_such():
    """Nothing beyond the radius, rows that sum to 1 as in softmax, and a shorter distance."""
    attention, x = layer_of(CONFIGS["clear"])
    found = t5lib.implicit_attention(attention, x, GRID)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 2, 17))
    assert found[:, :, 1, 16].max() == 0 < found[:, :, 1, 2].min()
    softmax = t5lib.implicit_attention(tiny_vit().blocks[1].attn, x, GRID)
    wide = attention_distance(softmax[:, :, 1:], list(range(1, 17)), GRID)
    near = attention_distance(found[:, :, 1:], list(range(1, 17)), GRID)
    assert near.mean() < 0.8 * wide.mean()


def test_few_probes_estimate_the_map_and_the_squares_without_bias():
    attention, x = layer_of(TTTConfig())
    whole = t5lib.implicit_attention(attention, x, GRID, probes=WIDTH)
    few = [t5lib.implicit_attention(attention, x, GRID, probes=2, seed=seed) for seed in range(12)]
    assert not torch.equal(few[0], few[1])
    assert (few[0] - whole).abs().mean() < 0.3 * whole.mean()
    assert torch.stack(few).square().mean().item() == pytest.approx(whole.square().mean().item(), rel=0.1)


def test_chunks_and_chosen_queries_change_nothing(monkeypatch):
    attention, x = layer_of(TTTConfig())
    whole = t5lib.implicit_attention(attention, x, GRID)
    monkeypatch.setitem(
        t5lib.analysis.attention_maps.CHUNK, "cpu", 3 * 2 * 2 * 17 * WIDTH
    )  # three pairs of a query and a probe
    torch.testing.assert_close(
        t5lib.implicit_attention(attention, x, GRID, queries=[16, 0, 5]), whole[:, :, [16, 0, 5]]
    )


def test_values_of_half_precision_give_a_map_in_full():
    attention, x = layer_of(TTTConfig())
    whole = t5lib.implicit_attention(attention, x, GRID)
    found = t5lib.implicit_attention(attention.bfloat16(), x.bfloat16(), GRID)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, whole, rtol=0.2, atol=0.02)


def test_what_cannot_be_asked_is_refused():
    attention, x = layer_of(TTTConfig())
    for queries in ([17], [-1], []):
        with pytest.raises(T5Error, match="expected token indices from 0 to 16"):
            t5lib.implicit_attention(attention, x, GRID, queries=queries)
    for probes in (0, WIDTH + 1):
        with pytest.raises(T5Error, match=f"probes is {probes}; expected 1 to the head width, 16"):
            t5lib.implicit_attention(attention, x, GRID, probes=probes)
    with pytest.raises(T5Error, match="Linear is neither an attention of timm nor a TTTAttention"):
        t5lib.implicit_attention(nn.Linear(32, 32), x, GRID)


def test_distance_is_in_patches_over_the_patches_alone():
    grid = TokenGrid(2, 3, num_prefix_tokens=1)
    weights = torch.zeros(1, 2, 2, 7)
    weights[0, 0, 0, [1, 3]] = torch.tensor(
        [0.1, 0.3]
    )  # from patch 0: itself, and two to the right, three times as much
    weights[0, 0, 1, 1 + 5] = 0.2  # from patch 1 to patch 5: one right, one down
    weights[0, 1, :, 0] = 1.0  # all on the class token: nothing to measure
    found = attention_distance(weights, [1, 2], grid)
    torch.testing.assert_close(found, torch.tensor([[(1.5 + 2**0.5) / 2, 0.0]]))
    torch.testing.assert_close(over_patches(weights, 1)[0, 0, 0, [0, 2]], torch.tensor([0.25, 0.75]))


def test_queries_are_spread_evenly_and_all_taken_where_they_fit():
    assert spread_queries(TokenGrid(3, 3, 1), 9) == spread_queries(TokenGrid(3, 3, 1), 15) == list(range(1, 10))
    few = spread_queries(TokenGrid(37, 37, 5), 49)
    places = [divmod(token - 5, 37) for token in few]
    assert len(set(few)) == 49
    assert sum(row for row, _ in places) / 49 == sum(column for _, column in places) / 49 == 18
    assert len(spread_queries(TokenGrid(2, 100), 49)) == 14
