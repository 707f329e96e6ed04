"""Replace softmax attention by TTT layers that inherit every pretrained weight, and give it back."""

import copy
from dataclasses import dataclass

import torch
from torch import nn

from t5lib.families import family_of
from t5lib.layers.attention import TTTLayer
from t5lib.layers.config import TTTConfig
from t5lib.layers.mixers import check_window
from t5lib.utils.errors import T5Error


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What became of every parameter and buffer, by name, and how many numbers that is.

    Attributes:
        layers: the attentions that were replaced.
        inherited: kept unchanged; new: added by the conversion; dropped: in the softmax model only.
        reset: pretrained, but started afresh because TTTConfig.inherit leaves them out.
        numbers: counts of single values under these four names.
    """

    layers: tuple[str, ...]
    inherited: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]
    reset: tuple[str, ...]
    numbers: dict[str, int]


def convert(model: nn.Module, config: TTTConfig | None = None, *, inplace: bool = False) -> nn.Module:
    """Return `model` with linear-cost attention and all its pretrained weights.

    The result keeps the interface of its kind, timm's or diffusers' (where its class becomes a subclass of ours). It
    carries `t5_config` and `t5_report`, a ConversionReport.

    Args:
        model: a timm VisionTransformer whose attention is timm's Attention, or diffusers' SD3Transformer2DModel or
            DiTTransformer2DModel; not changed unless `inplace`, which makes no second copy of the weights.
        config: what the new layers are; the default is the method's (swiglu, instance key norm, dwc_qk, all layers).

    Raises:
        T5Error: a part of the model cannot be converted (named), a layer index does not exist, or a neighborhood is
            larger than the grid of a model whose images have one size.
    """
    config = config or TTTConfig()
    family = family_of(model)
    family.check_convertible(model)
    names = family.attention_names(model)
    kinds = config.of_layers(len(names), family.layer_sets(model))
    chosen = {name: own for name, own in zip(names, kinds, strict=True) if own}
    if fixed := family.fixed_grid(model):
        for own in chosen.values():
            check_window(own, fixed)
    if not inplace:
        model = copy.deepcopy(model)
    before = model.state_dict()
    grid, reset = family.make_grid(model), []
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)  # not torch.manual_seed, which seeds the GPUs too
        for name, own in chosen.items():
            reset += family.reset_left_out(model, name, own.inherit)
            model.set_submodule(name, family.new_layer(model.get_submodule(name), own, grid))
    family.mark(model, config)
    model.t5_report = _account(before, model, list(chosen), list(dict.fromkeys(reset)))
    return model


def revert(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Return the softmax model a converted one stands for; straight after `convert`, bit for bit the original.

    Inherited weights are given back as they are now; what was trained since stays trained. New weights are dropped.

    Raises:
        T5Error: `model` is not converted.
    """
    layers = ttt_layers(model)
    if not layers:
        raise T5Error(f"this {type(model).__name__} holds no TTT layer; nothing to revert")
    family = family_of(model)
    if not inplace:
        model = copy.deepcopy(model)
    for name in layers:
        model.set_submodule(name, family.softmax_attention(model.get_submodule(name)))
    family.remove_grid(model)
    family.unmark(model)
    return model


def new_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that conversion added or started afresh, by name (all others are inherited)."""
    report = getattr(model, "t5_report", None)
    reset = set(report.reset) if report else set()
    return {n: parameter for n, parameter in model.named_parameters() if ".mixer." in f".{n}" or n in reset}


def ttt_layers(model: nn.Module) -> dict[str, TTTLayer]:
    """The TTT layers of `model`, by name, in the order of its modules."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TTTLayer)}


def _account(
    before: dict[str, torch.Tensor], model: nn.Module, layers: list[str], reset: list[str]
) -> ConversionReport:
    """Compare names and storage: an inherited tensor must be the very same one; nothing may go unexplained."""
    after = model.state_dict()
    inherited = [n for n in after if n in before and after[n].data_ptr() == before[n].data_ptr() and n not in reset]
    new = [n for n in after if n not in before and any(n.startswith(f"{layer}.mixer.") for layer in layers)]
    dropped = [n for n in before if n not in after]
    unexplained = sorted(set(after) - {*inherited, *new, *reset}) + dropped
    if unexplained:  # today's layers inherit everything, so a dropped tensor is a mistake too
        raise T5Error(f"conversion lost track of {unexplained}; please report this model")
    names = {"inherited": inherited, "new": new, "dropped": dropped, "reset": reset}
    numbers = {what: sum((after | before)[n].numel() for n in tensors) for what, tensors in names.items()}
    return ConversionReport(
        layers=tuple(layers), **{what: tuple(tensors) for what, tensors in names.items()}, numbers=numbers
    )
