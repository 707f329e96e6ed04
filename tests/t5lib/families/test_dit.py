"""DiT converts, stays a diffusers model, and can be taken back; checkpoints of its own code compute what they did."""

import copy
import math
import warnings

import numpy as np
import pytest
import released
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding
from tiny_denoisers import CLASSES, dit_batch, tiny_dit
from torch import Tensor, nn

import t5lib
from t5lib.conversion import new_parameters, ttt_layers
from t5lib.families import dit
from t5lib.layers.config import TTTConfig
from t5lib.utils.errors import T5Error
from t5lib.weights import released_dit


def run(model: nn.Module, height: int = 8, width: int = 8) -> Tensor:
    latents = dit_batch(0, size=2)["latents"].repeat(1, 1, 2, 2)[:, :, :height, :width]
    return model(latents.to(model.dtype), torch.tensor([3, 700]), torch.tensor([1, 5]), return_dict=False)[0]


def bits(model: nn.Module) -> list[tuple[str, bytes]]:
    return [(name, tensor.numpy().tobytes()) for name, tensor in model.state_dict().items()]


def test_convert_and_revert_give_the_original_back_bit_for_bit():
    model = tiny_dit()
    before = bits(model), str(model), run(model)
    converted = t5lib.convert(model)
    assert type(converted) is dit.T5DiTTransformer2DModel and not torch.equal(run(converted), run(model))
    assert set(converted.t5_report.new) == set(new_parameters(converted))
    back = t5lib.revert(converted)
    assert type(back) is DiTTransformer2DModel and dict(back.config) == dict(model.config)
    for each in (back, model):
        assert (bits(each), str(each)) == before[:2] and torch.equal(run(each), before[2])
        assert not each.pos_embed._forward_pre_hooks


def test_converting_in_place_shares_every_storage():
    model = tiny_dit()
    pointers = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    converted = t5lib.convert(model, inplace=True)
    after = converted.state_dict()
    assert converted is model and set(converted.t5_report.inherited) == set(pointers)
    assert {name: after[name].data_ptr() for name in pointers} == pointers


@pytest.mark.parametrize("preset", ["t5", "dit5", "lit"])
def test_save_and_load_are_bit_equal(preset, tmp_path):
    converted = t5lib.convert(tiny_dit(), TTTConfig.preset(preset, locality="dwc_qk+nat3", layers=(1,)))
    t5lib.save(converted, tmp_path / "ours")
    converted.save_pretrained(tmp_path / "diffusers")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = dit.T5DiTTransformer2DModel.from_pretrained(tmp_path / "diffusers")
    for loaded in (t5lib.load(tmp_path / "ours"), theirs):
        assert bits(loaded) == bits(converted) and torch.equal(run(loaded), run(converted))
        assert loaded.t5_config == converted.t5_config and loaded.t5_report == converted.t5_report
        assert list(ttt_layers(loaded)) == ["transformer_blocks.1.attn1"]
        assert type(t5lib.revert(loaded)) is DiTTransformer2DModel


def test_what_is_not_converted_stays_bit_equal():
    first = [m.transformer_blocks[0] for m in (tiny_dit(), t5lib.convert(tiny_dit(), TTTConfig(layers=(1,))))]
    x = torch.randn(2, 16, 16)
    outputs = [block(x, timestep=torch.tensor([3, 4]), class_labels=torch.tensor([1, 2])) for block in first]
    assert torch.equal(*outputs)


def test_other_square_latents_work_and_others_are_refused_with_the_reason():
    converted = t5lib.convert(tiny_dit())
    assert run(converted, 12, 12).shape == (2, 8, 12, 12)
    with pytest.raises(T5Error, match=r"a DiT takes square latents only, got 8×12; crop or resize the images"):
        run(converted, 8, 12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timestep": 5000}, r"timestep goes from 5000 to 5000; expected numbers from 0 to what"),
        ({"timestep": -1}, r"timestep goes from -1 to -1"),
        (
            {"class_labels": CLASSES + 1},
            rf"class_labels go from {CLASSES + 1} to {CLASSES + 1}; expected whole numbers, 0 to",
        ),
        ({"class_labels": -1}, "class_labels go from -1 to -1"),
        ({"class_labels": 1.0}, "class_labels go from 1.0 to 1.0"),
    ],
)
def test_steps_and_classes_that_the_model_does_not_know_are_refused(changes, message):
    model = tiny_dit()
    batch = {"hidden_states": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([1]), "class_labels": torch.tensor([0])}
    batch |= {name: torch.tensor([value]) for name, value in changes.items()}
    with pytest.raises(T5Error, match=message):
        t5lib.diagnose(model, batch)


def test_watching_an_attention_tells_what_its_processor_takes_and_gives():
    model, inside, outside = tiny_dit(), {}, {}
    attention = model.transformer_blocks[1].attn1
    handles = dit.ADAPTER.watch(attention, inside, outside, "x")
    run(model)
    q, k, v = dit.ADAPTER.project(attention, inside["x"])
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(outside["x"], expected)
    torch.testing.assert_close(attention.to_out[0](outside["x"]), attention(*inside["x"].tokens))
    assert len(handles) == 3


