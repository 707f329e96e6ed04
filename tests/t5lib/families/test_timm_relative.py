"""Models with a bias of relative positions: on request they convert without it, and `revert` gives it back."""

import pytest
import torch
from command_line import refused, run, words
from tiny import random_images, tiny_timm

import t5lib
from t5lib.conversion import ttt_layers
from t5lib.families import family_of
from t5lib.layers.config import TTTConfig
from t5lib.utils.errors import T5Error

WITHOUT = TTTConfig(drop_position_bias=True)
NAMES = {
    "beit": "beit_base_patch16_224",
    "relative": "vit_relpos_small_patch16_224",
    "relative_class_token": "vit_relpos_base_patch16_cls_224",
    "shared": "vit_srelpos_small_patch16_224",
}
every_kind = pytest.mark.parametrize("kind", NAMES)


def tiny(kind, **changes):
    return tiny_timm(NAMES[kind], 0, **changes)


@every_kind
def test_a_refusal_names_the_option_and_so_does_one_where_it_has_no_use(kind):
    with pytest.raises(T5Error, match=r"blocks\.0\.attn: it adds a bias.*TTTConfig\(drop_position_bias=True\)"):
        t5lib.convert(tiny(kind))
    with pytest.raises(T5Error, match="none of the attentions of this VisionTransformer has a position bias"):
        t5lib.convert(tiny_timm("vit_tiny_patch16_224", 0), WITHOUT)


@every_kind
@torch.no_grad()
def test_what_is_dropped_is_in_the_report_idle_and_comes_back_bit_for_bit(kind):
    model = tiny(kind)
    converted, images = t5lib.convert(model, WITHOUT), random_images()
    report = converted.t5_report
    assert report.dropped and all("rel" in name for name in report.dropped)
    assert report.numbers["dropped"] == sum(model.get_parameter(name).numel() for name in report.dropped)
    assert {*report.dropped} | {*report.inherited} == {*model.state_dict()}
    before = converted(images)
    for name in report.dropped:
        converted.get_parameter(name).add_(1)
    assert torch.equal(converted(images), before)
    reverted = t5lib.revert(t5lib.convert(model, WITHOUT))
    assert torch.equal(reverted(images), model(images))
    assert all(parameter.requires_grad for parameter in reverted.parameters())


@every_kind
def test_all_that_can_learn_gets_a_gradient(kind):
    converted = t5lib.convert(tiny(kind), WITHOUT)
    converted(random_images()).square().sum().backward()
    idle = [name for name, p in converted.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []


def test_a_bias_that_some_attention_still_uses_is_not_dropped():
    report = t5lib.convert(tiny("shared"), TTTConfig(drop_position_bias=True, layers=(1,))).t5_report
    assert report.dropped == ()
    own = t5lib.convert(tiny("beit"), TTTConfig(drop_position_bias=True, layers=(1,))).t5_report
    assert own.dropped == ("blocks.1.attn.relative_position_bias_table",)


@every_kind
@torch.no_grad()
def test_softmax_of_the_adapters_own_queries_and_keys_is_the_attention_but_for_its_bias(kind):
    model = tiny(kind)
    family, calls, heads = family_of(model), {}, {}
    for name, parameter in model.named_parameters():
        if "rel" in name:
            parameter.zero_()
    for name in family.attention_names(model):
        family.watch(model.get_submodule(name), calls, heads, name)
    model(random_images())
    for name, expected in heads.items():
        q, k, v = family.project(model.get_submodule(name), calls[name])
        ours = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@every_kind
@torch.no_grad()
def test_a_saved_model_comes_back_with_the_option_and_reverts(kind, tmp_path):
    model, images = tiny(kind), random_images()
    converted = t5lib.convert(model, WITHOUT)
    t5lib.save(converted, tmp_path / "model")
    loaded = t5lib.load(tmp_path / "model")
    assert loaded.t5_config.drop_position_bias
    assert torch.equal(loaded(images), converted(images))
    assert torch.equal(t5lib.revert(loaded)(images), model(images))
    t5lib.save(model, tmp_path / "softmax")
    assert torch.equal(t5lib.load(tmp_path / "softmax")(images), model(images))


@every_kind
@torch.no_grad()
def test_another_image_size_is_taken_and_the_idle_bias_follows_it(kind):
    model, images = tiny(kind), random_images(2, 64, 64)
    converted = t5lib.convert(model, WITHOUT)
    for each in (model, converted):
        each.set_input_size(img_size=(64, 64))
    assert converted(images).shape == (2, 7)
    torch.testing.assert_close(t5lib.revert(converted)(images), model(images))


@pytest.mark.parametrize("kind", ["beit", "shared"])
def test_calibration_fits_the_attention_with_its_bias(kind):
    model = tiny(kind)
    converted = t5lib.convert(model, WITHOUT)
    batches = [random_images(8, seed=n) for n in range(30)]
    report = t5lib.calibrate(converted, teacher=model, batches=batches, config=t5lib.CalibrateConfig(steps=30))
    assert sum(report.error_after.values()) < 0.9 * sum(report.error_before.values())


@pytest.mark.parametrize("kind", ["relative", "shared"])
def test_softmax_that_calibration_puts_back_has_its_bias(kind):
    model = tiny(kind)
    auto = TTTConfig(drop_position_bias=True, layers="auto", softmax_layers=1)
    converted = t5lib.convert(model, auto)
    batches = [random_images(8, seed=n) for n in range(6)]
    t5lib.calibrate(converted, teacher=model, batches=batches, config=t5lib.CalibrateConfig(steps=4))
    [layer] = ttt_layers(converted)
    dropped = converted.t5_report.dropped
    assert all(name.startswith(f"{layer}.") for name in dropped) and bool(dropped) == (kind == "relative")
    assert all(p.requires_grad for name, p in converted.named_parameters() if name not in dropped)


def test_the_command_has_the_option_and_tells_what_it_drops(tmp_path):
    command = ("convert", "test_vit_relpos", tmp_path / "out", "--no-pretrained")
    assert "TTTConfig(drop_position_bias=True)" in refused(*command)
    result = run(*command, "--drop-position-bias")
    assert result.exit_code == 0, result.output
    loaded = t5lib.load(tmp_path / "out")
    assert loaded.t5_config.drop_position_bias and loaded.t5_report.numbers["dropped"] > 0
    assert f"dropped {loaded.t5_report.numbers['dropped']:,} numbers" in words(result.stdout)
