"""Tiny models of timm that hold their patch embedding or blocks elsewhere than a ViT does: NaFlexVit, encoders of
multimodal models alone and in classifiers."""

from tiny import tiny_timm
from torch import nn

ROTARY = {"attn_type": "rope", "rope_type": "axial"}
ENCODERS = {
    "naflex": ("naflexvit_base_patch16_gap", {}),
    "naflex_map": ("naflexvit_so150m2_patch16_reg1_map", {}),  # registers, pooling by attention
    "naflex_rotary": ("naflexvit_base_patch16_gap", ROTARY),
    "naflex_mixed": ("naflexvit_base_patch16_gap", ROTARY | {"rope_type": "mixed", "class_token": True}),
    "qwen3": ("qwen3_vit_88m", {}),
    "qwen3_merge": ("qwen3_vit_88m_merge", {}),
    "deepseek": ("deepseek_vit_412m", {}),
}


def tiny_encoder(kind: str = "naflex", *, seed: int = 0, **changes) -> nn.Module:
    """A model as `tiny_timm` makes it, with two blocks; it takes images of any size."""
    name, special = ENCODERS[kind]
    return tiny_timm(name, seed, **special | changes)
