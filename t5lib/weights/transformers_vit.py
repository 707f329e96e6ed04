"""Vision transformers in the naming of transformers, as state dicts for their twins in timm.

transformers (ViT, DeiT, DINOv2, DINOv3, SigLIP), before its version 5 and since  timm                  i: block
embeddings.{cls_token,distillation_token,position_embeddings}                 {cls_token,dist_token,pos_embed}
embeddings.{mask_token,register_tokens}                                       DINOv2's own names, which timm knows
embeddings.{patch_embeddings.projection,patch_embedding}.*                    patch_embed.proj.*
{encoder.layer,encoder.layers,layers}.i.…{query,key,value} or {q,k,v}_proj    blocks.i.attn.qkv, stacked
….i.{attention.output.dense,attention.o_proj,self_attn.out_proj}              blocks.i.attn.proj
….i.{layernorm_before,layernorm_after}, {norm1,norm2}, {layer_norm1,2}        blocks.i.{norm1,norm2}
….i.{intermediate.dense,output.dense}, mlp.{fc1,fc2}                          blocks.i.mlp.{fc1,fc2}
….i.layer_scale{1,2}.lambda1                                                  blocks.i.ls{1,2}.gamma
{layernorm,post_layernorm}.*, {classifier,cls_classifier}.*                   norm.*, head.*
head.{probe,attention,layernorm,mlp} of SigLIP                                attn_pool.{latent,q and kv,norm,mlp}

DINOv3's become the names of Meta's own files, which timm knows.

What a classifier does not use, poolers and towers for text, is left out.
"""

import re

import torch
from torch import Tensor

_BLOCK = re.compile(r"(?:encoder\.layers?|layers|layer)\.(\d+)\.(.+)\.(weight|bias|lambda1)")
_PROJECTION = re.compile(r"(?:attention\.attention|attention|self_attn)\.(query|key|value|[qkv]_proj)")
_IN_BLOCK = {
    **dict.fromkeys(("attention.output.dense", "attention.o_proj", "self_attn.out_proj"), "attn.proj"),
    **dict.fromkeys(("layernorm_before", "layer_norm1", "norm1"), "norm1"),
    **dict.fromkeys(("layernorm_after", "layer_norm2", "norm2"), "norm2"),
    **dict.fromkeys(("intermediate.dense", "mlp.fc1"), "mlp.fc1"),
    **dict.fromkeys(("output.dense", "mlp.fc2"), "mlp.fc2"),
    "layer_scale1": "ls1",
    "layer_scale2": "ls2",
    "mlp.weights_in": "mlp.w12",
    "mlp.weights_out": "mlp.w3",
    "mlp.gate_proj": "mlp.w1",
    "mlp.up_proj": "mlp.w2",
    "mlp.down_proj": "mlp.w3",
}
_WITHOUT_GATE = {"mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2"}
_DINOV3 = "embeddings.patch_embeddings.weight"  # those of other models are in a module `projection`
_OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.distillation_token": "dist_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.position_embedding.weight": "pos_embed",
    "head.probe": "attn_pool.latent",
}
_MODULES = {
    **dict.fromkeys(("embeddings.patch_embeddings.projection", "embeddings.patch_embedding"), "patch_embed.proj"),
    "embeddings.patch_embeddings": "patch_embed.proj",
    **dict.fromkeys(("layernorm", "post_layernorm"), "norm"),
    **dict.fromkeys(("classifier", "cls_classifier"), "head"),
    "distillation_classifier": "head_dist",
    "head.attention.out_proj": "attn_pool.proj",
    "head.layernorm": "attn_pool.norm",
    "head.mlp.fc1": "attn_pool.mlp.fc1",
    "head.mlp.fc2": "attn_pool.mlp.fc2",
}
_TOWERS = ("vision_model.", "vit.", "deit.", "dinov2.", "dinov2_with_registers.", "model.")
_UNUSED = ("pooler.", "text_model.", "logit_scale", "logit_bias")


def is_theirs(weights: dict[str, Tensor]) -> bool:
    """Whether these are names of transformers."""
    return any(re.search(r"(^|\.)embeddings\.patch_embedding", name) for name in weights)


def to_timm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights to timm's names, as described above; tensors are shared but for q, k and v. Unknown names stay."""
    ours: dict[str, Tensor] = {}
    stacked: dict[str, dict[str, Tensor]] = {}
    in_block = _IN_BLOCK if any(".gate_proj." in name for name in weights) else _IN_BLOCK | _WITHOUT_GATE
    for name, value in weights.items():
        bare = name
        for tower in _TOWERS:
            bare = bare.removeprefix(tower)
        if name.startswith(_UNUSED) or bare.startswith(_UNUSED):
            continue
        block = _BLOCK.fullmatch(bare)
        projection = block and _PROJECTION.fullmatch(block[2])
        if block and projection:
            stacked.setdefault(f"blocks.{block[1]}.attn.qkv.{block[3]}", {})[projection[1][0]] = value
        elif block:
            kind = "gamma" if block[3] == "lambda1" else block[3]
            ours[f"blocks.{block[1]}.{in_block.get(block[2], block[2])}.{kind}"] = value
        else:
            ours |= _outside(bare, value)
    for parts in stacked.values():
        if parts.keys() == {"q", "v"}:  # DINOv3's keys have no bias
            parts["k"] = torch.zeros_like(parts["q"])
    ours |= {name: torch.cat([parts[t] for t in "qkv"]) for name, parts in stacked.items() if len(parts) == 3}
    if _DINOV3 in weights and "register_tokens" in ours:
        ours["storage_tokens"] = ours.pop("register_tokens")
    return ours


def _outside(name: str, value: Tensor) -> dict[str, Tensor]:
    module, _, kind = name.rpartition(".")
    if name in _OUTSIDE:
        return {_OUTSIDE[name]: value if value.ndim == 3 or "position" not in name else value.unsqueeze(0)}
    if name.startswith("head.attention.in_proj_"):
        width, kind = len(value) // 3, name.removeprefix("head.attention.in_proj_")
        return {f"attn_pool.q.{kind}": value[:width], f"attn_pool.kv.{kind}": value[width:]}
    return {f"{_MODULES[module]}.{kind}" if module in _MODULES else name: value}
