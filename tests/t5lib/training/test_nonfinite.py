"""A blow-up is traced to the module it began in, and the advice is the one that fits the settings."""

import math

import pytest
import torch
from tiny import random_images, tiny_vit

import t5lib
from t5lib.layers.config import TTTConfig
from t5lib.training.classifier import TrainConfig
from t5lib.training.nonfinite import activation_peaks, explain_blow_up


def test_peaks_are_those_of_the_outputs_in_order_and_no_hook_stays():
    model, images = t5lib.convert(tiny_vit()), random_images()
    peaks = activation_peaks(model, {"x": images})
    names = list(peaks)
    assert names.index("patch_embed.proj") < names.index("blocks.0.attn") < names.index("blocks.1.mlp.fc1")
    assert names[-1] == "head"
    assert peaks["head"] == pytest.approx(model(images).abs().max().item())
    assert [name for name, module in model.named_modules() if module._forward_hooks] == ["patch_embed"]  # the grid's


def explained(model, config: TrainConfig, loss: float = math.nan) -> str:
    return explain_blow_up(model, {"x": random_images()}, config, 7, loss, math.inf)


def test_the_first_module_that_is_not_finite_is_named():
    model = t5lib.convert(tiny_vit())
    with torch.no_grad():
        model.blocks[0].attn.mixer.w3.fill_(math.nan)
    message = explained(model, TrainConfig())
    assert message.startswith(
        "training stopped at step 7: loss nan, gradient norm inf. Not finite first in blocks.0.attn"
    )


def test_advice_fits_the_settings():
    instance, none = t5lib.convert(tiny_vit()), t5lib.convert(tiny_vit(), TTTConfig(key_norm="instance_no_mean"))
    careful, bold = TrainConfig(), TrainConfig(precision="bf16", clip_norm=None)
    assert "key_norm 'instance_no_mean' leaves the shift" in explained(none, careful)
    for model in (instance, tiny_vit()):
        message = explained(model, careful)
        assert "key_norm" not in message and "fp32" not in message and "set clip_norm" not in message
        assert "All activations are in range, so the backward pass overflowed" in message
        assert "lower the learning rates (lr 2e-05, lr_new 0.0004) or lengthen warmup" in message
    assert "try precision fp32; set clip_norm, e.g. 1.0" in explained(instance, bold)


def test_largest_activations_come_first():
    model = tiny_vit()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(1e6)
        model.blocks[1].mlp.fc2.weight.mul_(1e3)
    named = explained(model, TrainConfig()).split("Largest activations: ")[1].split(". Advice")[0].split(", ")
    sizes = [float(entry.split()[1].rstrip(".")) for entry in named]
    assert len(sizes) == 5 and sizes == sorted(sizes, reverse=True)
