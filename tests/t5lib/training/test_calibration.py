"""Attention transfer: every new layer learns its softmax layer, alone, without labels, and survives an interruption."""

import dataclasses
import functools
import signal
from itertools import count

import pytest
import torch
from tiny import KINDS, random_images, tiny_vit
from torch import Tensor, nn

import t5lib
from t5lib.conversion import new_parameters
from t5lib.layers.attention import project
from t5lib.layers.config import TTTConfig
from t5lib.layers.grid import TokenGrid
from t5lib.training.calibration import CalibrateConfig
from t5lib.utils.errors import T5Error

GRID = TokenGrid(4, 4, num_prefix_tokens=1)  # of a tiny model's images
QUICK = CalibrateConfig(steps=24, batch_size=4, warmup=2, pool=2, reuse=2, checkpoint_every=4, lr_inherited=0.0)


def batches(start: int):
    """Endless batches of four images that follow from their number alone."""
    return (random_images(4, seed=number) for number in count(start))


def calibrated(model: nn.Module, teacher: nn.Module, *, source=batches, resume_dir=None, log=None, **changes):
    config = dataclasses.replace(QUICK, **changes)
    return t5lib.calibrate(model, teacher=teacher, batches=source, config=config, resume_dir=resume_dir, log=log)


def same(one: nn.Module, two: nn.Module) -> bool:
    ours, theirs = one.state_dict(), two.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def layer_error(model: nn.Module, teacher: nn.Module, name: str, images: Tensor, grid: TokenGrid = GRID) -> float:
    """Squared error of one layer's heads on the teacher's inputs, over the variance of the teacher's heads."""
    seen = {}
    source, layer = teacher.get_submodule(name), model.get_submodule(name)
    hooks = [
        source.register_forward_pre_hook(lambda _, args: seen.update(x=args[0])),
        source.norm.register_forward_pre_hook(lambda _, args: seen.update(target=args[0])),
    ]
    with torch.no_grad():
        teacher(images)
        out = layer.mixer(*project(layer, seen["x"]), grid).transpose(1, 2).flatten(2)
    for hook in hooks:
        hook.remove()
    return ((out - seen["target"]).square().mean() / seen["target"].var(correction=0)).item()


@pytest.mark.parametrize("kind", KINDS)
def test_error_of_every_layer_falls(kind):
    teacher = tiny_vit(kind)
    report = calibrated(t5lib.convert(teacher), teacher, steps=60, lr_inherited=1e-3)
    assert list(report.error_before) == list(report.error_after) == ["blocks.0.attn", "blocks.1.attn"]
    for name, before in report.error_before.items():
        assert report.error_after[name] < 0.8 * before, name
    assert report.steps == 60 and report.seconds > 0


def test_reported_errors_are_those_of_the_layers_on_the_first_batch():
    teacher, images = tiny_vit(), next(batches(0))
    model = t5lib.convert(teacher)
    before = {name: layer_error(model, teacher, name, images) for name in model.t5_report.layers}
    report = calibrated(model, teacher)
    assert report.error_before == pytest.approx(before, rel=1e-4)
    after = {name: layer_error(model, teacher, name, images) for name in model.t5_report.layers}
    assert report.error_after == pytest.approx(after, rel=1e-4)


def test_first_batch_is_measured_on_and_never_fitted_on():
    fitted, teacher = [], tiny_vit()
    teacher.register_forward_pre_hook(lambda _, args, named: fitted.append(named["x"]), with_kwargs=True)
    calibrated(t5lib.convert(teacher), teacher)
    probe, *pools, again = fitted
    assert torch.equal(probe, random_images(4, seed=0)) and torch.equal(again, probe)
    assert torch.equal(torch.cat(pools), torch.cat([random_images(4, seed=number) for number in range(1, 13)]))


@pytest.mark.parametrize("kind", ["augreg", "qk_norm"])
def test_only_new_parameters_change_and_only_the_model(kind):
    teacher = tiny_vit(kind)
    model = t5lib.convert(teacher)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibrated(model, teacher)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(new_parameters(model))
    assert same(teacher, tiny_vit(kind))


@pytest.mark.parametrize("kind", ["augreg", "qk_norm"])
def test_projections_are_fitted_along_when_asked_to(kind):
    teacher = tiny_vit(kind)
    model = t5lib.convert(teacher)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibrated(model, teacher, lr_inherited=1e-3)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    projections = {n for n in before if any(part in n for part in (".qkv.", ".q_norm.", ".k_norm."))}
    assert changed == set(new_parameters(model)) | projections
    assert same(teacher, tiny_vit(kind))


@pytest.mark.parametrize("lr_inherited", [0.0, 1e-3])
def test_no_gradient_is_left_behind_for_the_training_that_follows(lr_inherited):
    teacher = tiny_vit("qk_norm")
    model = t5lib.convert(teacher)
    calibrated(model, teacher, lr_inherited=lr_inherited)
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == []


