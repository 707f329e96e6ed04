"""Model families: an Adapter each (t5lib.families.base), found by the class of a model or by the family's name."""

from importlib import import_module

from torch import nn

from t5lib.families import refusals
from t5lib.families.base import Adapter
from t5lib.utils.errors import T5Error
from t5lib.utils.extras import extras_named

# Looked up by name, so that nothing is imported that the model at hand does not need.
_CLASSES = {
    ("timm", "VisionTransformer"): "timm_vit",
    ("timm", "Eva"): "timm_eva",
    ("timm", "NaFlexVit"): "timm_naflex",
    ("timm", "Qwen3VitEncoder"): "timm_encoders",
    ("timm", "Qwen3VitClassifier"): "timm_encoders",
    ("timm", "DeepseekVitEncoder"): "timm_encoders",
    ("timm", "DeepseekVitClassifier"): "timm_encoders",
    ("timm", "Beit"): "timm_relative",
    ("timm", "VisionTransformerRelPos"): "timm_relative",
    ("diffusers", "SD3Transformer2DModel"): "sd3",
    ("diffusers", "DiTTransformer2DModel"): "dit",
    ("diffusers", "FluxTransformer2DModel"): "flux",
    ("diffusers", "PixArtTransformer2DModel"): "pixart",
    ("diffusers", "QwenImageTransformer2DModel"): "qwen_image",
    ("transformers", "ViTPreTrainedModel"): "transformers_vit",
    ("transformers", "DeiTPreTrainedModel"): "transformers_vit",
    ("transformers", "ViTMSNPreTrainedModel"): "transformers_vit",
    ("transformers", "ViTMAEPreTrainedModel"): "transformers_vit",
    ("transformers", "IJepaPreTrainedModel"): "transformers_vit",
    ("transformers", "Dinov2PreTrainedModel"): "transformers_vit",
    ("transformers", "Dinov2WithRegistersPreTrainedModel"): "transformers_vit",
    ("transformers", "DINOv3ViTPreTrainedModel"): "transformers_vit",
    ("transformers", "SiglipPreTrainedModel"): "transformers_vit",
    ("transformers", "CLIPPreTrainedModel"): "transformers_vit",
    ("transformers", "MetaClip2PreTrainedModel"): "transformers_vit",
    ("transformers", "DepthAnythingPreTrainedModel"): "transformers_vit",
}


def family_of(model: nn.Module) -> Adapter:
    """The adapter of the family that `model` is of.

    Raises:
        T5Error: it is of no family that can be converted.
    """
    if name := _family_name(model):
        return adapter(name)
    raise T5Error(refusals.of_model(model, lambda part: bool(_family_name(part))))


def _family_name(model: nn.Module) -> str | None:
    names = (_CLASSES.get((base.__module__.partition(".")[0], base.__name__)) for base in type(model).__mro__)
    return next(filter(None, names), None)


def adapter(name: str) -> Adapter:
    """The adapter of the family called `name`. Raises T5Error when there is none, or its library is not installed."""
    if name not in _CLASSES.values():
        raise T5Error(f"unknown model family '{name}'; known: {', '.join(_CLASSES.values())}. Is this t5lib too old?")
    with extras_named():
        return import_module(f"t5lib.families.{name}").ADAPTER
