"""Attentions out, new layers in: the part of a conversion that is the same for every family, with its account."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from t5lib.families.base import Adapter
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


def chosen_layers(adapter: Adapter, model: nn.Module, config: TTTConfig) -> dict[str, TTTConfig]:
    """The attentions that `config` converts, by name, and what each becomes.

    Raises:
        T5Error: a part of the model cannot be converted (named), a layer index does not exist, or a neighborhood is
            larger than the grid of a model whose images have one size.
    """
    adapter.check_convertible(model)
    names = adapter.attention_names(model)
    kinds = config.of_layers(len(names), adapter.layer_sets(model))
    chosen = {name: own for name, own in zip(names, kinds, strict=True) if own}
    if fixed := adapter.fixed_grid(model):
        for own in chosen.values():
            check_window(own, fixed)
    return chosen


def replace_attentions(adapter: Adapter, model: nn.Module, config: TTTConfig, chosen: dict[str, TTTConfig]) -> None:
    """Put a new layer in the place of every attention of `chosen`, in place; the model then carries its report."""
    before, reset = model.state_dict(), []
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)  # not torch.manual_seed, which seeds the GPUs too
        for name, own in chosen.items():
            reset += adapter.reset_left_out(model, name, own.inherit)
            model.set_submodule(name, adapter.new_layer(model, model.get_submodule(name), own))
    adapter.carry_grid(model)
    adapter.mark(model, config)
    model.t5_report = _account(before, model, list(chosen), list(dict.fromkeys(reset)))


def _account(before: dict[str, Tensor], model: nn.Module, layers: list[str], reset: list[str]) -> ConversionReport:
    """Compare names and storage: an inherited tensor must be the very same one; nothing may go unexplained."""
    after = model.state_dict()
    inherited = [n for n in after if n in before and after[n].data_ptr() == before[n].data_ptr() and n not in reset]
    new = [n for n in after if n not in before and any(n.startswith(f"{layer}.mixer.") for layer in layers)]
    dropped = [n for n in before if n not in after]
    unexplained = sorted(set(after) - {*inherited, *new, *reset}) + dropped
    if unexplained:  # today's layers inherit everything, so a dropped tensor is a mistake too
        raise T5Error(
            f"conversion lost track of {', '.join(unexplained)}: every old weight keeps its name and its tensor, and "
            "new ones are under 'mixer.'; please report this model, or mend the new layer if it is yours"
        )
    names = {"inherited": inherited, "new": new, "dropped": dropped, "reset": reset}
    numbers = {what: sum((after | before)[n].numel() for n in tensors) for what, tensors in names.items()}
    return ConversionReport(
        layers=tuple(layers), **{what: tuple(tensors) for what, tensors in names.items()}, numbers=numbers
    )
