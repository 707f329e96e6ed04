"""Blocks that recompute their activations in the backward pass instead of keeping them."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from t5lib.families import family_of
from t5lib.layers.grid import on_current_grid


@contextmanager
def recomputed_blocks(model: nn.Module, share: float) -> Iterator[None]:
    """Within this context, `share` of the model's blocks (rounded up) do so; compiled blocks rerun their compiled code.

    They are the first blocks: when the backward pass reaches them, the memory of the others is free again.
    """
    blocks = list(family_of(model).blocks(model))
    chosen = blocks[: math.ceil(share * len(blocks))]
    before = [block._compiled_call_impl for block in chosen]
    for block, compiled in zip(chosen, before, strict=True):
        block._compiled_call_impl = _recomputed(compiled or block._call_impl)
    try:
        yield
    finally:
        for block, compiled in zip(chosen, before, strict=True):
            block._compiled_call_impl = compiled


def _recomputed(call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(on_current_grid(call), *args, use_reentrant=False, **kwargs)

    return run
