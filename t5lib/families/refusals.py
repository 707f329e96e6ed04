"""Why a model is of no family that can be converted, in a sentence that ends with what to do instead."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

CONVERTIBLE = (
    "a timm VisionTransformer (ViT, DeiT, AugReg, DINOv2, DeiT III, SigLIP …) or Eva (DINOv3, Perception Encoder, "
    "EVA02, RoPE-ViT …), nor transformers' ViT, DeiT, DINOv2, DINOv3, SigLIP, CLIP, ViTMAE or Depth Anything, nor "
    "diffusers' SD3Transformer2DModel, DiTTransformer2DModel, FluxTransformer2DModel, PixArtTransformer2DModel or "
    "QwenImageTransformer2DModel"
)
ROTARY = (
    "it rotates queries and keys by their positions (rotary embedding), which is supported in timm's Eva family, "
    "transformers' DINOv3 and diffusers' Flux.1 and Qwen-Image alone so far"
)
PACKING = "it packs images of several sizes into one sequence and masks what pads it, and a TTT layer takes no mask"
NAFLEX = (
    "it packs images of several sizes into one sequence and masks what pads it (NaFlex), and a TTT layer takes no "
    "mask; a SigLIP 2 of fixed size, such as google/siglip2-base-patch16-224, is a SiglipModel and converts"
)
WINDOWS = "it attends within windows, whose cost is linear already"
RELATIVE = "it adds a bias of relative positions to the softmax map, and a TTT layer has no such map"
WINDOWED = (
    "it attends within windows in most blocks, whose cost is linear already, and adds a bias of relative positions to "
    "all its softmax maps, which a TTT layer has no counterpart for"
)
POOLING = "it pools tokens on the way, so that attention has fewer keys than queries or another grid in every stage"
LINEAR = "its attention is linear already"
PARALLEL = "it computes attention and MLP from one projection or in parallel, where a TTT layer has no place"
CROSS = "it attends to text in attentions of their own beside those over the image, which only PixArt may so far"
DIFFERENCE = "it subtracts one softmax map from another, which a TTT layer has no counterpart for"
LATENTS = "it attends from a few latents to the image, whose cost is linear already"
VIDEO = "its tokens lie in time too, and a TTT layer needs a grid of rows and columns"
UNKNOWN = "t5lib does not know yet where its attentions are, or what they are given besides tokens"
OTHER = "it is another attention than softmax over the tokens of an image"

# Beginnings of the names of classes, of models and of attentions.
REASONS = {
    **dict.fromkeys(("EvaAttention", "AttentionRope", "Qwen3Vit", "DeepseekVit"), ROTARY),
    **dict.fromkeys(("Flux", "HunyuanDiT", "Lumina", "QwenImage", "Wan"), ROTARY),
    "NaFlexVit": PACKING,
    "Siglip2": NAFLEX,
    **dict.fromkeys(("SamModel", "SamVision", "SamHQ"), WINDOWED),
    "Sam": WINDOWS,
    "Perceiver": LATENTS,
    **dict.fromkeys(("Vivit", "VideoMAE", "VideoPrism", "Timesformer", "VJEPA"), VIDEO),
    **dict.fromkeys(("Swin", "VisionTransformerSAM", "MaxxVit", "DaVit", "Twins", "Nest", "WindowAttention"), WINDOWS),
    **dict.fromkeys(("VisionTransformerRelPos", "RelPosAttention", "Beit", "Data2VecVision", "Levit"), RELATIVE),
    **dict.fromkeys(("MultiScaleVit", "PoolingVision", "PyramidVision", "Hiera", "Pvt", "Segformer"), POOLING),
    **dict.fromkeys(("Xcit", "EfficientVit", "Sana", "MobileVitV2"), LINEAR),
    **dict.fromkeys(("Parallel", "DiffParallel"), PARALLEL),
    **dict.fromkeys(("UNet", "Transformer2DModel"), CROSS),
    "DiffAttention": DIFFERENCE,
}


def reason(kind: str, otherwise: str = OTHER) -> str:
    """Why the model or attention of the class called `kind` is not converted."""
    return next((why for start, why in REASONS.items() if kind.startswith(start)), otherwise)


def of_model(model: Any, convertible: Callable[[nn.Module], bool]) -> str:
    """Why `model` is refused. `convertible`: whether a part of it is of a known family."""
    if not isinstance(model, nn.Module):
        return _no_module(model)
    kind = type(model).__name__
    if hasattr(model, "merge_and_unload"):
        return f"{kind} holds adapters; merge them first: model = model.merge_and_unload()"
    for name, part in model.named_modules():
        if convertible(part):
            where = f"model.{name}" if name.replace(".", "").isidentifier() else f"model.get_submodule({name!r})"
            return f"{kind} wraps a {type(part).__name__}; pass that: {where}"
    attends = any(name in type(part).__name__ for part in model.modules() for name in ("Attn", "Attention"))
    otherwise = UNKNOWN if type(model).__module__.startswith("transformers.") else OTHER
    why = reason(kind, otherwise) if attends else "it has no attention"
    return f"{kind} is not {CONVERTIBLE}: {why}; only these can be converted so far"


def _no_module(model: Any) -> str:
    if isinstance(model, str):
        return f"expected a model, got the text {model!r:.60}; make it first: timm.create_model(NAME, pretrained=True)"
    if isinstance(model, Mapping):
        return "expected a model, got weights by name; load them into one first: model.load_state_dict(weights)"
    if isinstance(getattr(model, "transformer", None), nn.Module):
        return f"expected a model, got a {type(model).__name__}; call t5lib.convert_pipeline(pipe) instead"
    return f"expected a model, got a {type(model).__name__}; pass a torch.nn.Module"
