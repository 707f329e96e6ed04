"""swiglu with the dot loss by the kernels of triton_kernels.py: two differentiable custom ops, the halves of `ttt`.

`accumulate` sums the step over keys and values, `apply` applies the stepped weights to queries; autograd joins their
backward passes through the step, so what is kept for the backward is the inputs and the step, 3·D² numbers a head.
Results are the same from run to run: partial sums of programs are added in a fixed order.
"""

import functools
import itertools
from dataclasses import dataclass

import torch
import triton as triton_package
from torch import Tensor

from t5kernels.transforms import transformed
from t5kernels.ttt import triton_kernels as kernels

LARGEST_HEAD = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Decided when the kernels were defined: by TRITON_INTERPRET, and then good for CPU tensors.
INTERPRETED = not isinstance(kernels.accumulate_kernel, triton_package.runtime.JITFunction)
# The interpreter's machine: small, so that tests split their tokens.
INTERPRETED_PROGRAMS = 8


@dataclass(frozen=True, kw_only=True)
class Tile:
    """How a kernel is cut: `block` tokens at a time, `hidden` columns of the inner model (0 where it has none).

    `resident` programs are held by a multiprocessor at once; more would only mean more partial sums. `registers` a
    thread are the most that the compiler may use, where it would otherwise take a few too many for them.
    """

    hidden: int = 0
    block: int
    warps: int
    stages: int = 1
    resident: int = 2
    registers: int | None = None

    @property
    def options(self) -> dict[str, int | None]:
        """As Triton calls them."""
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


# By kernel, then by the head width padded to a power of two; 16-bit tokens on a card of the H100's size.
TILES = {
    "accumulate": {
        32: Tile(hidden=32, block=64, warps=4, stages=3, resident=3),
        64: Tile(hidden=64, block=64, warps=4, stages=3, resident=2),
        128: Tile(hidden=64, block=64, warps=8, resident=1),
    },
    "apply": {
        32: Tile(hidden=32, block=64, warps=4, stages=2, resident=4),
        64: Tile(hidden=64, block=128, warps=8, stages=3, resident=2),
        128: Tile(hidden=128, block=64, warps=4, stages=2, resident=1),
    },
    "apply_backward": {
        32: Tile(hidden=32, block=64, warps=4, stages=2, resident=2),
        64: Tile(hidden=64, block=64, warps=4, stages=3, resident=2),
        128: Tile(hidden=64, block=32, warps=8, resident=1),
    },
    "accumulate_backward": {
        32: Tile(hidden=32, block=64, warps=4, resident=2),
        64: Tile(hidden=64, block=128, warps=8, stages=2, resident=1),
        128: Tile(hidden=32, block=32, warps=8, resident=1),
    },
}
ADDING = Tile(block=1024, warps=4)  # of partial sums, numbers at a time
# float32 has no tensor cores without losing digits, and small cards hold less on chip: there it is to be right.
SAFE_TILE = Tile(hidden=32, block=32, warps=8, resident=1)
LEAST_SHARED = 160 * 1024  # bytes a program may have on chip, for TILES
FIRST_EARLY = 9  # the first major version of cards whose kernels may come up before the one ahead of them is done
# What a program costs beside its blocks of tokens, in blocks: it loads weights and writes sums that are added later.
OVERHEAD = 3
MOST_CHUNKS = 32


def check(op: str, given: list[Tensor], weights: tuple[Tensor, ...]) -> None:
    """Raises ValueError when the kernels cannot be used with tokens `given` (B, H, N, D) and these inner weights."""
    dtype, device = given[0].dtype, given[0].device
    came = f"{op}: impl='triton' with {', '.join(str(t.dtype) for t in (*given, *weights))} on {device}"
    if any(t.device != device for t in (*given, *weights)):
        raise ValueError(f"{came}; expected everything on one device, got {sorted({str(t.device) for t in weights})}")
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        raise ValueError(f"{came}; expected CUDA tensors (TRITON_INTERPRET=1 emulates them on a CPU); use 'reference'")
    if any(t.dtype != dtype for t in given) or any(t.dtype not in DTYPES for t in (*given, *weights)):
        raise ValueError(f"{came}; expected tokens of one dtype, all of {DTYPES}; convert them, or use 'reference'")
    if transformed():
        raise ValueError(f"{came}; expected no transform of torch.func, which the kernels have no rules for")
    if INTERPRETED and torch.bfloat16 in {t.dtype for t in (*given, *weights)}:
        raise ValueError(f"{came}; Triton's interpreter is wrong in bfloat16; expected float16 or float32")
    if given[0].shape[3] > LARGEST_HEAD or any(t.numel() == 0 for t in given):
        shapes = [tuple(t.shape) for t in given]
        raise ValueError(f"{came}; expected at least one token and heads up to {LARGEST_HEAD} wide, got {shapes}")


def accumulate(k: Tensor, v: Tensor, weights: tuple[Tensor, ...], scale: float) -> Tensor:
    """The step (B, H, 3, D, D) that k and v (B, H, N, D) ask for, float32."""
    return _accumulate(k, v, *weights, scale)


