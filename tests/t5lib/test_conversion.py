"""Conversion inherits every weight, accounts for all of them, leaves its argument alone, and can be taken back."""

import copy

import pytest
import timm
import torch
import torchvision
from timm.layers import Attention, AttentionRope
from tiny import KINDS, random_images, tiny_vit
from torch import nn

import t5lib
from t5lib.conversion import new_parameters, ttt_layers
from t5lib.layers.attention import TTTAttention
from t5lib.layers.config import TTTConfig
from t5lib.layers.grid import TokenGrid
from t5lib.utils.errors import T5Error

every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return random_images()


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


@every_kind
def test_convert_and_revert_give_the_original_back_bit_for_bit(kind, images):
    model = tiny_vit(kind)
    back = t5lib.revert(t5lib.convert(model))
    assert bits(back) == bits(model)
    assert str(back) == str(model)
    assert torch.equal(back(images), model(images))
    assert not hasattr(back, "t5_config") and not back.patch_embed._forward_pre_hooks
    assert type(back.blocks) is type(model.blocks)


@every_kind
def test_convert_leaves_its_argument_alone(kind, images):
    model = tiny_vit(kind)
    model.blocks[0].register_forward_hook(lambda *_: None)
    before = bits(model), str(model), [len(m._forward_pre_hooks) for m in model.modules()], model(images)
    converted = t5lib.convert(model)
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.zero_()
    converted(images)
    after = bits(model), str(model), [len(m._forward_pre_hooks) for m in model.modules()], model(images)
    assert before[:3] == after[:3] and torch.equal(before[3], after[3])
    assert not hasattr(model, "t5_config")


@every_kind
def test_every_parameter_is_inherited_with_its_storage_or_new(kind):
    model = tiny_vit(kind)
    pointers = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    converted = t5lib.convert(model, inplace=True)
    report, after = converted.t5_report, converted.state_dict()
    assert converted is model
    assert set(report.inherited) == set(pointers) and report.dropped == ()
    assert set(report.inherited) | set(report.new) == set(after) and not set(report.inherited) & set(report.new)
    assert {name: after[name].data_ptr() for name in report.inherited} == pointers
    assert set(report.new) == set(new_parameters(converted))
    assert report.layers == ("blocks.0.attn", "blocks.1.attn")
    own = (
        2 * 3 * 16 * 16 + 2 * 32 * 10
    )  # 2 heads × 3 inner weights of 16 × 16; two 3×3 depthwise convolutions with bias
    assert report.numbers["new"] == 2 * own and report.numbers["dropped"] == 0
    assert report.numbers["inherited"] == sum(p.numel() for p in converted.parameters()) - 2 * own


@every_kind
def test_converted_model_learns_in_every_parameter(kind, images):
    converted = t5lib.convert(tiny_vit(kind))
    converted(images).square().sum().backward()
    without = [n for n, p in converted.named_parameters() if p.grad is None or not p.grad.any()]
    # a class token is read alone in the end, and the convolution over the grid leaves it out
    idle = "blocks.1.attn.mixer.q_conv."
    assert without == ([idle + "weight", idle + "bias"] if converted.global_pool == "token" else [])


def test_gated_attention_is_converted_with_its_gate(images):
    model = tiny_vit("augreg")
    for block in model.blocks:
        block.attn = Attention(32, 2, qkv_bias=True, gated=True)
    converted = t5lib.convert(model)
    open_gate, gate = converted(images), converted.blocks[0].attn.gate
    with torch.no_grad():
        gate.bias -= 1e4  # shuts it
    assert not torch.equal(converted(images), open_gate)
    shut = converted.blocks[0].attn(torch.randn(1, 17, 32), grid=TokenGrid(4, 4, 1))
    torch.testing.assert_close(shut, converted.blocks[0].attn.proj.bias.expand_as(shut))
    assert torch.equal(t5lib.revert(t5lib.convert(model))(images), model(images))


@pytest.mark.parametrize("layers", [(0,), (1,), (1, 0)], ids=str)
def test_a_subset_of_layers(layers, images):
    converted = t5lib.convert(tiny_vit(), TTTConfig(layers=layers))
    names = [f"blocks.{i}.attn" for i in sorted(layers)]
    assert list(ttt_layers(converted)) == names == list(converted.t5_report.layers)
    assert type(converted.blocks[1 - layers[0]].attn) is (TTTAttention if len(layers) == 2 else Attention)
    assert converted(images).isfinite().all()
    assert torch.equal(t5lib.revert(converted)(images), tiny_vit()(images))


