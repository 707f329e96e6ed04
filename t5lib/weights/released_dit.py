"""Checkpoints of DiT's own code, softmax or released DiT5, as diffusers models.

DiT's own code                             diffusers' DiTTransformer2DModel                            i: block
x_embedder.proj.*                          pos_embed.proj.*
pos_embed                                  the buffer pos_embed.pos_embed
t_embedder.mlp.{0,2}.*                     transformer_blocks.i.norm1.emb.timestep_embedder.linear_{1,2}.*, every i
y_embedder.embedding_table.weight          transformer_blocks.i.norm1.emb.class_embedder.embedding_table.weight, every i
blocks.i.adaLN_modulation.1.*              transformer_blocks.i.norm1.linear.*
blocks.i.attn.qkv.*                        transformer_blocks.i.attn1.{to_q,to_k,to_v}.*
blocks.i.attn.proj.*                       transformer_blocks.i.attn1.to_out.0.*
blocks.i.mlp.{fc1,fc2}.*                   transformer_blocks.i.ff.net.{0.proj,2}.*
final_layer.{adaLN_modulation.1,linear}.*  {proj_out_1,proj_out_2}.*
of DiT5 alone:
blocks.i.attn.{w1,w2,…}                    transformer_blocks.i.attn1.mixer.{w1,w2,…}, as for the ViT
blocks.i.attn.qk_{scale,offset}_ttt        transformer_blocks.i.attn1.mixer.{q,k}_{scale,offset}: (1, 1, C, 2), the last
                                           axis is q, then k

diffusers spaces the frequencies of its timestep embedding otherwise than DiT's own code; a model made here has DiT's
own.
Source: the code released with "Linearizing Vision Transformer with Test-Time Training" (arXiv 2605.02772); "Scalable
Diffusion Models with Transformers" (arXiv 2212.09748).
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t5lib.families.dit import T5DiTTransformer2DModel
from t5lib.layers.config import TTTConfig
from t5lib.utils.config import to_dict
from t5lib.utils.errors import T5Error
from t5lib.utils.weights import check_fit
from t5lib.weights.state_dicts import INNER, RELEASED, RELEASED_REMEDY, read

NORM_EPS = 1e-6  # of DiT's own code; diffusers' default is 1e-5
HEADS = {1152: 16, 1024: 16, 768: 12, 384: 6}  # of DiT-XL, -L, -B and -S by width: weights do not tell

# of released names, ours along the last axis
RESCALE = {f"qk_{name}_ttt": (f"q_{name}", f"k_{name}") for name in ("scale", "offset")}

NEEDED = ("pos_embed", "y_embedder.embedding_table.weight", "final_layer.linear.weight")
_NAMES = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_EVERY_BLOCK = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
_BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}


def load(path: Path | str, *, which: str | None = None, heads: int | None = None) -> T5DiTTransformer2DModel:
    """The softmax DiT in a checkpoint of its own code (DiT-XL-2-256x256.pt), in eval mode and the file's precision.

    Args:
        path: a file of torch.save, which is opened without running any code in it, or .safetensors.
        which: "ema" or "model", for a file that holds both; None takes the moving average where there is one.
        heads: of each attention; None knows those of DiT-S, -B, -L and -XL.

    Raises:
        T5Error: not such a file; weights that are missing, unknown or of another shape (named).
    """
    weights, entry = read(path, which)
    source = f"{entry} of {path}" if entry else str(path)
    _check_present(weights, ("x_embedder.proj.weight", *NEEDED), source, "a DiT in the naming of its own code")
    width = weights["x_embedder.proj.weight"].shape[0]
    heads = heads or HEADS.get(width)
    if heads is None or width % heads:
        raise T5Error(f"{source} is {width} wide, and weights do not tell its number of heads; pass heads")
    model, positions = _fill(weights, _describe(weights, source, heads, width // heads), None, source)
    own = model.pos_embed.pos_embed
    if own is None or not torch.allclose(positions, own.to(positions), atol=1e-4):
        raise T5Error(f"{source} has other positions than sines and cosines, which diffusers' DiT cannot hold")
    return model.eval()


def from_released(weights: dict[str, Tensor], config: TTTConfig | None, source: str) -> T5DiTTransformer2DModel:
    """The model whose weights these are, in the released naming; in their precision.

    Args:
        config: of the layers; None for the preset "dit5" with the inner model, convolutions and rescale that the
            weights are of.
        source: what errors call the weights.

    Raises:
        T5Error: weights that are missing, unknown or of another shape (named).
    """
    _check_present(weights, (*NEEDED, "blocks.0.attn.w1"), source, "a released DiT5")
    width, inner = weights["x_embedder.proj.weight"].shape[0], weights["blocks.0.attn.w1"]
    if inner.ndim != 4 or inner.shape[1] * inner.shape[2] != width:
        raise T5Error(f"{source}: attn.w1 is {tuple(inner.shape)}; expected (1, H, D, D) with H·D = {width}")
    arguments = _describe(weights, source, inner.shape[1], inner.shape[2])
    model, positions = _fill(weights, arguments, config or _infer_config(weights), source)
    model.pos_embed.pos_embed = positions.to(model.pos_embed.pos_embed)
    return model


def _fill(
    weights: dict[str, Tensor], arguments: dict[str, Any], config: TTTConfig | None, source: str
) -> tuple[T5DiTTransformer2DModel, Tensor]:
    """The model of `arguments` with these weights, and their position table (1, N, C)."""
    with torch.random.fork_rng(devices=[]):
        model = T5DiTTransformer2DModel(
            **arguments, t5_config=to_dict(config) if config else None, downscale_freq_shift=0
        )
    model = model.type(weights["x_embedder.proj.weight"].dtype)
    ours = to_ours(weights, arguments["num_layers"], arguments["num_attention_heads"])
    positions = ours.pop("pos_embed")
    check_fit(ours, model.state_dict(), f"{source} does not fit the model it describes", RELEASED_REMEDY)
    model.load_state_dict(ours)
    return model, positions


def to_ours(weights: dict[str, Tensor], depth: int, heads: int) -> dict[str, Tensor]:
    """Rename weights to diffusers' names and ours, as described above; "pos_embed" and unknown names stay."""
    ours: dict[str, Tensor] = {}
    for name, value in weights.items():
        module, _, kind = name.rpartition(".")
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if module in _EVERY_BLOCK:
            ours |= {f"transformer_blocks.{i}.{_EVERY_BLOCK[module]}.{kind}": value for i in range(depth)}
        elif block:
            renamed = _in_block(block[2], value, heads)
            ours |= {f"transformer_blocks.{block[1]}.{inside}": part for inside, part in renamed.items()}
        else:
            ours[f"{_NAMES[module]}.{kind}" if module in _NAMES else name] = value
    return ours


