"""swiglu and swiglu_last with the dot loss by the kernels of triton_kernels.py: two differentiable custom ops, the
halves of `ttt`.

`accumulate` sums the step over keys and values, `apply` applies the stepped weights to queries. Autograd joins their
backward passes through the step, so the backward keeps the inputs and the step only: S·D² numbers a head, where S is 3,
or 1 where W3 alone steps. Results are the same from run to run: partial sums of programs are added in a fixed order.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.types import Number

from t5kernels.launch import (
    H100_SHARED,
    LARGEST_HEAD,
    LEAST_SHARED,
    Tile,
    ceil_div,
    chunks_of,
    contiguous,
    lacks_shared_memory,
    launch,
    like_tokens,
    lying_alike,
    padded_to,
    sum_over_chunks,
)
from t5kernels.ops import differentiable, op
from t5kernels.ttt import triton_kernels as kernels

# By kernel, then by the padded head width, a power of two or a sum of two (see `groups_of`); 16-bit tokens on a card of
# the H100's size. The tiles of 80 and 96 have not been timed; they spill little.
TILES = {
    "accumulate": {
        32: Tile(hidden=32, block=64, warps=4, stages=3, resident=3),
        64: Tile(hidden=64, block=64, warps=4, stages=3, resident=2),
        80: Tile(hidden=64, block=32, warps=4, stages=3, resident=2),
        96: Tile(hidden=64, block=32, warps=4, stages=3, resident=2),
        128: Tile(hidden=64, block=128, warps=8, stages=2, resident=1),
    },
    "accumulate_last": {
        32: Tile(hidden=32, block=64, warps=4, stages=3, resident=4),
        64: Tile(hidden=64, block=64, warps=4, stages=3, resident=3),
        80: Tile(hidden=64, block=64, warps=4, stages=2, resident=3),
        96: Tile(hidden=64, block=64, warps=4, stages=2, resident=3),
        128: Tile(hidden=64, block=64, warps=8, stages=2, resident=1),
    },
    "apply": {
        32: Tile(hidden=32, block=64, warps=4, stages=2, resident=4),
        64: Tile(hidden=64, block=128, warps=8, stages=3, resident=2),
        80: Tile(hidden=128, block=128, warps=8, stages=2, resident=1),
        96: Tile(hidden=128, block=128, warps=8, stages=2, resident=1),
        128: Tile(hidden=128, block=128, warps=8, stages=2, resident=1),
    },
    "apply_backward": {
        32: Tile(hidden=32, block=64, warps=4, stages=2, resident=2),
        64: Tile(hidden=64, block=64, warps=4, stages=3, resident=2),
        80: Tile(hidden=32, block=64, warps=4, stages=2, resident=2),
        96: Tile(hidden=32, block=64, warps=4, resident=2),
        128: Tile(hidden=32, block=64, warps=4, stages=2, resident=2),
    },
    "accumulate_backward": {
        32: Tile(hidden=32, block=64, warps=4, resident=2),
        64: Tile(hidden=64, block=128, warps=8, stages=2, resident=1),
        80: Tile(hidden=32, block=32, warps=4, resident=2),
        96: Tile(hidden=32, block=64, warps=8, resident=1),
        128: Tile(hidden=64, block=128, warps=8, resident=1),
    },
    "accumulate_last_backward": {
        32: Tile(hidden=32, block=64, warps=4, stages=2, resident=3),
        64: Tile(hidden=64, block=32, warps=4, stages=2, resident=2),
        80: Tile(hidden=32, block=64, warps=4, resident=2),
        96: Tile(hidden=32, block=64, warps=4, resident=2),
        128: Tile(hidden=64, block=32, warps=8, resident=1),
    },
}
# Heads 128 wide, on cards with less shared memory than an H100 has, such as the A100.
SMALLER_TILES = {
    "accumulate": Tile(hidden=64, block=64, warps=8, resident=1),
    "apply": Tile(hidden=128, block=64, warps=4, stages=2, resident=1),
    "accumulate_backward": Tile(hidden=32, block=32, warps=8, resident=1),
}
# In float32 tensor cores would lose digits, and small cards have little shared memory: this tile only has to be right.
SAFE_TILE = Tile(hidden=32, block=32, warps=8, resident=1)


def accumulate(k: Tensor, v: Tensor, weights: Sequence[Tensor], scale: float, steps: int) -> Tensor:
    """The inner gradient (B, H, S, D, D) by the last S = `steps` weights on k and v (B, H, N, D), float32."""
    return _differentiable_accumulate(k, v, *weights, scale, steps)


def apply(q: Tensor, weights: Sequence[Tensor], step: Tensor) -> Tensor:
    """The stepped inner model applied to q (B, H, N, D). step: (B, H, S, D, D)."""
    return _differentiable_apply(q, *weights, step.float())


def launch_accumulate(
    tokens: Sequence[tuple[Tensor, Tensor]], weights: Sequence[Tensor], scale: float, steps: int
) -> Tensor:
    """The step (B, H, S, D, D) in float32, on the keys and values of all parts of a sequence."""
    first = tokens[0][0]
    B, H, _, D = first.shape
    name, kernel = _kernel_of("accumulate{}", steps)
    widths, tile, slices = _tile_for(name, first)
    keys, values = (lying_alike(each) for each in zip(*tokens, strict=True))
    chunk, chunks, _ = chunks_of(keys, tile, B * H * slices)
    sums = first.new_empty(B * H, sum(chunks), steps, D, D, dtype=torch.float32)
    (k, text_k), (v, text_v) = ((each[0], each[-1]) for each in (keys, values))
    launch(
        *(kernel, (B * H, sum(chunks), slices), k, tile),
        *(k, v, text_k, text_v, *contiguous(*weights), sums),
        *(*k.stride(), *v.stride(), *text_k.stride()[:3], *text_v.stride()[:3]),
        *(H, k.shape[2], text_k.shape[2], chunk, chunks[0], sum(chunks), scale),
        *(D, *widths, tile.hidden, tile.block, len(tokens) > 1),
    )
    return sum_over_chunks(sums).view(B, H, steps, D, D)


def launch_apply(queries: Sequence[Tensor], weights: Sequence[Tensor], step: Tensor) -> list[Tensor]:
    """The outputs (B, H, N, D) for the queries of each part of a sequence."""
    queries = lying_alike(queries)
    q, text_q = queries[0], queries[-1]
    B, H, N, D = q.shape
    widths, tile, slices = _tile_for("apply", q)
    chunk, chunks, _ = chunks_of(queries, tile, B * H)
    outs = [like_tokens(each) for each in queries]
    launch(
        *(kernels.apply_kernel, (B * H, sum(chunks)), q, tile),
        *(q, text_q, *contiguous(*weights, step), outs[0], outs[-1]),
        *(*q.stride(), *text_q.stride()[:3], *outs[0].stride(), *outs[-1].stride()[:3]),
        *(H, N, text_q.shape[2], chunk, chunks[0]),
        *(D, *widths, tile.hidden, tile.block, slices, step.shape[2] == 1, len(queries) > 1),
    )
    return outs


def launch_apply_backward(
    tokens: Sequence[tuple[Tensor, Tensor]], weights: Sequence[Tensor], step: Tensor
) -> tuple[list[Tensor], Tensor]:
    """From the gradient of the output and the queries of each part of a sequence.

    The gradients of the queries; and (B, H, 3, D, D) in float32 minus that of the stepped weights of every image. Of
    those that step it is the gradient of the step, the last S; its negative sum over images is what the weights get.
    """
    d_outs, queries = (lying_alike(each) for each in zip(*tokens, strict=True))
    (do, text_do), (q, text_q) = ((each[0], each[-1]) for each in (d_outs, queries))
    B, H, N, D = q.shape
    widths, tile, slices = _tile_for("apply_backward", q)
    chunk, chunks, _ = chunks_of(queries, tile, B * H)
    sums = q.new_empty(B * H, sum(chunks), 3, D, D, dtype=torch.float32)
    gradients = [like_tokens(each) for each in queries]
    dq, text_dq = gradients[0], gradients[-1]
    launch(
        *(kernels.apply_backward_kernel, (B * H, sum(chunks)), q, tile),
        *(do, q, text_do, text_q, *contiguous(*weights, step), dq, text_dq, sums),
        *(*do.stride(), *q.stride(), *text_do.stride()[:3], *text_q.stride()[:3], *dq.stride(), *text_dq.stride()[:3]),
        *(H, N, text_q.shape[2], chunk, chunks[0], sum(chunks)),
        *(D, *widths, tile.hidden, tile.block, slices, step.shape[2] == 1, len(tokens) > 1),
    )
    return gradients, sum_over_chunks(sums).view(B, H, 3, D, D)


def launch_accumulate_backward(
    d_step: Tensor, tokens: Sequence[tuple[Tensor, Tensor]], weights: Sequence[Tensor], scale: float
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The gradients of the keys and values of all parts of a sequence, and in float32 partial sums of those of the
    weights that the step depends on.

    Args:
        d_step: (B, H, S, D, D); where S is 1, it may be a part of (B, H, 3, D, D).

    Returns:
        dk and dv, (B, H, N, D) of each part; (groups of images, H, chunks, 3 or 2, D, D), see `weights_summed`.
    """
    keys, values = (lying_alike(each) for each in zip(*tokens, strict=True))
    (k, text_k), (v, text_v) = ((each[0], each[-1]) for each in (keys, values))
    B, H, N, D = k.shape
    steps = d_step.shape[2]
    name, kernel = _kernel_of("accumulate{}_backward", steps)
    widths, tile, slices = _tile_for(name, k)
    chunk, chunks, images = chunks_of(keys, tile, H, B)
    groups = ceil_div(B, images)
    d_keys, d_values = ([like_tokens(each) for each in tensors] for tensors in (keys, values))
    (dk, text_dk), (dv, text_dv) = ((each[0], each[-1]) for each in (d_keys, d_values))
    sums = k.new_empty(groups, H, sum(chunks), _weighed(steps), D, D, dtype=torch.float32)
    launch(
        *(kernel, (groups * H, sum(chunks)), k, tile),
        *(d_step, k, v, text_k, text_v, *contiguous(*weights), dk, dv, text_dk, text_dv, sums),
        *(*k.stride(), *v.stride(), *text_k.stride()[:3], *text_v.stride()[:3]),
        *(*dk.stride(), *dv.stride(), *text_dk.stride()[:3], *text_dv.stride()[:3]),
        *(B, H, N, text_k.shape[2], images, chunk, chunks[0], scale, *([d_step.stride(1)] if steps == 1 else [])),
        *(D, *widths, tile.hidden, tile.block, slices, len(tokens) > 1),
    )
    return d_keys, d_values, sums


