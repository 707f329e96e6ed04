"""Converted denoisers are called as those of diffusers are; batches for them are checked by name."""

import pytest
import torch
from tiny_denoisers import HEAD_DIM, HEADS, tiny_sd3
from torch import Tensor, nn
from torch.nn import functional as F

import t5lib
from t5lib.conversion import ttt_layers
from t5lib.families import sd3
from t5lib.families.inputs import ExampleSize
from t5lib.layers.grid import TokenGrid
from t5lib.utils.errors import T5Error


def inputs() -> dict[str, Tensor]:
    """Two latents of 8×8, 4×4 tokens."""
    return sd3.ADAPTER.example_inputs(tiny_sd3(), ExampleSize(8, batch=2, pixels_per_latent=1, text_tokens=3))


def softmax_inside(model: nn.Module) -> nn.Module:
    """A converted model whose mixers are the softmax attention that they stand for."""

    def joint(image: tuple, text: tuple | None, _grid: TokenGrid) -> tuple[Tensor, Tensor | None]:
        both = image if text is None else [torch.cat(pair, dim=2) for pair in zip(image, text, strict=True)]
        o, text_o = F.scaled_dot_product_attention(*both).tensor_split((image[0].shape[2],), dim=2)
        return o, None if text is None else text_o

    for layer in ttt_layers(model).values():
        layer._norms, layer.mixer.joint = lambda text: {}, joint
    return model


RESIDUALS = [torch.randn(2, 16, HEADS * HEAD_DIM, generator=torch.Generator().manual_seed(i)) for i in range(2)]


@torch.no_grad()
def test_what_diffusers_model_takes_besides_the_converted_one_takes_and_does_alike(caplog):
    softmax, converted = tiny_sd3(), softmax_inside(t5lib.convert(tiny_sd3()))
    for others in (
        {},
        {"skip_layers": [1]},
        {"block_controlnet_hidden_states": RESIDUALS},
        {"block_controlnet_hidden_states": RESIDUALS[:1], "skip_layers": {0}},
        {"joint_attention_kwargs": {"scale": 0.5}},
        {"joint_attention_kwargs": {"unknown": 1}},
        {"hidden_states": torch.randn(2, 4, 9, 12)},  # a row that no patch covers is left out
        {"timestep": torch.tensor([3.0])},
    ):
        named = inputs() | others
        torch.testing.assert_close(converted(**named).sample, softmax(**named, return_dict=False)[0])
    assert "does not take unknown, which is ignored" in caplog.text


def test_batches_that_do_not_fit_are_told_by_name():
    model, good = tiny_sd3(), inputs()
    for change, message in (
        ({"hidden_states": torch.ones(4, 8, 12)}, r"a batch must hold images .*, got \(4, 8, 12\)"),
        ({"hidden_states": torch.ones(2, 5, 8, 12)}, "images of 5 channels were given to a model that takes 4"),
        ({"hidden_states": torch.ones(2, 4, 9, 12)}, "resolution 9 is not a multiple of the patch size 2"),
        ({"hidden_states": torch.ones(2, 4, 64, 12)}, "latents are 64 wide or high; the model takes 2 to 32"),
        ({"hidden_states": torch.ones(2, 4, 0, 12)}, "latents are 0 wide or high"),
        (
            {"hidden_states": torch.ones(3, 4, 8, 12)},
            r"is a tensor \(2,.*; expected a tensor with a row for each of its 3",
        ),
        ({"timestep": 3}, "'timestep' of a batch is 3; expected a tensor with a row for each of its 2 images"),
        ({"timestep": torch.tensor(3.0)}, r"'timestep' of a batch is a tensor \(\); expected"),
        ({"timestep": torch.ones(2, 1)}, r"timestep of a batch is \(2, 1\); this model takes \(B\)"),
        ({"encoder_hidden_states": None}, "lacks encoder_hidden_states; expected its keyword arguments hidden_states"),
        ({"encoder_hidden_states": torch.ones(2, 3, 5)}, r"is \(2, 3, 5\); this model takes \(B, T, 6\)"),
        ({"pooled_projections": torch.ones(2, 9)}, r"pooled_projections of .* this model takes \(B, 10\)"),
        ({"return_dict": False}, "'return_dict' of a batch is False; expected a tensor"),
        ({"labels": torch.ones(2)}, "the batch is not what SD3.* is called with: .*'labels'"),
    ):
        with pytest.raises(T5Error, match=message):
            sd3.ADAPTER.check_inputs(model, sd3.ADAPTER.inputs(good | change))
    sd3.ADAPTER.check_inputs(model, sd3.ADAPTER.inputs(good | {"skip_layers": None}))
