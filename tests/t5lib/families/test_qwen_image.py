"""Qwen-Image converts, learns its grid from img_shapes, and heeds what pads the texts of a batch."""

import pytest
import torch
from diffusers import QwenImagePipeline
from tiny_denoisers import CAPTION, HEAD_DIM, HEADS, qwen_image_batch, tiny_qwen_image
from tiny_pipelines import tiny_qwen_image_pipeline
from torch import Tensor

import t5lib
from t5lib.conversion import new_parameters
from t5lib.families import qwen_image
from t5lib.layers.config import TTTConfig
from t5lib.layers.grid import TokenGrid
from t5lib.training.objectives import RectifiedFlow, noised_batch, noising_of
from t5lib.utils.errors import T5Error

MASK = torch.tensor([[True, True, True, True], [True, True, False, False], [True, False, True, False]])
TEXTS = torch.randn(3, 4, CAPTION, generator=torch.Generator().manual_seed(0))


def inputs() -> dict[str, Tensor]:
    """Three latents of 8 × 12, 4 × 6 tokens."""
    return noised_batch(qwen_image_batch(0, 3, 8, 12), RectifiedFlow(), 0) | {"encoder_hidden_states": TEXTS}


def named(**changes) -> dict:
    """What diffusers' pipeline calls the model with."""
    given = inputs()
    tokens = QwenImagePipeline._pack_latents(given["hidden_states"], 3, 4, 8, 12)
    timestep = given["timestep"] / 1000
    return given | {"hidden_states": tokens, "timestep": timestep, "img_shapes": [[(1, 4, 6)]] * 3} | changes


@torch.no_grad()
def test_the_library_calls_it_as_the_pipeline_does():
    for model in (tiny_qwen_image(), t5lib.convert(tiny_qwen_image())):
        expected = QwenImagePipeline._unpack_latents(model(**named()).sample, 16, 24, 2)[:, :, 0]
        assert torch.equal(qwen_image.ADAPTER.call(model, inputs()), expected)


@torch.no_grad()
@pytest.mark.parametrize("config", [TTTConfig(), TTTConfig(text="exact", locality="dwc_qk+nat3"), None], ids=str)
def test_a_latent_is_drawn_by_its_own_text_whatever_pads_it_beside_longer_ones(config):
    """As the softmax model does (None). The mask may have any pattern, and positions of text stay what they are."""
    model = t5lib.convert(tiny_qwen_image(), config) if config else tiny_qwen_image()
    together = model(**named(encoder_hidden_states_mask=MASK)).sample
    noise = named(encoder_hidden_states_mask=MASK, encoder_hidden_states=TEXTS.masked_fill(~MASK[..., None], 1e3))
    torch.testing.assert_close(model(**noise).sample, together)
    for row, length in ((0, 4), (1, 2)):
        alone = named(encoder_hidden_states=TEXTS[:, :length])
        alone = {name: value[row : row + 1] for name, value in alone.items()}
        torch.testing.assert_close(together[row : row + 1], model(**alone).sample, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_prompts_of_unequal_length_are_drawn_together_as_each_alone():
    pipe = t5lib.convert_pipeline(tiny_qwen_image_pipeline(), inplace=True)
    pipe.set_progress_bar_config(disable=True)
    options = {"height": 16, "width": 24, "num_inference_steps": 2, "output_type": "pt"}
    prompts, seeds = ["red sun", "a"], (0, 1)
    together = pipe(prompts, generator=[torch.Generator().manual_seed(seed) for seed in seeds], **options).images
    for prompt, seed, image in zip(prompts, seeds, together, strict=True):
        alone = pipe(prompt, generator=torch.Generator().manual_seed(seed), **options).images[0]
        torch.testing.assert_close(image, alone, rtol=1e-4, atol=1e-4)


def test_layers_are_fitted_on_text_without_padding():
    for name in ("encoder_hidden_states_mask", "encoder_attention_mask"):
        with pytest.raises(T5Error, match=rf"holds {name}.*prompts with equally many tokens.* leave the mask out"):
            qwen_image.ADAPTER.check_inputs(tiny_qwen_image(), inputs() | {name: MASK})
    with pytest.raises(T5Error, match="takes no guidance"):
        qwen_image.ADAPTER.check_inputs(tiny_qwen_image(), inputs() | {"guidance": torch.ones(3)})


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (None, "without img_shapes, which give its grid"),
        ([[(1, 4, 6), (1, 4, 6)]] * 3, r"sees no others beside it \(Edit, Layered\)"),
        ([[(1, 4, 6)], [(1, 6, 4)], [(1, 4, 6)]], "all of one size"),
        ([[(2, 2, 6)]] * 3, r"expected \(1, rows, columns\) of one image"),
    ],
)
def test_shapes_of_other_than_one_image_a_latent_are_refused(shapes, message):
    with pytest.raises(T5Error, match=message):
        t5lib.convert(tiny_qwen_image())(**named(img_shapes=shapes))
    assert qwen_image.grid_of([(1, 4, 6)] * 2) == (4, 6)


def test_angles_are_a_table_of_both_axes_and_back():
    angles = tiny_qwen_image().pos_embed([[(1, 4, 6)]], max_txt_seq_len=5, device=torch.device("cpu"))
    table = qwen_image.QwenImageTTTAttention.table(angles, 24)
    assert table.shape == (29, 2 * HEAD_DIM)
    assert all(map(torch.equal, qwen_image.QwenImageTTTAttention.angles(table, 24), angles))


@torch.no_grad()
def test_the_exact_text_keeps_the_attention_that_it_had():
    texts = []
    for model in (tiny_qwen_image(), t5lib.convert(tiny_qwen_image(), TTTConfig(text="exact", layers=(0,)))):
        model.transformer_blocks[0].register_forward_hook(lambda _module, _args, out: texts.append(out[0]))
        qwen_image.ADAPTER.call(model, inputs())
    torch.testing.assert_close(texts[1], texts[0])


def test_a_mask_on_all_tokens_is_refused():
    layer = t5lib.convert(tiny_qwen_image()).transformer_blocks[0].attn
    x = torch.ones(1, 24, HEADS * HEAD_DIM)
    with pytest.raises(T5Error, match="call it without attention_mask"):
        layer(x, x[:, :3], attention_mask=torch.ones(1, 27), grid=TokenGrid(4, 6))


def test_what_is_not_inherited_starts_afresh():
    converted = t5lib.convert(tiny_qwen_image(), TTTConfig(inherit="attention"))
    assert {name.split(".")[2] for name in converted.t5_report.reset} == {"img_mlp", "txt_mlp"}
    assert qwen_image.ADAPTER.call(converted, inputs()).isfinite().all()


def test_qwen_image_converts_without_memory_for_its_weights():
    model = qwen_image.ADAPTER.skeleton("QwenImageTransformer2DModel", qwen_image.QWEN_IMAGE, None)
    before = sum(parameter.numel() for parameter in model.parameters())
    t5lib.convert(model, TTTConfig(layers=(0, 59)), inplace=True)
    one = 3 * 24 * 128 * 128 + 2 * (9 + 1) * 3072  # inner weights, and two convolutions with a bias
    assert before == 20_430_401_088 and len(qwen_image.ADAPTER.attention_names(model)) == 60
    assert sum(parameter.numel() for parameter in new_parameters(model).values()) == 2 * one
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_the_shift_of_its_scheduler_is_that_of_the_largest_images():
    assert noising_of(tiny_qwen_image_pipeline().scheduler).shift == pytest.approx(2.4596, abs=1e-4)