def weights_summed(sums: Tensor) -> Tensor:
    """The gradients of the weights (3 or 2, H, D, D) from what `launch_accumulate_backward` gives."""
    return sums.sum((0, 2)).transpose(0, 1).contiguous()


def _kernel_of(name: str, steps: int) -> tuple[str, Any]:
    """The name and the kernel of a half on keys, where so many weights step."""
    name = name.format("_last" if steps == 1 else "")
    return name, getattr(kernels, f"{name}_kernel")


def _weighed(steps: int) -> int:
    """How many weights the step of the last `steps` depends on: with the dot loss not on W3 where that alone steps."""
    return 2 if steps == 1 else 3


# torch.compile would fix the value of a float argument, and with it the number of tokens from which the scale comes. A
# Number is traced as it is.
@op("ttt_swiglu_accumulate")
def _accumulate(k: Tensor, v: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, scale: Number, steps: int) -> Tensor:
    return launch_accumulate([(k, v)], [w1, w2, w3], float(scale), steps)


@torch.library.register_fake("t5kernels::ttt_swiglu_accumulate")
def _(k, v, w1, w2, w3, scale, steps):
    B, H, _, D = k.shape
    return k.new_empty(B, H, steps, D, D, dtype=torch.float32)


@op("ttt_swiglu_accumulate_backward")
def _accumulate_backward(
    d_step: Tensor, k: Tensor, v: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, scale: Number
) -> tuple[Tensor, Tensor, Tensor]:
    """dk, dv, and (3 or 2, H, D, D) gradients of the weights in float32."""
    [dk], [dv], sums = launch_accumulate_backward(d_step.contiguous(), [(k, v)], [w1, w2, w3], float(scale))
    return dk, dv, weights_summed(sums)


