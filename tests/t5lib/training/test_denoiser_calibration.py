"""Attention transfer in denoisers: on noised latents, for image and text, in joint and image-only attentions."""

import dataclasses
import functools
from itertools import count

import pytest
import torch
from tiny_denoisers import TEXT, dit_batches, sd3_batch, sd3_batches, tiny_dit, tiny_sd3
from torch import Tensor, nn

import t5lib
from t5lib.conversion import new_parameters
from t5lib.families.base import AttentionCall
from t5lib.layers.config import TTTConfig
from t5lib.training import calibration
from t5lib.training.calibration import CalibrateConfig
from t5lib.training.objectives import NoiseAndVariance, RectifiedFlow, noised_batch, noised_inputs
from t5lib.utils.errors import T5Error

QUICK = CalibrateConfig(steps=12, batch_size=4, warmup=2, pool=2, reuse=2, checkpoint_every=4)
MODELS = {"sd3": (tiny_sd3, sd3_batches, RectifiedFlow()), "dit": (tiny_dit, dit_batches, NoiseAndVariance())}
ATTENTIONS = {
    "sd3": [f"transformer_blocks.{name}" for name in ("0.attn", "0.attn2", "1.attn", "1.attn2", "2.attn")],
    "dit": [f"transformer_blocks.{name}" for name in ("0.attn1", "1.attn1")],
}


@pytest.fixture(params=MODELS)
def kind(request) -> str:
    return request.param


def calibrated(model: nn.Module, teacher: nn.Module, kind: str, *, source=None, **changes):
    _, batches, noising = MODELS[kind]
    options = {name: changes.pop(name) for name in ("resume_dir", "log") if name in changes}
    config = dataclasses.replace(QUICK, **changes)
    source = noised_inputs(source or batches, noising, config.seed)
    return t5lib.calibrate(model, teacher=teacher, batches=source, config=config, **options)


def same(one: nn.Module, two: nn.Module) -> bool:
    theirs = two.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


