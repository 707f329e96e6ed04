"""Alignment: the whole student learns from the whole teacher, without labels, in every family, and survives an
interruption."""

import dataclasses
import functools
import math
from itertools import count

import pytest
import torch
from tiny import KINDS, random_images, tiny_vit
from tiny_denoisers import dit_batches, sd3_batches, tiny_dit, tiny_sd3
from torch import nn

import t5lib
from t5lib.conversion import new_parameters
from t5lib.families import family_of
from t5lib.layers.config import TTTConfig
from t5lib.layers.grid import TokenGrid
from t5lib.training.alignment import AlignConfig, align
from t5lib.training.objectives import NoiseAndVariance, RectifiedFlow, noised_inputs
from t5lib.training.recorder import Recorder, output_error, token_errors
from t5lib.utils.errors import T5Error

QUICK = AlignConfig(
    steps=8, batch_size=4, lr=1e-3, lr_new=3e-3, features=None, cosine=0.0, damping=0.0, checkpoint_every=3
)


def batches(start: int):
    """Endless batches of four images that follow from their number alone."""
    return (random_images(4, seed=number) for number in count(start))


def aligned(model: nn.Module, teacher: nn.Module, *, source=batches, resume_dir=None, log=None, **changes):
    config = dataclasses.replace(QUICK, **changes)
    return align(model, teacher=teacher, batches=source, config=config, resume_dir=resume_dir, log=log)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("kind", KINDS)
def test_errors_of_vits_fall_and_the_teacher_stays_as_it_is(kind):
    teacher = tiny_vit(kind)
    model, before = t5lib.convert(teacher), state(teacher)
    # All of the loss on the features, so that every kind must bring them down, layer scales near 0 or not.
    report = aligned(model, teacher, steps=20, features="norm", lr=1e-4, lr_new=1e-3, output=0.0, blocks=0.0)
    assert list(report.error_before) == ["blocks.0", "blocks.1", "features", "output"]
    assert report.error_after["features"] < 0.95 * report.error_before["features"]
    assert report.steps == 20 and math.isfinite(report.loss)
    assert not changed(teacher, before) and not any(p.grad is not None for p in teacher.parameters())


def test_by_default_the_features_of_vits_are_matched_and_denoisers_have_none():
    config, denoised = AlignConfig(steps=2, batch_size=4), noised_inputs(dit_batches, NoiseAndVariance(), 0)
    for build, inputs, matched in ((tiny_vit, batches, True), (tiny_dit, denoised, False)):
        teacher = build()
        report = align(t5lib.convert(teacher), teacher=teacher, batches=inputs, config=config)
        assert ("features" in report.error_after) == matched


@pytest.mark.parametrize(
    ("build", "source", "noising"),
    [(tiny_sd3, sd3_batches, RectifiedFlow()), (tiny_dit, dit_batches, NoiseAndVariance())],
    ids=["sd3", "dit"],
)
def test_errors_of_denoisers_fall(build, source, noising):
    teacher = build()
    report = aligned(t5lib.convert(teacher), teacher, source=noised_inputs(source, noising, 0), steps=20)
    first, *_, last = report.error_before
    assert first == "transformer_blocks.0" and last == "output"
    for name, before in report.error_before.items():
        assert report.error_after[name] < 0.9 * before, name


def test_a_softmax_model_has_no_error_and_one_of_other_weights_has():
    """What is measured is a distance: 0 from a model to itself, bit for bit."""
    teacher = tiny_vit()
    model = t5lib.convert(teacher, TTTConfig(layers=(1,)))
    report = aligned(model, teacher, steps=0, features="norm")
    assert report.error_before == report.error_after and report.steps == 0
    assert report.error_before["blocks.0"] == 0 and report.error_before["blocks.1"] > 0
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.1)
    assert aligned(model, teacher, steps=0).error_before["blocks.0"] > 0.001


def test_the_loss_is_the_weighed_sum_of_the_errors():
    teacher = tiny_vit("average_pool")  # no prefix tokens
    model, told = t5lib.convert(teacher), []
    once = functools.partial(aligned, teacher=teacher, source=[random_images()], steps=1)
    errors = aligned(model, teacher, source=[random_images()], steps=0, features="norm").error_before
    changes = {"features": "norm", "blocks": 3.0, "block_growth": 2.0, "features_weight": 0.5, "output": 0.25}
    once(model, log=lambda values, _: told.append(values["loss"]), **changes)
    blocks = 1.0 * errors["blocks.0"] + 2.0 * errors["blocks.1"]
    assert told == pytest.approx([blocks + 0.5 * errors["features"] + 0.25 * errors["output"]], rel=1e-4)


def test_errors_have_the_values_of_the_formula():
    theirs = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0)).double()
    theirs[..., 2] += 100  # what all tokens have in common is no variance
    ours = theirs + torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1))
    grid = TokenGrid(2, 3, 1)
    errors = token_errors(ours, theirs, grid, cosine=True)
    variance = theirs[:, 1:].flatten(0, 1).var(0, correction=0).sum() / 5
    difference = (ours - theirs).square()
    assert errors["image"].item() == pytest.approx((difference[:, 1:].mean() / variance).item(), rel=1e-4)
    assert errors["prefix"].item() == pytest.approx((difference[:, :1].mean() / variance).item(), rel=1e-4)
    cosine = torch.nn.functional.cosine_similarity(ours[:, 1:], theirs[:, 1:], dim=-1).mean().item()
    assert errors["cosine"].item() == pytest.approx(1 - cosine, abs=1e-6)
    expected = (difference.mean() / theirs.var(correction=0)).item()
    assert output_error(ours, theirs).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("trainable", ["all", "blocks", "attention", "new"])