@pytest.mark.parametrize("layers", [(), (2,), (-1,), (0, 0)], ids=str)
def test_layers_that_do_not_exist_are_refused(layers):
    with pytest.raises(T5Error, match="expected different indices from 0 to 1, at least one"):
        t5lib.convert(tiny_vit(), TTTConfig(layers=layers))


@pytest.mark.parametrize("kind", ["augreg", "dinov2_registers", "siglip", "deit_distilled"])
def test_any_image_size_in_any_sequence(kind):
    """Layers follow the grid of each image, so the sizes seen before leave no trace."""
    converted = t5lib.convert(tiny_vit(kind, dynamic_img_size=True))
    shapes = [(32, 48), (48, 32), (40, 24), (32, 32)]
    fresh = [copy.deepcopy(converted)(random_images(2, *shape)) for shape in shapes]
    for shape, expected in zip(shapes + shapes[::-1], fresh + fresh[::-1], strict=True):
        assert torch.equal(converted(random_images(2, *shape)), expected)
    wide, tall = random_images(2, 32, 48), random_images(2, 32, 48).mT.contiguous()
    assert not torch.equal(converted(wide), converted(tall))


def test_padded_image_sizes():
    converted = t5lib.convert(tiny_vit(dynamic_img_size=True, dynamic_img_pad=True))
    images = random_images(2, 30, 41)
    padded = nn.functional.pad(images, (0, 7, 0, 2))
    torch.testing.assert_close(converted(images), converted(padded))


def test_set_input_size_moves_the_grid_along():
    converted = t5lib.convert(tiny_vit())
    converted.set_input_size(img_size=(40, 24))
    assert converted(random_images(2, 40, 24)).shape == (2, 7)
    converted.set_input_size(img_size=(32, 32), patch_size=(16, 8))
    assert converted(random_images(2)).shape == (2, 7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_new_weights_share_the_dtype_of_the_model(dtype, images):
    converted = t5lib.convert(tiny_vit().to(dtype))
    assert {parameter.dtype for parameter in converted.parameters()} == {dtype}
    out = converted(images.to(dtype))
    exact = t5lib.convert(tiny_vit())  # the same new weights, up to rounding
    exact.load_state_dict(converted.state_dict())
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), exact(images), rtol=0.1, atol=0.1)


def test_new_weights_follow_from_the_seed_alone():
    state = torch.get_rng_state()
    one, two = t5lib.convert(tiny_vit()), t5lib.convert(tiny_vit())
    assert bits(one) == bits(two)
    assert torch.equal(torch.get_rng_state(), state)
    other = t5lib.convert(tiny_vit(), TTTConfig(seed=1))
    assert all(not torch.equal(p, new_parameters(other)[n]) for n, p in new_parameters(one).items())
    heads = one.blocks[0].attn.mixer.w1
    assert not torch.equal(heads[0], heads[1]) and not torch.equal(heads, one.blocks[1].attn.mixer.w1)


def test_timm_interface_still_works(images):
    converted = t5lib.convert(tiny_vit("dinov2_registers"))
    features = converted.forward_features(images)
    assert features.shape == (4, 5 + 16, 32)
    last, maps = converted.forward_intermediates(images, indices=2, norm=True)
    assert torch.equal(last, features) and [m.shape for m in maps] == [(4, 32, 4, 4)] * 2
    converted.reset_classifier(3, "avg")
    assert converted(images).shape == (4, 3)
    assert converted.no_weight_decay() == tiny_vit("dinov2_registers").no_weight_decay()


def test_gradient_checkpointing_gives_equal_gradients(images):
    converted = t5lib.convert(tiny_vit()).train()
    converted(images).square().sum().backward()
    plain = {name: parameter.grad.clone() for name, parameter in converted.named_parameters()}
    converted.zero_grad()
    converted.set_grad_checkpointing()
    converted(images).square().sum().backward()
    for name, parameter in converted.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], msg=name)


def test_compiled_model_agrees_also_after_the_image_size_changed():
    converted = t5lib.convert(tiny_vit(dynamic_img_size=True, depth=1))
    compiled = torch.compile(copy.deepcopy(converted), backend="aot_eager")
    for shape in ((32, 32), (32, 48), (48, 32), (32, 32)):
        images = random_images(2, *shape)
        torch.testing.assert_close(compiled(images), converted(images))


def not_converted(build, message):
    with pytest.raises(T5Error, match=message):
        t5lib.convert(build())


