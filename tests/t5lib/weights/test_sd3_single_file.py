"""One file of Stable Diffusion 3.5, as its authors name weights, becomes diffusers' model, offline and whole."""

import re

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("diffusers", reason="SD3 is diffusers'")

from tiny_denoisers import tiny_sd3

import t5lib
from t5lib.utils.errors import T5Error
from t5lib.weights import sd3_single_file

OUTSIDE = {
    "pos_embed.proj": "x_embedder.proj",
    "pos_embed.pos_embed": "pos_embed",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
IN_BLOCK = {
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
STACKED = {"attn.to_{}": "x_block.attn", "attn.add_{}_proj": "context_block.attn", "attn2.to_{}": "x_block.attn2"}


def published(model, prefix="model.diffusion_model."):
    """The weights as the authors name them."""
    theirs, state = {}, model.state_dict()
    last = f"transformer_blocks.{model.config.num_layers - 1}.norm1_context.linear"
    for name, value in state.items():
        module, _, kind = name.rpartition(".")
        block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module)
        if module in ("norm_out.linear", last):  # scale and shift are in the other order
            value = torch.cat(value.chunk(2)[::-1])
        if name == "pos_embed.pos_embed":
            theirs["pos_embed"] = value
        elif not block:
            theirs[f"{OUTSIDE[module]}.{kind}"] = value
        elif block[2] in IN_BLOCK:
            theirs[f"joint_blocks.{block[1]}.{IN_BLOCK[block[2]]}.{kind}"] = value
        else:
            for ours, stacked in STACKED.items():
                if block[2] == ours.format("q"):
                    parts = [state[f"transformer_blocks.{block[1]}.{ours.format(t)}.{kind}"] for t in "qkv"]
                    theirs[f"joint_blocks.{block[1]}.{stacked}.qkv.{kind}"] = torch.cat(parts)
    return {prefix + name: value.contiguous() for name, value in theirs.items()}


@pytest.mark.parametrize("kind", ["medium", "large"])
def test_the_file_of_the_authors_becomes_the_very_model_of_diffusers(kind, tmp_path):
    model = tiny_sd3(dual_attention_layers=(0, 1) if kind == "medium" else ()).bfloat16()
    others = {"first_stage_model.decoder.weight": torch.ones(2)}
    save_file(published(model) | others, tmp_path / "sd3.5.safetensors")
    loaded = sd3_single_file.load(tmp_path / "sd3.5.safetensors")
    ours = loaded.state_dict()
    assert ours.keys() == model.state_dict().keys() and not loaded.training
    assert all(torch.equal(value, ours[name]) for name, value in model.state_dict().items())
    for name in (
        "patch_size",
        "num_attention_heads",
        "attention_head_dim",
        "pos_embed_max_size",
        "dual_attention_layers",
    ):
        assert loaded.config[name] == model.config[name]
    assert t5lib.convert(loaded, t5lib.TTTConfig(layers="paper")).t5_report.layers


def test_another_file_a_missing_weight_and_an_unknown_one_are_named(tmp_path):
    weights = published(tiny_sd3(), prefix="")
    file = tmp_path / "sd3.safetensors"
    for change, message in (
        (lambda w: w.pop("pos_embed"), r"is not Stable Diffusion 3 in one file: it has no \['pos_embed'\]"),
        (lambda w: w.pop("joint_blocks.1.x_block.mlp.fc1.bias"), r"lacks 'joint_blocks\.1\.x_block\.mlp\.fc1\.bias'"),
        (lambda w: w.update({"more.weight": torch.ones(1)}), r"unknown \['more\.weight'\]"),
    ):
        changed = dict(weights)
        change(changed)
        save_file(changed, file)
        with pytest.raises(T5Error, match=message):
            sd3_single_file.load(file)
