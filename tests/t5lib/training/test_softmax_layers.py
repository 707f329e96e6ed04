"""`layers: auto`: after the fit, softmax comes back where the whole model misses it most."""

import pytest
import torch
from tiny import random_images, tiny_vit
from tiny_denoisers import sd3_batch, tiny_sd3
from torch import nn

import t5lib
from t5lib.conversion import ttt_layers
from t5lib.layers.config import TTTConfig
from t5lib.training.calibration import CalibrateConfig
from t5lib.training.objectives import RectifiedFlow, noised_batch
from t5lib.utils.errors import T5Error

RECIPE = CalibrateConfig(steps=4, batch_size=4, warmup=1, pool=1, reuse=1)


def error(model: nn.Module, teacher: nn.Module, batches: list[torch.Tensor]) -> float:
    """Of patch features and output, over the variance of the teacher's."""
    total = 0.0
    with torch.no_grad():
        for images in batches:
            ours, theirs = model.forward_features(images)[:, 1:], teacher.forward_features(images)[:, 1:]
            total += ((ours - theirs).square().mean() / theirs.var(dim=(0, 1), correction=0).mean()).item()
            ours, theirs = model(images), teacher(images)
            total += ((ours - theirs).square().mean() / theirs.var(correction=0)).item()
    return total / len(batches)


def with_softmax(model: nn.Module, teacher: nn.Module, layers: list[str]) -> nn.Module:
    """The model that conversion without these layers gives, with the other layers of `model`."""
    kept = [index for index in range(len(model.blocks)) if f"blocks.{index}.attn" not in layers]
    other = t5lib.convert(teacher, TTTConfig(layers=kept))
    for index in kept:
        other.blocks[index].attn.load_state_dict(model.blocks[index].attn.state_dict())
    return other.eval()


def test_layers_that_harm_most_are_softmax_again_and_the_rest_stays_fitted():
    teacher = tiny_vit(depth=4)
    batches = [random_images(4, seed=number) for number in range(6)]
    everything, auto = t5lib.convert(teacher), t5lib.convert(teacher, TTTConfig(layers="auto", softmax_layers=2))
    t5lib.calibrate(everything, teacher=teacher, batches=batches, config=RECIPE)
    report = t5lib.calibrate(auto, teacher=teacher, batches=batches, config=RECIPE)

    measured, back = batches[:4], []
    assert report.softmax.error == pytest.approx(error(everything.eval(), teacher, measured), rel=1e-3)
    for errors, chosen in zip(report.softmax.error_with, report.softmax.layers, strict=True):
        expected = {
            name: error(with_softmax(everything, teacher, [*back, name]), teacher, measured)
            for name in ttt_layers(everything)
            if name not in back
        }
        assert errors == pytest.approx(expected, rel=1e-3)
        assert chosen == min(expected, key=expected.get)
        back.append(chosen)
    expected = with_softmax(everything, teacher, back)
    assert auto.t5_config == expected.t5_config
    assert auto.t5_report == expected.t5_report
    torch.testing.assert_close(auto.eval()(batches[0]), expected(batches[0]))
    assert error(auto, teacher, measured) < report.softmax.error


def test_a_chosen_model_is_saved_and_reverted_as_any_other(tmp_path):
    teacher = tiny_sd3()
    model = t5lib.convert(teacher, TTTConfig(layers="auto", softmax_layers=1))
    batch = noised_batch(sd3_batch(0), RectifiedFlow(), 0)
    report = t5lib.calibrate(model, teacher=teacher, batches=[batch] * 3, config=RECIPE)
    [back] = report.softmax.layers
    assert type(model.get_submodule(back)) is type(teacher.get_submodule(back))
    assert set(report.softmax.error_with[0]) == {back, *ttt_layers(model)}
    t5lib.save(model, tmp_path / "model")
    loaded = t5lib.load(tmp_path / "model").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).sample, model.eval()(**batch).sample)
    assert type(t5lib.revert(loaded)) is type(teacher)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": "auto"}, "'auto' needs to know how many"),
        ({"softmax_layers": 2}, "layers is None and softmax_layers 2"),
        ({"layers": [0], "softmax_layers": 1}, "and with other layers it is 0"),
    ],
)
def test_auto_and_its_number_go_together(settings, message):
    with pytest.raises(T5Error, match=message):
        TTTConfig(**settings)


def test_at_least_one_layer_stays_converted():
    with pytest.raises(T5Error, match="softmax_layers is 2 of 2 attentions; leave at least one"):
        t5lib.convert(tiny_vit(depth=2), TTTConfig(layers="auto", softmax_layers=2))