KINDS_REFUSED = {
    "resnet18": ({}, "ResNet cannot be converted: it has no attention; there is nothing to convert"),
    "swin_tiny_patch4_window7_224": ({}, "SwinTransformer cannot be converted: it attends within windows.*; .* gain"),
    "samvit_base_patch16": ({"depth": 1}, "VisionTransformerSAM cannot be converted: it attends within windows"),
    "gemma4_vit_167m": ({}, r"Gemma4VitClassifier cannot be converted: .*\(rotary embedding\).*; take a family"),
    "pit_ti_224": ({}, "PoolingVisionTransformer cannot be converted: it pools tokens on the way"),
    "xcit_nano_12_p16_224": ({}, "Xcit cannot be converted: its attention is linear already"),
    "cait_xxs24_224": ({}, "Cait cannot be converted: it mixes the softmax maps of its heads.*; take a plain"),
    "crossvit_tiny_240": ({}, "CrossVit cannot be converted: it attends to tokens of two scales"),
    "resnest14d": ({}, "ResNet cannot be converted: its attention weighs channels and mixes no tokens; there is"),
    "fastvit_sa12": ({}, "FastVit cannot be converted: it is a convolutional network with attention of its"),
}


def test_attention_of_torch_itself_is_told_with_where_such_models_are():
    with torch.device("meta"):
        model = torchvision.models.vit_b_32()
    not_converted(lambda: model, r"is torch's MultiheadAttention.*; take the model from timm, which has open_clip's")


@pytest.mark.parametrize("name", KINDS_REFUSED)
def test_models_of_other_kinds_are_refused_by_name_and_the_reason_told(name):
    options, message = KINDS_REFUSED[name]
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    not_converted(lambda: model, message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_layer": "diff"}, r"blocks\.0 uses DiffAttention; only timm's .*: it subtracts one softmax map from"),
        ({"patch_drop_rate": 0.5}, "patch_drop_rate is set"),
    ],
    ids=str,
)
def test_parts_that_cannot_be_converted_are_refused_by_name(options, message):
    not_converted(lambda: tiny_vit(**options), message)


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.ModuleDict({"backbone": tiny_vit()})


def quantized():
    return torch.ao.quantization.quantize_dynamic(tiny_vit(), {nn.Linear}, torch.qint8)


def changed(change):
    model = tiny_vit()
    change(model)
    return model


def tied_weight(model):
    model.blocks[1].attn.qkv.weight = model.blocks[0].attn.qkv.weight


def tied_block(model):
    model.blocks[1] = model.blocks[0]


def patched(model):
    model.blocks[1].attn.forward = lambda x, **_: x


REFUSED = {
    "compiled": (
        lambda: torch.compile(tiny_vit(), backend="eager"),
        r"wraps a Vision.*model\._orig_mod$",
    ),
    "parallel": (
        lambda: nn.DataParallel(tiny_vit()),
        r"DataParallel wraps a Vision.*: model\.module$",
    ),
    "a sequence": (lambda: nn.Sequential(tiny_vit()), r"pass that instead: model\.get_submodule\('0'\)$"),
    "a module of one's own": (lambda: Wrapper(), r"Wrapper wraps .*: model\.net\.backbone$"),
    "a name": (
        lambda: "vit_tiny_patch16_224",
        r"got the text 'vit_tiny_.*make it first: timm\.create_model",
    ),
    "weights": (lambda: tiny_vit().state_dict(), r"got weights by name; load them into one first"),
    "nothing": (lambda: None, "expected a model, got a NoneType"),
    "quantized": (quantized, r"projections of blocks\.0\.attn are quantized.*convert the model first"),
    "a tied weight": (
        lambda: changed(tied_weight),
        r"blocks\.0\.attn\.qkv\.weight and blocks\.1\.attn\.qkv\.weight are one parameter \(tied\)",
    ),
    "a block twice": (lambda: changed(tied_block), r"blocks\.0\.norm1\.weight and blocks\.1\.norm1\.weight are one"),
    "rotary": (
        lambda: changed(lambda model: setattr(model.blocks[0], "attn", AttentionRope(32, 2))),
        r"blocks\.0 uses AttentionRope; .*rotary embedding",
    ),
    "patched": (lambda: changed(patched), r"blocks\.1\.attn has a forward of its own.*del model\.blocks\.1\.attn"),
}


