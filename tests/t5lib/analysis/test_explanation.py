"""An explanation holds what the two models really do, layer by layer, and changes neither."""

import pytest
import torch
from tiny import random_images, tiny_vit

import t5lib
from t5lib.analysis.key_shift import diagnose
from t5lib.layers.config import TTTConfig
from t5lib.training.calibration import CalibrateConfig
from t5lib.utils.errors import T5Error

IMAGES = random_images(6)


@pytest.fixture(scope="module")
def mixed():
    """Softmax in layer 0, a TTT layer in 1."""
    return t5lib.convert(tiny_vit(), TTTConfig(layers=(1,)))


@pytest.fixture(scope="module")
def found(mixed):
    return t5lib.explain(tiny_vit(), mixed, IMAGES, map_images=3)


def test_layers_that_stayed_softmax_are_found_unchanged(found):
    assert found.layers == ("blocks.0.attn", "blocks.1.attn")
    assert found.kinds == ("softmax", "swiglu, dwc_qk")
    assert found.layer_error[0] == found.block_error[0] == 0
    assert found.cka[0] == pytest.approx(1)
    assert found.distance_softmax[0] == found.distance_converted[0] != found.distance_converted[1]
    assert found.shift_after[0] is found.shift_fitted[0] is None
    assert found.layer_error[1] > 0 and found.block_error[1] > 0 and found.cka[1] < 1
    assert (found.images, found.map_images, found.grid) == (6, 3, (4, 4))


def test_layer_error_is_the_one_that_calibration_tells(mixed, found):
    before = t5lib.calibrate(mixed, teacher=tiny_vit(), batches=[IMAGES], config=CalibrateConfig(steps=0)).error_before
    assert found.layer_error[1] == pytest.approx(before["blocks.1.attn"], rel=1e-4)


def test_block_error_is_of_the_models_as_they_run(mixed, found):
    kept = []
    for model in (mixed, tiny_vit()):
        with model.blocks[1].register_forward_hook(lambda _, given, made: kept.append(made)), torch.no_grad():
            model(IMAGES)
    ours, theirs = kept
    expected = ((ours - theirs).square().mean() / theirs.var(correction=0)).item()
    assert found.block_error[1] == pytest.approx(expected, rel=1e-4)


def test_shifts_follow_the_keys_through_norm_and_convolution(found):
    expected = torch.tensor(diagnose(tiny_vit(), IMAGES).shift_ratio).mean(1)
    torch.testing.assert_close(torch.tensor(found.shift_softmax), expected)
    torch.testing.assert_close(torch.tensor(found.shift_before), expected)  # nothing was trained
    assert found.shift_after[1] < 1e-5 < found.shift_fitted[1]
    plain = t5lib.convert(tiny_vit(), TTTConfig(key_norm="none", locality="none", rescale=True))
    with torch.no_grad():
        plain.blocks[1].attn.mixer.k_offset += 100
    shifts = t5lib.explain(tiny_vit(), plain, IMAGES)
    assert shifts.shift_after[0] == pytest.approx(shifts.shift_before[0])
    assert shifts.shift_before[1] < 0.9 < shifts.shift_after[1] == shifts.shift_fitted[1]


def test_attention_without_preference_has_the_uniform_distance():
    softmax, flat = tiny_vit(), tiny_vit()
    with torch.no_grad():
        flat.blocks[0].attn.qkv.weight[:32] = 0
        flat.blocks[0].attn.qkv.bias[:32] = 0
    found = t5lib.explain(softmax, flat, IMAGES)
    assert found.distance_converted[0] == pytest.approx(found.distance_uniform)
    assert found.kinds == ("softmax", "softmax")
    assert "layer_error" not in found.summary()


def test_maps_are_of_named_queries_and_sum_to_one(found):
    assert {shown.query for shown in found.maps} == {"centre", "corner", "class token"}
    assert {(shown.image, shown.layer) for shown in found.maps} == {(i, layer) for i in (0, 1) for layer in (0, 1)}
    for shown in found.maps:
        for values in (shown.softmax, shown.converted):
            assert [len(row) for row in values] == [4] * 4
            assert sum(map(sum, values)) == pytest.approx(1, abs=1e-2)
        assert (shown.softmax == shown.converted) == (shown.layer == 0)
    assert {shown.query: shown.patch for shown in found.maps} == {"centre": 10, "corner": 0, "class token": None}


