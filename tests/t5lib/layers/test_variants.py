"""Every variant of the layer, in a whole model: converts, learns, saves, loads, compiles, takes any grid, reverts."""

import pytest
import torch
from tiny import random_images, tiny_vit

import t5lib
from t5lib.conversion import new_parameters, ttt_layers
from t5lib.layers.config import CONVOLUTIONS, INNERS, PRESETS, TTTConfig
from t5lib.layers.grid import TokenGrid
from t5lib.training.calibration import CalibrateConfig
from t5lib.utils.errors import T5Error

WIDE = {"num_heads": 2, "dynamic_img_size": True}  # head_dim 16
VARIANTS = (
    {inner: TTTConfig(inner=inner, radius=2.0) for inner in INNERS}
    | {f"residual-{inner}": TTTConfig(inner=inner, inner_loss="residual") for inner in ("swiglu", "three_layer")}
    | {f"{base}+nat3": TTTConfig(locality=f"{base}+nat3") for base in CONVOLUTIONS}
    | {base: TTTConfig(locality=base) for base in CONVOLUTIONS}
    | {f"preset-{name}": TTTConfig.preset(name, radius=2.0) for name in PRESETS}
    | {"map": TTTConfig(layers={"0": "two_layer+nat3", "1": "hedgehog"}), "rescale": TTTConfig(rescale=True)}
)
WITHOUT_NEW_WEIGHTS = ("clear", "preset-clear", "swa", "preset-graft-swa")
every_variant = pytest.mark.parametrize("variant", VARIANTS)
# Of a baseline both the inner model and the preset are variants; to trace or to fit one of them takes a second.
ONCE = [name for name in VARIANTS if name.removeprefix("preset-") == name or name[7:] not in INNERS]


def images_for(height: int = 48, width: int = 40) -> torch.Tensor:
    return random_images(2, height, width)


@every_variant
def test_converts_runs_on_a_grid_that_is_no_square_and_gives_the_softmax_model_back(variant):
    model, config = tiny_vit("dinov2_registers", **WIDE), VARIANTS[variant]
    converted = t5lib.convert(model, config)
    out = converted(images_for())
    assert out.shape == (2, 7) and out.isfinite().all()
    assert not torch.allclose(out, model(images_for()))
    if config.inherit == "all" and not config.layers:
        assert torch.equal(t5lib.revert(converted)(images_for()), model(images_for()))


@every_variant
def test_saved_and_loaded_it_is_the_same_model(variant, tmp_path):
    converted = t5lib.convert(tiny_vit(**WIDE), VARIANTS[variant])
    t5lib.save(converted, tmp_path / "model")
    loaded = t5lib.load(tmp_path / "model")
    assert loaded.t5_config == converted.t5_config
    assert torch.equal(loaded(images_for()), converted(images_for()))


@every_variant
def test_one_step_of_training_changes_every_new_parameter(variant):
    converted = t5lib.convert(tiny_vit("average_pool", **WIDE), VARIANTS[variant]).train()
    before = {name: parameter.detach().clone() for name, parameter in new_parameters(converted).items()}
    optimizer = torch.optim.AdamW(converted.parameters(), lr=1e-3)
    converted(images_for()).square().sum().backward()
    optimizer.step()
    assert [name for name, parameter in new_parameters(converted).items() if torch.equal(parameter, before[name])] == []
    assert converted(images_for()).isfinite().all()


@pytest.mark.parametrize("variant", ONCE)
@torch.no_grad()
def test_compiled_in_one_graph_its_layers_compute_the_same(variant):
    """What is around the layers is alike in all variants, and takes as long to trace (test_token_grid.py does)."""
    config = VARIANTS[variant]
    grid, x = TokenGrid(6, 5, num_prefix_tokens=1), torch.randn(2, 31, 32)
    for layer in ttt_layers(t5lib.convert(tiny_vit(**WIDE, depth=2 if config.layers else 1), config)).values():
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, grid=grid), layer(x, grid=grid))


@pytest.mark.parametrize("variant", [name for name in ONCE if name not in WITHOUT_NEW_WEIGHTS])
def test_calibration_brings_every_layer_nearer_to_softmax(variant):
    teacher, config = tiny_vit(**WIDE), VARIANTS[variant]
    model = t5lib.convert(teacher, config)
    recipe = CalibrateConfig(steps=40, batch_size=8, warmup=2, pool=1, reuse=4, lr=3e-3)
    batches = [random_images(8, 48, 40, seed=s) for s in range(8)]
    report = t5lib.calibrate(model, teacher=teacher, batches=batches, config=recipe)
    worse = {n: (b, report.error_after[n]) for n, b in report.error_before.items() if report.error_after[n] >= b}
    assert worse == {}


