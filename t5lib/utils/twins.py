"""Two models with the same weights: whether they compute the same, part by part."""

import dataclasses
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from t5lib.utils.config import shown

if TYPE_CHECKING:
    from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# Modes, ways to compute the same, and accounts of where a model came from.
OF_NO_MATTER = {"training", "fused_attn", "grad_checkpointing", "gradient_checkpointing"}
OF_NO_MATTER |= {"pretrained_cfg", "default_cfg", "feature_info", "t5_report"}
OF_NO_MATTER |= {"transformers_version", "architectures", "name_or_path"}
KEEPING = "transformers.utils.output_capturing"  # the module of hooks that keep what passes and change nothing
_NONE = object()


def differences(model: "nn.Module", twin: "nn.Module") -> list[str]:
    """Why `model` would compute something else than `twin` with the same weights, a phrase each.

    Compared are the classes of all parts, their plain values (eps, approximate, …), methods that an object has in the
    place of its class's, and hooks of the forward pass.
    """
    ours, theirs = (dict(each.named_modules(remove_duplicate=False)) for each in (model, twin))
    found = [f"{name} is missing" for name in theirs if name not in ours]
    for name, part in ours.items():
        found += _of_part(name, part, theirs[name]) if name in theirs else [f"{name} was added"]
    return found


def _of_part(name: str, part: "nn.Module", twin: "nn.Module") -> Iterator[str]:
    where = name or "the model"
    if type(part) is not type(twin):
        yield f"{where} is a {type(part).__name__}, not a {type(twin).__name__}"
        return
    for kind in HOOKS:
        known = list(getattr(twin, kind).values())
        added = [hook for hook in getattr(part, kind).values() if hook not in known and hook.__module__ != KEEPING]
        yield from (f"{where} calls a hook ({getattr(hook, '__qualname__', type(hook).__name__)})" for hook in added)
    for key, value in vars(part).items():
        if inspect.isroutine(getattr(type(part), key, None)):
            yield f"{where} has a {key} of its own in place of its class's"
        elif not key.startswith("_"):
            yield from _of_values(f"{name}.{key}".lstrip("."), value, vars(twin).get(key, _NONE))


def _of_values(name: str, value: Any, other: Any) -> Iterator[str]:
    if other is _NONE or name.rpartition(".")[2] in OF_NO_MATTER:
        return
    if dataclasses.is_dataclass(value) and type(value) is type(other):
        value, other = vars(value), vars(other)
    if isinstance(value, dict) and isinstance(other, dict):
        for key in value:
            if not str(key).startswith("_"):
                yield from _of_values(f"{name}.{key}", value[key], other.get(key, _NONE))
    elif _comparable(value) != _comparable(other):
        yield f"{name} is {shown(value)}, not {shown(other)}"


def _comparable(value: Any) -> Any:
    """Objects of libraries, which may not tell whether they are equal, by their class alone."""
    if inspect.isroutine(value) or inspect.isclass(value):
        return value.__module__, value.__qualname__
    if isinstance(value, list):  # JSON makes lists of tuples
        return tuple(value)
    return value if isinstance(value, str | int | float | tuple | None) else type(value)
