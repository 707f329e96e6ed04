"""No adapter forgets a position: of its own q, k and v softmax attention makes what the original attention makes.

It is asked of everything that is converted: of each attention by itself, and of whole converted models whose mixers are
replaced by softmax attention, which must give what the original models give.
"""

import dataclasses

import pytest
import timm
import torch
from tiny import KINDS, SMALL, random_images, tiny_vit
from tiny_denoisers import (
    dit_batch,
    pixart_batch,
    qwen_image_batch,
    sd3_batch,
    tiny_dit,
    tiny_flux,
    tiny_pixart,
    tiny_qwen_image,
    tiny_sd3,
)
from tiny_encoders import ENCODERS, tiny_encoder
from tiny_eva import EVAS, tiny_eva
from tiny_transformers import KINDS as TRANSFORMERS
from tiny_transformers import tiny_transformer
from torch import Tensor, nn
from torch.nn import functional as F

import t5lib
from t5lib.conversion import ttt_layers
from t5lib.families import family_of
from t5lib.layers.config import TTTConfig
from t5lib.training.objectives import NoiseAndVariance, RectifiedFlow, noised_batch
from t5lib.utils.errors import T5Error


def vit(kind):
    return lambda: (tiny_vit(kind), {"x": random_images()})


def eva(kind):
    return lambda: (tiny_eva(kind, dynamic_img_size=True), {"x": random_images(2, 24, 40)})


def encoder(kind):
    return lambda: (tiny_encoder(kind), {"x": random_images(2, 32, 48)})


def transformer(kind):
    square = kind == "vit_pretraining"  # its head puts patches together to a square image
    return lambda: (tiny_transformer(kind), {"pixel_values": random_images(2, 24, 24 if square else 40)})


MODELS = {
    **{f"vit {kind}": vit(kind) for kind in KINDS},
    **{f"eva {kind}": eva(kind) for kind in EVAS},
    **{f"encoder {kind}": encoder(kind) for kind in ENCODERS},
    **{f"transformers {kind}": transformer(kind) for kind in TRANSFORMERS},
    "sd3": lambda: (tiny_sd3(), noised_batch(sd3_batch(0), RectifiedFlow(), 0)),
    "dit": lambda: (tiny_dit(), noised_batch(dit_batch(0), NoiseAndVariance(), 0)),
    "pixart": lambda: (tiny_pixart(), noised_batch(pixart_batch(0, width=12), NoiseAndVariance(), 0)),
    "qwen image": lambda: (tiny_qwen_image(), noised_batch(qwen_image_batch(0, width=12), RectifiedFlow(), 0)),
    "flux": lambda: (tiny_flux(), noised_batch(sd3_batch(0, width=12), RectifiedFlow(guidance=3.5), 0)),
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def watched(model, inputs):
    """What each attention of `model` is called with, and the merged heads that it makes."""
    family, calls, heads = family_of(model), {}, {}
    handles = [
        handle
        for name in family.attention_names(model)
        for handle in family.watch(model.get_submodule(name), calls, heads, name)
    ]
    family.call(model, inputs)
    for handle in handles:
        handle.remove()
    return calls, heads


def merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@every_model
@torch.no_grad()
def test_softmax_of_the_adapters_own_queries_keys_and_values_is_the_original_attention(make):
    model, inputs = make()
    calls, heads = watched(model, inputs)
    for name, expected in heads.items():
        ours = merged(*family_of(model).project(model.get_submodule(name), calls[name]))
        torch.testing.assert_close(ours[:, : expected.shape[1]], expected, rtol=1e-5, atol=1e-5, msg=name)


@every_model
@torch.no_grad()
def test_a_converted_layer_projects_as_the_attention_that_it_replaces(make):
    model, inputs = make()
    calls, _ = watched(model, inputs)
    family, converted = family_of(model), t5lib.convert(model)
    for name, call in calls.items():
        both = (family.project(each.get_submodule(name), call) for each in (converted, model))
        for ours, theirs in zip(*both, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


class SoftmaxMixer(nn.Module):
    """Mixes as softmax attention does, in the place of a mixer."""

    takes_norms = False

    def prepare(self, x, grid):
        return x

    def forward(self, q, k, v, grid):
        return F.scaled_dot_product_attention(q, k, v)

    def joint(self, image, text, grid):
        q, k, v = image if text is None else (torch.cat(pair, dim=2) for pair in zip(image, text, strict=True))
        o = F.scaled_dot_product_attention(q, k, v).tensor_split((grid.patches.stop,), dim=2)
        return (o[0], o[1] if text is not None else None)


def mixing_by_softmax(model):
    """`model` converted, with softmax in the place of its mixers."""
    converted = t5lib.convert(model)
    for layer in ttt_layers(converted).values():
        layer.mixer = SoftmaxMixer()
    return converted


@every_model
@torch.no_grad()
def test_a_converted_model_that_mixes_by_softmax_is_the_original_model(make):
    model, inputs = make()
    ours, theirs = (family_of(each).call(each, inputs) for each in (mixing_by_softmax(model), model))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("module", ["deepseek_vit", "deit", "eva", "naflexvit", "qwen3_vit", "vision_transformer"])
@torch.no_grad()
def test_so_it_is_with_every_architecture_of_timm_that_converts(module):
    """Each made small: one block of two heads."""
    images, converted = random_images(1), 0
    for name in timm.list_models(module=module):
        small = SMALL | {"depth": 1} | ({"num_kv_heads": 1} if "sapiens2" in name else {})
        if name.endswith("_enc"):
            del small["num_classes"]
        model = timm.create_model(name, **small).eval()
        try:
            ours = mixing_by_softmax(model).forward_features(images)
        except T5Error:
            assert module == "vision_transformer"  # some of its attentions are others than timm's Attention
            continue
        torch.testing.assert_close(ours, model.forward_features(images), rtol=1e-4, atol=1e-5, msg=name)
        converted += 1
    assert converted >= 3


ROTATING = [kind for kind in EVAS if kind != "eva"]
ROTARY = ["flux", "qwen image", "transformers dinov3", *(f"eva {kind}" for kind in ROTATING)]


@pytest.mark.parametrize("name", ROTARY)
@torch.no_grad()
def test_the_attentions_of_rotary_models_are_told_their_positions_and_differ_without(name):
    model, inputs = MODELS[name]()
    calls, heads = watched(model, inputs)
    for name, call in calls.items():
        forgotten = dataclasses.replace(call, rope=None)
        ours = merged(*family_of(model).project(model.get_submodule(name), forgotten))
        assert (ours - heads[name]).abs().max() > 1e-4, name


@pytest.mark.parametrize("kind", ROTATING)
@torch.no_grad()
def test_a_model_keeps_no_table_in_its_layers_and_hears_of_a_changed_one(kind):
    """Frequencies are a matter of the model: the layers get the table anew with every call."""
    _, inputs = eva(kind)()
    converted = t5lib.convert(tiny_eva(kind, dynamic_img_size=True), TTTConfig(locality="none"))
    before = converted(**inputs)
    for name, layer in ttt_layers(converted).items():
        assert not [key for key in layer.state_dict() if "rope" in key], name
    for values in (*converted.rope.parameters(), *converted.rope.buffers()):
        values.mul_(3)
    assert not torch.allclose(converted(**inputs), before)
