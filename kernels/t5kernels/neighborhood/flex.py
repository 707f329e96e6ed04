"""The ops by FlexAttention: one kernel that skips the blocks of tokens outside every window.

The mask of a geometry is built once and kept, whether its first use is eager or while torch.compile traces a model.
An eager call compiles FlexAttention here; inside a compiled region FlexAttention is a part of that region.
"""

import functools
import operator
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

SMALLEST_HEAD = 16
# Each geometry, shape, dtype and gradient mode is a kernel of its own. Beyond its default limit of 8, torch.compile
# would fall back, with a warning only, to an attention that holds every pair of tokens.
COMPILE_LIMITS = {"recompile_limit": 256, "fail_on_recompile_limit_hit": True}


def neighborhood_attention(q: Tensor, k: Tensor, v: Tensor, *, rows: int, columns: int, window: int) -> Tensor:
    """Square windows; q, k, v: (B, H, R·C, D)."""
    return _attention(q, k, v, "neighborhood", (rows, columns, window))


def circular_attention(
    q: Tensor, k: Tensor, v: Tensor, *, rows: int, columns: int, num_prefix_tokens: int, squared_radius: int
) -> Tensor:
    """Round windows; q, k, v: (B, H, prefix + R·C, D)."""
    return _attention(q, k, v, "circular", (rows, columns, num_prefix_tokens, squared_radius))


def _attention(q: Tensor, k: Tensor, v: Tensor, kind: str, sizes: tuple[int, ...]) -> Tensor:
    # operator.index fixes a size that torch.compile traces as dynamic, and must: a mask belongs to one geometry, and a
    # kernel to one head width.
    name = _prepare(kind, tuple(operator.index(size) for size in sizes), str(q.device))
    width = operator.index(q.shape[3])
    scale = width**-0.5
    if width < SMALLEST_HEAD:
        q, k, v = (F.pad(t, (0, SMALLEST_HEAD - width)) for t in (q, k, v))
    if torch.compiler.is_compiling() or q.device.type != "cuda":
        return flex_attention(q, k, v, block_mask=getattr(_masks, name), scale=scale)[..., :width]
    with torch._dynamo.config.patch(COMPILE_LIMITS):
        return _compiled()(q, k, v, block_mask=getattr(_masks, name), scale=scale)[..., :width]


@functools.cache
def _compiled():
    return torch.compile(flex_attention, dynamic=False)


class _Masks:
    """BlockMasks as attributes, because torch.compile can read an attribute that `_prepare` adds while it traces."""


_masks = _Masks()


@torch.compiler.assume_constant_result
def _prepare(kind: str, sizes: tuple[int, ...], device: str) -> str:
    """The attribute of `_masks` that holds the mask, built if it is new. torch.compile runs this while it traces."""
    name = "_".join(map(str, (kind, *sizes, device)))
    if not hasattr(_masks, name):
        # A mask built in inference mode could not be used in training later.
        with torch.inference_mode(False):
            setattr(_masks, name, _build(kind, sizes, device))
    return name


def _build(kind: str, sizes: tuple[int, ...], device: str) -> BlockMask:
    rows, columns, *others = sizes
    num_tokens = rows * columns + (others[0] if kind == "circular" else 0)
    masks: dict[str, Callable] = {"neighborhood": _in_neighborhood, "circular": _in_circle}
    return create_block_mask(masks[kind](*sizes), None, None, num_tokens, num_tokens, device=device)


def _in_neighborhood(rows: int, columns: int, window: int):
    def is_visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = key // columns - (query // columns - window // 2).clamp(0, rows - window)
        column = key % columns - (query % columns - window // 2).clamp(0, columns - window)
        return (row >= 0) & (row < window) & (column >= 0) & (column < window)

    return is_visible


def _in_circle(rows: int, columns: int, num_prefix_tokens: int, squared_radius: int):
    def is_visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        prefix = (query < num_prefix_tokens) | (key < num_prefix_tokens)
        query, key = query - num_prefix_tokens, key - num_prefix_tokens
        row, column = query // columns - key // columns, query % columns - key % columns
        return prefix | (row * row + column * column <= squared_radius)

    return is_visible
