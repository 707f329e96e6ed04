"""Neighborhood attention by the kernels of triton_kernels.py: a differentiable custom op for grids of any size.

The backward keeps inputs, output, and a float32 number a token and head. Results are the same from run to run.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from t5kernels.launch import Tile, ceil_div, launch, like_tokens, padded_width
from t5kernels.neighborhood import triton_kernels as kernels
from t5kernels.ops import differentiable, op

# A program takes a square of so many tokens a side: the first that with what it reads around it is not too large.
SQUARES, LARGEST_SIDE = (8, 4), 16
# By kernel, then by the head width padded to a power of two; `block` says nothing that SQUARES does not.
TILES = {
    name: dict.fromkeys((32, 64, 128), Tile(block=SQUARES[0] ** 2, warps=8))
    for name in ("neighborhood", "neighborhood_queries", "neighborhood_keys")
}


def neighborhood_attention(q: Tensor, k: Tensor, v: Tensor, *, rows: int, columns: int, window: int) -> Tensor:
    """Square windows; q, k, v: (B, H, R·C, D) of any strides. The output lies in memory as (B, R·C, H, D)."""
    return _differentiable_attention(q, k, v, rows, columns, window)[0]


def launch_forward(q: Tensor, k: Tensor, v: Tensor, rows: int, columns: int, window: int) -> tuple[Tensor, Tensor]:
    """The output (B, H, N, D), and lse (B·H, N) in float32."""
    B, H, N, _ = q.shape
    out, lse = like_tokens(q), q.new_empty(B * H, N, dtype=torch.float32)
    _launch("neighborhood", (q, k, v, out, lse), rows, columns, window, reach=window - 1)
    return out, lse


def launch_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rows: int, columns: int, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    dq, dk, dv, delta = like_tokens(q), like_tokens(k), like_tokens(v), torch.empty_like(lse)
    sizes = (rows, columns, window)
    _launch("neighborhood_queries", (d_out, q, k, v, out, lse, dq, delta), *sizes, reach=window - 1)
    _launch("neighborhood_keys", (d_out, q, k, v, lse, delta, dk, dv), *sizes, reach=2 * (window - 1))
    return dq, dk, dv


def _launch(name: str, tensors: Sequence[Tensor], rows: int, columns: int, window: int, *, reach: int) -> None:
    """Run a kernel on its tensors, in its order; those of tokens, which it takes strides of, have four dimensions.

    `reach`: how much larger than a program's square of tokens the square of those is that it reads beside them.
    """
    q = tensors[0]
    B, H, _, D = q.shape
    square = next(each for each in SQUARES if each + 2 * (window - 1) <= LARGEST_SIDE)
    side = 1 << (square + reach - 1).bit_length()
    strides = [stride for t in tensors if t.ndim == 4 for stride in t.stride()]
    width, programs = padded_width(D), (B * H, ceil_div(rows, square) * ceil_div(columns, square))
    launch(
        *(getattr(kernels, f"{name}_kernel"), programs, q, TILES[name][width]),
        *(*tensors, *strides),
        *(H, rows, columns, D**-0.5),
        *(D, width, window, square, side),
    )


@op("neighborhood_attention")
def _attention(q: Tensor, k: Tensor, v: Tensor, rows: int, columns: int, window: int) -> tuple[Tensor, Tensor]:
    return launch_forward(q, k, v, rows, columns, window)


@torch.library.register_fake("t5kernels::neighborhood_attention")
def _(q, k, v, rows, columns, window):
    return like_tokens(q), q.new_empty(q.shape[0] * q.shape[1], q.shape[2], dtype=torch.float32)


@op("neighborhood_attention_backward")
def _backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rows: int, columns: int, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_backward(d_out, q, k, v, out, lse, rows, columns, window)


@torch.library.register_fake("t5kernels::neighborhood_attention_backward")
def _(d_out, q, k, v, out, lse, rows, columns, window):
    return like_tokens(q), like_tokens(k), like_tokens(v)


def _keep_for_backward(ctx, inputs, output) -> None:
    *tokens, ctx.rows, ctx.columns, ctx.window = inputs
    ctx.save_for_backward(*tokens, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, d_out, _d_lse):
    return *_backward(d_out, *ctx.saved_tensors, ctx.rows, ctx.columns, ctx.window), None, None, None


_differentiable_attention = differentiable(_attention, _keep_for_backward, _differentiate)
