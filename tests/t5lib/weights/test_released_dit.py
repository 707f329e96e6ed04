"""Released DiT5 checkpoints come in as diffusers models with our layers, and compute what the released model does."""

import pytest
import released
import torch
from safetensors.torch import save_file

import t5lib
from t5lib.conversion import new_parameters
from t5lib.layers.config import TTTConfig
from t5lib.utils.errors import T5Error
from t5lib.weights import released_vit

pytest.importorskip("diffusers", reason="DiT models are diffusers'")


def inputs(side=12):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, side, side, dtype=torch.float64, generator=generator)
    return latents, torch.tensor([3, 977]), torch.tensor([4, 5])  # 5: no class


@pytest.fixture
def load(tmp_path):
    def save_and_load(state, **options):
        save_file(state, tmp_path / "dit.safetensors")
        return t5lib.load_released(tmp_path / "dit.safetensors", **options)

    return save_and_load


def run(model, latents, steps, labels):
    return model(latents, timestep=steps, class_labels=labels, return_dict=False)[0]


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("window", [5, None], ids=["dit5", "without neighborhood"])
def test_a_full_model_gives_the_released_outputs_and_gradients(window, load):
    config = None if window else TTTConfig.preset("dit5", locality="dwc_qk")
    state = released.dit_state()
    model = load(state, config=config)
    parameters = {name: value.clone().requires_grad_() for name, value in state.items()}
    expected = released.dit(parameters, *inputs(), window=window)
    weight = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
    (expected * weight).sum().backward()
    out = run(model, *inputs())
    (out * weight).sum().backward()

    assert not model.training and model.t5_config == (config or TTTConfig.preset("dit5"))
    assert relative_error(out, expected) < 1e-10
    for ours, theirs in {
        "attn1.mixer.w1": "attn.w1",
        "attn1.mixer.k_conv.weight": "attn.k_conv2d.weight",
        "attn1.to_out.0.weight": "attn.proj.weight",
        "norm1.linear.bias": "adaLN_modulation.1.bias",
    }.items():
        for block in range(2):
            gradient = parameters[f"blocks.{block}.{theirs}"].grad
            found = model.get_parameter(f"transformer_blocks.{block}.{ours}").grad
            assert relative_error(found.reshape(gradient.shape), gradient) < 1e-10, theirs
    for name in ("q_scale", "k_scale", "q_offset"):  # the key's offset has no gradient: instance norm takes it away
        for block in range(2):
            gradient = parameters[f"blocks.{block}.attn.qk_{name[2:]}_ttt"].grad[..., "qk".index(name[0])]
            found = model.get_parameter(f"transformer_blocks.{block}.attn1.mixer.{name}").grad
            assert relative_error(found.flatten(), gradient.flatten()) < 1e-10, name


def test_the_configuration_is_told_by_the_weights(load):
    model = load(released.dit_state())
    assert model.t5_config == TTTConfig.preset("dit5") and len(new_parameters(model)) == 2 * 10
    assert (model.config.sample_size, model.config.in_channels, model.out_channels) == (12, 4, 8)
    assert load(released.dit_state(rescale=False)).t5_config == TTTConfig.preset("dit5", rescale=False)


@pytest.mark.parametrize("shape", [(24,), (1, 1, 24), (1, 1, 2, 24), (1, 24, 1, 2), (1, 1, 25, 2)], ids=str)
def test_a_rescale_of_another_layout_is_refused(shape, load):
    with pytest.raises(T5Error, match=r"qk_scale_ttt is \(.*; expected \(1, 1, C, 2\), the last axis q, then k"):
        load(released.dit_state() | {"blocks.1.attn.qk_scale_ttt": torch.ones(shape, dtype=torch.float64)})


def test_another_size_of_image_is_taken(load):
    model = load(released.dit_state(), config=TTTConfig.preset("dit5", locality="dwc_qk"))
    assert run(model, *inputs(16)).shape == (2, 8, 16, 16)


def test_weights_that_do_not_fit_are_named(load):
    state = released.dit_state()
    with pytest.raises(T5Error, match=r"missing \[\], unknown \['transformer_blocks.0.attn.q_weird'"):
        load(state | {"blocks.0.attn.q_weird": torch.ones(24)})
    del state["blocks.1.mlp.fc1.bias"]
    with pytest.raises(T5Error, match=r"missing \['transformer_blocks.1.ff.net.0.proj.bias'\]"):
        load(state)
    with pytest.raises(T5Error, match=r"not a released DiT5: it has no \['blocks.0.attn.w1'\]"):
        load({name: value for name, value in state.items() if "attn.w" not in name})


def test_a_dit_cannot_be_named_back(load):
    with pytest.raises(T5Error, match="DiTTransformer2DModel is not a timm VisionTransformer"):
        released_vit.state_dict(load(released.dit_state()))
