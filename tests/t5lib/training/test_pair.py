"""Teachers and batches: what is meant is taken, what would fit to the wrong thing is refused in a line."""

import logging

import pytest
import torch
from PIL import Image
from tiny import random_images, tiny_vit

import t5lib
from t5lib.training.alignment import AlignConfig
from t5lib.training.calibration import CalibrateConfig
from t5lib.training.pair import check_pair
from t5lib.utils.errors import T5Error

IMAGES = random_images(2)
BROKEN = IMAGES.clone()
BROKEN[1, 0, 3, 3] = torch.nan


def calibrate(teacher, batch=IMAGES, model=None, **settings):
    model, config = model or t5lib.convert(tiny_vit()), CalibrateConfig(steps=1, batch_size=2, pool=1, **settings)
    return t5lib.calibrate(model, teacher=teacher, batches=[batch], config=config).error_after


def align(teacher, batch=IMAGES, model=None):
    model, config = model or t5lib.convert(tiny_vit()), AlignConfig(steps=0)
    return t5lib.align(model, teacher=teacher, batches=[batch], config=config).error_after


def diagnose(teacher, batch=IMAGES):
    return dict(enumerate(t5lib.diagnose(teacher, batch).shift_ratio))


def explain(teacher, batch=IMAGES):
    return dict(enumerate(t5lib.explain(teacher, t5lib.convert(teacher), batch, map_images=1, queries=1).layer_error))


every_entry = pytest.mark.parametrize("entry", [calibrate, align, diagnose, explain], ids=lambda entry: entry.__name__)

PAIRS = {
    "other weights": (lambda: tiny_vit(seed=1), r"not those that the model inherited \(relative distance 1\."),
    "one tensor not finite": (
        lambda: changed(lambda m: m.head.bias.fill_(torch.nan)),
        r"not those that the model inherited \(relative distance nan",
    ),
    "fewer blocks": (lambda: tiny_vit(depth=1), "the teacher has 1 blocks, the model 2; pass the softmax model"),
    "more blocks": (lambda: tiny_vit(depth=3), "the teacher has 3 blocks, the model 2"),
    "wider": (
        lambda: tiny_vit(embed_dim=64),
        r"other shapes than the model's, cls_token \(1, 1, 64\) for \(1, 1",
    ),
    "converted": (lambda: t5lib.convert(tiny_vit()), r"a converted model, with a TTT layer at blocks\.0\.attn"),
    "without values": (lambda: tiny_vit().to("meta"), "the teacher is on the meta device and has no weights"),
    "no model of ours": (lambda: torch.nn.Linear(3, 3), "Linear cannot be converted"),
}


def changed(change):
    model = tiny_vit()
    with torch.no_grad():
        change(model)
    return model


@pytest.mark.parametrize(("teacher", "message"), PAIRS.values(), ids=PAIRS)
def test_a_teacher_that_the_model_was_not_converted_from_is_refused(teacher, message):
    with pytest.raises(T5Error, match=message):
        check_pair(t5lib.convert(tiny_vit()), teacher())


def test_models_of_two_families_are_refused():
    tiny_denoisers = pytest.importorskip("tiny_denoisers")
    with pytest.raises(T5Error, match="the teacher is of the family dit, the model of timm_vit"):
        check_pair(t5lib.convert(tiny_vit()), tiny_denoisers.tiny_dit())


@pytest.mark.parametrize("model", [lambda: tiny_vit(), lambda: t5lib.convert(tiny_vit()).to("meta")])
def test_a_model_that_cannot_be_fitted_is_refused(model):
    with pytest.raises(T5Error, match=r"no new layer to fit; convert it first|the model is on the meta device"):
        check_pair(model(), tiny_vit())


def test_a_model_that_was_trained_since_is_taken_and_the_difference_told(caplog):
    teacher = tiny_vit()
    model = t5lib.convert(teacher)
    with caplog.at_level(logging.WARNING):
        check_pair(model.bfloat16(), teacher)
    assert not caplog.records
    told = {}
    for factor in (1.08, 1.2):  # as far as calibration and alignment move the weights; farther
        model = t5lib.convert(teacher)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(factor)
        with caplog.at_level(logging.WARNING):
            check_pair(model, teacher)
        told[factor] = caplog.text
    assert not told[1.08]
    assert "are 0.2 apart: expected if the model was trained since its conversion" in told[1.2]


def test_weights_that_conversion_started_afresh_are_no_difference():
    teacher = tiny_vit()
    check_pair(t5lib.convert(teacher, t5lib.TTTConfig(inherit="attention")), teacher)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_of_another_precision_than_the_fit_are_refused(dtype):
    teacher = tiny_vit().to(dtype)
    with pytest.raises(T5Error, match=r"on a CPU layers are fitted in float32; call \.float\(\) on both"):
        calibrate(teacher, model=t5lib.convert(teacher))
    with pytest.raises(T5Error, match=r"too coarse for small steps|call model\.float\(\)"):
        align(teacher, model=t5lib.convert(teacher))


def test_both_fits_work_under_no_grad_and_are_refused_in_inference_mode():
    with torch.no_grad():
        assert calibrate(tiny_vit()) and align(tiny_vit())
    with torch.inference_mode(), pytest.raises(T5Error, match=r"nothing can be fitted under torch\.inference_mode"):
        calibrate(tiny_vit())


