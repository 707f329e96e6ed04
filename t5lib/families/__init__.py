"""Model families: an Adapter each (t5lib.families.base), found by the class of a model or by the family's name."""

from importlib import import_module

from torch import nn

from t5lib.families.base import Adapter
from t5lib.utils.errors import T5Error

# Looked up by name, so that nothing is imported that the model at hand does not need.
_CLASSES = {
    ("timm", "VisionTransformer"): "timm_vit",
    ("diffusers", "SD3Transformer2DModel"): "sd3",
    ("diffusers", "DiTTransformer2DModel"): "dit",
}


def family_of(model: nn.Module) -> Adapter:
    """The adapter of the family that `model` is of.

    Raises:
        T5Error: it is of no family that can be converted.
    """
    for base in type(model).__mro__:
        name = _CLASSES.get((base.__module__.partition(".")[0], base.__name__))
        if name:
            return adapter(name)
    raise T5Error(
        f"{type(model).__name__} is not a timm VisionTransformer (ViT, DeiT, AugReg, DINOv2, DeiT III, SigLIP …), nor "
        "diffusers' SD3Transformer2DModel or DiTTransformer2DModel; only these can be converted so far"
    )


def adapter(name: str) -> Adapter:
    """The adapter of the family called `name`. Raises T5Error when there is none."""
    if name not in _CLASSES.values():
        raise T5Error(f"unknown model family '{name}'; known: {', '.join(_CLASSES.values())}. Is this t5lib too old?")
    return import_module(f"t5lib.families.{name}").ADAPTER
