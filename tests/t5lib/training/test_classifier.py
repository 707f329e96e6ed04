"""One loop for all protocols: what is trained and how fast, and what is said when a loss is not finite."""

import copy
import dataclasses
import functools
import math
import sys

import pytest
import torch
from tiny import random_images, tiny_vit
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook
from training_job import ALL_ON, PLAIN, STEPS, batch, converted, deterministic, run, same, state

import t5lib
from t5lib.conversion import new_parameters
from t5lib.layers.config import TTTConfig
from t5lib.training.classifier import TrainConfig
from t5lib.training.trainer import rate_factor
from t5lib.utils.errors import T5Error


def change(model: nn.Module, before: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: (tensor - before[name]).abs().max().item() for name, tensor in model.state_dict().items()}


def test_freeze_protocol_changes_new_parameters_alone():
    model = converted()
    before = state(model)
    run(model, dataclasses.replace(PLAIN, trainable="new", weight_decay=0.5))
    changed = {name for name, by in change(model, before).items() if by}
    assert changed == set(new_parameters(model))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_freeze_protocol_needs_new_parameters():
    with pytest.raises(T5Error, match="this model has none; convert it first"):
        run(tiny_vit(), dataclasses.replace(PLAIN, trainable="new"))


def test_fine_tune_and_control_train_everything():
    for model in (converted(), tiny_vit()):
        before = state(model)
        run(model)
        assert all(change(model, before).values())


def test_new_and_inherited_weights_have_their_own_learning_rates():
    """Adam's first step is the learning rate, whatever the gradient."""
    model = deterministic()
    before, told = state(model), []
    config = dataclasses.replace(PLAIN, lr=1e-4, lr_new=3e-3, warmup=0.5, weight_decay=0.0, clip_norm=None)
    run(model, config, steps=1, log=lambda values, _: told.append(values))
    new = set(new_parameters(model))
    for name, by in change(model, before).items():
        assert by == pytest.approx(3e-3 if name in new else 1e-4, rel=0.02), name
    assert told[0]["lr_new"] == 3e-3 and told[0]["lr_inherited"] == 1e-4


def test_muon_steps_inherited_matrices_along_all_their_directions_alike():
    model = deterministic()
    before = state(model)
    config = dataclasses.replace(PLAIN, lr=1e-4, lr_new=3e-3, warmup=0.5, weight_decay=0.0, optimizer="muon")
    run(model, config, steps=1)
    by = {name: (tensor - before[name]).abs() for name, tensor in model.state_dict().items()}
    name = "blocks.0.mlp.fc1.weight"
    spread = torch.linalg.svdvals(model.state_dict()[name] - before[name])
    assert spread.min() > 0.5 * spread.max()  # of AdamW's first step the largest is many times the least
    assert by[name].square().mean().sqrt() == pytest.approx(0.2e-4, rel=0.3)
    for name in new_parameters(model):  # AdamW's first step is the rate
        assert by[name].max() == pytest.approx(3e-3, rel=0.02), name


def test_warm_up_and_cosine_have_the_values_of_the_formula():
    config = TrainConfig(warmup=0.25, min_lr=0.1)
    factors = [rate_factor(step, 8, config) for step in range(8)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[5] == pytest.approx(0.1 + 0.9 * 0.5)  # half of the cosine
    assert factors[7] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 5 / 6)))
    assert [rate_factor(0, 4, TrainConfig(warmup=0.0)), rate_factor(0, 1, TrainConfig())] == [1.0, 1.0]


def test_rates_reach_the_optimizer_and_the_log():
    told, used = [], []
    handle = register_optimizer_step_pre_hook(
        lambda optimizer, *_: used.append(sorted({group["lr"] for group in optimizer.param_groups}))
    )
    config = dataclasses.replace(PLAIN, min_lr=0.1)
    run(converted(), config, log=lambda values, step: told.append((step, values["lr_inherited"], values["lr_new"])))
    handle.remove()
    expected = [rate_factor(step, STEPS, config) for step in range(STEPS)]
    assert told == [(i + 1, PLAIN.lr * factor, PLAIN.lr_new * factor) for i, factor in enumerate(expected)]
    assert used == [[inherited, new] for _, inherited, new in told]


