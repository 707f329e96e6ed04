"""Why a model is of no family that can be converted, in a sentence that ends with what to do instead."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

CONVERTIBLE = (
    ". ViTs of timm and transformers convert (ViT, DeiT, DINOv2, DINOv3, SigLIP, CLIP, EVA02 …), and SD3, DiT, Flux, "
    "PixArt and Qwen-Image of diffusers; docs/models.md names all"
)
ROTARY = "it rotates queries and keys by their positions (rotary embedding) in a way that t5lib does not know yet"
PACKING = "it packs images of several sizes into one sequence and masks what pads it, and a TTT layer takes no mask"
NAFLEX = "it packs images of several sizes into one sequence and masks what pads it (NaFlex); a TTT layer takes no mask"
WINDOWS = "it attends within windows, whose cost is linear already"
RELATIVE = "it adds a bias of relative positions to the softmax map, and a TTT layer has no such map"
WINDOWED = (
    "it attends within windows in most blocks, whose cost is linear already, and adds a bias of relative positions to "
    "all its softmax maps, which a TTT layer has no counterpart for"
)
POOLING = "it pools tokens on the way, so that attention has fewer keys than queries or another grid in every stage"
LINEAR = "its attention is linear already"
PARALLEL = "it computes attention and MLP from one projection or in parallel, where a TTT layer does not fit"
CROSS = "it attends to text in separate attentions, which t5lib supports only for PixArt so far"
DIFFERENCE = "it subtracts one softmax map from another, which a TTT layer has no counterpart for"
HEADS = "it mixes the softmax maps of its heads, which a TTT layer has no counterpart for"
SCALES = "it attends to tokens of two scales, and a TTT layer has one grid"
HYBRID = "it is a convolutional network with attention of its own kind in a few stages, where tokens are few"
CHANNELS = "its attention weighs channels and mixes no tokens"
LATENTS = "it attends from a few latents to the image, whose cost is linear already"
VIDEO = "its tokens lie in time too, and a TTT layer needs a grid of rows and columns"
SOUND = "its tokens are not an image, and a TTT layer needs a grid of rows and columns"
MULTIHEAD = "its attention is torch's MultiheadAttention, which t5lib does not take apart yet"
UNKNOWN = "t5lib does not know yet where its attentions are, or what they are given besides tokens"
OTHER = "its attention is not softmax over the tokens of an image"
NONE = "it has no attention"

PLAIN = "take a plain transformer for the task, such as ViT, DeiT, DINOv2, DINOv3, SigLIP or EVA02"
REMEDIES = {
    ROTARY: "take a family whose rotation it knows, such as DINOv3 or EVA02",
    PACKING: "call the model with images of one size",
    NAFLEX: "a SigLIP 2 of fixed size, such as google/siglip2-base-patch16-224, is a SiglipModel and converts",
    WINDOWS: f"a conversion would gain little: keep it, or {PLAIN}",
    LINEAR: f"a conversion would gain little: keep it, or {PLAIN}",
    HYBRID: f"a conversion would gain little: keep it, or {PLAIN}",
    MULTIHEAD: "take the model from timm, which has open_clip's weights, too (vit_base_patch16_clip_224.openai)",
    UNKNOWN: "docs/adapter.md says how a family of models is added",
    CHANNELS: "there is nothing to convert",
    NONE: "there is nothing to convert",
}

# Beginnings of the names of classes, of models and of attentions; the first that fits counts.
REASONS = {
    **dict.fromkeys(("EvaAttention", "AttentionRope", "Gemma4Vit"), ROTARY),
    **dict.fromkeys(("Flux", "HunyuanDiT", "Lumina", "QwenImage", "Wan"), ROTARY),
    "Siglip2": NAFLEX,
    **dict.fromkeys(("SamModel", "SamVision", "SamHQ"), WINDOWED),
    "Sam": WINDOWS,
    "Perceiver": LATENTS,
    **dict.fromkeys(("Vivit", "VideoMAE", "VideoPrism", "Timesformer", "VJEPA"), VIDEO),
    **dict.fromkeys(("Swin", "VisionTransformerSAM", "MaxxVit", "DaVit", "Twins", "Nest", "WindowAttention"), WINDOWS),
    **dict.fromkeys(("GlobalContextVit", "Hiera", "TinyVit", "EfficientVitMsra", "VOLO"), WINDOWS),
    **dict.fromkeys(("VisionTransformerRelPos", "RelPosAttention", "Beit", "Data2VecVision", "ConVit"), RELATIVE),
    **dict.fromkeys(("MultiScaleVit", "PoolingVision", "PyramidVision", "Levit", "NextViT"), POOLING),
    **dict.fromkeys(("Pvt", "Segformer"), POOLING),
    **dict.fromkeys(("Xcit", "EfficientVit", "Sana", "MobileVitV2", "CoaT", "SwiftFormer", "EdgeNeXt"), LINEAR),
    **dict.fromkeys(("Parallel", "DiffParallel"), PARALLEL),
    **dict.fromkeys(("UNet", "Transformer2DModel"), CROSS),
    **dict.fromkeys(("CrossVit", "TNT"), SCALES),
    **dict.fromkeys(("ByobNet", "CPUBone", "CSATv2", "EfficientFormer", "FastVit", "LowFormer"), HYBRID),
    **dict.fromkeys(("IFormer", "MetaFormer", "MobileNetV", "Visformer"), HYBRID),
    **dict.fromkeys(("ResNet", "NormFreeNet", "CspNe", "VovNet", "EfficientNet", "SplitAttn"), CHANNELS),
    "DiffAttention": DIFFERENCE,
    **dict.fromkeys(("Cait", "TalkingHead"), HEADS),
}


ENDINGS = {"3DModel": VIDEO, "1DModel": SOUND, "AudioDiTModel": SOUND}
KNOWN = tuple(dict.fromkeys((*REASONS.values(), *ENDINGS.values(), PACKING, MULTIHEAD, UNKNOWN, OTHER, NONE)))


def attends(model: nn.Module) -> bool:
    """Whether a part of it is an attention, by its class's name or its own."""
    names = (f"{name.rpartition('.')[2]} {type(part).__name__}".lower() for name, part in model.named_modules())
    return any("attn" in name or "attention" in name for name in names)


