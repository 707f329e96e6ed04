"""Denoisers learn their objective, by every protocol, from either teacher, and survive an interruption bit for bit."""

import dataclasses
import math
import sys
import types

import pytest
import torch
from diffusers.models.embeddings import LabelEmbedding
from tiny_denoisers import dit_batch, dit_batches, sd3_batch, sd3_batches, tiny_dit, tiny_sd3
from torch import nn
from torch.nn import functional as F

import t5lib
from t5lib.conversion import new_parameters
from t5lib.data.batches import seeded
from t5lib.training.denoiser import DenoiserTrainConfig, Denoising, validation_loss
from t5lib.training.objectives import NoiseAndVariance, RectifiedFlow
from t5lib.training.trainer import train
from t5lib.utils.errors import T5Error

PLAIN = DenoiserTrainConfig(steps=4, batch_size=4, lr=1e-3, lr_new=1e-2, warmup=0.0, ema=None, checkpoint_every=2)
MODELS = {"sd3": (tiny_sd3, sd3_batches, RectifiedFlow()), "dit": (tiny_dit, dit_batches, NoiseAndVariance())}


def run(model: nn.Module, config: DenoiserTrainConfig = PLAIN, *, source=None, teacher=None, **options):
    _, batches, noising = MODELS["dit" if "DiT" in type(model).__name__ else "sd3"]
    return train(model, source or batches, Denoising(config, noising, teacher), config, steps=config.steps, **options)


def losses(model: nn.Module, config: DenoiserTrainConfig = PLAIN, **options) -> list[float]:
    told = []
    run(model, config, log=lambda values, _: told.append(values["loss"]), **options)
    return told


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def same(one: nn.Module, two: nn.Module) -> bool:
    return not changed(one, state(two))


@pytest.fixture(params=MODELS)
def kind(request) -> str:
    return request.param


@pytest.mark.parametrize("converted", [False, True], ids=["control", "converted"])
def test_loss_falls_and_everything_is_trained(kind, converted):
    make, batches, objective = MODELS[kind]
    model = t5lib.convert(make()) if converted else make()
    before, batch = state(model), next(batches(0))
    held_out = [batch]
    first = validation_loss({"": model}, held_out, noising=objective)[""]
    report = run(model, dataclasses.replace(PLAIN, steps=30, lr=3e-3, lr_new=3e-3), source=lambda _: iter([batch] * 30))
    assert validation_loss({"": model}, held_out, noising=objective)[""] < 0.9 * first
    unused = {"attn.add_q_proj", "attn.norm_added_q"}  # in the last block, whose text is dropped
    last = f"transformer_blocks.{len(model.transformer_blocks) - 1}."
    untrained = {name for name, _ in model.named_parameters()} - changed(model, before)
    assert all(name.startswith(last) and name.removeprefix(last).rpartition(".")[0] in unused for name in untrained)
    assert report.steps == 30 and math.isfinite(report.loss) and not model.training


def test_first_loss_is_the_objectives_on_noise_that_follows_from_seed_and_batch(kind):
    make, batches, objective = MODELS[kind]
    model, expected = make(), []
    for number in range(2):
        noised = objective.noised(next(batches(number)), seeded(PLAIN.seed, 0, number))
        expected.append(objective.loss(model(**noised.inputs, return_dict=False)[0], noised).item())
    config = dataclasses.replace(PLAIN, steps=1, accumulate=2)
    assert losses(model, config) == pytest.approx([sum(expected) / 2], rel=1e-5)


def test_labels_that_came_are_used_in_every_block():
    """diffusers' label embeddings drop labels while training, each block its own; here the data does that."""
    model, seen = tiny_dit(), []
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 1.0
            module.embedding_table.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run(model, dataclasses.replace(PLAIN, steps=1))
    assert len(seen) >= 2 and all(torch.equal(labels, dit_batch(0)["labels"]) for labels in seen)