@pytest.mark.parametrize("clip", [None, 1e-3, 1e6])
def test_gradients_are_clipped_and_the_norm_before_is_told(clip):
    norms, told = [], []

    def measure(optimizer, *_):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())

    handle = register_optimizer_step_pre_hook(measure)
    run(
        deterministic(),
        dataclasses.replace(PLAIN, clip_norm=clip),
        steps=1,
        log=lambda v, _: told.append(v["grad_norm"]),
    )
    handle.remove()
    assert told[0] > 0.01
    assert norms[0] == pytest.approx(min(told[0], clip or math.inf), rel=1e-3)


def test_accumulated_batches_equal_one_large_batch():
    large, accumulated, told = deterministic(), deterministic(), []
    log = {"log": lambda values, _: told.append((values["loss"], values["grad_norm"]))}
    run(large, source=lambda start: (batch(start + i, size=8) for i in range(9)), steps=3, **log)

    def halves(start):
        for number in range(start, 99):
            images, labels = batch(number // 2, size=8)
            part = slice(4 * (number % 2), 4 * (number % 2) + 4)
            yield images[part], labels[part]

    run(accumulated, dataclasses.replace(PLAIN, accumulate=2), source=halves, steps=3, **log)
    torch.testing.assert_close(torch.tensor(told[3:]), torch.tensor(told[:3]), rtol=1e-3, atol=0)
    for name, tensor in large.state_dict().items():
        torch.testing.assert_close(accumulated.state_dict()[name], tensor, rtol=1e-3, atol=2e-5, msg=name)


def test_weight_decay_spares_vectors_and_what_timm_spares():
    model = deterministic()
    decayed = set()

    def record(optimizer, *_):
        names = {parameter: name for name, parameter in model.named_parameters()}
        groups = [group for group in optimizer.param_groups if group["weight_decay"]]
        decayed.update(names[parameter] for group in groups for parameter in group["params"])

    handle = register_optimizer_step_pre_hook(record)
    run(model, steps=1)
    handle.remove()
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    assert decayed == matrices - {"pos_embed"}


def test_averaged_weights_are_the_result():
    model, seen = deterministic(), []
    config = dataclasses.replace(PLAIN, ema=0.5)
    before = state(model)
    run(model, config, steps=4, log=lambda *_: seen.append(state(model)))
    average = before
    for step, weights in enumerate(seen, 1):
        decay = min(0.5, 1 - (1 + (step - 1)) ** (-2 / 3))  # timm's warm-up of the decay
        average = {name: average[name].lerp(weights[name], 1 - decay) for name in average}
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, average[name], msg=name)
    assert not same(state(model), seen[-1])


def test_without_augmentation_the_loss_is_smoothed_cross_entropy():
    model, told = deterministic(), []
    images, labels = batch(0)
    expected = F.cross_entropy(model(images), labels, label_smoothing=0.1).item()
    run(model, steps=1, log=lambda values, _: told.append(values["loss"]))
    assert told == pytest.approx([expected], rel=1e-5)


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_distillation_mixes_in_the_teachers_soft_labels(weight):
    model, teacher, told = deterministic(), tiny_vit(seed=5), []
    images, labels = batch(0)
    with torch.no_grad():
        logits, soft = model(images), teacher(images).softmax(-1)
    hard = F.cross_entropy(logits, labels, label_smoothing=0.1).item()
    before = state(teacher)
    config = dataclasses.replace(PLAIN, distill=weight)
    run(model, config, steps=2, teacher=teacher, log=lambda values, _: told.append(values["loss"]))
    assert told[0] == pytest.approx((1 - weight) * hard + weight * F.cross_entropy(logits, soft).item(), rel=1e-4)
    assert same(before, state(teacher)) and not any(p.grad is not None for p in teacher.parameters())
    with pytest.raises(T5Error, match="distill is set but no teacher was given"):
        run(model, config)


