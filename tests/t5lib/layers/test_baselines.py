"""Every rival is the mixing that its source describes, on any grid, with prefix tokens, for one layer or for many."""

import math

import pytest
import torch
from torch.nn import functional as F

from t5lib.layers.baselines import BASELINE_MIXERS, FeatureMapMixer
from t5lib.layers.config import BASELINES, TTTConfig
from t5lib.layers.factory import make_mixer
from t5lib.layers.grid import TokenGrid

B, H, D, LAYERS = 2, 2, 4, 3
GRID = TokenGrid(3, 5, num_prefix_tokens=2)
N = 17
MAPPED = [name for name, mixer in BASELINE_MIXERS.items() if issubclass(mixer, FeatureMapMixer)]
every_rival = pytest.mark.parametrize("name", BASELINES)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def qkv(heads: int = H, tokens: int = N) -> list[torch.Tensor]:
    return [draw(B, heads, tokens, D, seed=seed) for seed in range(3)]


def mixer_of(name: str, layers: int = 1, heads: int = H, **config):
    """The rival alone, in float64, with every parameter off its starting value."""
    torch.manual_seed(0)
    mixer = make_mixer(heads, D, TTTConfig.preset("hedgehog", inner=name, radius=1.5, **config), layers).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def test_every_rival_has_a_mixer_that_names_its_source():
    assert set(BASELINE_MIXERS) == set(BASELINES)
    for mixer in BASELINE_MIXERS.values():
        assert "arXiv" in mixer.__doc__ and "Departure" in mixer.__doc__


@every_rival
def test_output_and_all_gradients_are_exact_on_a_grid_that_is_not_square(name):
    mixer, inputs = mixer_of(name), [t.requires_grad_() for t in qkv()]
    parameters = list(mixer.parameters())
    assert torch.autograd.gradcheck(lambda *_: mixer(*inputs, GRID), (*inputs, *parameters), fast_mode=True)


@every_rival
@pytest.mark.parametrize("grid", [TokenGrid(1, 7), TokenGrid(4, 3, num_prefix_tokens=1)], ids=["row", "class token"])
def test_every_parameter_learns_on_any_grid(name, grid):
    mixer = mixer_of(name, locality="dwc_v")
    tokens = grid.rows * grid.columns + grid.num_prefix_tokens
    out = mixer(*qkv(tokens=tokens), grid)
    assert out.shape == (B, H, tokens, D)
    (out * draw(*out.shape, seed=9)).sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in mixer.parameters())


@every_rival
def test_several_layers_in_one_mixer_equal_layer_by_layer(name):
    """Parameters and buffers of the layers lie one after the other in the first dimension."""
    whole, inputs = mixer_of(name, LAYERS), qkv(heads=LAYERS * H)
    parts = []
    for index in range(LAYERS):
        one = mixer_of(name)
        one.load_state_dict({key: tensor.chunk(LAYERS)[index] for key, tensor in whole.state_dict().items()})
        parts.append(one(*(t.chunk(LAYERS, dim=1)[index] for t in inputs), GRID))
    torch.testing.assert_close(whole(*inputs, GRID), torch.cat(parts, dim=1), rtol=1e-12, atol=1e-12)


@every_rival
def test_autocast_stays_near_float32_and_large_inputs_stay_finite(name):
    mixer, inputs = mixer_of(name).float(), [t.float() for t in qkv()]
    expected = mixer(*inputs, GRID)
    halves = [t.bfloat16() for t in inputs]
    for scale in (1, 100):
        mixer.zero_grad()
        leaves = [(t * scale).requires_grad_() for t in halves[:2]]
        with torch.autocast("cpu", torch.bfloat16):
            out = mixer(*leaves, halves[2], GRID)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
        assert all(leaf.grad.isfinite().all() for leaf in [*leaves, *mixer.parameters()])
        if scale == 1:
            assert (out - expected).norm() < 0.03 * expected.norm()


@every_rival
def test_compiled_equals_eager(name):
    mixer, inputs = mixer_of(name), qkv()
    torch._dynamo.reset()
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(*inputs, GRID), mixer(*inputs, GRID), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MAPPED)
def test_feature_maps_have_the_attention_map_that_they_mix_by(name):
    mixer, (q, k, v) = mixer_of(name), qkv()
    weights = mixer.attention_map(q, k)
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, H, N, dtype=torch.float64))
    torch.testing.assert_close(mixer(q, k, v, GRID), weights @ v)


