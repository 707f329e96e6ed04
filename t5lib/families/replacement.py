"""Attentions out, new layers in: the part of a conversion that is the same for every family, with its account."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from t5lib.families.base import Adapter
from t5lib.families.refusals import RELATIVE
from t5lib.layers.config import TTTConfig
from t5lib.layers.mixers import check_window
from t5lib.utils.config import from_dict
from t5lib.utils.errors import T5Error


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What became of every parameter and buffer, by name, and how many numbers that is.

    Attributes:
        layers: the attentions that were replaced.
        inherited: kept unchanged; new: added by the conversion.
        dropped: of no effect any more, the position biases that TTTConfig.drop_position_bias leaves out. They stay in
            the model, without gradients, for who reverts it.
        reset: pretrained, but started afresh because TTTConfig.inherit leaves them out.
        numbers: counts of single values under these four names.
    """

    layers: tuple[str, ...]
    inherited: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]
    reset: tuple[str, ...]
    numbers: dict[str, int]


def without_layers(adapter: Adapter, report: ConversionReport, model: nn.Module, layers: list[str]) -> ConversionReport:
    """The report of a conversion that leaves `layers` out, from one that does not; `model` has them no more."""
    tensors = model.state_dict()
    kept = tuple(name for name in report.layers if name not in layers)
    dropped = tuple(_idle(adapter, model, list(kept)))
    own = tuple(f"{name}." for name in layers)
    reset = tuple(name for name in report.reset if not name.startswith(own))
    old = {*report.inherited, *report.reset, *report.dropped} - {*reset, *dropped}
    parts = {
        "inherited": tuple(name for name in tensors if name in old),
        "new": tuple(name for name in report.new if name in tensors),
        "dropped": dropped,
        "reset": reset,
    }
    numbers = {what: sum(tensors[name].numel() for name in names) for what, names in parts.items()}
    return ConversionReport(layers=kept, **parts, numbers=numbers)


def chosen_layers(adapter: Adapter, model: nn.Module, config: TTTConfig) -> dict[str, TTTConfig]:
    """The attentions that `config` converts, by name, and what each becomes.

    Raises:
        T5Error: a part of the model cannot be converted (named), a layer index does not exist, or a neighborhood is
            larger than the grid of a model whose images have one size, or text is to be exact where there is none.
    """
    adapter.check_convertible(model)
    names = adapter.attention_names(model)
    check_untied(model)
    for name in names:
        _check_plain(adapter, model.get_submodule(name), name)
    kinds = config.of_layers(len(names), adapter.layer_sets(model))
    chosen = {name: own for name, own in zip(names, kinds, strict=True) if own}
    _check_position_bias(adapter, model, config, list(chosen))
    if fixed := adapter.fixed_grid(model):
        for own in chosen.values():
            check_window(own.locality, own.window, fixed)
    return _with_text_where_it_is(adapter, model, chosen)


def _check_position_bias(adapter: Adapter, model: nn.Module, config: TTTConfig, chosen: list[str]) -> None:
    """Raises T5Error when an attention has a position bias that is not to be dropped, or none has one that is."""
    biased = [name for name in chosen if adapter.position_bias(model, name)]
    if biased and not config.drop_position_bias:
        raise T5Error(
            f"{biased[0]}: {RELATIVE}; leave it out by TTTConfig(drop_position_bias=True), and calibration makes up "
            "for it"
        )
    if config.drop_position_bias and not biased:
        raise T5Error(
            f"drop_position_bias is on, but none of the attentions of this {type(model).__name__} has a position bias; "
            "leave it out"
        )


def _with_text_where_it_is(adapter: Adapter, model: nn.Module, chosen: dict[str, TTTConfig]) -> dict[str, TTTConfig]:
    """`chosen`, with `text: exact` for those alone that see text, the others have no use for its weights.

    Raises:
        T5Error: none of them does.
    """
    exact = [name for name, own in chosen.items() if own.text == "exact"]
    without = [name for name in exact if not adapter.sees_text(model.get_submodule(name))]
    if exact and len(without) == len(exact):
        raise T5Error(
            f"text is 'exact', but none of the attentions to convert sees text ({', '.join(exact[:3])} …); leave it at "
            "'linear', or convert joint attentions"
        )
    return chosen | {name: dataclasses.replace(chosen[name], text="linear") for name in without}


