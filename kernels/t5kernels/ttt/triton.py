"""swiglu with the dot loss by the kernels of triton_kernels.py: two differentiable custom ops, the halves of `ttt`.

`accumulate` sums the step over keys and values, `apply` applies the stepped weights to queries; autograd joins their
backward passes through the step, so what is kept for the backward is the inputs and the step, 3·D² numbers a head.
Results are the same from run to run: partial sums of programs are added in a fixed order.
"""

from dataclasses import dataclass

import torch
import triton as triton_package
from torch import Tensor

from t5kernels.ttt import triton_kernels as kernels

LARGEST_HEAD = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Decided when the kernels were defined: by TRITON_INTERPRET, and then good for CPU tensors.
INTERPRETED = not isinstance(kernels.accumulate_kernel, triton_package.runtime.JITFunction)
# The interpreter's machine: small, so that tests split their tokens.
INTERPRETED_PROGRAMS = 8


@dataclass(frozen=True, kw_only=True)
class Tile:
    """How a kernel is cut: `hidden` columns of the inner model a program, `block` tokens at a time.

    `resident` programs are held by a multiprocessor at once; more would only mean more partial sums.
    """

    hidden: int
    block: int
    warps: int
    stages: int = 2
    resident: int = 2


# By kernel, then by the head width padded to a power of two; 16-bit tokens.
TILES = {
    "accumulate": {
        32: Tile(hidden=32, block=64, warps=4, resident=3),
        64: Tile(hidden=64, block=64, warps=4),
        128: Tile(hidden=64, block=64, warps=8, resident=1),
    },
    "apply": {
        32: Tile(hidden=32, block=64, warps=4, resident=8),
        64: Tile(hidden=64, block=64, warps=4, resident=4),
        128: Tile(hidden=128, block=64, warps=8, resident=1),
    },
    "apply_backward": {
        32: Tile(hidden=32, block=64, warps=4),
        64: Tile(hidden=64, block=64, warps=4),
        128: Tile(hidden=64, block=64, warps=8, resident=1),
    },
    "accumulate_backward": {
        32: Tile(hidden=32, block=64, warps=4),
        64: Tile(hidden=64, block=128, warps=8, resident=1),
        128: Tile(hidden=64, block=64, warps=8, resident=1),
    },
}
# float32 has no tensor cores without losing digits: it is here to be right.
SINGLE_TILE = Tile(hidden=32, block=32, warps=8, stages=1, resident=1)


def check(op: str, tokens: list[Tensor], weights: tuple[Tensor, ...]) -> None:
    """Raises ValueError when the kernels cannot be used with these (B, H, N, D) tokens and these inner weights."""
    dtype, device = tokens[0].dtype, tokens[0].device
    came = f"{op}: impl='triton' with {', '.join(str(t.dtype) for t in (*tokens, *weights))} on {device}"
    if any(t.device != device for t in (*tokens, *weights)):
        raise ValueError(f"{came}; expected everything on one device, got {sorted({str(t.device) for t in weights})}")
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        raise ValueError(f"{came}; expected CUDA tensors (TRITON_INTERPRET=1 emulates them on a CPU); use 'reference'")
    if any(t.dtype != dtype for t in tokens) or any(t.dtype not in DTYPES for t in (*tokens, *weights)):
        raise ValueError(f"{came}; expected tokens of one dtype, all of {DTYPES}; convert them, or use 'reference'")
    if INTERPRETED and torch.bfloat16 in {t.dtype for t in (*tokens, *weights)}:
        raise ValueError(f"{came}; Triton's interpreter is wrong in bfloat16; expected float16 or float32")
    if tokens[0].shape[3] > LARGEST_HEAD or any(t.numel() == 0 for t in tokens):
        shapes = [tuple(t.shape) for t in tokens]
        raise ValueError(f"{came}; expected at least one token and heads up to {LARGEST_HEAD} wide, got {shapes}")


def accumulate(k: Tensor, v: Tensor, weights: tuple[Tensor, ...], scale: float) -> Tensor:
    """The step (B, H, 3, D, D) that k and v (B, H, N, D) ask for, float32."""
    return _accumulate(k, v, *weights, scale)


