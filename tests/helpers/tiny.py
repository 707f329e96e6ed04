"""Tiny models of every kind that t5lib converts, each forward pass a few milliseconds."""

import timm
import torch
from torch import nn

# As small as timm lets them be; what makes each kind special (tokens, norms, pooling, layer scale) stays.
SMALL = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 7}
KINDS = {
    "deit": ("deit_tiny_patch16_224", {}),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", {}),
    "augreg": ("vit_tiny_patch16_224", {}),
    "dinov2_registers": ("vit_small_patch14_reg4_dinov2", {}),
    "deit3": ("deit3_small_patch16_224", {}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
    "qk_norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "scale_norm": ("vit_tiny_patch16_224", {"scale_attn_norm": True}),
    "no_qkv_bias": ("vit_tiny_patch16_224", {"qkv_bias": False}),
    "average_pool": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
}


def tiny_vit(kind: str = "augreg", *, seed: int = 0, **changes) -> nn.Module:
    """A model of timm's VisionTransformer family, as `tiny_timm` makes it."""
    name, special = KINDS[kind]
    return tiny_timm(name, seed, **special | changes)


def tiny_timm(name: str, seed: int, **changes) -> nn.Module:
    """A model in eval mode whose every parameter is random, also those that timm starts at zero or one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(name, **(SMALL | changes)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def random_images(count: int = 4, height: int = 32, width: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))