def apply(q: Tensor, weights: tuple[Tensor, ...], step: Tensor) -> Tensor:
    """The stepped inner model applied to q (B, H, N, D). step: (B, H, 3, D, D)."""
    return _apply(q, *weights, step.float())


def launch_accumulate(k: Tensor, v: Tensor, weights: list[Tensor], scale: float) -> Tensor:
    """The step (B, H, 3, D, D) in float32."""
    B, H, N, D = k.shape
    width, tile, slices = _cut("accumulate", k)
    chunk, chunks, _ = chunks_of(k, tile, B * H * slices)
    sums = k.new_empty(B * H, chunks, 3, D, D, dtype=torch.float32)
    with torch.cuda.device_of(k):
        kernels.accumulate_kernel[B * H, chunks, slices](
            *(k, v, *_contiguous(*weights), sums),
            *(*k.stride(), *v.stride()),
            *(H, N, chunk, scale),
            *(D, width, tile.hidden, tile.block),
            **launch_options(k, tile),
        )
    return added(sums).view(B, H, 3, D, D)


def launch_apply(q: Tensor, weights: list[Tensor], step: Tensor) -> Tensor:
    """The output (B, H, N, D)."""
    B, H, N, D = q.shape
    width, tile, slices = _cut("apply", q)
    chunk, chunks, _ = chunks_of(q, tile, B * H)
    out = like_tokens(q)
    with torch.cuda.device_of(q):
        kernels.apply_kernel[B * H, chunks](
            *(q, *_contiguous(*weights, step), out),
            *(*q.stride(), *out.stride()),
            *(H, N, chunk),
            *(D, width, tile.hidden, tile.block, slices),
            **launch_options(q, tile),
        )
    return out


