"""Models of transformers, whatever holds them: converted, fitted, looked into, saved, loaded and taken back."""

import copy
import pickle
import sys

import pytest
import torch
import transformers
from tiny import random_images
from tiny_transformers import KINDS, SMALL, tiny_transformer
from torch import Tensor, nn

import t5lib
from t5lib.analysis.attention_maps import map_of
from t5lib.families import adapter, family_of
from t5lib.families.inputs import ExampleSize
from t5lib.families.transformers_vit import ADAPTER
from t5lib.layers.config import PRESETS, TTTConfig
from t5lib.layers.grid import TokenGrid
from t5lib.training.alignment import AlignConfig
from t5lib.training.calibration import CalibrateConfig
from t5lib.utils.errors import T5Error

every_kind = pytest.mark.parametrize("kind", KINDS)
# One of everything that is called, aligned and described in its own way.
FEW = [
    "vit_classifier",
    "dinov2_registers",
    "dinov3",
    "siglip_dual",
    "clip_projection",
    "mae",
    "depth_anything",
]
few_kinds = pytest.mark.parametrize("kind", FEW)
PREFIX = {"deit": 2, "dinov2_registers": 4, "dinov3": 5}
PREFIX |= dict.fromkeys(("siglip", "siglip_classifier", "siglip_dual", "ijepa"), 0)


def call(model: nn.Module, images: Tensor) -> Tensor:
    return family_of(model).call(model, {"pixel_values": images})


def bits(model: nn.Module) -> dict[str, bytes]:
    tensors = model.state_dict() | dict(model.named_buffers())
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def batches(count: int = 8):
    while True:
        yield random_images(count)


@every_kind
@torch.no_grad()
def test_convert_and_revert_give_the_original_back_bit_for_bit(kind):
    model, images = tiny_transformer(kind), random_images()
    converted = t5lib.convert(model)
    assert not torch.equal(call(converted, images), call(model, images))
    back = t5lib.revert(converted)
    assert bits(back) == bits(model) and str(back) == str(model)
    assert torch.equal(call(back, images), call(model, images))
    assert [type(part) for part in back.modules()] == [type(part) for part in model.modules()]
    assert back.config.to_dict() == model.config.to_dict() and type(back.config) is type(model.config)


@every_kind
def test_every_parameter_keeps_its_name_and_its_storage_and_new_ones_learn(kind):
    model = tiny_transformer(kind)
    pointers = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    converted = t5lib.convert(model, inplace=True)
    report, after = converted.t5_report, converted.state_dict()
    assert set(report.inherited) == set(pointers) and report.dropped == ()
    assert {name: after[name].data_ptr() for name in report.inherited} == pointers
    call(converted, random_images()).square().sum().backward()
    idle = [name for name in report.new if not converted.get_parameter(name).grad.any()]
    assert len(idle) < len(report.new) / 4  # such as what only class tokens' queries would need


