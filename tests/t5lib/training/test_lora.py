"""Adapters learn in place of everything else, and end in the weights they adapt: a model with its old parameters."""

import dataclasses
import math

import pytest
import torch
from tiny import random_images, tiny_vit
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from training_job import ALL_ON, PLAIN, batches, run, same, state

import t5lib
from t5lib.layers.config import TTTConfig
from t5lib.training import lora
from t5lib.utils.errors import T5Error

ADAPTERS = dataclasses.replace(PLAIN, trainable="lora", lora_rank=3, lora_alpha=6.0)
ADAPTED = {f"blocks.1.attn.{part}.weight" for part in ("qkv", "proj")}
RANDOM = dataclasses.replace(ALL_ON, trainable="lora")


def half_converted() -> nn.Module:
    """The second of two attentions is a Hedgehog one, the first stays softmax."""
    return t5lib.convert(tiny_vit("average_pool", proj_drop_rate=0.1), TTTConfig.preset("lolcats", layers=(1,)))


def learned(model: nn.Module, before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    after = state(model)
    assert after.keys() == before.keys()
    return {name: after[name] - before[name] for name in after if not torch.equal(after[name], before[name])}


def plain_again(model: nn.Module) -> bool:
    trainable = all(parameter.requires_grad for parameter in model.parameters())
    return trainable and vars(model).keys() - {"_is_accelerate_prepared"} == vars(half_converted()).keys()


def test_adapters_of_converted_attentions_learn_and_nothing_else():
    model = half_converted()
    before = state(model)
    run(model, ADAPTERS)
    changes = learned(model, before)
    assert changes.keys() == ADAPTED and plain_again(model)
    for change in changes.values():
        strengths = torch.linalg.svdvals(change.double())
        assert strengths[2] > 1e-3 and strengths[3] < 1e-6  # of rank three


def test_adapters_have_the_learning_rate_of_new_parameters():
    seen = []
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: seen.extend(optimizer.param_groups))
    run(half_converted(), dataclasses.replace(ADAPTERS, warmup=0.0), steps=1)
    handle.remove()
    assert [(group["lr"], len(group["params"])) for group in seen] == [(PLAIN.lr_new, 4)]


def test_model_computes_the_same_before_and_with_and_after_its_adapters():
    model, images = half_converted(), random_images()
    before, expected = state(model), model(images)
    torch.manual_seed(0)
    lora.attach(model, 3, 6.0)
    assert torch.equal(model(images), expected)
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(adapters) == 4 and all("lora_" in name for name in adapters)
    for adapter in adapters.values():
        nn.init.normal_(adapter, std=0.1)
    adapted = model(images)
    lora.merge(model)
    assert learned(model, before).keys() == ADAPTED
    torch.testing.assert_close(model(images), adapted, rtol=1e-4, atol=1e-5)
    assert (adapted - expected).norm() > 0.01 * expected.norm()


def test_adapters_that_learned_nothing_change_no_bit():
    model = half_converted()
    before = state(model)
    run(model, dataclasses.replace(ADAPTERS, lr_new=0.0), steps=1)
    assert same(state(model), before)


def test_what_adapters_learned_is_saved_and_loaded(tmp_path):
    model = half_converted()
    run(model, ADAPTERS, steps=2)
    t5lib.save(model, tmp_path / "model")
    assert torch.equal(t5lib.load(tmp_path / "model").eval()(random_images()), model(random_images()))


def test_a_run_that_broke_goes_on_and_ends_with_the_same_bits(tmp_path):
    def dying(start):
        for number, item in enumerate(batches(start), start):
            if number == 9:
                raise OSError("disk gone")
            yield item

    uninterrupted, model, steps = half_converted(), half_converted(), []
    run(uninterrupted, RANDOM)
    before = state(model)
    with pytest.raises(OSError, match="disk gone"):
        run(model, RANDOM, source=dying, resume_dir=tmp_path)
    assert learned(model, before).keys() == ADAPTED and plain_again(model)
    model = half_converted()
    run(model, RANDOM, resume_dir=tmp_path, log=lambda _, step: steps.append(step))
    assert steps[0] == 4 and same(state(model), state(uninterrupted))


def test_a_step_that_is_not_finite_leaves_the_model_as_it_was():
    model = half_converted()
    with torch.no_grad():
        model.blocks[1].attn.mixer.q_map.fill_(math.inf)
    before = state(model)
    with pytest.raises(T5Error, match=r"Not finite first in blocks\.1\.attn"):
        run(model, ADAPTERS)
    assert same(state(model), before) and plain_again(model)


def test_a_softmax_model_learns_by_the_same_recipe_so_that_it_can_be_the_control():
    model = tiny_vit("average_pool", proj_drop_rate=0.1)
    before = state(model)
    run(model, ADAPTERS)
    parts = {f"blocks.{block}.attn.{part}.weight" for block in (0, 1) for part in ("qkv", "proj")}
    assert learned(model, before).keys() == parts


def test_adapters_need_linear_projections():
    model = half_converted()
    for name in ("qkv", "proj"):
        setattr(model.blocks[1].attn, name, nn.Identity())
    with pytest.raises(T5Error, match="this VisionTransformer has none; train all of it: trainable 'all'"):
        lora.attach(model, 3, 6.0)
