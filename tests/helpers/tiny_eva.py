"""Tiny models of timm's Eva family, one of everything that sets its attentions apart."""

from tiny import tiny_timm
from torch import nn

SEPARATE = {"qkv_fused": False, "attn_type": "rope"}
EVAS = {
    "dinov3": ("vit_small_patch16_dinov3", {}),  # one table, halves turned; class token and four registers
    "dinov3_biases": ("vit_small_patch16_dinov3_qkvb", {}),  # q_bias and v_bias beside qkv
    "eva": ("eva_giant_patch14_224", {}),  # no rotation
    "eva02": ("eva02_tiny_patch14_224", {}),  # channels 2i and 2i + 1 turned
    "eva02_separate": ("eva02_base_patch14_224", {}),  # q_proj, k_proj without bias, v_proj
    "eva02_clip": ("eva02_base_patch16_clip_224", {}),  # a norm before the output projection
    "post_norm": ("eva02_enormous_patch14_clip_224", {"use_rot_pos_emb": True}),
    "perception": ("vit_pe_core_base_patch16_224", {}),  # AttentionRope, pooling by attention
    "no_prefix": ("vit_pe_spatial_gigantic_patch14_448", {}),
    "one_register": ("vit_medium_patch16_rope_reg1_gap_256", {}),
    "mixed": ("vit_small_patch16_rope_mixed_224", {}),  # a table for every layer and head
    "mixed_halves": ("vit_small_patch16_rope_mixed_ape_224", {"attn_type": "eva"}),
    "qk_norm": ("vit_small_patch16_rope_224", {"qk_norm": True}),
    "grouped": ("vit_small_patch16_rope_224", SEPARATE | {"num_kv_heads": 1}),  # two heads share keys and values
    "separate": ("vit_small_patch16_rope_224", SEPARATE | {"qk_norm": True}),
}


def tiny_eva(kind: str = "dinov3", *, seed: int = 0, **changes) -> nn.Module:
    """A model of the family, as `tiny_timm` makes it."""
    name, special = EVAS[kind]
    return tiny_timm(name, seed, **special | changes)