def test_other_sizes_batches_and_models_without_class_token(monkeypatch):
    monkeypatch.setattr(t5lib.analysis.explanation, "TOKENS_AT_ONCE", 64)  # two images at once
    sizes = {"img_size": (32, 48)}
    softmax = tiny_vit("average_pool", **sizes)
    converted = t5lib.convert(softmax)
    images = random_images(3, 32, 48)
    found = t5lib.explain(softmax, converted, images)
    assert found.grid == (4, 6) and {shown.query for shown in found.maps} == {"centre", "corner"}
    monkeypatch.undo()
    whole = t5lib.explain(softmax, converted, images)
    assert found.cka == pytest.approx(whole.cka, rel=1e-5)
    assert found.layer_error == pytest.approx(whole.layer_error, rel=1e-4)
    assert found.shift_before == pytest.approx(whole.shift_before, rel=1e-5)


def test_summary_and_layers_are_flat_numbers(found):
    summary = found.summary()
    assert all(isinstance(value, float) for value in summary.values())
    assert summary["layer_error"] == found.layer_error[1] and summary["cka_min"] == min(found.cka)
    assert summary["distance_softmax"] == pytest.approx(sum(found.distance_softmax) / 2)
    first, second = found.by_layer()
    assert first.keys() | {"shift_after", "shift_fitted"} == second.keys()
    assert second["block_error"] == found.block_error[1]
    assert found.as_dict()["maps"][0]["query"] == "centre"


def test_models_and_random_state_are_as_before():
    softmax = tiny_vit(drop_path_rate=0.5).train()
    converted = t5lib.convert(softmax)
    random, hooks = torch.get_rng_state(), [len(module._forward_hooks) for module in converted.modules()]
    one = t5lib.explain(softmax, converted, IMAGES)
    assert softmax.training and converted.training and torch.equal(torch.get_rng_state(), random)
    assert [len(module._forward_hooks) for module in converted.modules()] == hooks
    assert not any(module._forward_hooks for module in softmax.modules())
    for model in (softmax, converted):
        assert not any("mix" in vars(module) for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())
    assert one == t5lib.explain(softmax.eval(), converted.eval(), IMAGES)


def test_models_that_do_not_belong_together_are_refused(mixed):
    softmax = tiny_vit()
    with pytest.raises(T5Error, match=r"first model must be the softmax one: blocks\.1\.attn is converted already"):
        t5lib.explain(mixed, softmax, IMAGES)
    with pytest.raises(T5Error, match=r"the models differ in blocks\.2\.attn\.proj\.bias None and \(32,\)"):
        t5lib.explain(softmax, t5lib.convert(tiny_vit(depth=3)), IMAGES)
    with pytest.raises(T5Error, match=r"pos_embed \(1, 17, 32\) and \(1, 65, 32\)"):
        t5lib.explain(softmax, t5lib.convert(tiny_vit(img_size=64)), IMAGES)
    with pytest.raises(T5Error, match=r"the models differ in .*blocks"):
        t5lib.explain(softmax, torch.nn.Linear(3, 3), IMAGES)
    with pytest.raises(T5Error, match=r"must hold images \(B, 3, H, W\), got \(3, 32, 32\)"):
        t5lib.explain(softmax, mixed, IMAGES[0])
    with pytest.raises(T5Error, match="a batch holds no image"):
        t5lib.explain(softmax, mixed, IMAGES[:0])


def test_numbers_that_mean_nothing_and_weights_that_are_not_finite_are_refused(mixed):
    softmax = tiny_vit()
    wrong = {"queries": (0, -1, 1.5, None, True), "map_images": (0, -1, 1.5), "probes": (0, -1, 2.5)}
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(T5Error, match=f"explain: {name} is {value}; expected a whole number, 1 or more"):
                t5lib.explain(softmax, mixed, IMAGES, **{name: value})
    broken = t5lib.convert(softmax)
    with torch.no_grad():
        broken.get_submodule("blocks.1.attn.mixer").q_conv.weight[0] = torch.inf
    with pytest.raises(T5Error, match=r"the converted model holds numbers that are not finite, in 1 weights"):
        t5lib.explain(softmax, broken, IMAGES)