@torch.library.register_fake("t5kernels::ttt_swiglu_accumulate_backward")
def _(d_step, k, v, w1, w2, w3, scale):
    _, H, _, D = k.shape
    return like_tokens(k), like_tokens(v), k.new_empty(_weighed(d_step.shape[2]), H, D, D, dtype=torch.float32)


def _keep_for_accumulate(ctx, inputs, output) -> None:
    *tensors, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_accumulate(ctx, d_step):
    k, v, *weights = ctx.saved_tensors
    dk, dv, d_weights = _accumulate_backward(d_step, k, v, *weights, ctx.scale)
    d_weights = _in_dtypes(d_weights, weights)
    return dk, dv, *d_weights, *(None,) * (3 - len(d_weights)), None, None


_differentiable_accumulate = differentiable(_accumulate, _keep_for_accumulate, _differentiate_accumulate)


@op("ttt_swiglu_apply")
def _apply(q: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, step: Tensor) -> Tensor:
    return launch_apply([q], [w1, w2, w3], step)[0]


@torch.library.register_fake("t5kernels::ttt_swiglu_apply")
def _(q, w1, w2, w3, step):
    return like_tokens(q)


@op("ttt_swiglu_apply_backward")
def _apply_backward(
    d_out: Tensor, q: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, step: Tensor
) -> tuple[Tensor, Tensor]:
    """dq, and (B, H, 3, D, D) as `launch_apply_backward` gives it."""
    (dq,), d_stepped = launch_apply_backward([(d_out, q)], [w1, w2, w3], step)
    return dq, d_stepped


