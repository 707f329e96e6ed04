"""Replace softmax attention by TTT layers that inherit every pretrained weight, and give it back."""

import copy
from dataclasses import dataclass

import torch
from torch import nn

from t5lib.layers.attention import TTTAttention
from t5lib.layers.settings import T5Config
from t5lib.errors import T5Error
from t5lib.families import timm_vit


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What became of every parameter and buffer, by name, and how many numbers that is.

    Attributes:
        layers: the attentions that were replaced.
        inherited: kept unchanged; new: added by the conversion; dropped: in the softmax model only.
        numbers: {"inherited": int, "new": int, "dropped": int}, counts of single values.
    """

    layers: tuple[str, ...]
    inherited: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]
    numbers: dict[str, int]


def convert(model: nn.Module, config: T5Config | None = None, *, inplace: bool = False) -> nn.Module:
    """Return `model` with linear-cost attention and all its pretrained weights.

    The result keeps timm's interface. It carries `t5_config` and `t5_report`, a ConversionReport.

    Args:
        model: a timm VisionTransformer whose attention is timm's Attention; not changed unless `inplace`.
        config: what the new layers are; the default is the method's (swiglu, instance key norm, dwc_qk, all layers).

    Raises:
        T5Error: a part of the model cannot be converted (named), or a layer index does not exist.
    """
    config = config or T5Config()
    timm_vit.check_convertible(model)
    names = timm_vit.attention_names(model)
    chosen = _chosen(names, config.layers)
    if not inplace:
        model = copy.deepcopy(model)
    before = model.state_dict()
    grid = timm_vit.make_grid(model)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)  # not torch.manual_seed, which seeds the GPUs too
        for name in chosen:
            model.set_submodule(name, TTTAttention(model.get_submodule(name), config, grid))
    model.t5_config = config
    model.t5_report = _account(before, model, chosen)
    return model


def revert(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Return the softmax model a converted one stands for; straight after `convert`, bit for bit the original.

    Inherited weights are given back as they are now; what was trained since stays trained. New weights are dropped.

    Raises:
        T5Error: `model` is not converted.
    """
    layers = [name for name, module in model.named_modules() if isinstance(module, TTTAttention)]
    if not layers:
        raise T5Error(f"this {type(model).__name__} holds no TTT layer; nothing to revert")
    if not inplace:
        model = copy.deepcopy(model)
    for name in layers:
        model.set_submodule(name, timm_vit.softmax_attention(model.get_submodule(name)))
    timm_vit.remove_grid(model)
    del model.t5_config, model.t5_report
    return model


def new_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters conversion added, by name (all others are inherited)."""
    return {name: parameter for name, parameter in model.named_parameters() if ".mixer." in f".{name}"}


def ttt_layers(model: nn.Module) -> dict[str, TTTAttention]:
    """The TTT layers of `model`, by name, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TTTAttention)}


def _chosen(names: list[str], layers: tuple[int, ...] | None) -> list[str]:
    if layers is None:
        return names
    wrong = [index for index in layers if not 0 <= index < len(names)]
    if wrong or not layers or len(set(layers)) != len(layers):
        raise T5Error(f"layers {list(layers)}: expected different indices from 0 to {len(names) - 1}, at least one")
    return [names[index] for index in sorted(layers)]


def _account(before: dict[str, torch.Tensor], model: nn.Module, layers: list[str]) -> ConversionReport:
    """Compare names and storage: a pretrained tensor must be the very same one; nothing may go unexplained."""
    after = model.state_dict()
    inherited = [n for n in after if n in before and after[n].data_ptr() == before[n].data_ptr()]
    new = [n for n in after if n not in before and any(n.startswith(f"{layer}.mixer.") for layer in layers)]
    dropped = [n for n in before if n not in after]
    unexplained = sorted(set(after) - set(inherited) - set(new)) + dropped
    if unexplained:  # today's layers inherit everything, so a dropped tensor is a mistake too
        raise T5Error(f"conversion lost track of {unexplained}; please report this model")
    numbers = {
        "inherited": sum(after[n].numel() for n in inherited),
        "new": sum(after[n].numel() for n in new),
        "dropped": sum(before[n].numel() for n in dropped),
    }
    return ConversionReport(
        layers=tuple(layers), inherited=tuple(inherited), new=tuple(new), dropped=tuple(dropped), numbers=numbers
    )