def test_freeze_protocol_changes_new_parameters_alone(kind):
    model = t5lib.convert(MODELS[kind][0]())
    before = state(model)
    run(model, dataclasses.replace(PLAIN, trainable="new"))
    assert changed(model, before) == set(new_parameters(model))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_adapters_learn_on_the_projections_of_converted_layers_and_are_merged(kind):
    model = t5lib.convert(MODELS[kind][0]())
    before = state(model)
    run(model, dataclasses.replace(PLAIN, trainable="lora", lora_rank=2))
    parts = {name.rpartition(".attn")[2].split(".", 1)[1] for name in changed(model, before)}
    joint = {"add_q_proj.weight", "add_k_proj.weight", "add_v_proj.weight", "to_add_out.weight"}
    own = {"to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight"}
    assert parts == (own | joint if kind == "sd3" else own)
    assert before.keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    "changes",
    [{}, {"align": 0.5}, {"align": 0.5, "teacher": "source"}, {"accumulate": 2, "trainable": "lora"}],
    ids=["plain", "ema teacher", "source teacher", "adapters"],
)
def test_interrupted_and_run_again_it_ends_with_the_same_bits(kind, changes, tmp_path):
    make = MODELS[kind][0]
    config = dataclasses.replace(PLAIN, ema=0.9, steps=5, **changes)
    options = {"teacher": make()} if config.teacher == "source" else {}
    whole, resumed = t5lib.convert(make()), t5lib.convert(make())
    run(whole, config, **options)
    with pytest.raises(ZeroDivisionError):
        run(resumed, config, resume_dir=tmp_path, log=lambda _, step: 1 / (4 - step), **options)
    resumed, steps = t5lib.convert(make()), []
    run(resumed, config, resume_dir=tmp_path, log=lambda _, step: steps.append(step), **options)
    assert steps == [3, 4, 5] and same(resumed, whole)


def test_averaged_weights_teach_and_are_the_result():
    model, told, seen = tiny_sd3(), [], []
    config = dataclasses.replace(PLAIN, steps=4, ema=0.5, align=50.0, clip_norm=None)
    weights = [state(model)]
    run(model, config, log=lambda values, _: (told.append(values["loss"]), weights.append(state(model))))
    average, objective = weights[0], RectifiedFlow()
    for number, student in enumerate(weights[:-1]):
        noised = objective.noised(sd3_batch(number), seeded(0, 0, number))
        given, wanted = (predicted(values, noised) for values in (student, average))
        seen.append((objective.loss(given, noised) + 50 * F.mse_loss(given, wanted)).item())
        decay = min(0.5, 1 - (1 + number) ** (-2 / 3))  # timm's warm-up of the decay
        average = {name: average[name].lerp(weights[number + 1][name], 1 - decay) for name in average}
    assert told == pytest.approx(seen, rel=1e-4)
    assert told[3] != pytest.approx(objective.loss(predicted(weights[3], noised), noised).item(), rel=1e-3)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, average[name], msg=name)


@torch.no_grad()
def predicted(weights: dict[str, torch.Tensor], noised) -> torch.Tensor:
    model = tiny_sd3()
    model.load_state_dict(weights)
    return model(**noised.inputs, return_dict=False)[0]


def test_source_teaches_its_prediction_and_stays_as_it_is(kind):
    make, batches, objective = MODELS[kind]
    model, source = make(), make(seed=1)
    noised = objective.noised(next(batches(0)), seeded(0, 0, 0))
    with torch.no_grad():
        given, wanted = (each(**noised.inputs, return_dict=False)[0] for each in (model, source))
    distance = F.mse_loss(given[:, :4], wanted[:, :4])  # of what both denoise with, not of DiT's variance
    before = state(source)
    config = dataclasses.replace(PLAIN, steps=2, align=2.0, teacher="source")
    told = losses(model, config, teacher=source)
    assert told[0] == pytest.approx((objective.loss(given, noised) + 2 * distance).item(), rel=1e-5)
    assert not changed(source, before) and all(parameter.grad is None for parameter in source.parameters())


def test_a_source_in_bfloat16_teaches_nearly_the_same(kind):
    make = MODELS[kind][0]
    config = dataclasses.replace(PLAIN, steps=2, align=2.0, teacher="source", precision="bf16")
    exact = losses(make(), config, teacher=make(seed=1))
    assert losses(make(), config, teacher=make(seed=1).bfloat16()) == pytest.approx(exact, rel=1e-2)
    with pytest.raises(
        T5Error, match=r"teacher's weights are torch\.bfloat16 and precision is fp32; call teacher\.float"
    ):
        run(make(), dataclasses.replace(config, precision="fp32"), teacher=make(seed=1).bfloat16())