def test_only_what_is_named_is_trained(trainable):
    teacher = tiny_vit()
    model = t5lib.convert(teacher, TTTConfig(layers=(1,)))
    before = state(model)
    # Without the output nothing reaches the head, and block 0 is the teacher's own.
    aligned(model, teacher, trainable=trainable, steps=3, features="norm", prefix=1.0)
    moved = changed(model, before)
    new = set(new_parameters(model))
    if trainable == "new":
        assert moved == new
    elif trainable == "attention":
        assert new < moved and all(name.startswith("blocks.1.attn.") for name in moved)
    else:
        assert new < moved and "blocks.1.mlp.fc1.weight" in moved
        outside = {"patch_embed.proj.weight", "pos_embed", "norm.weight"}
        assert moved & outside == (outside if trainable == "all" else set())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("build", "source"),
    [(tiny_vit, batches), (tiny_sd3, noised_inputs(sd3_batches, RectifiedFlow(), 0))],
    ids=["vit", "sd3"],
)
def test_damping_holds_back_what_a_block_learns_from_later_ones(build, source):
    """Of the last block's error, every earlier block lies one more damped step away."""
    model = t5lib.convert(build())
    family = family_of(model)
    inputs = family.inputs(next(source(0)))

    def gradients(damping: float) -> list[torch.Tensor]:
        recorder = Recorder(family, model, None, damping)
        with recorder.recording():
            family.call(model, inputs)
        recorder.remove()
        parameters = [next(p for p in block.parameters() if p.ndim > 1) for block in family.blocks(model)]
        return list(torch.autograd.grad(recorder.blocks[-1].square().mean(), parameters))

    whole, damped = gradients(0.0), gradients(0.25)
    for depth, (one, other) in enumerate(zip(reversed(whole), reversed(damped), strict=True)):
        torch.testing.assert_close(other, one * 0.75**depth)


def test_first_batch_is_measured_on_and_never_trained_on():
    seen, teacher = [], tiny_vit()
    model = t5lib.convert(teacher)
    teacher.register_forward_pre_hook(lambda _module, _args, named: seen.append(named["x"]), with_kwargs=True)
    aligned(model, teacher, steps=3)
    expected = [random_images(4, seed=number) for number in (0, 1, 2, 3, 0)]
    assert all(torch.equal(one, other) for one, other in zip(seen, expected, strict=True))


def test_sizes_may_alternate():
    teacher = tiny_vit(dynamic_img_size=True)
    sizes = [(32, 32), (32, 48), (64, 40)]

    def source(start):
        return (random_images(2, *sizes[number % 3], seed=number) for number in count(start))

    report = aligned(t5lib.convert(teacher), teacher, source=source, steps=30)
    assert report.error_after["blocks.1"] < report.error_before["blocks.1"]


@pytest.mark.parametrize("changes", [{}, {"ema": 0.9, "accumulate": 2}, {"trainable": "attention"}], ids=str)
def test_a_run_that_was_broken_off_ends_with_the_same_bits(changes, tmp_path):
    teacher = tiny_vit()
    whole = t5lib.convert(teacher)
    aligned(whole, teacher, features="norm", **changes)
    with pytest.raises(ZeroDivisionError):
        aligned(
            t5lib.convert(teacher),
            teacher,
            features="norm",
            resume_dir=tmp_path,
            log=lambda _, step: 1 / (5 - step),
            **changes,
        )
    resumed, steps = t5lib.convert(teacher), []
    log = {"log": lambda _, step: steps.append(step)}
    aligned(resumed, teacher, features="norm", resume_dir=tmp_path, **log, **changes)
    assert steps[0] == 4 and not changed(resumed, state(whole))


def test_models_are_plain_again_also_after_an_error():
    teacher = tiny_vit()
    model = t5lib.convert(teacher)

    def hooks() -> list[int]:
        return [len(module._forward_hooks) for each in (model, teacher) for module in each.modules()]

    before = hooks()
    with pytest.raises(ZeroDivisionError):
        aligned(model, teacher, features="norm", log=lambda *_: 1 / 0)
    assert hooks() == before
    for each in (model, teacher):
        assert not each.training
        assert all(block._compiled_call_impl is None for block in each.blocks)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_or_checkpointed_it_learns_the_same(checkpointing, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    teacher = tiny_vit()
    plain, other = t5lib.convert(teacher), t5lib.convert(teacher)
    aligned(plain, teacher, features="norm", steps=3)
    changes = {"gradient_checkpointing": True} if checkpointing else {"compile": True}
    aligned(other, teacher, features="norm", steps=3, **changes)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_one_compilation_serves_all_blocks_of_a_kind(monkeypatch):
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    teacher = tiny_vit(depth=4)
    aligned(t5lib.convert(teacher), teacher, steps=2, compile=True, features="norm", output=0.0)
    # A block of each model, the student's first, whose input has no gradient, and the error of tokens.
    assert len(graphs) == 4


def test_what_cannot_be_is_refused():
    teacher = tiny_vit()
    model = t5lib.convert(teacher)
    with pytest.raises(T5Error, match=r"'norms' is not a part .* name one of .*norm"):
        aligned(model, teacher, features="norms")
    with pytest.raises(T5Error, match="bfloat16 and precision is fp32"):
        aligned(model, tiny_vit().bfloat16())
    with pytest.raises(T5Error, match="nothing to learn from"):
        AlignConfig(blocks=0.0, output=0.0, features=None)
