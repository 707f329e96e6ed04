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

pytestmark = pytest.mark.usefixtures("one_thread")

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
        "attn1.mixer.q_scale": "attn.q_scale",
        "attn1.mixer.q_offset": "attn.q_offset",  # the key's has no gradient: instance norm takes it away
        "attn1.mixer.k_scale": "attn.k_scale",
        "attn1.mixer.k_conv.weight": "attn.k_conv2d.weight",
        "attn1.to_out.0.weight": "attn.proj.weight",
        "norm1.linear.bias": "adaLN_modulation.1.bias",
    }.items():
        for block in range(2):
            gradient = parameters[f"blocks.{block}.{theirs}"].grad
            found = model.get_parameter(f"transformer_blocks.{block}.{ours}").grad
            assert relative_error(found.reshape(gradient.shape), gradient) < 1e-10, theirs


def test_the_configuration_is_told_by_the_weights(load):
    model = load(released.dit_state())
    assert model.t5_config == TTTConfig.preset("dit5") and len(new_parameters(model)) == 2 * 10
    assert (model.config.sample_size, model.config.in_channels, model.out_channels) == (12, 4, 8)
    assert load(released.dit_state(rescale=False)).t5_config == TTTConfig.preset("dit5", rescale=False)


def test_other_spellings_of_the_rescale_mean_the_same(load):
    state, config = released.dit_state(), TTTConfig.preset("dit5", locality="dwc_qk")
    others = {"q_scale": "q_gamma", "q_offset": "q_beta", "k_scale": "k_rescale", "k_offset": "k_shift"}
    spelled = {}
    for name, value in state.items():
        before, _, last = name.rpartition(".")
        spelled[f"{before}.{others[last]}" if last in others else name] = value.flatten() if last in others else value
    assert spelled.keys() != state.keys()
    assert torch.equal(run(load(spelled, config=config), *inputs()), run(load(state, config=config), *inputs()))


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