@pytest.mark.parametrize(("build", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_model_or_one_inside_of_another_is_told_with_the_remedy(build, message):
    not_converted(build, message)


def test_models_with_adapters_are_told_what_to_do():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_vit(), peft.LoraConfig(target_modules=["qkv"], r=2))
    not_converted(lambda: adapted, r"PeftModel holds adapters; .*model = model\.merge_and_unload\(\)")


def test_a_preset_may_be_named_and_settings_of_another_type_are_refused(images):
    assert t5lib.convert(tiny_vit(), "hedgehog").t5_config == TTTConfig.preset("hedgehog")
    with pytest.raises(T5Error, match=r"preset 't5\+\+' is unknown; .*did you mean 't5\+'"):
        t5lib.convert(tiny_vit(), "t5++")
    for config in ({"inner": "two_layer"}, 3, TTTConfig):
        with pytest.raises(T5Error, match="expected settings, a TTTConfig, or None for the defaults; got"):
            t5lib.convert(tiny_vit(), config)


def test_a_subclass_of_the_model_keeps_its_class(images):
    class Doubled(timm.models.vision_transformer.VisionTransformer):
        def forward(self, x):
            return 2 * super().forward(x)

    model = tiny_vit()
    plain = model(images)
    model.__class__ = Doubled
    converted = t5lib.convert(model)
    assert isinstance(converted, Doubled) and type(converted).__name__ == "Doubled"
    back = t5lib.revert(converted)
    assert type(back) is Doubled and torch.equal(back(images), 2 * plain)


def test_hooks_and_settings_of_an_attention_come_along_and_back(images):
    model, calls = tiny_vit(), []
    attention = model.blocks[0].attn
    handle = attention.register_forward_hook(lambda *_: calls.append("after"))
    attention.register_forward_pre_hook(lambda *_, **__: calls.append("before"), with_kwargs=True)
    attention.scale, attention.fused_attn = attention.scale * 2, False
    expected = model(images)
    converted = t5lib.convert(model)
    converted(images)
    back = t5lib.revert(converted)
    assert torch.equal(back(images), expected)
    assert calls == ["before", "after"] * 3
    inplace = t5lib.convert(model, inplace=True)
    handle.remove()
    calls.clear()
    inplace(images)
    assert calls == ["before"]


def test_parallel_blocks_are_refused_by_name():
    from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock

    for block in (ParallelScalingBlock, ParallelThingsBlock):
        with pytest.raises(T5Error, match=f"blocks.0 uses {block.__name__}"):
            t5lib.convert(tiny_vit(block_fn=block))


def test_a_subclass_of_attention_is_refused_by_name():
    class MyAttention(Attention):
        pass

    model = tiny_vit()
    model.blocks[1].attn = MyAttention(32, 2)
    with pytest.raises(T5Error, match=r"blocks\.1 uses MyAttention"):
        t5lib.convert(model)


def test_converting_twice_or_reverting_a_softmax_model_is_refused():
    converted = t5lib.convert(tiny_vit(), TTTConfig(layers=(1,)))
    with pytest.raises(T5Error, match=r"blocks\.1\.attn is converted already; call t5lib\.revert first"):
        t5lib.convert(converted)
    with pytest.raises(T5Error, match="holds no TTT layer; nothing to revert"):
        t5lib.revert(tiny_vit())


def test_revert_in_place_and_revert_of_a_trained_model_keep_inherited_weights(images):
    converted = t5lib.convert(tiny_vit())
    with torch.no_grad():
        converted.blocks[0].attn.qkv.weight.add_(1)
        converted.blocks[0].attn.mixer.w1.add_(1)
    copied, back = t5lib.revert(converted), None
    assert ttt_layers(converted)
    back = t5lib.revert(converted, inplace=True)
    assert back is converted and not ttt_layers(back)
    assert torch.equal(back(images), copied(images))
    assert torch.equal(back.blocks[0].attn.qkv.weight, tiny_vit().blocks[0].attn.qkv.weight + 1)


@pytest.mark.parametrize("mask", [{"attn_mask": torch.ones(17, 17)}, {"is_causal": True}], ids=str)
def test_masks_given_to_the_model_are_refused(mask, images):
    with pytest.raises(T5Error, match="attn_mask and is_causal are not supported"):
        t5lib.convert(tiny_vit())(images, **mask)


def test_tokens_that_were_dropped_or_merged_on_the_way_are_refused(images):
    converted = t5lib.convert(tiny_vit())
    converted.blocks[0].register_forward_hook(lambda _module, _inputs, out: out[:, ::2])
    with pytest.raises(T5Error, match=r"holds 16 tokens .* got 9 tokens.*turn token dropping and merging off"):
        converted(images)