def _in_block(name: str, value: Tensor, heads: int) -> dict[str, Tensor]:
    module, _, kind = name.rpartition(".")
    if module in _BLOCK:
        return {f"{_BLOCK[module]}.{kind}": value}
    if module == "attn.qkv":
        return {f"attn1.to_{t}.{kind}": part for t, part in zip("qkv", value.chunk(3), strict=True)}
    new, dot, rest = name.removeprefix("attn.").partition(".")
    if name == f"attn.{new}" and new in RESCALE:
        if value.ndim != 4 or value.shape[:2] != (1, 1) or value.shape[2] % heads or value.shape[3] != 2:
            raise T5Error(f"{name} is {tuple(value.shape)}; expected (1, 1, C, 2), the last axis q, then k")
        parts = zip(RESCALE[new], value.unbind(-1), strict=True)
        return {f"attn1.mixer.{ours}": part.reshape(heads, 1, -1) for ours, part in parts}
    if name.startswith("attn.") and new in RELEASED:
        return {f"attn1.mixer.{RELEASED[new]}{dot}{rest}": value if dot else value.squeeze(0)}
    return {name: value}


def _infer_config(weights: dict[str, Tensor]) -> TTTConfig:
    names = {name.split(".")[3] for name in weights if re.match(r"blocks\.\d+\.attn\.", name)}
    config = TTTConfig.preset("dit5", rescale=bool(names & RESCALE.keys()))
    inner = INNER.get(tuple(sorted(names & {"w1", "w2", "w3"})), config.inner)
    locality = config.locality if "q_conv2d" in names else config.locality.replace("dwc_qk", "none")
    return dataclasses.replace(config, inner=inner, locality=locality)


def _check_present(weights: dict[str, Tensor], needed: tuple[str, ...], source: str, what: str) -> None:
    missing = [name for name in needed if name not in weights]
    if missing:
        raise T5Error(
            f"{source} is not {what}: it has no {missing}; t5lib.load_released reads released DiT5, "
            "t5lib.weights.released_dit.load DiT with softmax"
        )


def _describe(weights: dict[str, Tensor], source: str, heads: int, head_dim: int) -> dict[str, Any]:
    """The arguments of DiTTransformer2DModel."""
    channels, patch = weights["x_embedder.proj.weight"].shape[1:3]
    tokens = weights["pos_embed"].shape[1]
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise T5Error(f"{source}: pos_embed has {tokens} positions; expected a square number")
    return {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "in_channels": channels,
        "out_channels": weights["final_layer.linear.weight"].shape[0] // patch**2,
        "num_layers": 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")),
        "sample_size": side * patch,
        "patch_size": patch,
        "num_embeds_ada_norm": weights["y_embedder.embedding_table.weight"].shape[0] - 1,  # the last row: no class
        "norm_eps": NORM_EPS,
    }
