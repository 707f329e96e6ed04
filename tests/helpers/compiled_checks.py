"""What torch.compile looks into in every call of a compiled model: what costs a small model its time."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch._dynamo.eval_frame import _debug_get_cache_entry_list


def looked_into(block: nn.Module, kind: type[nn.Module]) -> list[str]:
    """Names of what torch.compile looks into in every call, within the parts of `kind` in a compiled block.

    It passes over a module at a glance if all that was read of it in a forward is plain values, parameters and modules
    of the same sort; it looks into everything else.

    Raises:
        AssertionError: the block was not compiled, or has no such part.
    """
    entries = _debug_get_cache_entry_list(type(block).forward.__code__)
    parts = [node for entry in entries for node in _below(entry.guard_manager.root) if issubclass(_type(node), kind)]
    assert parts, f"no part of the compiled block is a {kind.__name__}"
    return [node.get_source() for part in parts for node in _below(part) if not node.is_tag_safe()]


def _below(node: Any) -> Iterator[Any]:
    yield node
    pairs = node.get_key_value_managers().values() if hasattr(node, "get_key_value_managers") else ()
    for child in (*node.get_child_managers(), *(each for pair in pairs for each in pair if each is not None)):
        yield from _below(child)


def _type(node: Any) -> type:
    guarded = node.get_type_of_guarded_value()
    return guarded if isinstance(guarded, type) else object