@pytest.mark.parametrize("lr_inherited", [0.0, 1e-3])
def test_layers_fitted_together_equal_each_fitted_alone(lr_inherited):
    teacher = tiny_vit()
    together = t5lib.convert(teacher)
    start = {name: tensor.clone() for name, tensor in together.state_dict().items()}
    calibrated(together, teacher, steps=3, lr_inherited=lr_inherited)
    for index in (0, 1):
        alone = t5lib.convert(teacher, TTTConfig(layers=(index,)))
        own = f"blocks.{index}.attn."
        alone.load_state_dict({name: start[name] for name in alone.state_dict()})
        calibrated(alone, teacher, steps=3, lr_inherited=lr_inherited)
        for name, tensor in alone.state_dict().items():
            if name.startswith(own):
                torch.testing.assert_close(together.state_dict()[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_one_step_equals_adam_on_the_layer_itself():
    teacher = tiny_vit(depth=1)
    model, by_hand = t5lib.convert(teacher), t5lib.convert(teacher)
    calibrated(model, teacher, steps=1, batch_size=8, warmup=0)
    layer, seen = by_hand.blocks[0].attn, {}
    teacher.blocks[0].attn.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    teacher.blocks[0].attn.norm.register_forward_pre_hook(lambda _, args: seen.update(target=args[0]))
    with torch.no_grad():
        teacher(torch.cat([random_images(4, seed=1), random_images(4, seed=2)]))
    out = layer.mixer(*project(layer, seen["x"]), GRID).transpose(1, 2).flatten(2)
    ((out - seen["target"]).square().mean() / seen["target"].var(correction=0)).backward()
    torch.optim.Adam(layer.mixer.parameters(), lr=QUICK.lr).step()
    for name, parameter in new_parameters(by_hand).items():
        torch.testing.assert_close(new_parameters(model)[name], parameter, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("lr_inherited", [0.0, 1e-3])
@pytest.mark.parametrize("stop_at", [1, 8, 12])
def test_interrupted_and_run_again_it_ends_with_the_same_bits(lr_inherited, stop_at, tmp_path):
    teacher = tiny_vit("qk_norm")
    whole = t5lib.convert(teacher)
    report = calibrated(whole, teacher, lr_inherited=lr_inherited)

    opened, steps = [], []

    def dying(start):
        opened.append(start)
        for number, batch in enumerate(batches(start)):
            if len(opened) == 1 and number == stop_at:
                raise KeyboardInterrupt
            yield batch

    def log(_values, step):
        steps.append(step)

    def again():
        model = t5lib.convert(teacher)
        options = {"lr_inherited": lr_inherited, "source": dying, "resume_dir": tmp_path / "calibrate", "log": log}
        return model, calibrated(model, teacher, **options)

    with pytest.raises(KeyboardInterrupt):
        again()
    steps.clear()
    model, resumed = again()
    assert same(model, whole)
    assert resumed.error_before == report.error_before and resumed.error_after == report.error_after
    if stop_at == 12:  # five of six pools of two batches, each good for four steps, were done; the fifth is read again
        assert opened[-1] == 9 and steps == [24]


def test_ctrl_c_in_the_middle_of_a_pool_loses_no_step(tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has it ignored
    teacher, steps = tiny_vit(), []
    whole, model = t5lib.convert(teacher), t5lib.convert(teacher)
    calibrated(whole, teacher, checkpoint_every=1000)

    def stopping(_values, step):
        steps.append(step)
        if step == 10:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        calibrated(model, teacher, resume_dir=tmp_path, log=stopping, checkpoint_every=1000)
    model = t5lib.convert(teacher)
    calibrated(model, teacher, resume_dir=tmp_path, log=stopping, checkpoint_every=1000)
    signal.signal(signal.SIGINT, before)
    assert same(model, whole) and steps == [10, 20, 24]


def test_an_interrupted_model_is_fitted_in_part_but_whole():
    teacher = tiny_vit()
    model = t5lib.convert(teacher)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def dying(start):
        yield from (random_images(4, seed=number) for number in range(start, 5))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrated(model, teacher, source=dying, lr_inherited=1e-3)
    assert not torch.equal(model.blocks[0].attn.qkv.weight, start["blocks.0.attn.qkv.weight"])
    for name, parameter in new_parameters(model).items():
        assert not torch.equal(parameter, start[name]), name


def test_finished_work_is_not_done_again(tmp_path):
    teacher = tiny_vit()
    model, read = t5lib.convert(teacher), []

    def counted(start):
        for number, batch in enumerate(batches(start), start):
            read.append(number)
            yield batch

    report = calibrated(model, teacher, source=counted, resume_dir=tmp_path)
    read.clear()
    again = t5lib.convert(teacher)
    assert calibrated(again, teacher, source=counted, resume_dir=tmp_path).error_after == report.error_after
    assert same(again, model) and read == [0]  # the probe


def test_labels_are_ignored_and_a_plain_loader_is_repeated():
    teacher = tiny_vit()
    images = [random_images(4, seed=number) for number in range(5)]
    one, two = t5lib.convert(teacher), t5lib.convert(teacher)
    calibrated(one, teacher, source=images)
    calibrated(two, teacher, source=[(batch, torch.full((4,), 10**6)) for batch in images])
    assert same(one, two)


def test_a_subset_of_layers_is_fitted_and_no_other():
    teacher = tiny_vit()
    model = t5lib.convert(teacher, TTTConfig(layers=(1,)))
    report = calibrated(model, teacher, steps=40)
    assert list(report.error_after) == ["blocks.1.attn"]
    assert report.error_after["blocks.1.attn"] < report.error_before["blocks.1.attn"]


def test_images_of_another_size_than_the_model_was_made_for():
    """The layers run on the teacher's inputs, without the model, so the grid must come from the teacher's images."""
    teacher = tiny_vit(dynamic_img_size=True)
    for height, width in ((32, 48), (48, 32)):
        model = t5lib.convert(teacher)
        wide = [random_images(4, height, width, seed=number) for number in range(9)]
        before, grid = t5lib.convert(teacher), TokenGrid(height // 8, width // 8, num_prefix_tokens=1)
        expected = {name: layer_error(before, teacher, name, wide[0], grid) for name in model.t5_report.layers}
        assert calibrated(model, teacher, source=wide).error_before == pytest.approx(expected, rel=1e-4)


def test_log_tells_error_and_learning_rate():
    teacher, told = tiny_vit(), {}
    calibrated(t5lib.convert(teacher), teacher, log=lambda values, step: told.update({step: values}))
    assert sorted(told) == [10, 20, 24]
    assert all(set(values) == {"loss", "lr"} for values in told.values())
    assert told[24]["loss"] < told[10]["loss"] and 0 < told[24]["lr"] < told[10]["lr"] < QUICK.lr


def test_compiled_fit_agrees(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    teacher = tiny_vit()
    plain, compiled = t5lib.convert(teacher), t5lib.convert(teacher)
    for model, compile in ((plain, False), (compiled, True)):
        calibrated(model, teacher, steps=3, lr_inherited=1e-3, compile=compile)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_no_steps_measure_only():
    teacher = tiny_vit()
    model = t5lib.convert(teacher)
    report = calibrated(model, teacher, steps=0)
    assert report.error_before == report.error_after and same(model, t5lib.convert(teacher))


def test_training_mode_and_hooks_are_as_before():
    teacher = tiny_vit(drop_path_rate=0.5, proj_drop_rate=0.5).train()
    model = t5lib.convert(teacher)
    hooks = [len(module._forward_pre_hooks) for module in teacher.modules()]
    calibrated(model, teacher)
    assert model.training
    assert [len(module._forward_pre_hooks) for module in teacher.modules()] == hooks


def test_a_teacher_with_other_heads_is_refused():
    with pytest.raises(T5Error, match=r"blocks\.0\.attn of the teacher has .* \(4, 8, 32\), of the model \(2, 16"):
        calibrated(t5lib.convert(tiny_vit()), tiny_vit(num_heads=4))


def test_a_fit_that_diverges_stops_and_names_layer_and_setting():
    teacher = tiny_vit()
    model = t5lib.convert(teacher)
    with torch.no_grad():
        model.blocks[1].attn.mixer.w1.fill_(torch.inf)
    with pytest.raises(
        T5Error, match=r"step 10: the error of blocks\.1\.attn is not finite; lower calibrate\.lr \(0\.01\)"
    ):
        calibrated(model, teacher)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "the loader gave no batch"),
        ([torch.zeros(3, 32, 32)], r"images \(B, 3, H, W\), got \(3, 32, 32\)"),
        ([{"image": 1}], "called by name: expected 'x'"),
        (lambda start: iter([random_images(4)]), "batches ended after number 1;"),
    ],
    ids=["empty", "one image", "dictionary", "finite"],
)
def test_batches_that_cannot_be_used_are_refused(source, message):
    with pytest.raises(T5Error, match=message):
        calibrated(t5lib.convert(tiny_vit()), tiny_vit(), source=source)


@pytest.mark.parametrize(
    "setting",
    [{"steps": -1}, {"batch_size": 0}, {"lr": 0.0}, {"lr_inherited": -1.0}, {"pool": 0}, {"reuse": 0}, {"warmup": -1}],
    ids=str,
)
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(T5Error, match=next(iter(setting))):
        CalibrateConfig(**setting)
