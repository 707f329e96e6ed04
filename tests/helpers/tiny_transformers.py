"""Tiny models of transformers of every kind that t5lib converts, one of everything that sets their attentions apart."""

import torch
import transformers
from torch import nn

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SMALL |= {"image_size": 32, "patch_size": 8}
TEXT = {"vocab_size": 20, "max_position_embeddings": 8, "projection_dim": 16, "bos_token_id": 0, "eos_token_id": 1}
DUAL = {"vision_config": SMALL, "text_config": {**SMALL, **TEXT, "pad_token_id": 1}}
DEPTH = {"backbone_config": {"model_type": "dinov2", **SMALL, "reshape_hidden_states": False}, "patch_size": 8}
DEPTH["backbone_config"]["out_features"] = ["stage1", "stage2"]
DEPTH |= {"reassemble_hidden_size": 32, "reassemble_factors": [1, 0.5], "neck_hidden_sizes": [8, 8]}
DEPTH |= {"fusion_hidden_size": 8, "head_hidden_size": 8, "depth_estimation_type": "metric"}

# The class, and what its configuration is told; labels where it is a classifier.
KINDS = {
    "vit": ("ViTModel", {}),
    "vit_classifier": ("ViTForImageClassification", {"num_labels": 7}),
    "vit_pretraining": ("ViTForMaskedImageModeling", {"encoder_stride": 8}),
    "deit": ("DeiTForImageClassificationWithTeacher", {"num_labels": 7}),  # a class and a distillation token
    "dinov2": ("Dinov2Model", {}),
    "dinov2_classifier": ("Dinov2ForImageClassification", {"num_labels": 7}),
    "dinov2_backbone": ("Dinov2Backbone", {"out_features": ["stage1", "stage2"]}),
    "dinov2_registers": ("Dinov2WithRegistersModel", {"num_register_tokens": 3}),
    "dinov2_swiglu": ("Dinov2Model", {"use_swiglu_ffn": True}),
    "dinov3": ("DINOv3ViTModel", {"num_register_tokens": 4}),  # rotary positions; keys without bias
    "dinov3_backbone": ("DINOv3ViTBackbone", {"use_gated_mlp": True}),
    "siglip": ("SiglipVisionModel", {}),  # no prefix; pooling by attention
    "siglip_classifier": ("SiglipForImageClassification", {**DUAL, "num_labels": 7}),
    "siglip_dual": ("SiglipModel", DUAL),
    "clip": ("CLIPVisionModel", {}),
    "clip_projection": ("CLIPVisionModelWithProjection", {"projection_dim": 16}),
    "clip_classifier": ("CLIPForImageClassification", {**DUAL, "projection_dim": 16, "num_labels": 7}),
    "clip_dual": ("CLIPModel", {**DUAL, "projection_dim": 16}),
    "metaclip2": ("MetaClip2VisionModelWithProjection", {"projection_dim": 16}),
    "msn": ("ViTMSNModel", {}),
    "ijepa": ("IJepaModel", {}),  # no prefix, and positions for the patches alone
    "mae": ("ViTMAEModel", {"mask_ratio": 0.0}),
    "depth_anything": ("DepthAnythingForDepthEstimation", DEPTH),
}


def tiny_transformer(kind: str = "vit_classifier", *, seed: int = 0, **changes) -> nn.Module:
    """A model in eval mode whose every parameter is random, also those that transformers starts at zero or one."""
    name, special = KINDS[kind]
    config = getattr(transformers, name).config_class
    own = {} if "vision_config" in special or kind == "depth_anything" else SMALL
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, name)(config(**own | special | changes)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model
