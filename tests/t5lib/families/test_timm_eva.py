"""timm's Eva family, with rotary positions: converted, fitted, looked into, saved, loaded and taken back."""

import threading

import pytest
import timm
import torch
import torch._dynamo.testing
from tiny import random_images
from tiny_eva import EVAS, tiny_eva
from torch import nn

import t5lib
from t5lib.benchmarks.timing import ModelTime
from t5lib.cli import inspecting
from t5lib.families import family_of
from t5lib.layers.config import PRESETS, TTTConfig
from t5lib.layers.grid import TokenGrid
from t5lib.planning import cost_model, layer_search
from t5lib.training.alignment import AlignConfig
from t5lib.training.calibration import CalibrateConfig
from t5lib.utils.errors import T5Error

every_kind = pytest.mark.parametrize("kind", EVAS)
SIZES = [(16, 24), (24, 16), (32, 32)]


def bits(model: nn.Module) -> dict[str, bytes]:
    tensors = model.state_dict() | dict(model.named_buffers())
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def batches(count: int = 8):
    while True:
        yield random_images(count)


@every_kind
def test_convert_and_revert_give_the_original_back_bit_for_bit(kind):
    model, images = tiny_eva(kind), random_images()
    converted = t5lib.convert(model)
    assert not torch.equal(converted(images), model(images))
    back = t5lib.revert(converted)
    assert bits(back) == bits(model) and str(back) == str(model)
    assert torch.equal(back(images), model(images))
    assert type(back) is type(model) and type(back.blocks) is type(model.blocks)


@every_kind
def test_every_parameter_is_inherited_with_its_storage_or_new_and_learns(kind):
    model = tiny_eva(kind)
    pointers = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    converted = t5lib.convert(model, inplace=True)
    report, after = converted.t5_report, converted.state_dict()
    assert set(report.inherited) == set(pointers) and report.dropped == ()
    assert {name: after[name].data_ptr() for name in report.inherited} == pointers
    converted(random_images()).square().sum().backward()
    without = {n for n, p in converted.named_parameters() if p.grad is None or not p.grad.any()}
    idle = {f"blocks.1.attn.mixer.q_conv.{part}" for part in ("weight", "bias")}
    assert without <= (idle if converted.global_pool == "token" else set())


@every_kind
@pytest.mark.parametrize("dynamic", [False, True], ids=["one size", "any size"])
def test_what_is_saved_is_loaded_with_the_same_outputs(kind, dynamic, tmp_path):
    images = random_images(2, 24, 40) if dynamic else random_images(2)
    model = t5lib.convert(tiny_eva(kind, dynamic_img_size=dynamic))
    t5lib.save(model, tmp_path / "saved")
    loaded = t5lib.load(tmp_path / "saved")
    assert bits(loaded) == bits(model) and torch.equal(loaded(images), model(images))
    softmax = t5lib.revert(model)
    t5lib.save(softmax, tmp_path / "saved")
    assert torch.equal(t5lib.load(tmp_path / "saved")(images), softmax(images))


@pytest.mark.parametrize("kind", ["dinov3_biases", "mixed", "eva02_separate", "grouped"])
def test_models_that_were_changed_after_they_were_made_are_saved_too(kind, tmp_path):
    model = tiny_eva(kind)
    model.set_input_size(img_size=(24, 40))
    model.reset_classifier(3, "avg")
    model = t5lib.convert(model)
    t5lib.save(model, tmp_path / "saved")
    images = random_images(2, 24, 40)
    assert torch.equal(t5lib.load(tmp_path / "saved")(images), model(images))