def reason(kind: str, otherwise: str = OTHER) -> str:
    """Why the model or attention of the class called `kind` is not converted."""
    by_ending = next((why for end, why in ENDINGS.items() if kind.endswith(end)), otherwise)
    return next((why for start, why in REASONS.items() if kind.startswith(start)), by_ending)


def advice(kind: str) -> str:
    """The reason, and what to do instead."""
    return with_remedy(reason(kind))


def with_remedy(why: str) -> str:
    return f"{why}; {REMEDIES.get(why, PLAIN)}"


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
            return f"{kind} wraps a {type(part).__name__}; pass that instead: {where}"
    otherwise = UNKNOWN if type(model).__module__.startswith(("transformers.", "diffusers.")) else OTHER
    if any(isinstance(part, nn.MultiheadAttention) for part in model.modules()):
        otherwise = MULTIHEAD
    why = with_remedy(reason(kind, otherwise) if attends(model) else NONE)
    return f"{kind} cannot be converted: {why}{CONVERTIBLE}"


def _no_module(model: Any) -> str:
    if isinstance(model, str):
        return f"expected a model, got the text {model!r:.60}; make it first: timm.create_model(NAME, pretrained=True)"
    if isinstance(model, Mapping):
        return "expected a model, got weights by name; load them into one first: model.load_state_dict(weights)"
    if isinstance(getattr(model, "transformer", None), nn.Module):
        return f"expected a model, got a {type(model).__name__}; call t5lib.convert_pipeline(pipe) instead"
    return f"expected a model, got a {type(model).__name__}; pass a torch.nn.Module"