def test_gradient_checkpointing_and_one_compiled_graph_agree_with_the_plain_model():
    converted = t5lib.convert(tiny_dit(), TTTConfig(locality="dwc_qk+nat3")).train()
    for module in converted.modules():
        if isinstance(module, LabelEmbedding):
            module.eval()  # or it drops labels at random
    run(converted).square().sum().backward()
    plain = {name: parameter.grad.clone() for name, parameter in converted.named_parameters()}
    converted.zero_grad()
    converted.enable_gradient_checkpointing()
    run(converted).square().sum().backward()
    for name, parameter in converted.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], msg=name)
    converted.disable_gradient_checkpointing()
    compiled = torch.compile(copy.deepcopy(converted).eval(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), run(converted.eval()))


def own_state(width: int = 24, side: int = 6, **sizes: int) -> dict[str, Tensor]:
    """Random weights in the naming of DiT's own code, with the positions that it computes."""
    state = released.dit_state(width=width, side=side, rescale=False, **sizes)
    for name in [name for name in state if ".attn.w" in name or "conv2d" in name]:
        del state[name]
    half = np.arange(width // 4, dtype=np.float64) / (width / 4)
    columns, rows = np.meshgrid(np.arange(side), np.arange(side))
    waves = [np.outer(axis.reshape(-1), 1 / 10000**half) for axis in (columns, rows)]
    positions = np.concatenate([f(wave) for wave in waves for f in (np.sin, np.cos)], axis=1)
    return state | {"pos_embed": torch.from_numpy(positions)[None]}


def own_dit(state: dict[str, Tensor], latents: Tensor, steps: Tensor, labels: Tensor, heads: int) -> Tensor:
    """The softmax DiT, written out from its paper; latents (B, C, side, side)."""
    linear, patch = released.linear, state["x_embedder.proj.weight"].shape[-1]
    x = F.conv2d(latents, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=patch)
    side, x = x.shape[-1], x.flatten(2).transpose(1, 2) + state["pos_embed"]
    angles = steps[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    waves = torch.cat([angles.cos(), angles.sin()], dim=1).to(x)
    condition = linear(state, "t_embedder.mlp.2", F.silu(linear(state, "t_embedder.mlp.0", waves)))
    condition = F.silu(condition + state["y_embedder.embedding_table.weight"][labels])
    for block in range(2):
        here = {n[len("blocks.0.") :]: value for n, value in state.items() if n.startswith(f"blocks.{block}.")}
        shift, scale, gate, *rest = linear(here, "adaLN_modulation.1", condition)[:, None].chunk(6, dim=-1)
        q, k, v = linear(here, "attn.qkv", released.modulated(x, shift, scale)).unflatten(-1, (3, heads, -1)).unbind(2)
        weights = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
        mixed = torch.einsum("bhij,bjhd->bihd", weights.softmax(-1), v).flatten(2)
        x = x + gate * linear(here, "attn.proj", mixed)
        x = x + rest[2] * released.mlp(here, released.modulated(x, *rest[:2]), approximate="tanh")
    shift, scale = linear(state, "final_layer.adaLN_modulation.1", condition)[:, None].chunk(2, dim=-1)
    x = linear(state, "final_layer.linear", released.modulated(x, shift, scale))
    x = x.reshape(len(x), side, side, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(len(x), -1, side * patch, side * patch)


def test_a_checkpoint_of_dits_own_code_computes_what_it_did_also_from_a_folder(tmp_path):
    state = own_state()
    torch.save({"ema": state, "model": {n: value + 1 for n, value in state.items()}}, tmp_path / "dit.pt")
    model = released_dit.load(tmp_path / "dit.pt", heads=3)
    latents = torch.randn(2, 4, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    steps, labels = torch.tensor([3, 977]), torch.tensor([4, 5])
    expected = own_dit(state, latents, steps, labels, heads=3)
    t5lib.save(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "diffusers")
    folders = (
        t5lib.load(tmp_path / "ours"),
        dit.T5DiTTransformer2DModel.from_pretrained(tmp_path / "diffusers", torch_dtype=torch.float64),
    )
    back = t5lib.revert(t5lib.convert(model))
    for each in (model, *folders, back):
        found = each(latents, steps, labels, return_dict=False)[0]
        assert ((found - expected).norm() / expected.norm()).item() < 1e-6
    assert type(back) is dit.T5DiTTransformer2DModel and back.t5_config is None
    assert dict(back.config) | {"t5_config": None} == dict(model.config)


@pytest.mark.parametrize(("width", "heads"), [(1152, 16), (384, 6)])
def test_the_heads_of_the_published_sizes_are_known(width, heads, tmp_path):
    torch.save(own_state(width=width, side=2, heads=heads, depth=1), tmp_path / "dit.pt")
    assert released_dit.load(tmp_path / "dit.pt").config.num_attention_heads == heads


def test_checkpoints_that_are_something_else_are_refused(tmp_path):
    file = tmp_path / "dit.pt"
    for state, message in (
        (own_state(), "is 24 wide, and weights do not tell its number of heads; pass heads"),
        ({"head.weight": torch.ones(1)}, r"is not a DiT in the naming of its own code: it has no \['x_embedder"),
    ):
        torch.save(state, file)
        with pytest.raises(T5Error, match=message):
            released_dit.load(file)
    for state, message in (
        (own_state() | {"pos_embed": torch.randn(1, 36, 24)}, "has other positions than sines and cosines"),
        (own_state() | {"blocks.1.attn.w1": torch.ones(3)}, r"unknown \['transformer_blocks.1.attn1.mixer.w1'\]"),
    ):
        torch.save(state, file)
        with pytest.raises(T5Error, match=message):
            released_dit.load(file, heads=3)
