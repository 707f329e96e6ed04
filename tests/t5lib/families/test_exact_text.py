"""`text: exact` in a whole model of joint attentions, and its refusal where there is no text."""

import copy

import pytest
import torch
from tiny import tiny_vit
from tiny_denoisers import HEADS, TEXT, sd3_batch, sd3_batches, tiny_dit, tiny_sd3
from torch import Tensor, nn

import t5lib
from t5lib.conversion import new_parameters, ttt_layers
from t5lib.layers.config import TTTConfig
from t5lib.training.calibration import CalibrateConfig
from t5lib.training.objectives import RectifiedFlow, noised_batch, noised_inputs
from t5lib.utils.errors import T5Error

EXACT = TTTConfig(text="exact")
JOINT = [f"transformer_blocks.{index}.attn" for index in range(3)]


def run(model: nn.Module, height: int = 8, width: int = 12) -> Tensor:
    inputs = noised_batch(sd3_batch(0, 2, height, width), RectifiedFlow(), 0)
    given = {name: t.to(model.dtype) if name != "timestep" else t for name, t in inputs.items()}
    return model(**given, return_dict=False)[0]


def test_attentions_of_the_image_alone_are_what_they_are_without():
    exact, linear = (t5lib.convert(tiny_sd3(), TTTConfig(text=text)) for text in ("exact", "linear"))
    assert [name for name, layer in ttt_layers(exact).items() if layer.mixer.config.text == "exact"] == JOINT
    more = set(new_parameters(exact)) - set(new_parameters(linear))
    assert more == {f"{name}.mixer.text_weight" for name in JOINT}
    assert exact.t5_report.numbers["new"] == linear.t5_report.numbers["new"] + 3 * HEADS
    assert not torch.allclose(run(exact), run(linear))


def test_in_a_layer_map_it_holds_for_every_joint_attention():
    model = t5lib.convert(tiny_sd3(), TTTConfig(text="exact", layers={"0": "t5+", "1": "graft-conv", "3": "swiglu"}))
    mixers = {name: layer.mixer.config for name, layer in ttt_layers(model).items()}
    assert {name: own.text for name, own in mixers.items()} == {
        JOINT[0]: "exact",
        JOINT[1]: "exact",
        "transformer_blocks.0.attn2": "linear",
    }


def test_the_text_keeps_the_attention_that_it_had():
    softmax = tiny_sd3()
    converted = t5lib.convert(softmax, TTTConfig(text="exact", layers=(0,)))
    texts = []
    for model in (softmax, converted):
        model.transformer_blocks[0].attn.register_forward_hook(lambda _module, _args, out: texts.append(out[1]))
        run(model)
    torch.testing.assert_close(texts[1], texts[0])


def test_every_new_parameter_learns_and_checkpointing_gives_equal_gradients():
    model = t5lib.convert(tiny_sd3(), EXACT).train()
    run(model).square().sum().backward()
    plain = {name: p.grad.clone() for name, p in new_parameters(model).items()}
    assert all(gradient.any() for gradient in plain.values())
    model.zero_grad()
    model.enable_gradient_checkpointing()
    run(model).square().sum().backward()
    for name, parameter in new_parameters(model).items():
        torch.testing.assert_close(parameter.grad, plain[name], msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_it_is_the_same_model(dtype, tmp_path):
    model = t5lib.convert(tiny_sd3().to(dtype), EXACT)
    t5lib.save(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "diffusers")
    for loaded in (t5lib.load(tmp_path / "ours"), type(model).from_pretrained(tmp_path / "diffusers").to(dtype)):
        assert loaded.t5_config == EXACT and torch.equal(run(loaded), run(model))


@torch.no_grad()
def test_it_compiles_as_one_graph_also_after_the_size_changed():
    model = t5lib.convert(tiny_sd3(num_layers=2, dual_attention_layers=(0,)), EXACT)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    for height, width in ((8, 12), (12, 10)):
        torch.testing.assert_close(run(compiled, height, width), run(model, height, width))


def test_calibration_fits_it_and_begins_nearer_because_the_text_is_exact():
    teacher, reports = tiny_sd3(), {}
    recipe = CalibrateConfig(steps=30, batch_size=4, warmup=2, pool=2, reuse=2)
    for text in ("linear", "exact"):
        model = t5lib.convert(teacher, TTTConfig(text=text))
        start = {name: parameter.clone() for name, parameter in new_parameters(model).items()}
        batches = noised_inputs(sd3_batches, RectifiedFlow(), 0)
        reports[text] = t5lib.calibrate(model, teacher=teacher, batches=batches, config=recipe)
        assert [name for name, p in new_parameters(model).items() if torch.equal(p, start[name])] == []
    exact, linear = reports["exact"], reports["linear"]
    assert all(exact.error_after[name] < before for name, before in exact.error_before.items())
    assert all(exact.error_before[name] < linear.error_before[name] for name in JOINT)
    patches = 16
    for name in JOINT[:2]:  # text adds nothing to the error; the last one drops it
        assert exact.error_before[name] < linear.error_before[name] * patches / (patches + TEXT)


def test_it_is_refused_where_no_attention_sees_text():
    config = TTTConfig(text="exact")
    for model in (tiny_vit(), tiny_dit()):
        with pytest.raises(T5Error, match="text is 'exact', but none of the attentions to convert sees text"):
            t5lib.convert(model, config)
    with pytest.raises(T5Error, match=r"sees text \(transformer_blocks\.0\.attn2 …\)"):
        t5lib.convert(tiny_sd3(), TTTConfig(text="exact", layers=(3,)))
    with pytest.raises(T5Error, match="text 'exakt' is unknown; expected one of linear, exact"):
        TTTConfig(text="exakt")


def test_there_is_no_one_map_to_fit():
    teacher = tiny_sd3()
    model = t5lib.convert(teacher, TTTConfig.preset("hedgehog", text="exact"))
    recipe = CalibrateConfig(steps=1, batch_size=2, objective="attention")
    batches = noised_inputs(sd3_batches, RectifiedFlow(), 0)
    with pytest.raises(T5Error, match="with text 'exact' there are two; use objective 'output'"):
        t5lib.calibrate(model, teacher=teacher, batches=batches, config=recipe)
