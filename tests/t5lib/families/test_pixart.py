"""PixArt's self-attentions convert; its cross-attentions stay, with the masks of their texts."""

import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from tiny_denoisers import pixart_batch, tiny_dit, tiny_pixart
from tiny_pipelines import tiny_pixart_pipeline
from torch import Tensor

import t5lib
from t5lib.conversion import new_parameters, ttt_layers
from t5lib.families import pixart
from t5lib.layers.config import TTTConfig
from t5lib.training.objectives import NoiseAndVariance, noised_batch, noising_of
from t5lib.utils.errors import T5Error


def inputs(**changes) -> dict[str, Tensor]:
    """Two latents of 8 × 12; the last token of each text is masked."""
    return noised_batch(pixart_batch(0, 2, 8, 12), NoiseAndVariance(), 0) | changes


@torch.no_grad()
def test_cross_attentions_stay_as_they_are_and_heed_the_mask():
    source = tiny_pixart()
    model = t5lib.convert(source)
    assert list(ttt_layers(model)) == ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]
    for ours, theirs in zip(model.transformer_blocks, source.transformer_blocks, strict=True):
        assert type(ours.attn2) is type(theirs.attn2) and type(ours.attn2.processor) is type(theirs.attn2.processor)
    text = inputs()["encoder_hidden_states"].clone()
    text[:, -1] = 100.0
    expected = pixart.ADAPTER.call(model, inputs())
    torch.testing.assert_close(pixart.ADAPTER.call(model, inputs(encoder_hidden_states=text)), expected)
    everything = inputs(encoder_hidden_states=text, encoder_attention_mask=torch.ones(2, 3))
    assert not torch.allclose(pixart.ADAPTER.call(model, everything), expected)


def test_a_mask_of_another_length_than_the_text_is_refused_and_none_is_fine():
    model, given = tiny_pixart(), inputs()
    with pytest.raises(T5Error, match=r"encoder_attention_mask of a batch is \(2, 4\); of this text it is \(2, 3\)"):
        pixart.ADAPTER.check_inputs(model, inputs(encoder_attention_mask=torch.ones(2, 4)))
    del given["encoder_attention_mask"]
    pixart.ADAPTER.check_inputs(model, given)


def test_a_mask_on_the_image_is_refused():
    with pytest.raises(T5Error, match="sees all tokens and no others; call it without attention_mask"):
        t5lib.convert(tiny_pixart())(**inputs(), attention_mask=torch.ones(2, 24))


def test_there_is_no_text_in_self_attention_to_be_exact_about():
    with pytest.raises(T5Error, match="none of the attentions to convert sees text"):
        t5lib.convert(tiny_pixart(), TTTConfig(text="exact"))


@torch.no_grad()
def test_pixart_alpha_is_told_the_size_of_the_image_as_its_pipeline_does():
    size = {"resolution": torch.tensor([[64.0, 96.0]] * 2), "aspect_ratio": torch.tensor([[64 / 96]] * 2)}
    model = tiny_pixart(num_attention_heads=6, cross_attention_dim=48, use_additional_conditions=True)
    expected = model(**inputs(), added_cond_kwargs=size).sample
    assert torch.equal(pixart.ADAPTER.call(model, inputs()), expected)
    assert pixart.ADAPTER.call(t5lib.convert(model), inputs()).shape == expected.shape


def test_pixart_sigma_converts_without_memory_for_its_weights():
    model = pixart.ADAPTER.skeleton("PixArtTransformer2DModel", pixart.SIGMA, None)
    before = sum(parameter.numel() for parameter in model.parameters())
    t5lib.convert(model, inplace=True)
    one = 3 * 16 * 72 * 72 + 2 * (9 + 1) * 1152  # inner weights, and two convolutions with a bias
    assert before == 610_856_096 and len(ttt_layers(model)) == 28
    assert sum(parameter.numel() for parameter in new_parameters(model).values()) == 28 * one
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_the_noise_is_that_of_its_pipelines_scheduler():
    assert noising_of(tiny_pixart_pipeline().scheduler) == NoiseAndVariance()


@pytest.mark.parametrize(("make", "kind"), [(tiny_pixart, PixArtTransformer2DModel), (tiny_dit, DiTTransformer2DModel)])
def test_a_transformer_by_the_name_that_repositories_still_give_it_is_loaded_as_what_it_is(make, kind, tmp_path):
    make().save_pretrained(tmp_path / "transformer")
    config = tmp_path / "transformer" / "config.json"
    config.write_text(config.read_text().replace(kind.__name__, "Transformer2DModel"))
    (tmp_path / "model_index.json").write_text('{"transformer": ["diffusers", "Transformer2DModel"]}')
    loaded = t5lib.load_transformer(tmp_path)
    assert type(loaded) is kind and not loaded.training
    assert all(torch.equal(tensor, make().state_dict()[name]) for name, tensor in loaded.state_dict().items())