@every_kind
@torch.no_grad()
def test_images_of_any_size_are_taken_as_by_the_original(kind):
    """41 pixels are five patches of eight and one column that is left out."""
    model = tiny_transformer(kind)
    converted = t5lib.convert(model, TTTConfig(layers=(0,)))
    sizes = [(40, 40), (16, 16)] if kind == "vit_pretraining" else [(24, 41), (48, 16)]
    for size in sizes:
        ours, theirs = call(converted, random_images(2, *size)), call(model, random_images(2, *size))
        assert ours.shape == theirs.shape and ours.isfinite().all()
        grid = ADAPTER.grid(model, {"pixel_values": random_images(2, *size)})
        assert (grid.rows, grid.columns) == (size[0] // 8, size[1] // 8)
        assert grid.num_prefix_tokens == PREFIX.get(kind, 1)
    with pytest.raises(T5Error, match="images are 32×7 px, smaller than a patch of 8×8"):
        ADAPTER.grid(model, {"pixel_values": random_images(1, 32, 7)})


@few_kinds
def test_layers_are_calibrated_and_models_aligned_also_by_adapters(kind):
    teacher = tiny_transformer(kind)
    model = t5lib.convert(teacher)
    recipe = CalibrateConfig(steps=25, batch_size=8, warmup=5)
    report = t5lib.calibrate(model, teacher=teacher, batches=batches(), config=recipe)
    assert all(report.error_after[name] < 0.8 * report.error_before[name] for name in report.error_before)
    for trainable in ("blocks", "lora"):
        recipe = AlignConfig(steps=2, batch_size=8, lr_new=1e-3, trainable=trainable, blocks=0.1)
        aligned = t5lib.align(model, teacher=teacher, batches=batches(), config=recipe)
        assert aligned.error_after["output"] < aligned.error_before["output"]
    assert not [name for name in model.state_dict() if "lora" in name]
    seen = t5lib.explain(teacher, model, random_images(4, 24, 40))
    assert len(seen.layer_error) == 2 and all(0 <= each < 1 for each in seen.shift_before)
    class_token = set() if PREFIX.get(kind) == 0 else {"class token"}
    assert {each.query for each in seen.maps} == {"centre", "corner"} | class_token
    assert 0 < t5lib.diagnose(teacher, random_images()).summary()["mean_shift_ratio"] < 1


def test_a_classifier_is_fine_tuned_on_labels_and_scored():
    model = t5lib.convert(tiny_transformer("vit_classifier"))
    before = copy.deepcopy(model.state_dict())
    labelled = [(random_images(4, seed=seed), torch.arange(4)) for seed in range(4)]
    objective = t5lib.Classification(t5lib.TrainConfig(), num_classes=7)
    config = t5lib.TrainConfig(batch_size=4, gradient_checkpointing=True)
    report = t5lib.train(model, lambda start: iter(labelled[start:]), objective, config, steps=2)
    assert 0 < report.loss < 10
    assert [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert t5lib.evaluate({"fitted": model}, labelled)["fitted"].n == 16


@pytest.mark.parametrize("kind", [*FEW, "vit", "deit", "dinov2_backbone", "siglip_classifier"])
@torch.no_grad()
def test_what_is_saved_is_loaded_with_the_same_outputs(kind, tmp_path):
    model, images = t5lib.convert(tiny_transformer(kind)), random_images(2)
    expected = call(model, images)
    t5lib.save(model, tmp_path / "saved")
    loaded = t5lib.load(tmp_path / "saved")
    assert bits(loaded) == bits(model) and torch.equal(call(loaded, images), expected)
    assert type(loaded) is type(model) and loaded.config.to_dict() == model.config.to_dict()
    softmax = t5lib.revert(loaded)
    t5lib.save(softmax, tmp_path / "saved")
    assert torch.equal(call(t5lib.load(tmp_path / "saved"), images), call(softmax, images))


@torch.no_grad()
def test_parts_that_the_class_has_at_choice_are_saved_too(tmp_path):
    config = transformers.ViTConfig(**SMALL)
    model = t5lib.convert(transformers.ViTModel(config, add_pooling_layer=False, use_mask_token=True).eval().half())
    t5lib.save(model, tmp_path / "saved")
    loaded = t5lib.load(tmp_path / "saved")
    assert loaded.pooler is None and loaded.embeddings.mask_token is not None and loaded.dtype == torch.float16
    assert bits(loaded) == bits(model)


def test_a_model_of_somebody_elses_class_is_converted_but_not_saved(tmp_path):
    class Mine(transformers.ViTPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.tower = transformers.ViTModel(config)
            self.post_init()

        def forward(self, pixel_values, **options):
            return self.tower(pixel_values, **options)

    model = t5lib.convert(Mine(transformers.ViTConfig(**SMALL)))
    assert call(model, random_images(2)).isfinite().all() and isinstance(model, Mine)
    with pytest.raises(T5Error, match="Mine is not a class of transformers"):
        t5lib.save(model, tmp_path / "saved")


@pytest.mark.parametrize("kind", ["vit_classifier", "dinov3", "clip_dual", "mae"])
@torch.no_grad()
def test_copies_and_pickles_compute_the_same(kind):
    model = t5lib.convert(tiny_transformer(kind))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(call(twin, random_images(2)), call(model, random_images(2)))
        assert type(twin) is type(model) and type(twin.config) is type(model.config)


def test_a_configuration_that_models_share_does_not_tell_of_the_conversion_of_one():
    config = transformers.ViTConfig(**SMALL)
    one, other = transformers.ViTModel(config), transformers.ViTModel(config)
    t5lib.convert(one, inplace=True)
    assert one.config.model_type == "t5_vit" and one.layers[0].mlp.config is one.config
    assert other.config is config and config.model_type == "vit" and "t5_config" not in config.to_dict()


@torch.no_grad()
def test_an_attention_that_was_taken_back_follows_the_models_configuration():
    back = t5lib.revert(t5lib.convert(tiny_transformer("vit")))
    back.set_attn_implementation("eager")
    assert len(back(random_images(2), output_attentions=True).attentions) == 2


@pytest.mark.parametrize("kind", ["vit", "dinov3", "siglip"])
@torch.no_grad()
def test_maps_of_a_softmax_layer_are_those_that_transformers_gives(kind):
    model, calls = tiny_transformer(kind), {}
    model.set_attn_implementation("eager")
    name = ADAPTER.attention_names(model)[0]
    handles = ADAPTER.watch(model.get_submodule(name), calls, {}, name)
    expected = model(random_images(2), output_attentions=True).attentions[0]
    for handle in handles:
        handle.remove()
    qkv = ADAPTER.project(model.get_submodule(name), calls[name])
    torch.testing.assert_close(map_of(qkv, None, TokenGrid(4, 4)), expected)


@torch.no_grad()
def test_hidden_states_are_given_and_do_not_stand_in_the_way_of_saving(tmp_path):
    model, images = tiny_transformer("vit"), random_images(2)
    model(images, output_hidden_states=True)
    converted = t5lib.convert(model, TTTConfig(layers=(1,)))
    ours, theirs = (each(images, output_hidden_states=True).hidden_states for each in (converted, model))
    assert len(ours) == 3 and torch.equal(ours[1], theirs[1]) and not torch.equal(ours[2], theirs[2])
    t5lib.save(converted, tmp_path / "saved")


@pytest.mark.parametrize("kind", ["vit", "siglip_dual"])
def test_checkpointing_that_was_on_before_a_conversion_stays_on(kind):
    model = tiny_transformer(kind).train()
    gradients = []
    for on in (False, True):
        if on:
            newest = hasattr(model, "activation_checkpointing_enable")  # by the version of transformers
            model.activation_checkpointing_enable() if newest else model.gradient_checkpointing_enable()
        converted = t5lib.convert(model)
        call(converted, random_images(2)).square().sum().backward()
        gradients.append([p.grad for p in converted.parameters() if p.grad is not None])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["vit", "siglip"])
@pytest.mark.parametrize("inherit", ["attention", "mlp"])
def test_what_is_not_inherited_starts_as_in_a_fresh_model(kind, inherit):
    model = tiny_transformer(kind, hidden_size=128, intermediate_size=256)
    converted, fresh = t5lib.convert(model, TTTConfig(inherit=inherit)), ADAPTER.fresh(model, 0)
    assert converted.t5_report.reset
    for name in converted.t5_report.reset:
        ours, theirs = converted.get_parameter(name), fresh.get_parameter(name)
        torch.testing.assert_close(ours.std(), theirs.std(), rtol=0.15, atol=1e-5)
        torch.testing.assert_close(ours.mean(), theirs.mean(), rtol=0, atol=2e-3)
    kept = converted.state_dict()
    others = model.state_dict().keys() - set(converted.t5_report.reset)
    assert all(torch.equal(kept[name], model.state_dict()[name]) for name in others)


@pytest.mark.parametrize("preset", PRESETS)
@torch.no_grad()
def test_every_preset_can_take_the_place(preset):
    model = t5lib.convert(tiny_transformer("dinov3", image_size=48), preset)
    assert call(model, random_images(2, 48, 48)).isfinite().all()


@torch.no_grad()
def test_layers_that_are_missed_most_become_softmax_again(tmp_path):
    teacher = tiny_transformer("clip_dual")
    model = t5lib.convert(teacher, TTTConfig(layers="auto", softmax_layers=1))
    recipe = CalibrateConfig(steps=2, batch_size=4)
    report = t5lib.calibrate(model, teacher=teacher, batches=batches(4), config=recipe)
    assert len(report.softmax.layers) == 1 and model.config.t5_config["layers"] == list(model.t5_config.layers)
    t5lib.save(model, tmp_path / "saved")
    assert torch.equal(call(t5lib.load(tmp_path / "saved"), random_images(2)), call(model, random_images(2)))


@torch.no_grad()
def test_example_inputs_and_other_resolutions_are_what_a_benchmark_needs():
    model, size = t5lib.convert(tiny_transformer("clip_projection")), ExampleSize(resolution=48, batch=3)
    larger, inputs = ADAPTER.at_resolution(model, size), ADAPTER.example_inputs(model, size)
    assert ADAPTER.call(larger, inputs).shape == (3, 16) and ADAPTER.num_tokens(larger, inputs) == 37
    with pytest.raises(T5Error, match="resolution 50 is not a multiple of the patch size 8"):
        ADAPTER.at_resolution(model, ExampleSize(resolution=50))


def test_batches_may_come_with_labels_but_with_nothing_else():
    model = tiny_transformer("clip_dual")
    told = {"pixel_values": random_images(2), "labels": torch.arange(2)}
    assert ADAPTER.inputs(told).keys() == {"pixel_values"}
    with pytest.raises(T5Error, match=r"a batch holds input_ids besides pixel_values.*pass the images alone"):
        ADAPTER.check_inputs(model, ADAPTER.inputs({**told, "input_ids": torch.zeros(2, 3, dtype=torch.long)}))


@torch.no_grad()
def test_the_text_tower_of_a_model_of_images_and_text_stays_as_it_is():
    model = tiny_transformer("siglip_dual")
    converted = t5lib.convert(model)
    text = {"input_ids": torch.arange(12).view(2, 6)}
    assert torch.equal(*(each.get_text_features(**text).pooler_output for each in (converted, model)))
    assert {name.split(".")[0] for name in converted.t5_report.layers} == {"vision_model"}
    outputs = converted(pixel_values=random_images(2), **text)
    torch.testing.assert_close(outputs.vision_model_output.pooler_output, call(converted, random_images(2)))
    assert outputs.logits_per_image.shape == (2, 2)


def refused(model, match):
    with pytest.raises(T5Error, match=match):
        t5lib.convert(model)


@pytest.mark.parametrize("kind", ["vit", "dinov2", "dinov3", "siglip_classifier", "clip_dual", "mae", "depth_anything"])
def test_softmax_maps_and_masks_are_refused(kind):
    model = t5lib.convert(tiny_transformer(kind), TTTConfig(layers=(0,)))
    inputs = {"pixel_values": random_images(2)}
    if kind == "clip_dual":
        inputs["input_ids"] = torch.arange(12).view(2, 6)
    with pytest.raises(T5Error, match="output_attentions is set, and a TTT layer has no softmax map to give"):
        model(**inputs, output_attentions=True)
    if kind in ("clip_dual", "depth_anything"):  # where it is one of text, and where transformers drops it
        return
    with pytest.raises(T5Error, match="an attention_mask is given, and a TTT layer sees all tokens"):
        model(**inputs, attention_mask=torch.ones(2, 17))


def test_maps_that_the_configuration_asks_for_are_refused_too():
    model = tiny_transformer("vit")
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with pytest.raises(T5Error, match="output_attentions is set"):
        t5lib.convert(model)(random_images(2))


@torch.no_grad()
def test_patches_that_are_hidden_or_shuffled_are_refused():
    model = tiny_transformer("mae")
    converted, images = t5lib.convert(model), random_images(2)
    ordered = torch.arange(16.0).expand(2, -1)
    torch.testing.assert_close(converted(images).last_hidden_state, call(converted, images))
    assert torch.equal(converted(images, noise=ordered).last_hidden_state, call(converted, images))
    with pytest.raises(T5Error, match="noise shuffles the patches"):
        converted(images, noise=ordered.flip(1))
    converted.config.mask_ratio = 0.5
    with pytest.raises(T5Error, match=r"config\.mask_ratio is 0\.5"):
        converted(images)
    refused(tiny_transformer("mae", mask_ratio=0.75), r"mask_ratio is 0\.75: the patches that are left lie on no grid")


def test_what_cannot_be_converted_is_refused_with_the_reason_and_the_remedy():
    swin = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    dual = {"vision_config": {**text, "num_patches": 16, "patch_size": 8}, "text_config": {**text, "vocab_size": 9}}
    sam = {"vision_config": {**text, "mlp_dim": 32, "output_channels": 8, "image_size": 32, "patch_size": 8}}
    cases = {
        ("SwinModel", "windows, whose cost is linear already"): swin,
        ("BeitModel", "a bias of relative positions to the softmax map"): SMALL,
        ("Sam2VisionModel", "windows, whose cost is linear already"): {},
        ("SamVisionModel", "windows in most blocks, .* adds a bias of relative positions"): sam["vision_config"],
        ("Siglip2Model", r"\(NaFlex\).*; a SigLIP 2 of fixed size, .*is a SiglipModel and converts"): dual,
        ("VivitModel", "its tokens lie in time too"): text,
        ("YolosModel", "does not know yet where its attentions are"): {**SMALL, "image_size": [32, 32]},
        ("CLIPTextModel", r"none of the vision towers .*ViTModel.*over text alone are not converted"): text,
    }
    for (name, match), settings in cases.items():
        kind = getattr(transformers, name)
        with torch.device("meta"):
            model = kind(kind.config_class(**settings))
        refused(model, match)


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "t5lib.families.transformers_vit")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(T5Error, match=r"transformers is not installed; pip install 't5-ttt\[transformers\]'"):
        adapter("transformers_vit")


@pytest.mark.slow
@torch.no_grad()
def test_rotary_positions_are_exported_for_images_of_any_size(tmp_path):
    model = t5lib.convert(tiny_transformer("dinov3", num_hidden_layers=1))
    made = t5lib.export_onnx(model, tmp_path / "model.onnx", random_images(2), dynamic_size=True)
    assert {shape[2:] for shape in made.checked} == {(32, 32), (64, 64), (32, 64)}


def test_models_that_were_changed_are_refused_by_name():
    converted = t5lib.convert(tiny_transformer("vit_classifier"))
    refused(converted, r"vit\.layers\.0\.attention is converted already; call t5lib\.revert first")
    offloaded = tiny_transformer("vit_classifier")
    offloaded.vit.forward = offloaded.vit.forward
    refused(offloaded, "the forward of vit is not that of its class")
    other = tiny_transformer("vit_classifier")
    other.vit.layers[1].attention.q_proj = None
    del other.vit.layers[1].attention.q_proj
    refused(other, r"vit\.layers\.1\.attention, a ViTAttention, has other parts in transformers .* than t5lib knows")
    holder = nn.ModuleDict({"encoder": tiny_transformer("dinov2")})
    refused(holder, "wraps a Dinov2Model; pass that instead: model.encoder")
