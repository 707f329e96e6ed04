"""Converted models under names of their own in timm: timm.create_model("t5_deit_tiny_patch16_224").

    import t5lib.weights.timm_registry    # registers them, as timm's own model files do

`t5_X` is timm's X with the preset "t5" (swiglu, instance key norm, dwc_qk), `t5_X+` with "t5+" (half 5×5 neighborhood
attention). They take what timm's VisionTransformer takes, and weights of these models, of the released code
(t5lib.weights.released_vit) and of `t5lib.save`.
"""

from collections.abc import Callable
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from t5lib.conversion import convert
from t5lib.layers.config import TTTConfig
from t5lib.utils.errors import T5Error
from t5lib.weights.released_vit import to_ours

_VIT = {"patch_size": 16, "depth": 12}
_CFG = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "fixed_input_size": True,
    "pool_size": None,
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "first_conv": "patch_embed.proj",
    "classifier": "head",
    "paper_ids": "arXiv:2605.02772",
}
# timm's architecture -> (its VisionTransformer's arguments, preprocessing and head): as in timm's deit.py and
# vision_transformer.py
BASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "deit_tiny_patch16_224": (_VIT | {"embed_dim": 192, "num_heads": 3}, _CFG),
    "deit_small_patch16_224": (_VIT | {"embed_dim": 384, "num_heads": 6}, _CFG),
    "vit_small_patch14_dinov2": (
        _VIT | {"patch_size": 14, "embed_dim": 384, "num_heads": 6, "init_values": 1e-5},
        _CFG | {"num_classes": 0, "input_size": (3, 518, 518), "crop_pct": 1.0},
    ),
}
NAMES = {f"t5_{base}{mark}": (base, f"t5{mark}") for base in BASES for mark in ("", "+")}

# timm's register_model looks here
default_cfgs = generate_default_cfgs({name: BASES[base][1] for name, (base, _) in NAMES.items()})


def build(name: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
    """The model `name` of NAMES, or its features with features_only=True; timm.create_model calls this.

    Raises:
        T5Error: weights that do not fit (named), or are those of a softmax model.
    """
    base, preset = NAMES[name]
    strict = arguments.get("pretrained_strict", True)
    return build_model_with_cfg(
        lambda **own: _converted(preset, own),
        name,
        pretrained,
        pretrained_filter_fn=lambda weights, model: _adapt(weights, model, strict=strict),
        feature_cfg={"out_indices": arguments.pop("out_indices", 3), "feature_cls": "getter"},
        **BASES[base][0] | arguments,
    )


def _entrypoint(name: str) -> Callable[..., Any]:
    def entrypoint(pretrained: bool = False, **arguments: Any):
        return build(name, pretrained, **arguments)

    base, preset = NAMES[name]
    entrypoint.__name__ = entrypoint.__qualname__ = name  # what timm registers it under
    entrypoint.__doc__ = f"timm's {base} with TTTConfig.preset({preset!r})."
    return entrypoint


def _converted(preset: str, arguments: dict[str, Any]) -> nn.Module:
    return convert(VisionTransformer(**arguments), TTTConfig.preset(preset), inplace=True)


def _adapt(weights: dict[str, Tensor], model: Any, *, strict: bool) -> dict[str, Tensor]:
    """Weights in our or the released naming for `model`, resized to its image and patch size by timm."""
    weights = to_ours(checkpoint_filter_fn(weights, model, adapt_layer_scale=True))
    if not any(".attn.mixer." in name for name in weights):
        raise T5Error(
            "these are the weights of a softmax model; expected those of a converted one. Convert it: "
            f"t5lib.convert(timm.create_model({NAMES[model.pretrained_cfg['architecture']][0]!r}, pretrained=True))"
        )
    if strict:
        _check_names(set(weights), set(model.state_dict()))
    return weights


def _check_names(present: set[str], expected: set[str]) -> None:
    """timm tells of names that do not fit in a log only, once the number of classes differs; the head is its own."""
    head = {"head.weight", "head.bias"}
    missing, unknown = sorted(expected - present - head), sorted(present - expected - head)
    if missing or unknown:
        raise T5Error(f"weights do not fit the model: missing {missing[:6]}, unknown {unknown[:6]}")


for _name in NAMES:
    globals()[_name] = register_model(_entrypoint(_name))