def test_batches_are_not_changed_by_mixing():
    loader = [batch(0), batch(1)]
    before = copy.deepcopy(loader)
    run(converted(), ALL_ON, source=loader, steps=2)
    assert all(
        torch.equal(a, b) for one, two in zip(loader, before, strict=True) for a, b in zip(one, two, strict=True)
    )


def test_gradients_from_before_are_forgotten():
    clean, stained = deterministic(), deterministic()
    for parameter in stained.parameters():
        parameter.grad = torch.ones_like(parameter)
    for model in (clean, stained):
        run(model, dataclasses.replace(PLAIN, trainable="new"), steps=2)
    assert same(state(clean), state(stained))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_trained_model_is_a_plain_one_again(precision):
    model = deterministic()
    run(model, dataclasses.replace(PLAIN, precision=precision), steps=2)
    assert not model.training and "forward" not in vars(model)
    fresh = deterministic()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(random_images()), model(random_images()))
    run(model, dataclasses.replace(PLAIN, precision="bf16" if precision == "fp32" else "fp32"), steps=1)


def test_compiled_training_agrees(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    plain, compiled = deterministic(), deterministic()
    run(plain, dataclasses.replace(PLAIN, accumulate=2), steps=2)
    run(compiled, dataclasses.replace(PLAIN, accumulate=2, compile=True), steps=2)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def compilations(monkeypatch) -> list[int]:
    """Grows by one entry with every graph that torch.compile makes."""
    graphs = []

    def backend(graph, _inputs):
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    return graphs


@pytest.mark.parametrize(
    ("layers", "kinds"),
    [(None, 1), ({"0,1": "swiglu", "3": "two_layer"}, 3)],  # the third layer stays softmax
    ids=["alike", "mixed"],
)
def test_one_compilation_serves_all_blocks_of_a_kind(layers, kinds, monkeypatch):
    graphs = compilations(monkeypatch)
    model = t5lib.convert(tiny_vit(depth=4), TTTConfig(layers=layers))
    run(model, dataclasses.replace(PLAIN, compile=True, precision="bf16"), steps=2)
    assert len(graphs) == kinds
    assert all(block._compiled_call_impl is None for block in model.blocks)
    assert torch.equal(copy.deepcopy(model)(random_images()), model(random_images())) and len(graphs) == kinds


@torch._dynamo.config.patch(recompile_limit=2)
def test_blocks_that_all_differ_are_all_compiled(monkeypatch):
    """Past torch's limit for one function the rest would quietly run uncompiled."""
    graphs = compilations(monkeypatch)
    run(tiny_vit(depth=4, drop_path_rate=0.3), dataclasses.replace(PLAIN, compile=True), steps=1)
    assert len(graphs) == 4
    assert torch._dynamo.config.recompile_limit == 2


def test_compiled_training_goes_on_from_a_checkpoint_with_the_same_bits(monkeypatch, tmp_path):
    compilations(monkeypatch)
    whole, broken_off = deterministic(), deterministic()
    config = dataclasses.replace(PLAIN, compile=True, ema=0.9)
    run(whole, config, steps=5)
    with pytest.raises(ZeroDivisionError):
        run(broken_off, config, steps=5, resume_dir=tmp_path, log=lambda _, step: 1 / (4 - step))
    assert all(block._compiled_call_impl is None for block in broken_off.blocks)
    resumed = deterministic()
    run(resumed, config, steps=5, resume_dir=tmp_path)
    assert same(state(resumed), state(whole))


def test_a_step_reads_one_value_from_the_device(monkeypatch):
    """Every read waits until the device has done all that it was told."""
    reads = []

    def counted(name):
        read = getattr(torch.Tensor, name)

        def call(tensor, *args):
            if sys._getframe(1).f_globals["__name__"].startswith(("t5lib", "accelerate")):
                reads.append(name)
            return read(tensor, *args)

        return call

    for name in ("item", "tolist", "__float__", "__bool__", "__int__", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    config = dataclasses.replace(PLAIN, accumulate=2, distill=0.5, ema=0.9)
    run(deterministic(), config, steps=3, teacher=tiny_vit(seed=5), log=lambda *_: None)
    assert reads == ["tolist"] * 3


def test_report_counts_steps_images_and_seconds():
    report = run(converted(), ALL_ON)
    assert report.steps == STEPS and math.isfinite(report.loss)
    assert report.samples_per_second == pytest.approx(STEPS * 4 * 2 / report.seconds)


def test_epochs_become_steps():
    assert TrainConfig(epochs=2, batch_size=32).steps(4000) == 250
    assert TrainConfig(epochs=2, batch_size=32, accumulate=2).steps(4000) == 125
    assert TrainConfig(epochs=0.001).steps(100) == 1


@pytest.mark.parametrize(
    "setting",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"accumulate": 0},
        {"checkpoint_every": 0},
        {"lr": -1.0},
        {"lr_new": -1.0},
        {"min_lr": 2.0},
        {"warmup": 500.0},
        {"weight_decay": -0.1},
        {"clip_norm": 0.0},
        {"lora_rank": 0},
        {"lora_alpha": 0.0},
        {"label_smoothing": 1.0},
        {"mixup": -1.0},
        {"cutmix": -1.0},
        {"distill": 1.5},
        {"ema": 1.0},
        {"trainable": "old"},
        {"precision": "fp16"},
        {"mixup": 0.8, "batch_size": 5},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_by_name(setting):
    with pytest.raises(T5Error, match=next(iter(setting))):
        TrainConfig(**setting)


def broken(fill: float, **config) -> nn.Module:
    model = t5lib.convert(tiny_vit(), TTTConfig(**config))
    with torch.no_grad():
        model.blocks[1].attn.mixer.w1.fill_(fill)
    return model


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_loss_that_is_not_finite_names_step_layer_and_advice(compiled, monkeypatch):
    compilations(monkeypatch)
    model = broken(math.inf, key_norm="none")
    with pytest.raises(T5Error) as caught:
        run(model, dataclasses.replace(PLAIN, precision="bf16", clip_norm=None, compile=compiled))
    message = str(caught.value)
    assert "stopped at step 1: loss nan" in message
    assert "Not finite first in blocks.1.attn" in message
    for advice in ("use 'instance'", "precision fp32", "clip_norm, e.g. 1.0", "lr 0.001, lr_new 0.01"):
        assert advice in message


def test_large_activations_are_named_and_needless_advice_is_not_given():
    model = t5lib.convert(tiny_vit())
    with torch.no_grad():
        model.blocks[0].mlp.fc2.weight.mul_(1e30)
        model.head.weight.mul_(1e38)
    with pytest.raises(T5Error) as caught:
        run(model)
    message = str(caught.value)
    assert "Largest activations: blocks.0.mlp.fc2" in message
    assert "use 'instance'" not in message and "fp32" not in message and "clip_norm" not in message


def test_an_overflow_of_the_gradient_is_told_apart():
    model = t5lib.convert(tiny_vit())
    model.blocks[0].register_full_backward_hook(lambda _module, gradients, _: tuple(g * math.inf for g in gradients))
    with pytest.raises(T5Error, match="the backward pass overflowed"):
        run(model)


def test_nothing_is_learned_from_a_step_that_is_not_finite_and_nothing_stays_frozen():
    model = broken(math.inf)
    before = state(model)
    with pytest.raises(T5Error, match="stopped at step 1"):
        run(model, dataclasses.replace(PLAIN, trainable="new"))
    assert same(state(model), before)
    assert all(parameter.requires_grad for parameter in model.parameters())