@torch.library.register_fake("t5kernels::ttt_swiglu_apply_backward")
def _(d_out, q, w1, w2, w3, step):
    B, H, _, D = q.shape
    return like_tokens(q), q.new_empty(B, H, 3, D, D, dtype=torch.float32)


def _keep_for_apply(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_apply(ctx, d_out):
    q, *weights, step = ctx.saved_tensors
    dq, d_stepped = _apply_backward(d_out, q, *weights, step)
    return dq, *_in_dtypes(-d_stepped.sum(0).transpose(0, 1), weights), d_stepped[:, :, -step.shape[2] :]


_differentiable_apply = differentiable(_apply, _keep_for_apply, _differentiate_apply)


def _in_dtypes(gradients: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Those of the first weights, in the weights' dtypes."""
    return [g.to(w.dtype) for g, w in zip(gradients.unbind(0), weights, strict=False)]


def groups_of(width: int) -> tuple[int, int]:
    """The constants WIDTH and REST for a width in TILES: its largest power of two, and what is left."""
    largest = 1 << (width.bit_length() - 1)
    return largest, width - largest


def _tile_for(kernel: str, x: Tensor) -> tuple[tuple[int, int], Tile, int]:
    """The widths of the groups of channels, the tile, and how many slices it makes of the hidden width."""
    D = x.shape[3]
    width = padded_to(TILES[kernel], D)
    tile = TILES[kernel][width]
    if x.dtype == torch.float32 or lacks_shared_memory(x, LEAST_SHARED):
        tile = SAFE_TILE
    elif width == LARGEST_HEAD and lacks_shared_memory(x, H100_SHARED):
        tile = SMALLER_TILES.get(kernel, tile)
    return groups_of(width), tile, ceil_div(D, tile.hidden)