@pytest.mark.parametrize("aligned", [{}, {"ema": 0.9, "align": 0.5}], ids=["plain", "aligned"])
def test_checkpointed_gradients_and_compiled_blocks_agree(kind, aligned, monkeypatch):
    compile_eagerly = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *given, **named: compile_eagerly(*given, backend="eager", **named))
    make = MODELS[kind][0]
    config = dataclasses.replace(PLAIN, steps=2, **aligned)
    plain = losses(make(), config)
    model = make()
    assert losses(model, dataclasses.replace(config, gradient_checkpointing=True)) == pytest.approx(plain, rel=1e-4)
    assert not any(block._compiled_call_impl for block in model.transformer_blocks)
    both = dataclasses.replace(config, gradient_checkpointing=True, compile=True)
    assert losses(make(), both) == pytest.approx(plain, rel=1e-4)


def test_batches_of_other_sizes_and_shapes_follow_each_other():
    def source(start):
        return iter([sd3_batch(0), sd3_batch(1, height=8, width=16), sd3_batch(2, size=2, height=16, width=8)][start:])

    model = t5lib.convert(tiny_sd3())
    assert all(math.isfinite(loss) for loss in losses(model, dataclasses.replace(PLAIN, steps=3), source=source))


def test_validation_compares_models_on_the_same_noise(kind):
    make, batches, objective = MODELS[kind]
    held_out = [next(batches(100)), next(batches(101))]
    one, other = make(), make(seed=1)
    together = validation_loss({"one": one, "other": other}, held_out, noising=objective)
    assert together == validation_loss({"one": one, "other": other}, held_out, noising=objective)
    assert validation_loss({"other": other}, held_out, noising=objective)["other"] == together["other"]
    assert together["one"] != together["other"]
    assert validation_loss({"one": one}, held_out, noising=objective, seed=1)["one"] != together["one"]
    with pytest.raises(T5Error, match="validation batches are empty"):
        validation_loss({"one": one}, [], noising=objective)


def test_8_bit_optimizer_is_that_of_bitsandbytes(monkeypatch):
    made = []

    class AdamW8bit(torch.optim.AdamW):
        def __init__(self, groups):
            made.append(len(groups))
            super().__init__(groups)

    optim = types.ModuleType("bitsandbytes.optim")
    optim.AdamW8bit = AdamW8bit
    config = dataclasses.replace(PLAIN, optimizer="adamw8bit")
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    model = tiny_dit()
    with pytest.raises(T5Error, match="needs bitsandbytes; install it"):
        run(model, config)
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)
    run(model, config)
    assert made == [2]  # decayed and not


@pytest.mark.parametrize("part", ["transformer_blocks.1.attn2.to_q", "transformer_blocks.1.attn.add_k_proj"])
def test_a_loss_that_is_not_finite_names_step_and_module(part):
    model = tiny_sd3()
    with torch.no_grad():
        model.get_submodule(part).weight.fill_(math.inf)
    before = state(model)
    with pytest.raises(T5Error, match=rf"stopped at step 1: loss nan.* Not finite first in {part}"):
        run(model, dataclasses.replace(PLAIN, gradient_checkpointing=True))
    assert not changed(model, before)


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(T5Error, match="teacher is 'source' but no teacher was given"):
        run(tiny_sd3(), dataclasses.replace(PLAIN, align=1.0, teacher="source"))
    with pytest.raises(T5Error, match=r"weights are torch\.bfloat16.*torch_dtype=torch\.float32"):
        run(tiny_sd3().bfloat16())
    with pytest.raises(T5Error, match="convert it first"):
        run(tiny_sd3(), dataclasses.replace(PLAIN, trainable="new"))


@pytest.mark.parametrize(
    "setting",
    [{"steps": 0}, {"align": -1.0}, {"teacher": "control"}, {"optimizer": "sgd"}, {"align": 1.0, "ema": None}],
    ids=str,
)
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(T5Error, match=list(setting)[-1]):
        DenoiserTrainConfig(**setting)