def test_hedgehog_starts_from_the_softmax_of_scaled_queries_and_keys():
    q, k, _ = qkv()
    features = make_mixer(H, D, TTTConfig.preset("hedgehog")).double().features(q, k)
    for x, feature in zip((q, k), features, strict=True):
        x = x / D**0.25
        torch.testing.assert_close(feature, torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1))


def test_hedgehog_maps_of_queries_and_keys_are_learned_apart():
    mixer, (q, _, _) = mixer_of("hedgehog"), qkv()
    for_queries, for_keys = mixer.features(q, q)
    assert not torch.allclose(for_queries, for_keys)


def test_performer_estimates_softmax_attention():
    """With as many features as thousands of heads draw, the map is that of softmax."""
    mixer = mixer_of("performer", heads=4000)
    mixer.directions = mixer.directions.flatten(0, 1).unsqueeze(0)
    q, k, _ = (t / 2 for t in qkv(heads=1))  # the longer the vectors, the more draws it takes
    softmax = (q @ k.mT / D**0.5).softmax(-1)
    assert (softmax - 1 / N).norm() > 0.2 * softmax.norm()
    assert (mixer.attention_map(q, k) - softmax).norm() < 0.03 * softmax.norm()


def test_performer_directions_are_orthogonal_repeatable_and_saved():
    mixer, same = mixer_of("performer"), mixer_of("performer")
    directions = mixer.state_dict()["directions"]
    assert torch.equal(directions, same.directions) and not list(mixer.parameters())
    for block in directions.unflatten(1, (2, D)).flatten(0, 1):
        products = block @ block.T
        torch.testing.assert_close(products, products.diagonal().diag(), rtol=0, atol=1e-5)
    assert not torch.equal(directions[0], directions[1])


def test_relu_attention_survives_queries_that_meet_no_key():
    mixer, (q, k, v) = mixer_of("relu_linear"), qkv()
    q, k = -q.abs(), k.abs()
    out = mixer(q, k, v, GRID)
    assert out.isfinite().all()
    torch.testing.assert_close(mixer.attention_map(q, k).sum(-1), torch.ones(B, H, N, dtype=torch.float64))


def test_clear_is_softmax_attention_within_the_radius():
    q, k, v = qkv()
    prefix = GRID.num_prefix_tokens
    places = [(index // GRID.columns, index % GRID.columns) for index in range(N - prefix)]
    seen = torch.ones(N, N, dtype=torch.bool)
    for i, here in enumerate(places):
        for j, there in enumerate(places):
            seen[prefix + i, prefix + j] = math.dist(here, there) <= 1.5
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    torch.testing.assert_close(mixer_of("clear")(q, k, v, GRID), expected)


def stepped(weights: list[torch.Tensor], loss, dims: list) -> list[torch.Tensor]:
    """One step of learning rate 1 along the bounded gradient that autograd takes of loss(*weights)."""
    own = [w.detach().clone().requires_grad_() for w in weights]
    gradients = torch.autograd.grad(loss(*own), own)
    return [(w - g / (1 + g.norm(dim=d, keepdim=True))).detach() for w, g, d in zip(own, gradients, dims, strict=True)]


@pytest.mark.parametrize("layers", [1, LAYERS])
def test_vit3_takes_one_step_of_each_inner_model(layers):
    mixer, (q, k, v) = mixer_of("vit3", layers), qkv(heads=layers * H)
    q, k, v = (5 * t for t in (q, k, v))  # so that the bound on the gradient matters
    out = mixer(q, k, v, GRID).detach()

    def gated(x, w1, w2):
        return (x @ w1) * F.silu(x @ w2)

    def convolution(x, taps):
        image = x[GRID.num_prefix_tokens :].T.reshape(1, D, GRID.rows, GRID.columns)
        return F.conv2d(image, taps.unsqueeze(1), padding=1, groups=D).flatten(2).squeeze(0).T

    for b in range(B):
        for h in range(layers * H):
            keys, values = k[b, h], v[b, h]
            loss = lambda *w, x=keys, y=values: -(gated(x, *w) * y).sum(-1).mean() / 3  # noqa: E731
            expected = gated(q[b, h], *stepped([mixer.w1[h], mixer.w2[h]], loss, [0, 0]))
            if h % H == H - 1:
                patches = values[GRID.num_prefix_tokens :]
                loss = lambda w, x=keys, y=patches: -(convolution(x, w) * y).sum(-1).mean() / 3  # noqa: E731
                taps = stepped([mixer.taps[h // H]], loss, [(1, 2)])
                expected = torch.cat([expected[: GRID.num_prefix_tokens], convolution(q[b, h], *taps)])
            torch.testing.assert_close(out[b, h], expected, rtol=1e-10, atol=1e-10)