def check_untied(model: nn.Module) -> None:
    """Raises T5Error naming parameters of `model` that are one under several names."""
    names: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = names.setdefault(parameter, name)
        if other != name:
            raise T5Error(
                f"{other} and {name} are one parameter (tied); every layer is converted and saved by itself, so give "
                "each its own first: model.set_submodule(NAME, copy.deepcopy(model.get_submodule(NAME)))"
            )


def _check_plain(adapter: Adapter, attention: nn.Module, name: str) -> None:
    """Raises T5Error when the attention's weights are quantized, or its forward is not that of its class."""
    weight = getattr(adapter.projections(attention)[0], "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        kind = type(adapter.projections(attention)[0]).__name__
        raise T5Error(f"the projections of {name} are quantized ({kind}); convert the model first, then quantize it")
    if "forward" in vars(attention):
        raise T5Error(
            f"{name} has a forward of its own in place of its class's, which a conversion would lose; take the "
            f"patch off first: del model.{name}.forward"
        )


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Let `new`, which takes the place of `old` and is called as it was, call the hooks of `old`."""
    for name, value in vars(old).items():
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            setattr(new, name, value)


def replace_attentions(adapter: Adapter, model: nn.Module, config: TTTConfig, chosen: dict[str, TTTConfig]) -> None:
    """Put a new layer in the place of every attention of `chosen`, in place; the model then carries its report."""
    before, reset = model.state_dict(), []
    idle = _idle(adapter, model, list(chosen))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)  # not torch.manual_seed, which seeds the GPUs too
        for name, own in chosen.items():
            reset += adapter.reset_left_out(model, name, own.inherit)
            attention = model.get_submodule(name)
            layer = adapter.new_layer(model, attention, own)
            carry_hooks(attention, layer)
            model.set_submodule(name, layer)
    adapter.carry_grid(model)
    adapter.mark(model, config)
    for name in idle:
        model.get_parameter(name).requires_grad_(False)
    model.t5_report = _account(before, model, list(chosen), list(dict.fromkeys(reset)), idle)


def _idle(adapter: Adapter, model: nn.Module, chosen: list[str]) -> list[str]:
    """The parameters that nothing uses once the attentions `chosen` are replaced."""
    used = {name: set(adapter.position_bias(model, name)) for name in adapter.attention_names(model)}
    still = set().union(*(names for attention, names in used.items() if attention not in chosen))
    return sorted(set().union(*used.values()) - still)


def convert_as_told(adapter: Adapter, model: nn.Module, told: dict[str, Any]) -> None:
    """Convert a model that its library is making, as the entry t5_config of its config.json says."""
    config = from_dict(TTTConfig, told, "config.json: t5_config")
    replace_attentions(adapter, model, config, chosen_layers(adapter, model, config))


@contextmanager
def restarted(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The part `name` of `model` with fresh tensors, to be filled within, in the place of those that it had.

    They are filled on the CPU, so that a conversion is repeatable anywhere, and then moved to where the old ones are.
    """
    part = model.get_submodule(name)
    place = next(part.parameters()).device
    start = place if place.type == "meta" else torch.device("cpu")
    for module in part.modules():
        for parameter, value in list(module.named_parameters(recurse=False)):
            setattr(module, parameter, nn.Parameter(torch.empty_like(value, device=start)))
    yield part
    part.to(place)


def _account(
    before: dict[str, Tensor], model: nn.Module, layers: list[str], reset: list[str], dropped: list[str]
) -> ConversionReport:
    """Compare names and storage: an old tensor must be the very same one; nothing may go unexplained."""
    after = model.state_dict()
    same = [n for n in after if n in before and after[n].data_ptr() == before[n].data_ptr() and n not in reset]
    inherited = [name for name in same if name not in dropped]
    new = [n for n in after if n not in before and any(n.startswith(f"{layer}.mixer.") for layer in layers)]
    unexplained = sorted(set(after) - {*same, *new, *reset}) + [name for name in before if name not in after]
    if unexplained:
        raise T5Error(
            f"conversion lost track of {', '.join(unexplained)}: every old weight keeps its name and its tensor, and "
            "new ones are under 'mixer.'; please report this model, or fix the new layer if it is yours"
        )
    names = {"inherited": inherited, "new": new, "dropped": dropped, "reset": reset}
    numbers = {what: sum(after[n].numel() for n in tensors) for what, tensors in names.items()}
    return ConversionReport(
        layers=tuple(layers), **{what: tuple(tensors) for what, tensors in names.items()}, numbers=numbers
    )
