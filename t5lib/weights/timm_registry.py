"""Converted models under names of their own in timm: timm.create_model("t5_deit_tiny_patch16_224").

`t5_X` is timm's X with the preset "t5" (swiglu, instance key norm, dwc_qk), `t5_X+` with "t5+" (half 5×5 neighborhood
attention). They take what timm's VisionTransformer takes, and weights of timm_plugin's models, of the released code
(t5lib.weights.released_vit) and of `t5lib.save`.

`import t5lib` installs this: names are registered at once where timm is imported already, otherwise when it will be,
so that neither import needs the other. This module itself imports neither torch nor timm.
"""

import sys
import threading
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

REGISTRY = "timm.models._registry"  # the first part of timm.models that is needed here; it imports nothing heavy

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

default_cfgs: dict[str, Any] = {}  # timm's register_model looks here
_lock = threading.Lock()


def install() -> None:
    """Register NAMES with timm, now or as soon as it is imported. Doing it again does no harm.

    The order of the two steps matters where another thread is importing timm: whatever it has not begun to import is
    met by the finder, and whatever it has is waited for.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    if "timm.models" in sys.modules:
        register(import_module(REGISTRY))


def register(registry: ModuleType) -> None:
    """Enter NAMES into timm's model registry. `registry`: the module timm.models._registry."""
    with _lock:
        if all(registry.is_model(name) for name in NAMES):
            return
        default_cfgs.update(registry.generate_default_cfgs({name: BASES[base][1] for name, (base, _) in NAMES.items()}))
        for name in NAMES:
            globals()[name] = registry.register_model(_entrypoint(name))


def build(name: str, pretrained: bool = False, **arguments: Any):
    """The model `name` of NAMES, or its features with features_only=True; timm.create_model calls this.

    Raises:
        T5Error: weights that do not fit (named), or are those of a softmax model.
    """
    from timm.models import build_model_with_cfg

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


def _converted(preset: str, arguments: dict[str, Any]):
    from timm.models.vision_transformer import VisionTransformer

    from t5lib.conversion import convert
    from t5lib.layers.config import TTTConfig

    return convert(VisionTransformer(**arguments), TTTConfig.preset(preset), inplace=True)


def _adapt(weights: dict[str, Any], model: Any, *, strict: bool) -> dict[str, Any]:
    """Weights in our or the released naming for `model`, resized to its image and patch size by timm."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    from t5lib.utils.errors import T5Error
    from t5lib.weights.released_vit import to_ours

    weights = to_ours(checkpoint_filter_fn(weights, model, adapt_layer_scale=True))
    if not any(".attn.mixer." in name for name in weights):
        raise T5Error(
            "these are the weights of a softmax model; expected those of a converted one. Convert it: "
            f"t5lib.convert(timm.create_model({NAMES[model.pretrained_cfg['architecture']][0]!r}, pretrained=True))"
        )
    if strict:
        _check_names(set(weights), set(model.state_dict()))
    return weights


def _check_names(found: set[str], expected: set[str]) -> None:
    """timm tells of names that do not fit in a log only, once the number of classes differs; the head is its own."""
    from t5lib.utils.errors import T5Error

    head = {"head.weight", "head.bias"}
    missing, unknown = sorted(expected - found - head), sorted(found - expected - head)
    if missing or unknown:
        raise T5Error(f"weights do not fit the model: missing {missing[:6]}, unknown {unknown[:6]}")


class _Finder:
    """Waits in sys.meta_path for REGISTRY, lets the others find it, and registers once it is there."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != REGISTRY:
            return None
        others = (finder for finder in list(sys.meta_path) if not isinstance(finder, _Finder))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            self._follow(spec.loader)
        return spec

    @staticmethod
    def _follow(loader: Any) -> None:
        """Let `loader`, which is of this one module, register when it has run it."""
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            loader.exec_module = run
            run(module)
            register(module)

        loader.exec_module = exec_module