@pytest.mark.parametrize("objective", ["output", "attention"])
def test_layers_of_several_kinds_are_each_fitted_as_if_alone(objective):
    """The stacked mixers of a map give each layer just what a model with that one layer converted gives it."""
    kinds = {"output": ("two_layer", "swiglu"), "attention": ("hedgehog", "performer")}[objective]
    maps = dict(zip("01", kinds, strict=True))
    teacher = tiny_vit(**WIDE)
    recipe = CalibrateConfig(steps=6, batch_size=8, warmup=2, pool=1, reuse=2, objective=objective)
    batches = [random_images(8, seed=s) for s in range(4)]
    together = t5lib.convert(teacher, TTTConfig(layers=maps))
    t5lib.calibrate(together, teacher=teacher, batches=batches, config=recipe)
    alone = t5lib.convert(teacher, TTTConfig(layers=maps))
    alone.blocks[0].attn = teacher.blocks[0].attn
    t5lib.calibrate(alone, teacher=teacher, batches=batches, config=recipe)
    assert list(ttt_layers(alone)) == ["blocks.1.attn"]
    ours, theirs = together.blocks[1].attn.state_dict(), alone.blocks[1].attn.state_dict()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_the_attention_objective_needs_a_map():
    teacher = tiny_vit()
    recipe = CalibrateConfig(steps=1, batch_size=2, objective="attention")
    with pytest.raises(T5Error, match="inner 'swiglu' has none"):
        t5lib.calibrate(t5lib.convert(teacher), teacher=teacher, batches=[random_images(2)] * 2, config=recipe)


def test_the_attention_objective_refuses_what_its_maps_leave_out():
    teacher = tiny_vit()
    model = t5lib.convert(teacher, TTTConfig(inner="hedgehog"))
    recipe = CalibrateConfig(steps=1, batch_size=2, objective="attention")
    with pytest.raises(T5Error, match="key_norm is 'instance', locality 'dwc_qk'"):
        t5lib.calibrate(model, teacher=teacher, batches=[random_images(2)] * 2, config=recipe)


def test_layers_without_new_weights_need_their_projections_fitted():
    teacher = tiny_vit()
    model = t5lib.convert(teacher, TTTConfig(inner="linear", locality="none"))
    recipe = CalibrateConfig(steps=1, batch_size=2, lr_inherited=0.0)
    with pytest.raises(T5Error, match="nothing to fit"):
        t5lib.calibrate(model, teacher=teacher, batches=[random_images(2)] * 2, config=recipe)


@pytest.mark.parametrize(("inherit", "reset"), [("attention", "mlp"), ("mlp", "attn")])
def test_what_is_not_inherited_starts_afresh_and_is_accounted_for(inherit, reset):
    model = tiny_vit()
    converted = t5lib.convert(model, TTTConfig(inherit=inherit, layers=(1,)))
    report = converted.t5_report
    assert report.reset and all(name.startswith(f"blocks.1.{reset}.") for name in report.reset)
    assert not set(report.reset) & set(report.inherited)
    own, pretrained = converted.state_dict(), model.state_dict()
    assert all(not torch.equal(own[name], pretrained[name]) for name in report.reset)
    assert all(torch.equal(own[name], pretrained[name]) for name in report.inherited)
    assert report.numbers["reset"] == sum(pretrained[name].numel() for name in report.reset)


def test_a_window_larger_than_the_grid_is_refused_with_both_sizes():
    converted = t5lib.convert(tiny_vit(**WIDE), TTTConfig(locality="none+nat5"))
    with pytest.raises(T5Error, match="5×5 tokens, more than the grid of 4×4"):
        converted(random_images(2, 32, 32))


def test_a_model_of_one_size_with_too_large_a_window_is_refused_before_anything_changes():
    model = tiny_vit(num_heads=2)  # 4×4 patches, no other size
    before = list(model.state_dict())
    for config in (TTTConfig(locality="none+nat5"), TTTConfig(layers={"0": "swiglu", "1": "clear+nat5"})):
        with pytest.raises(T5Error, match="5×5 tokens, more than the grid of 4×4"):
            t5lib.convert(model, config, inplace=True)
    assert list(model.state_dict()) == before and not model.patch_embed._forward_pre_hooks
    assert t5lib.convert(model, TTTConfig(locality="none+nat3"))(random_images(2)).isfinite().all()


@pytest.mark.parametrize(("inherit", "fresh"), [("mlp", "attn.qkv"), ("attention", "mlp.fc1")])
def test_what_starts_afresh_is_trained_as_new(inherit, fresh):
    converted = t5lib.convert(tiny_vit(), TTTConfig(inherit=inherit))
    assert {f"blocks.0.{fresh}.weight", "blocks.0.attn.mixer.w1"} <= set(new_parameters(converted))
    assert "blocks.0.norm1.weight" not in new_parameters(converted)


def test_a_conversion_that_starts_parts_afresh_is_repeatable_and_leaves_the_random_state_alone():
    before = torch.random.get_rng_state()
    one, two = (t5lib.convert(tiny_vit(), TTTConfig.preset("lit", seed=3)).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(torch.random.get_rng_state(), before)
