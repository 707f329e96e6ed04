"""`text: exact`: softmax wherever text takes part, the inner model between the tokens of the image."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from t5lib.layers.config import TTTConfig
from t5lib.layers.factory import make_mixer
from t5lib.layers.grid import TokenGrid

B, H, D, IMAGE, TEXT = 2, 2, 8, 12, 5
GRID = TokenGrid(3, 4)
WHOLE = GRID.with_suffix(TEXT)


def tokens(image: int = IMAGE, text: int = TEXT, dtype=torch.float64, batch: int = B) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, batch, H, image + text, D, dtype=torch.float64, generator=generator)
    return list(drawn.to(dtype).unbind(0))


def mixer(dtype=torch.float64, weight: float = 0.0, **settings):
    torch.manual_seed(0)
    mix = make_mixer(H, D, TTTConfig(text="exact", **settings)).to(dtype)
    with torch.no_grad():
        mix.text_weight.fill_(weight)
    return mix


@pytest.mark.parametrize(
    "settings",
    [{}, {"rescale": True}, {"inner": "hedgehog"}, {"locality": "dwc_v+nat3", "neighborhood_share": "learned"}],
    ids=str,
)
@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_text_asks_all_by_softmax_and_the_image_takes_the_texts_part_of_it(settings, weight):
    mix, (q, k, v) = mixer(weight=weight, **settings), tokens()
    out = mix(q, k, v, WHOLE)
    torch.testing.assert_close(out[:, :, IMAGE:], F.scaled_dot_product_attention(q, k, v)[:, :, IMAGE:])
    of_image = mix(*(t[:, :, :IMAGE] for t in (q, k, v)), GRID)
    of_text = F.scaled_dot_product_attention(q[:, :, :IMAGE], k[:, :, IMAGE:], v[:, :, IMAGE:])
    mass = torch.tensor(weight, dtype=torch.float64).exp() * TEXT
    share = mass / (mass + IMAGE)
    torch.testing.assert_close(out[:, :, :IMAGE], (1 - share) * of_image + share * of_text)


def test_between_tokens_that_are_all_alike_to_a_query_the_start_is_softmax():
    """Keys of 0: every token has the same weight, and what the image gives is put in as softmax has it."""
    mix, (q, _, v) = mixer(), tokens()
    mix.attend = lambda image, text, grid: (image[2].mean(2, keepdim=True).expand_as(image[2]), None)
    k = torch.zeros_like(q)
    torch.testing.assert_close(mix(q, k, v, WHOLE), F.scaled_dot_product_attention(q, k, v))


def test_gradients_are_exact():
    mix = mixer(weight=0.3)
    inputs = [t.requires_grad_() for t in tokens()]
    assert torch.autograd.gradcheck(lambda *_: mix(*inputs, WHOLE), (*inputs, *mix.parameters()), fast_mode=True)


def test_checkpointing_gives_the_same_gradients():
    mix = mixer()

    def gradients(run):
        leaves = [t.requires_grad_() for t in tokens()]
        return torch.autograd.grad(run(*leaves, WHOLE).square().sum(), [*leaves, *mix.parameters()])

    again = gradients(lambda *given: checkpoint(mix, *given, use_reentrant=False))
    assert all(torch.equal(one, two) for one, two in zip(gradients(mix), again, strict=True))


def test_several_layers_in_one_mixer_equal_layer_by_layer():
    torch.manual_seed(0)
    whole = make_mixer(1, D, TTTConfig(text="exact"), H).double()
    torch.nn.init.normal_(whole.text_weight)
    given = tokens()
    for index in range(H):
        one = make_mixer(1, D, TTTConfig(text="exact")).double()
        one.load_state_dict({name: tensor.chunk(H)[index] for name, tensor in whole.state_dict().items()})
        alone = one(*(t[:, index : index + 1] for t in given), WHOLE)
        torch.testing.assert_close(whole(*given, WHOLE)[:, index : index + 1], alone)


@pytest.mark.parametrize("text", [0, 1])
def test_little_text_and_none(text):
    out = mixer()(*tokens(text=text), GRID.with_suffix(text))
    assert out.shape == (B, H, IMAGE + text, D) and out.isfinite().all()
    image = [t[:, :, :IMAGE] for t in tokens(text=text)]
    joint, none = mixer().joint(tuple(image), tuple(t[:, :, :0] for t in image), GRID)
    torch.testing.assert_close(joint, mixer()(*image, GRID))
    assert none.shape == (B, H, 0, D)


def test_half_precision_autocast_and_a_batch_of_none():
    exact = mixer()(*tokens(), WHOLE).float()
    half = mixer(torch.bfloat16)(*tokens(dtype=torch.bfloat16), WHOLE)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = mixer(torch.float32)(*tokens(dtype=torch.float32)[:2], tokens(dtype=torch.bfloat16)[2], WHOLE)
    assert half.dtype == torch.bfloat16 and mixed.dtype == torch.float32
    for out in (half, mixed):
        assert (out - exact).norm() < 0.03 * exact.norm()
    assert mixer()(*tokens(batch=0), WHOLE).shape == (0, H, IMAGE + TEXT, D)


def test_it_compiles_as_one_graph_also_when_image_and_text_change_and_is_exported():
    mix = mixer()
    torch._dynamo.reset()
    compiled = torch.compile(mix, backend="eager", fullgraph=True)
    for grid in (WHOLE, TokenGrid(5, 6, num_suffix_tokens=7), TokenGrid(4, 3, num_suffix_tokens=9)):
        given = tokens(grid.rows * grid.columns, grid.num_suffix_tokens)
        torch.testing.assert_close(compiled(*given, grid), mix(*given, grid))

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = mix

        def forward(self, q, k, v):
            return self.mix(q, k, v, WHOLE)

    layer, given = Layer(), tuple(tokens())
    torch.testing.assert_close(torch.export.export(layer, given).module()(*given), layer(*given))
