"""What every denoiser of diffusers can do besides SD3 and DiT, whose own files ask more of them."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

import pytest
import torch
from tiny_denoisers import pixart_batch, qwen_image_batch, sd3_batch, tiny_flux, tiny_pixart, tiny_qwen_image
from torch import Tensor, nn

import t5lib
from t5lib.conversion import new_parameters, ttt_layers
from t5lib.families import family_of
from t5lib.families.inputs import ExampleSize, Inputs
from t5lib.layers.config import TTTConfig
from t5lib.training.alignment import AlignConfig
from t5lib.training.calibration import CalibrateConfig
from t5lib.training.objectives import NoiseAndVariance, Noising, RectifiedFlow, noised_batch, noised_inputs
from t5lib.utils.errors import T5Error

RECIPE = CalibrateConfig(steps=30, batch_size=4, warmup=2, pool=2, reuse=2)
NEIGHBORS = TTTConfig(locality="dwc_qk+nat3")


@dataclass
class Kind:
    """A family as it is made tiny, the batches that it learns from, and how they are noised."""

    make: Callable[..., nn.Module]
    batch: Callable[..., dict[str, Tensor]]
    noising: Noising
    joint: bool = True

    def inputs(self, height: int = 8, width: int = 12, size: int = 2) -> Inputs:
        return noised_batch(self.batch(0, size, height, width), self.noising, 0)

    def batches(self, start: int) -> Iterator[dict[str, Tensor]]:
        return (self.batch(number) for number in count(start))

    def noised(self):
        return noised_inputs(self.batches, self.noising, 0)


KINDS = {
    "flux dev": Kind(tiny_flux, sd3_batch, RectifiedFlow(guidance=3.5)),
    "flux schnell": Kind(lambda: tiny_flux(guidance=False), sd3_batch, RectifiedFlow(shift=1.0)),
    "pixart": Kind(tiny_pixart, pixart_batch, NoiseAndVariance(), joint=False),
    "qwen image": Kind(tiny_qwen_image, qwen_image_batch, RectifiedFlow(shift=2.46)),
}
ONE_OF_EACH = [name for name in KINDS if name != "flux schnell"]


@pytest.fixture(params=KINDS)
def kind(request) -> Kind:
    return KINDS[request.param]


@pytest.fixture(params=ONE_OF_EACH)
def one(request) -> Kind:
    """A kind of each family."""
    return KINDS[request.param]


def run(model: nn.Module, inputs: Inputs) -> Tensor:
    inputs = {name: t.to(model.dtype) if t.is_floating_point() else t for name, t in inputs.items()}
    return family_of(model).call(model, inputs)


def bits(model: nn.Module) -> list[tuple[str, bytes]]:
    return [(name, tensor.view(torch.uint8).numpy().tobytes()) for name, tensor in model.state_dict().items()]


@torch.no_grad()
def test_convert_and_revert_give_the_original_back_bit_for_bit(kind):
    model, inputs = kind.make(), kind.inputs()
    before = bits(model), str(model), run(model, inputs)
    converted, family = t5lib.convert(model), family_of(model)
    assert type(converted) is family.converted_class and type(model) is family.softmax_class
    assert list(converted.t5_report.layers) == family.attention_names(model)
    assert not torch.allclose(run(converted, inputs), before[2], rtol=1e-3)
    back = t5lib.revert(converted)
    assert type(back) is family.softmax_class and dict(back.config) == dict(model.config)
    for each in (back, model):
        assert (bits(each), str(each)) == before[:2] and torch.equal(run(each, inputs), before[2])


def test_converting_in_place_shares_every_storage_and_accounts_for_all(one):
    model = one.make()
    pointers = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    converted = t5lib.convert(model, inplace=True)
    report, after = converted.t5_report, converted.state_dict()
    assert converted is model and set(report.inherited) == set(pointers) and report.dropped == report.reset == ()
    assert {name: after[name].data_ptr() for name in pointers} == pointers
    assert set(report.new) == set(after) - set(pointers) == set(new_parameters(converted))


@torch.no_grad()
def test_any_size_in_any_sequence(one):
    converted = t5lib.convert(one.make(), NEIGHBORS)
    sizes = [one.inputs(*size) for size in ((8, 12, 2), (12, 8, 3), (6, 6, 1))]
    fresh = [run(copy.deepcopy(converted), inputs) for inputs in sizes]
    for inputs, expected in zip(sizes + sizes[::-1], fresh + fresh[::-1], strict=True):
        assert expected.shape[-2:] == inputs["hidden_states"].shape[-2:]
        assert torch.equal(run(converted, inputs), expected)


def idle(model: nn.Module) -> set[str]:
    """The parameters that a backward pass reached with nothing."""
    return {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}


def test_every_parameter_learns_that_does_in_the_softmax_model_also_with_gradient_checkpointing(one):
    converted, softmax, inputs = t5lib.convert(one.make(), NEIGHBORS).train(), one.make(), one.inputs()
    for model in (converted, softmax):
        run(model, inputs).square().sum().backward()
    assert idle(converted) == idle(softmax)
    plain = {n: p.grad.clone() for n, p in converted.named_parameters() if p.grad is not None}
    converted.zero_grad()
    converted.enable_gradient_checkpointing()
    run(converted, inputs).square().sum().backward()
    for name, parameter in converted.named_parameters():
        if name in plain:
            torch.testing.assert_close(parameter.grad, plain[name], msg=name)


@torch.no_grad()
def test_saved_and_loaded_it_is_the_same_model_also_in_half_precision(kind, tmp_path):
    converted, inputs = t5lib.convert(kind.make().to(torch.bfloat16), NEIGHBORS), kind.inputs()
    # What bfloat16 holds exactly, also divided by 1,000 or times 1,000, as models do it.
    exactly = {"timestep": torch.tensor([500, 250]), "guidance": torch.tensor([4.0, 2.0])}
    inputs |= {name: value for name, value in exactly.items() if name in inputs}
    exact = run(copy.deepcopy(converted).float(), inputs)
    assert ((run(converted, inputs).float() - exact).norm() / exact.norm()).item() < 0.02
    t5lib.save(converted, tmp_path / "ours")
    converted.save_pretrained(tmp_path / "diffusers")
    theirs = type(converted).from_pretrained(tmp_path / "diffusers", torch_dtype=torch.bfloat16)
    for loaded in (t5lib.load(tmp_path / "ours"), theirs):
        assert type(loaded) is type(converted) and bits(loaded) == bits(converted)
        assert loaded.t5_config == converted.t5_config and loaded.t5_report == converted.t5_report
        torch.testing.assert_close(run(loaded, inputs), run(converted, inputs), rtol=1e-2, atol=1e-2)


def test_calibration_and_alignment_bring_it_nearer_to_the_softmax_model(one):
    teacher = one.make()
    model = t5lib.convert(teacher)
    before = bits(teacher)
    fitted = t5lib.calibrate(model, teacher=teacher, batches=one.noised(), config=RECIPE)
    assert list(fitted.error_before) == family_of(teacher).attention_names(teacher)
    assert all(fitted.error_after[name] < 0.9 * error for name, error in fitted.error_before.items())
    recipe = AlignConfig(steps=12, batch_size=4, lr=1e-4, lr_new=3e-3, warmup=0.0)
    report = t5lib.align(model, teacher=teacher, batches=one.noised(), config=recipe)
    assert report.error_after["output"] < report.error_before["output"]
    assert bits(teacher) == before


def test_adapters_are_all_that_alignment_trains_when_it_is_told_so(one):
    teacher = one.make()
    model = t5lib.convert(teacher)
    before = dict(bits(model))
    recipe = AlignConfig(steps=2, batch_size=4, trainable="lora", lora_rank=2)
    t5lib.align(model, teacher=teacher, batches=one.noised(), config=recipe)
    after = dict(bits(model))
    changed = {name for name in before if before[name] != after[name]}
    inside = {f"{name}.{part}" for name, layer in ttt_layers(model).items() for part, _ in layer.named_parameters()}
    assert after.keys() == before.keys() and changed <= inside
    assert changed and all(name.endswith(".weight") and ".mixer." not in name for name in changed)


def test_layers_that_harm_most_are_given_back_to_softmax(one, tmp_path):
    teacher = one.make()
    model = t5lib.convert(teacher, TTTConfig(layers="auto", softmax_layers=1))
    quick = CalibrateConfig(steps=2, batch_size=4, warmup=1, pool=1, reuse=1)
    [back] = t5lib.calibrate(model, teacher=teacher, batches=one.noised(), config=quick).softmax.layers
    assert back not in ttt_layers(model) and type(model.get_submodule(back)) is type(teacher.get_submodule(back))
    t5lib.save(model, tmp_path)
    assert bits(t5lib.load(tmp_path)) == bits(model)


def test_only_sets_of_layers_that_somebody_published_have_a_name(one):
    with pytest.raises(T5Error, match=r"layers 'paper' is unknown.*expected all, auto \(which measures\), indices"):
        t5lib.convert(one.make(), TTTConfig(layers="paper"))


def test_it_is_diagnosed_and_explained(one):
    teacher, inputs = one.make(), one.inputs()
    names = family_of(teacher).attention_names(teacher)
    assert list(t5lib.diagnose(teacher, inputs).layers) == names
    explained = t5lib.explain(teacher, t5lib.convert(teacher), inputs)
    assert list(explained.layers) == names and all(error > 0 for error in explained.layer_error)


@torch.no_grad()
def test_blocks_compile_as_one_graph_each(one):
    converted, inputs = t5lib.convert(one.make(num_layers=1)), one.inputs()
    expected = run(converted, inputs)
    torch._dynamo.reset()
    for block in family_of(converted).blocks(converted):
        block.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(run(converted, inputs), expected)


@torch.no_grad()
def test_a_whole_qwen_image_compiles_as_one_graph_also_after_the_size_changed():
    """Not Flux, which tells its grid by numbers in a tensor (test_flux.py)."""
    kind = KINDS["qwen image"]
    model = t5lib.convert(kind.make(num_layers=1))
    compiled = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled.compile(fullgraph=True, backend="eager")
    for size in ((8, 12), (12, 10), (8, 12)):
        inputs = kind.inputs(*size)
        torch.testing.assert_close(run(compiled, inputs), run(model, inputs))


@torch.no_grad()
def test_made_up_inputs_are_what_it_takes(kind):
    model = kind.make()
    family, size = family_of(model), ExampleSize(16, batch=2, pixels_per_latent=2, text_tokens=5)
    inputs = family.example_inputs(model, size)
    family.check_inputs(model, inputs)
    assert run(model, inputs).shape[0] == 2 and inputs["hidden_states"].shape[-2:] == (8, 8)
    assert family.num_tokens(model, inputs) == 16 + (5 if kind.joint else 0)
    with pytest.raises(T5Error, match="not a multiple of what a patch covers"):
        family.check_resolution(model, ExampleSize(18, pixels_per_latent=2))