@pytest.mark.parametrize("kind", ["dinov3_biases", "mixed", "eva02_separate", "grouped", "no_prefix", "eva"])
def test_layers_are_calibrated_aligned_and_explained(kind):
    teacher = tiny_eva(kind, dynamic_img_size=True)
    model = t5lib.convert(teacher)
    assert 0 < t5lib.diagnose(teacher, random_images()).summary()["mean_shift_ratio"] < 1
    inherited = {name: value.clone() for name, value in model.state_dict().items()}
    report = t5lib.calibrate(
        model, teacher=teacher, batches=batches(), config=CalibrateConfig(steps=60, batch_size=8, warmup=5)
    )
    assert all(report.error_after[name] < 0.8 * report.error_before[name] for name in report.error_before)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, inherited[name])}
    projections = {name for name in inherited if ".attn." in name and ("q_" in name or "k_" in name or "v_" in name)}
    projections |= {name for name in inherited if "attn.qkv" in name}
    assert projections <= moved and not [name for name in moved if "rope" in name]
    aligned = t5lib.align(
        model, teacher=teacher, batches=batches(), config=AlignConfig(steps=10, batch_size=8, lr_new=1e-3)
    )
    assert aligned.error_after["output"] < aligned.error_before["output"]
    seen = t5lib.explain(teacher, model, random_images(4, 24, 40))
    assert seen.grid == (3, 5) and len(seen.maps) and all(0 <= each < 1 for each in seen.shift_before)


def test_the_error_that_calibration_tells_is_that_of_the_layer_in_its_model():
    """Calibration projects in its own way, for many layers at once; explain calls the layers themselves."""
    teacher = tiny_eva("mixed")
    model, images = t5lib.convert(teacher), random_images()
    report = t5lib.calibrate(model, teacher=teacher, batches=[images, images], config=CalibrateConfig(steps=0))
    seen = t5lib.explain(teacher, model, images)
    torch.testing.assert_close(
        torch.tensor(list(report.error_before.values())), torch.tensor(seen.layer_error), rtol=1e-3, atol=0
    )


@torch.no_grad()
def test_maps_of_a_softmax_layer_are_its_own():
    model, images, calls = tiny_eva("dinov3_biases"), random_images(2), {}
    handles = family_of(model).watch(model.blocks[0].attn, calls, {}, "it")
    model(images)
    for handle in handles:
        handle.remove()
    [x], attention, rope = calls["it"].tokens, model.blocks[0].attn, calls["it"].rope
    maps = t5lib.implicit_attention(attention, x, TokenGrid(4, 4, 5), rope=rope)
    attention.fused_attn, weights = False, []
    attention.attn_drop.register_forward_hook(lambda _module, _arguments, output: weights.append(output))
    attention(x, rope=rope)
    torch.testing.assert_close(maps, weights[0])


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_can_take_the_place(preset):
    model = t5lib.convert(tiny_eva("mixed", img_size=48), preset)
    assert model(random_images(2, 48, 48)).isfinite().all()


@pytest.mark.parametrize("inner", ["swiglu_last", "three_layer", "two_layer", "one_layer_gate", "linear"])
def test_every_inner_model_can_take_the_place(inner):
    assert t5lib.convert(tiny_eva(), TTTConfig(inner=inner))(random_images(2)).isfinite().all()


