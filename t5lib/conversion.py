"""Replace softmax attention by TTT layers that inherit every pretrained weight, and give it back."""

import copy

from torch import nn

from t5lib.families import family_of
from t5lib.families.replacement import carry_hooks, chosen_layers, replace_attentions
from t5lib.layers.attention import TTTLayer
from t5lib.layers.config import TTTConfig
from t5lib.utils.config import checked
from t5lib.utils.errors import T5Error


def convert(model: nn.Module, config: TTTConfig | str | None = None, *, inplace: bool = False) -> nn.Module:
    """Return `model` with linear-cost attention and all its pretrained weights.

    The result keeps the interface of its kind, timm's, transformers' or diffusers' (where its class becomes a subclass
    of ours). It carries `t5_config` and `t5_report`, a ConversionReport (t5lib.families.replacement).

    Args:
        model: of a family that converts (docs/models.md lists them): a model of timm, one of transformers that is or
            holds a vision tower such as ViT, DINOv3, SigLIP or CLIP, or a transformer of diffusers. It is not changed
            unless `inplace`, which makes no second copy of the weights.
        config: what the new layers are, or the name of a preset such as "t5+"; the default is the method's (swiglu,
            instance key norm, dwc_qk, all layers).

    Raises:
        T5Error: a part of the model cannot be converted (named), a layer index does not exist, or a neighborhood is
            larger than the grid of a model whose images have one size, or text is to be exact where there is none; or
            attentions have a position bias that the config does not drop.
    """
    adapter = family_of(model)
    config = TTTConfig.preset(config) if isinstance(config, str) else checked(config, TTTConfig)
    chosen = chosen_layers(adapter, model, config)
    if not inplace:
        model = copy.deepcopy(model)
    replace_attentions(adapter, model, config, chosen)
    return model


def revert(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Return the softmax model a converted one stands for; straight after `convert`, bit for bit the original.

    Inherited weights are given back as they are now; what was trained since stays trained. New weights are dropped.

    Raises:
        T5Error: `model` is not converted, or several processes share its passes.
    """
    layers = ttt_layers(model)
    if not layers:
        raise T5Error(f"this {type(model).__name__} holds no TTT layer; nothing to revert")
    if hasattr(model, "t5_splits"):
        raise T5Error(f"several processes share the passes of this {type(model).__name__}; load it again, then revert")
    adapter = family_of(model)
    if not inplace:
        model = copy.deepcopy(model)
    for name in layers:
        layer = model.get_submodule(name)
        attention = adapter.softmax_attention(layer)
        carry_hooks(layer, attention)
        model.set_submodule(name, attention)
    for name in model.t5_report.dropped:
        model.get_parameter(name).requires_grad_(True)
    adapter.drop_grid(model)
    adapter.unmark(model)
    return model


def new_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that conversion added or started afresh, by name (all others are inherited)."""
    report = getattr(model, "t5_report", None)
    reset = set(report.reset) if report else set()
    return {n: parameter for n, parameter in model.named_parameters() if ".mixer." in f".{n}" or n in reset}


def ttt_layers(model: nn.Module) -> dict[str, TTTLayer]:
    """The TTT layers of `model`, by name, in the order of its modules."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TTTLayer)}