def launch_apply_backward(d_out: Tensor, q: Tensor, weights: list[Tensor], step: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of q and of the step (B, H, 3, D, D), float32."""
    B, H, N, D = q.shape
    width, tile, slices = _cut("apply_backward", q)
    chunk, chunks, _ = chunks_of(q, tile, B * H)
    dq = like_tokens(q)
    sums = q.new_empty(B * H, chunks, 3, D, D, dtype=torch.float32)
    with torch.cuda.device_of(q):
        kernels.apply_backward_kernel[B * H, chunks](
            *(d_out, q, *_contiguous(*weights, step), dq, sums),
            *(*d_out.stride(), *q.stride(), *dq.stride()),
            *(H, N, chunk),
            *(D, width, tile.hidden, tile.block, slices),
            **launch_options(q, tile),
        )
    return dq, added(sums).view(B, H, 3, D, D)


def launch_accumulate_backward(
    d_step: Tensor, k: Tensor, v: Tensor, weights: list[Tensor], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of k and v, and in float32 those of the weights, (3, H, D, D)."""
    B, H, N, D = k.shape
    width, tile, slices = _cut("accumulate_backward", k)
    chunk, chunks, images = chunks_of(k, tile, H, B)
    groups = ceil_div(B, images)
    dk, dv = like_tokens(k), like_tokens(v)
    sums = k.new_empty(groups * H, chunks, 3, D, D, dtype=torch.float32)
    with torch.cuda.device_of(k):
        kernels.accumulate_backward_kernel[groups * H, chunks](
            *(*_contiguous(d_step), k, v, *_contiguous(*weights), dk, dv, sums),
            *(*k.stride(), *v.stride(), *dk.stride(), *dv.stride()),
            *(B, H, N, images, chunk, scale),
            *(D, width, tile.hidden, tile.block, slices),
            **launch_options(k, tile),
        )
    return dk, dv, sums.view(groups, H, chunks, 3, D, D).sum((0, 2)).transpose(0, 1).contiguous()


@torch.library.custom_op("t5kernels::ttt_swiglu_accumulate", mutates_args=())
def _accumulate(k: Tensor, v: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, scale: float) -> Tensor:
    return launch_accumulate(k, v, [w1, w2, w3], scale)


@_accumulate.register_fake
def _(k, v, w1, w2, w3, scale):
    B, H, _, D = k.shape
    return k.new_empty(B, H, 3, D, D, dtype=torch.float32)


@torch.library.custom_op("t5kernels::ttt_swiglu_accumulate_backward", mutates_args=())
def _accumulate_backward(
    d_step: Tensor, k: Tensor, v: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dk, dv, and (3, H, D, D) gradients of the weights in float32."""
    return launch_accumulate_backward(d_step, k, v, [w1, w2, w3], scale)


@_accumulate_backward.register_fake
def _(d_step, k, v, w1, w2, w3, scale):
    _, H, _, D = k.shape
    return like_tokens(k), like_tokens(v), k.new_empty(3, H, D, D, dtype=torch.float32)


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
    return launch_apply(q, [w1, w2, w3], step)


@_apply.register_fake
def _(q, w1, w2, w3, step):
    return like_tokens(q)


@torch.library.custom_op("t5kernels::ttt_swiglu_apply_backward", mutates_args=())
def _apply_backward(
    d_out: Tensor, q: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, step: Tensor
) -> tuple[Tensor, Tensor]:
    """dq, and the (B, H, 3, D, D) gradient of the step in float32; that of a weight is minus its sum over images."""
    return launch_apply_backward(d_out, q, [w1, w2, w3], step)


@_apply_backward.register_fake
def _(d_out, q, w1, w2, w3, step):
    return like_tokens(q), torch.empty_like(step, memory_format=torch.contiguous_format)


def _keep_for_apply(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_apply(ctx, d_out):
    q, *weights, step = ctx.saved_tensors
    dq, d_step = _apply_backward(d_out, q, *weights, step)
    return dq, *_in_dtypes(-d_step.sum(0).transpose(0, 1), weights), d_step


_apply.register_autograd(_differentiate_apply, setup_context=_keep_for_apply)


def _in_dtypes(gradients: Tensor, weights: list[Tensor]) -> list[Tensor]:
    return [g.to(w.dtype) for g, w in zip(gradients.unbind(0), weights, strict=True)]


def launch_options(x: Tensor, tile: Tile) -> dict[str, int | None]:
    """What a kernel on x is called with beside its arguments. From the H100 on launches overlap (after_previous)."""
    early = x.is_cuda and _card(x.device).major >= FIRST_EARLY
    return tile.options | {"EARLY": early} | ({"launch_pdl": True} if early else {})


def padded_width(head_dim: int) -> int:
    """Head width as the kernels see it, a key of each of TILES."""
    return max(32, 1 << (head_dim - 1).bit_length())


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up. Triton's own takes microseconds, which a launch has few of."""
    return -(-a // b)


def _cut(kernel: str, x: Tensor) -> tuple[int, Tile, int]:
    """Padded head width, tile and number of slices of the hidden width."""
    D = x.shape[3]
    width = padded_width(D)
    tile = SAFE_TILE if x.dtype == torch.float32 or _small(x) else TILES[kernel][width]
    return width, tile, ceil_div(D, tile.hidden)


def _small(x: Tensor) -> bool:
    """Whether x is on a card whose programs have less on chip than TILES are made for (or that does not say)."""
    return x.is_cuda and getattr(_card(x.device), "shared_memory_per_block_optin", 0) < LEAST_SHARED


@functools.cache
def _card(device: torch.device):
    """What the driver says of a card; asked once, since every launch wants to know."""
    return torch.cuda.get_device_properties(device)


def _programs(x: Tensor, tile: Tile) -> int:
    """How many programs the device holds at once."""
    if not x.is_cuda:
        return INTERPRETED_PROGRAMS
    return tile.resident * _card(x.device).multi_processor_count


def chunks_of(x: Tensor, tile: Tile, heads: int, images: int = 1) -> tuple[int, int, int]:
    """Tokens a chunk, chunks, and how many of the `images` a program takes, for so many `heads`."""
    blocks = ceil_div(x.shape[2], tile.block)
    blocks_a_chunk, images = _shares(blocks, heads, images, _programs(x, tile))
    return blocks_a_chunk * tile.block, ceil_div(blocks, blocks_a_chunk), images


def blocks_of(x: Tensor, tile: Tile, heads: int, blocks: int) -> int:
    """How many of the `blocks` of each of so many `heads` a program takes."""
    return _shares(blocks, heads, 1, _programs(x, tile))[0]


@functools.cache
def _shares(blocks: int, heads: int, images: int, programs: int) -> tuple[int, int]:
    """Blocks of tokens and images a program takes, so that the last one is done soonest; in doubt few programs."""

    def finished(share: tuple[int, int]) -> tuple[int, int]:
        count = heads * ceil_div(blocks, share[0]) * ceil_div(images, share[1])
        return ceil_div(count, programs) * (share[0] * share[1] + OVERHEAD), count

    at_once = {ceil_div(blocks, chunks) for chunks in range(1, min(blocks, MOST_CHUNKS) + 1)}
    return min(itertools.product(at_once, range(1, images + 1)), key=finished)


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


def added(parts: Tensor) -> Tensor:
    """Partial sums (programs, chunks, ...) added over the chunks."""
    if parts.shape[1] == 1:
        return parts.squeeze(1)
    sums = parts.new_empty(parts.shape[0], *parts.shape[2:])
    numbers = sums[0].numel()
    with torch.cuda.device_of(parts):
        kernels.add_kernel[parts.shape[0], ceil_div(numbers, ADDING.block)](
            *(parts, sums, parts.shape[1], numbers, ADDING.block), **launch_options(parts, ADDING)
        )
    return sums


def like_tokens(x: Tensor) -> Tensor:
    """Empty (B, H, N, D) that lies in memory as (B, N, H, D), so that merging the heads is a view."""
    B, H, N, D = x.shape
    return x.new_empty(B, N, H, D).transpose(1, 2)