def apply(q: Tensor, weights: tuple[Tensor, ...], step: Tensor) -> Tensor:
    """The stepped inner model applied to q (B, H, N, D). step: (B, H, 3, D, D)."""
    return _apply(q, *weights, step.float())


@torch.library.custom_op("t5kernels::ttt_swiglu_accumulate", mutates_args=())
def _accumulate(k: Tensor, v: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, scale: float) -> Tensor:
    B, H, N, D = k.shape
    width, tile, slices = _cut("accumulate", k)
    chunk, chunks = _chunks(k, tile, B * H * slices)
    sums = k.new_empty(B * H, chunks, 3, D, D, dtype=torch.float32)
    with torch.cuda.device_of(k):
        kernels.accumulate_kernel[B * H, chunks, slices](
            *(k, v, *_contiguous(w1, w2, w3), sums),
            *(*k.stride(), *v.stride()),
            *(H, N, chunk, scale),
            *(D, width, tile.hidden, tile.block),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return _added(sums).view(B, H, 3, D, D)


@_accumulate.register_fake
def _(k, v, w1, w2, w3, scale):
    B, H, _, D = k.shape
    return k.new_empty(B, H, 3, D, D, dtype=torch.float32)


@torch.library.custom_op("t5kernels::ttt_swiglu_accumulate_backward", mutates_args=())
def _accumulate_backward(
    d_step: Tensor, k: Tensor, v: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dk, dv, and (3, H, D, D) gradients of the weights in float32."""
    B, H, N, D = k.shape
    width, tile, slices = _cut("accumulate_backward", k)
    images = max(1, B * H * slices // _programs(k, tile))
    groups = -(-B // images)
    chunk, chunks = _chunks(k, tile, groups * H * slices)
    dk, dv = _slices_of_tokens(k, slices), _slices_of_tokens(v, slices)
    sums = k.new_empty(groups * H, chunks, 3, D, D, dtype=torch.float32)
    with torch.cuda.device_of(k):
        kernels.accumulate_backward_kernel[groups * H, chunks, slices](
            *(*_contiguous(d_step), k, v, *_contiguous(w1, w2, w3), dk, dv, sums),
            *(*k.stride(), *v.stride(), *_strides_of_slices(dk), *_strides_of_slices(dv)),
            *(B, H, N, images, chunk, scale),
            *(D, width, tile.hidden, tile.block),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    d_weights = sums.view(groups, H, chunks, 3, D, D).sum((0, 2)).transpose(0, 1).contiguous()
    return _joined(dk, k), _joined(dv, v), d_weights


@_accumulate_backward.register_fake
def _(d_step, k, v, w1, w2, w3, scale):
    _, H, _, D = k.shape
    return _like_tokens(k), _like_tokens(v), k.new_empty(3, H, D, D, dtype=torch.float32)


def _keep_for_accumulate(ctx, inputs, output) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_accumulate(ctx, d_step):
    k, v, *weights = ctx.saved_tensors
    dk, dv, d_weights = _accumulate_backward(d_step, k, v, *weights, ctx.scale)
    return dk, dv, *_in_dtypes(d_weights, weights), None


_accumulate.register_autograd(_differentiate_accumulate, setup_context=_keep_for_accumulate)


@torch.library.custom_op("t5kernels::ttt_swiglu_apply", mutates_args=())
def _apply(q: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, step: Tensor) -> Tensor:
    B, H, N, D = q.shape
    width, tile, slices = _cut("apply", q)
    chunk, chunks = _chunks(q, tile, B * H)
    out = _like_tokens(q)
    with torch.cuda.device_of(q):
        kernels.apply_kernel[B * H, chunks](
            *(q, *_contiguous(w1, w2, w3, step), out),
            *(*q.stride(), *out.stride()),
            *(H, N, chunk),
            *(D, width, tile.hidden, tile.block, slices),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out


@_apply.register_fake
def _(q, w1, w2, w3, step):
    return _like_tokens(q)


@torch.library.custom_op("t5kernels::ttt_swiglu_apply_backward", mutates_args=())
def _apply_backward(
    d_out: Tensor, q: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, step: Tensor
) -> tuple[Tensor, Tensor]:
    """dq, and the (B, H, 3, D, D) gradient of the step in float32; that of a weight is minus its sum over images."""
    B, H, N, D = q.shape
    width, tile, slices = _cut("apply_backward", q)
    chunk, chunks = _chunks(q, tile, B * H * slices)
    dq = _slices_of_tokens(q, slices)
    sums = q.new_empty(B * H, chunks, 3, D, D, dtype=torch.float32)
    with torch.cuda.device_of(q):
        kernels.apply_backward_kernel[B * H, chunks, slices](
            *(d_out, q, *_contiguous(w1, w2, w3, step), dq, sums),
            *(*d_out.stride(), *q.stride(), *_strides_of_slices(dq)),
            *(H, N, chunk),
            *(D, width, tile.hidden, tile.block),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return _joined(dq, q), _added(sums).view(B, H, 3, D, D)


@_apply_backward.register_fake
def _(d_out, q, w1, w2, w3, step):
    return _like_tokens(q), torch.empty_like(step, memory_format=torch.contiguous_format)


def _keep_for_apply(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_apply(ctx, d_out):
    q, *weights, step = ctx.saved_tensors
    dq, d_step = _apply_backward(d_out, q, *weights, step)
    return dq, *_in_dtypes(-d_step.sum(0).transpose(0, 1), weights), d_step


_apply.register_autograd(_differentiate_apply, setup_context=_keep_for_apply)


def _in_dtypes(gradients: Tensor, weights: list[Tensor]) -> list[Tensor]:
    return [g.to(w.dtype) for g, w in zip(gradients.unbind(0), weights, strict=True)]


def padded_width(head_dim: int) -> int:
    """Head width as the kernels see it, a key of each of TILES."""
    return max(32, triton_package.next_power_of_2(head_dim))


def _cut(kernel: str, x: Tensor) -> tuple[int, Tile, int]:
    """Padded head width, tile and number of slices of the hidden width."""
    D = x.shape[3]
    width = padded_width(D)
    tile = SINGLE_TILE if x.dtype == torch.float32 else TILES[kernel][width]
    return width, tile, -(-D // tile.hidden)


def _programs(x: Tensor, tile: Tile) -> int:
    """How many programs keep the device busy."""
    if not x.is_cuda:
        return INTERPRETED_PROGRAMS
    return tile.resident * torch.cuda.get_device_properties(x.device).multi_processor_count


def _chunks(x: Tensor, tile: Tile, programs: int) -> tuple[int, int]:
    """Tokens a chunk, a multiple of the tile's block, and chunks: so many that `programs` times as many fill it."""
    blocks = -(-x.shape[2] // tile.block)
    blocks_a_chunk = -(-blocks // max(1, min(blocks, _programs(x, tile) // programs)))
    return blocks_a_chunk * tile.block, -(-blocks // blocks_a_chunk)


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


def _added(sums: Tensor) -> Tensor:
    """Partial sums (programs, chunks, ...) added over the chunks."""
    return sums.squeeze(1) if sums.shape[1] == 1 else sums.sum(1)


def _like_tokens(x: Tensor) -> Tensor:
    """Empty (B, H, N, D) that lies in memory as (B, N, H, D), so that merging the heads is a view."""
    B, H, N, D = x.shape
    return x.new_empty(B, N, H, D).transpose(1, 2)


def _slices_of_tokens(x: Tensor, slices: int) -> Tensor:
    """Empty (slices, B, N, H, D): a part of a gradient a slice, in float32 unless there is one only."""
    B, H, N, D = x.shape
    return x.new_empty(slices, B, N, H, D, dtype=x.dtype if slices == 1 else torch.float32)


def _strides_of_slices(parts: Tensor) -> tuple[int, ...]:
    """Strides as the kernels take them: image, head, token, channel, slice."""
    slice_, b, n, h, d = parts.stride()
    return b, h, n, d, slice_


def _joined(parts: Tensor, x: Tensor) -> Tensor:
    """(B, H, N, D) in x's dtype from what `_slices_of_tokens` made."""
    whole = parts[0] if parts.shape[0] == 1 else parts.sum(0).to(x.dtype)
    return whole.transpose(1, 2)