@every_entry
def test_every_part_of_the_teacher_stays_in_its_mode(entry):
    teacher = tiny_vit().train()
    teacher.blocks[0].eval()
    before = [module.training for module in teacher.modules()]
    entry(teacher)
    assert [module.training for module in teacher.modules()] == before
    with pytest.raises(T5Error):
        entry(teacher, BROKEN)
    assert [module.training for module in teacher.modules()] == before


MEANT = {
    "with labels": [IMAGES, torch.zeros(2)],
    "float64": IMAGES.double(),
    "NumPy": IMAGES.numpy(),
    "single images": list(IMAGES),
    "single images of NumPy": tuple(IMAGES.numpy()),
    "a processor of transformers": {"pixel_values": IMAGES},
    "a collator of transformers": {"pixel_values": list(IMAGES.numpy()), "labels": torch.zeros(2)},
    "keyword arguments": {"x": IMAGES.numpy()},
}


@every_entry
@pytest.mark.parametrize("batch", MEANT.values(), ids=MEANT)
def test_batches_in_other_forms_are_taken(entry, batch):
    assert entry(tiny_vit(), batch) == entry(tiny_vit(), IMAGES)


REFUSED = {
    "not finite": (BROKEN, "'x' holds numbers that are not finite, first at place 1 of a batch of 2"),
    "uint8": (IMAGES.to(torch.uint8), r"images are torch\.uint8; expected floating-point numbers.*create_transform"),
    "int64": (IMAGES.long(), r"images are torch\.int64"),
    "one channel": (IMAGES[:, :1], "images of 1 channels were given to a model that takes 3"),
    "empty": (IMAGES[:0], "holds no image"),
    "one image": (IMAGES[0], r"must hold images \(B, 3, H, W\), got \(3, 32, 32\)"),
    "pictures": ([Image.new("RGB", (32, 32))] * 2, "got Image; .*create_transform.* makes tensors of image files"),
    "other size": (
        random_images(2, 40, 24),
        r"are 40×24 px, the model takes 32×32; .*img_size=\(40, 24\)",
    ),
    "several sizes": ([IMAGES[0], IMAGES[1, :, :16]], r"different shapes, \[\(3, 16, 32\), \(3, 32, 32\)\]"),
    "a dictionary of others": ({"image": IMAGES}, "expected 'x' .*, got 'image'"),
    "what the model does not take": ({"x": IMAGES, "mask": IMAGES}, "what VisionTransformer is called with: .*'mask'"),
    "more of a processor": (
        {"pixel_values": IMAGES, "bool_masked_pos": IMAGES},
        "got 'pixel_values', 'bool",
    ),
    "text": ("photos", "got str"),
    "nothing": (None, "got NoneType"),
}


@every_entry
@pytest.mark.parametrize(("batch", "message"), REFUSED.values(), ids=REFUSED)
def test_batches_that_mean_something_else_are_refused(entry, batch, message):
    with pytest.raises(T5Error, match=message):
        entry(tiny_vit(), batch)


def test_sides_that_patches_do_not_divide_are_refused_where_the_size_is_free():
    with pytest.raises(T5Error, match=r"30 is not a multiple of the patch size 8; the nearest is 32"):
        diagnose(tiny_vit(dynamic_img_size=True), random_images(2, 32, 30))
    assert diagnose(tiny_vit(dynamic_img_size=True, dynamic_img_pad=True), random_images(2, 32, 30))


def test_a_batch_of_a_denoiser_must_hold_all_that_it_is_called_with():
    tiny_denoisers = pytest.importorskip("tiny_denoisers")
    model, latents = tiny_denoisers.tiny_sd3(), torch.randn(2, 4, 8, 8)
    whole = {
        "timestep": torch.ones(2),
        "encoder_hidden_states": torch.randn(2, 3, model.config.joint_attention_dim),
        "pooled_projections": torch.randn(2, model.config.pooled_projection_dim),
    }
    cases = {
        r"lacks timestep, encoder_hidden_states, pooled_projections; .*noised_inputs": latents,
        r"lacks pooled_projections": {"hidden_states": latents, **whole, "pooled_projections": None},
        r"images of 3 channels were given to a model that takes 4": {"hidden_states": latents[:, :3], **whole},
        r"7 is not a multiple of the patch size 2": {"hidden_states": latents[..., :7], **whole},
        r"unexpected keyword argument 'labels'": {"hidden_states": latents, **whole, "labels": torch.ones(2)},
    }
    for message, batch in cases.items():
        with pytest.raises(T5Error, match=message):
            t5lib.diagnose(model, batch)


def test_a_comparison_with_other_weights_is_refused():
    with pytest.raises(T5Error, match="not those that the model inherited"):
        t5lib.explain(tiny_vit(seed=1), t5lib.convert(tiny_vit()), IMAGES)


@pytest.mark.parametrize("seed", [-1, float("nan"), 0.5, True, 2**63, "1"], ids=str)
def test_seeds_that_are_no_whole_numbers_are_refused(seed):
    with pytest.raises(T5Error, match=r"seed is .*expected a whole number, 0 or more"):
        t5lib.diagnose(tiny_vit(), IMAGES, seed=seed)


@pytest.mark.parametrize("config", [{"steps": 1}, 3, CalibrateConfig], ids=str)
def test_settings_of_another_type_are_refused(config):
    model = t5lib.convert(tiny_vit())
    for fit in (t5lib.calibrate, t5lib.align):
        with pytest.raises(T5Error, match=r"expected settings, a (Calibrate|Align)Config, or None for"):
            fit(model, teacher=tiny_vit(), batches=[IMAGES], config=config)