@torch.no_grad()
def test_neighborhoods_see_positions():
    """On a grid of 3×3 the neighborhood of every patch is all of them, and its attention that of the softmax model."""
    model, images = tiny_eva("no_prefix", img_size=24), random_images(2, 24, 24)
    near, far = (t5lib.convert(model, TTTConfig(locality=locality)) for locality in ("none+nat3", "none"))
    heads: dict[str, torch.Tensor] = {}
    for name, each in {"softmax": model, "near": near, "far": far}.items():
        family_of(each).watch(each.blocks[0].attn, {}, heads, name)
        each(images)
    torch.testing.assert_close(2 * heads["near"] - heads["far"], heads["softmax"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inherit", ["attention", "mlp"])
def test_what_is_not_inherited_starts_as_in_a_fresh_model(inherit):
    """Eva divides the last projections of a block by the root of twice its depth."""
    wide = {"embed_dim": 128, "num_heads": 4}
    model = tiny_eva("dinov3_biases", **wide)
    converted = t5lib.convert(model, TTTConfig(inherit=inherit))
    fresh = timm.create_model(EVAS["dinov3_biases"][0], img_size=32, patch_size=8, depth=2, **wide)
    assert converted.t5_report.reset
    for name in converted.t5_report.reset:
        ours, theirs = converted.get_parameter(name), fresh.get_parameter(name)
        torch.testing.assert_close(ours.std(), theirs.std(), rtol=0.15, atol=1e-6)
        torch.testing.assert_close(ours.mean(), theirs.mean(), rtol=0, atol=2e-3)


@pytest.mark.parametrize("kind", ["dinov3", "mixed"])
@torch.no_grad()
def test_a_conversion_is_planned_and_what_was_saved_inspected(kind, tmp_path, monkeypatch):
    def time_models(models, inputs, config, rules, where):
        assert all(model(**inputs).isfinite().all() for model in models.values())
        return {
            name: ModelTime([1.0 + len(model.blocks)], None, 0.0, torch.float64, None) for name, model in models.items()
        }

    monkeypatch.setattr(cost_model, "time_models", time_models)
    model = tiny_eva(kind)
    found = cost_model.plan(model, 48, "cpu", ("swiglu", "swiglu+nat3"))
    assert (found.depth, found.prefix, found.timing.tokens) == (
        2,
        model.num_prefix_tokens,
        36 + model.num_prefix_tokens,
    )
    mixed = layer_search.hybrid(model, {"swiglu": t5lib.convert(model)}, ["softmax", "swiglu"])
    t5lib.save(mixed, tmp_path / "saved")
    seen = inspecting.run(tmp_path / "saved")
    assert seen["layers"] == {"ttt": [1], "softmax": [0]} and seen["flops"]["equal_tokens"]


# The grid and the positions of the forward that runs.


@pytest.mark.parametrize("kind", ["dinov3", "mixed", "eva02_separate"])
@torch.no_grad()
def test_threads_share_a_model_at_several_sizes(kind):
    model = t5lib.convert(tiny_eva(kind, dynamic_img_size=True))
    inputs = [random_images(2, *size) for size in SIZES]
    expected, wrong = [t5lib.convert(tiny_eva(kind, dynamic_img_size=True))(each) for each in inputs], []

    @torch.no_grad()
    def serve(first: int) -> None:
        for number in range(first, first + 30):
            index = number % len(SIZES)
            if not torch.equal(model(inputs[index]), expected[index]):
                wrong.append(number)

    threads = [threading.Thread(target=serve, args=(first,)) for first in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("kind", ["dinov3_biases", "mixed"])
def test_recomputation_uses_the_grid_and_the_positions_of_its_own_forward(kind):
    plain, model = (t5lib.convert(tiny_eva(kind, dynamic_img_size=True)) for _ in "12")
    model.set_grad_checkpointing(True)
    for each in (plain, model):
        sum(each(random_images(2, *size)).square().sum() for size in SIZES).backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)


@torch.no_grad()
def test_a_converted_model_compiles_whole_and_no_more_often_than_the_softmax_model():
    def graphs(model: nn.Module) -> int:
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
        compiled = torch.compile(model, backend=counter, dynamic=True, fullgraph=True)
        for size in SIZES:
            torch.testing.assert_close(compiled(random_images(2, *size)), model(random_images(2, *size)))
        return counter.frame_count

    softmax = tiny_eva("mixed", dynamic_img_size=True)
    assert graphs(t5lib.convert(softmax)) <= graphs(softmax)


@torch.no_grad()
def test_every_way_to_the_blocks_knows_its_grid():
    model, images = t5lib.convert(tiny_eva(dynamic_img_size=True)), random_images(2, 24, 16)
    features = model.forward_features(images)
    torch.testing.assert_close(model.forward_head(features), model(images))
    _, tokens = model.forward_intermediates(images, output_fmt="NLC", norm=True)
    torch.testing.assert_close(tokens[-1], features[:, 5:])
    (early,) = model.forward_intermediates(images, [0], stop_early=True, intermediates_only=True)
    assert early.shape == (2, 32, 3, 2)


# Refused.


def test_masks_and_dropped_patches_are_refused():
    with pytest.raises(T5Error, match="patch_drop_rate is set"):
        t5lib.convert(tiny_eva(patch_drop_rate=0.5))
    model = t5lib.convert(tiny_eva())
    with pytest.raises(T5Error, match="attn_mask and is_causal are not supported"):
        model(random_images(), attn_mask=torch.ones(21, 21, dtype=torch.bool))
    with pytest.raises(T5Error, match=r"blocks\.0\.attn is converted already"):
        t5lib.convert(model)