@torch.no_grad()
def layer_error(model: nn.Module, teacher: nn.Module, name: str, kind: str) -> float:
    """One layer run by itself on what its attention got in the teacher; softmax by hand from q, k and v there."""
    _, batches, noising = MODELS[kind]
    inputs, seen = noised_batch(next(batches(0)), noising, QUICK.seed), {}
    source, layer = teacher.get_submodule(name), model.get_submodule(name)

    def keep(_module, args, named):
        given = (*args, named.get("hidden_states"), named.get("encoder_hidden_states"))
        seen[name] = tuple(part for part in given if part is not None)

    handle = source.register_forward_pre_hook(keep, with_kwargs=True)
    teacher(**inputs)
    handle.remove()
    tokens, family = seen[name], t5lib.families.family_of(model)
    grid = family.grid(model, inputs).with_suffix(tokens[1].shape[1] if len(tokens) > 1 else 0)
    q, k, v = family.project(source, AttentionCall(tokens))
    target = merged((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v)
    out = merged(layer.mixer(*family.project(layer, AttentionCall(tokens)), grid))
    image = tokens[0].shape[1]
    parts = [slice(0, image)]
    if len(tokens) == 2 and source.to_add_out is not None:
        parts.append(slice(image, image + TEXT))
    errors = [((out - target)[:, p].square().mean() / target[:, p].var(correction=0)).item() for p in parts]
    lengths = [part.stop - part.start for part in parts]
    return sum(error * length for error, length in zip(errors, lengths, strict=True)) / sum(lengths)


def merged(o: Tensor) -> Tensor:
    return o.transpose(1, 2).flatten(2)


def test_error_of_every_attention_falls(kind):
    teacher = MODELS[kind][0]()
    report = calibrated(t5lib.convert(teacher), teacher, kind, steps=60)
    assert sorted(report.error_before) == sorted(report.error_after) == sorted(ATTENTIONS[kind])
    for name, before in report.error_before.items():
        assert report.error_after[name] < 0.8 * before, name


def test_reported_errors_are_those_of_image_and_text_on_the_first_noised_batch(kind):
    teacher = MODELS[kind][0]()
    model = t5lib.convert(teacher)
    before = {name: layer_error(model, teacher, name, kind) for name in ATTENTIONS[kind]}
    report = calibrated(model, teacher, kind)
    assert report.error_before == pytest.approx(before, rel=1e-3)
    after = {name: layer_error(model, teacher, name, kind) for name in ATTENTIONS[kind]}
    assert report.error_after == pytest.approx(after, rel=1e-3)


def test_new_parameters_and_projections_of_queries_keys_and_values_are_fitted_and_nothing_else(kind):
    teacher = MODELS[kind][0]()
    for lr_inherited in (0.0, 1e-3):
        model = t5lib.convert(teacher)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        calibrated(model, teacher, kind, lr_inherited=lr_inherited)
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        inherited = changed - set(new_parameters(model))
        assert changed >= set(new_parameters(model))
        parts = {name.rpartition(".attn")[2].split(".")[1] for name in inherited}
        own = {"to_q", "to_k", "to_v"}
        joint = {"norm_q", "norm_k", "add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k"}
        assert parts == ((own | joint if kind == "sd3" else own) if lr_inherited else set())
        assert all(parameter.grad is None for parameter in model.parameters())
    assert same(teacher, MODELS[kind][0]())


@pytest.mark.parametrize("lr_inherited", [0.0, 1e-3])
def test_layers_fitted_together_equal_each_fitted_alone(lr_inherited, kind):
    """Not with instance norm, for which the gradient of a key's bias is rounding noise that Adam would blow up.

    Nor is the bias of DiT's keys compared: its gradient is as small with any norm.
    """
    teacher = MODELS[kind][0]()
    together = t5lib.convert(teacher, TTTConfig(key_norm="rms"))
    start = {name: tensor.clone() for name, tensor in together.state_dict().items()}
    calibrated(together, teacher, kind, steps=3, lr_inherited=lr_inherited)
    names = t5lib.families.family_of(teacher).attention_names(teacher)
    for index, layer in enumerate(names):
        alone = t5lib.convert(teacher, TTTConfig(key_norm="rms", layers=(index,)))
        alone.load_state_dict({name: start[name] for name in alone.state_dict()})
        calibrated(alone, teacher, kind, steps=3, lr_inherited=lr_inherited)
        for name, tensor in alone.state_dict().items():
            if name.startswith(f"{layer}.") and not name.endswith("to_k.bias"):
                torch.testing.assert_close(together.state_dict()[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_each_batch_has_noise_and_levels_of_its_own_and_a_condition(kind):
    make, batches, noising = MODELS[kind]
    teacher, seen = make(), []
    teacher.register_forward_pre_hook(lambda _, args, named: seen.append(named), with_kwargs=True)
    calibrated(t5lib.convert(make()), teacher, kind, steps=4)
    for named in seen:
        del named["return_dict"]
    probe, pool, again = seen
    assert all(torch.equal(probe[name], again[name]) for name in probe)
    expected = [noised_batch(next(batches(n)), noising, QUICK.seed, n) for n in (1, 2)]
    for name, given in pool.items():
        assert torch.equal(given, torch.cat([inputs[name] for inputs in expected])), name


def test_interrupted_and_run_again_it_ends_with_the_same_bits(kind, tmp_path):
    make, batches, _ = MODELS[kind]
    teacher = make()
    whole, resumed = t5lib.convert(teacher), t5lib.convert(teacher)
    report = calibrated(whole, teacher, kind)

    def dying(start):
        for number, batch in zip(count(start), batches(start), strict=False):
            if number == 5:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        calibrated(resumed, teacher, kind, source=dying, resume_dir=tmp_path)
    resumed = t5lib.convert(teacher)
    assert calibrated(resumed, teacher, kind, resume_dir=tmp_path).error_after == report.error_after
    assert same(resumed, whole)


def test_sizes_may_change_within_a_pool():
    sizes = ((8, 8), (16, 8), (8, 16))

    def source(start):
        return (sd3_batch(number, 4, *sizes[number % 3]) for number in count(start))

    teacher, steps = tiny_sd3(), []
    model = t5lib.convert(teacher)
    options = {"source": source, "steps": 18, "pool": 3, "log": lambda _, step: steps.append(step)}
    report = calibrated(model, teacher, "sd3", **options)
    assert steps == [10, 18]
    assert all(report.error_after[name] < before for name, before in report.error_before.items())


def test_a_chosen_set_of_layers_is_fitted_and_no_other():
    teacher = tiny_sd3()
    model = t5lib.convert(teacher, TTTConfig(layers={"0-1": "two_layer", "3-4": "swiglu"}))
    report = calibrated(model, teacher, "sd3", steps=30)
    assert sorted(report.error_after) == ATTENTIONS["sd3"][:4]
    assert all(report.error_after[name] < before for name, before in report.error_before.items())


def test_a_teacher_of_another_shape_is_refused():
    with pytest.raises(T5Error, match=r"other shapes than the model's, .*norm_q\.weight \(4,\) for \(8,\)"):
        calibrated(t5lib.convert(tiny_sd3()), tiny_sd3(num_attention_heads=4, attention_head_dim=4), "sd3")
    with pytest.raises(T5Error, match=r"with a TTT layer at transformer_blocks\.0\.attn1; pass the softmax"):
        calibrated(t5lib.convert(tiny_dit()), t5lib.convert(tiny_dit()), "dit")


def test_layers_that_take_turns_in_a_step_learn_the_same(kind, monkeypatch):
    """As many as a step goes through at once, or here one after the other."""
    teacher, told = MODELS[kind][0](), []
    for at_once in (calibration.TOGETHER, 1):
        monkeypatch.setattr(calibration, "TOGETHER", at_once)
        losses: list[float] = []
        log = {"log": lambda values, _, losses=losses: losses.append(values["loss"])}
        report = calibrated(t5lib.convert(teacher), teacher, kind, **log)
        told.append([*losses, *report.error_before.values(), *report.error_after.values()])
    assert told[0] == pytest.approx(told[1], rel=1e-3)


def test_layers_that_take_turns_share_what_is_compiled(monkeypatch):
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(calibration, "TOGETHER", 1)
    teacher = tiny_sd3(num_layers=6, dual_attention_layers=(0, 1, 2, 3))
    calibrated(t5lib.convert(teacher), teacher, "sd3", steps=2, compile=True)
    assert len(graphs) == 3  # joint, joint without the text's output, of the image alone
