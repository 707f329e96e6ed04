# pyright: reportGeneralTypeIssues=false
# (The body of a kernel is Triton's language, which has no types that pyright could check.)
"""The gradients of the parameters: the last sums of the backward, over images and programs, in a fixed order.

PyTorch could add them, too. They are kernels so that the whole backward consists of launches that a plan can hold.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from t5kernels.launch import Tile, ceil_div, launch, padded_width
from t5kernels.reductions import over_tokens
from t5kernels.tokens import COUNTS, after_previous
from t5kernels.ttt_layer.triton_prepare import BIAS_SUM, SUMS

WEIGHTS_TILE = Tile(block=1024, warps=4, stages=4)  # numbers of a weight that a program adds
CONV_TILE = Tile(block=32, warps=4)  # images that a program adds at a time
GAINS_TILE = Tile(block=128, warps=4)  # programs of the kernel before whose parts are added at a time
MOST_GAINS = 4  # of queries and keys, of image and text


@triton.jit
def _add_programs(
    total, sums, weight, h, number, H, groups, chunks, numbers, mask, WEIGHED: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """total plus what the programs of a head wrote for a weight, sums (groups, H, chunks, WEIGHED, numbers)."""
    for group in range(groups):
        first = ((group * H + h) * chunks).to(tl.int64) * (WEIGHED * numbers) + weight * numbers
        for chunk in tl.range(chunks, num_stages=STAGES):
            total += tl.load(sums + first + chunk * (WEIGHED * numbers) + number, mask, other=0.0)
    return total


@triton.jit(do_not_specialize=COUNTS)
def weights_kernel(
    d_stepped, sums, text_sums, d_weights, B, H, groups, chunks, text_groups, text_chunks, numbers,
    WEIGHED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Write d_weights (3, H, numbers). The launch grid is (3·H, blocks of the numbers).

    d_stepped: (B, H, 3, numbers) of -dU; its sum over images is subtracted. sums, text_sums: (groups, H, chunks,
    WEIGHED, numbers) for the first WEIGHED weights; they are added.
    """
    after_previous(EARLY)
    weight, h = tl.program_id(0) // H, tl.program_id(0) % H
    number = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = number < numbers
    total = tl.full((BLOCK,), 0.0, tl.float32)
    d_stepped += (h * 3 + weight) * numbers + number
    for b in tl.range(B, num_stages=STAGES):
        total -= tl.load(d_stepped + tl.cast(b, tl.int64) * (H * 3 * numbers), mask, other=0.0)
    if weight < WEIGHED:
        total = _add_programs(total, sums, weight, h, number, H, groups, chunks, numbers, mask, WEIGHED, STAGES)
        total = _add_programs(
            total, text_sums, weight, h, number, H, text_groups, text_chunks, numbers, mask, WEIGHED, STAGES
        )
    tl.store(d_weights + tl.program_id(0).to(tl.int64) * numbers + number, total, mask)


@triton.jit(do_not_specialize=COUNTS)
def convolution_kernel(
    sums, d_weight, d_bias, B, H, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    """Write d_weight (H·D, 9) and d_bias (H·D,), from sums (B·H, SUMS, D). The launch grid is (H, 9 + 1)."""
    after_previous(EARLY)
    h, row = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, WIDTH)
    total = tl.full((WIDTH,), 0.0, tl.float32)
    for first in range(0, B, BLOCK):
        image = first + tl.arange(0, BLOCK)
        places = (image.to(tl.int64) * H + h)[:, None] * (SUMS * D) + row * D + channel[None, :]
        total += over_tokens(tl.load(sums + places, (image < B)[:, None] & (channel < D)[None, :], other=0.0))
    channels = h * D + channel
    if row == BIAS_SUM:
        tl.store(d_bias + channels, total, channel < D)
    else:
        tl.store(d_weight + channels * 9 + row, total, channel < D)


@triton.jit(do_not_specialize=("rows0", "rows1", "rows2", "rows3"))
def gains_kernel(
    parts0, parts1, parts2, parts3, d_gains, rows0, rows1, rows2, rows3,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Write d_gains (gains, D): of every gain the sum of its parts (rows, D). The launch grid is (gains, 1)."""
    after_previous(EARLY)
    gain = tl.program_id(0)
    parts = tl.where(gain < 2, tl.where(gain == 0, parts0, parts1), tl.where(gain == 2, parts2, parts3))
    rows = tl.where(gain < 2, tl.where(gain == 0, rows0, rows1), tl.where(gain == 2, rows2, rows3))
    channel = tl.arange(0, WIDTH)
    total = tl.full((WIDTH,), 0.0, tl.float32)
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        mask = (row < rows)[:, None] & (channel < D)[None, :]
        total += over_tokens(tl.load(parts + row[:, None] * D + channel[None, :], mask, other=0.0))
    tl.store(d_gains + gain * D + channel, total, channel < D)


def weight_gradients(d_stepped: Tensor, sums: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The gradients of all three weights (3, H, D, D), in `dtype`.

    Args:
        d_stepped: (B, H, 3, D, D), from `launch_apply_backward`.
        sums: those of the image and, if any, of the text, from `launch_accumulate_backward`.
    """
    B, H, _, D, _ = d_stepped.shape
    total = d_stepped.new_empty(3, H, D, D, dtype=dtype)
    text = sums[1] if len(sums) > 1 else None
    launch(
        *(weights_kernel, (3 * H, ceil_div(D * D, WEIGHTS_TILE.block)), d_stepped, WEIGHTS_TILE),
        *(d_stepped, sums[0], sums[0] if text is None else text, total),
        *(B, H, sums[0].shape[0], sums[0].shape[2], *((0, 0) if text is None else (text.shape[0], text.shape[2]))),
        *(D * D, sums[0].shape[3], WEIGHTS_TILE.block, WEIGHTS_TILE.stages),
    )
    return total


def convolution_gradients(sums: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of a convolution's weight (H·D, 1, 3, 3) and bias (H·D,), from sums (B·H, SUMS, D)."""
    D = sums.shape[2]
    H = bias.shape[0] // D
    d_weight, d_bias = sums.new_empty(weight.shape, dtype=weight.dtype), sums.new_empty(bias.shape, dtype=bias.dtype)
    launch(
        *(convolution_kernel, (H, BIAS_SUM.value + 1), sums, CONV_TILE),
        *(sums, d_weight, d_bias, sums.shape[0] // H, H, D, padded_width(D), CONV_TILE.block),
    )
    return d_weight, d_bias


def gain_gradients(parts: Sequence[Tensor]) -> Tensor:
    """The gradients (gains, D) in float32 of up to MOST_GAINS gains, from what their programs wrote, (B·H, chunks, D)
    each."""
    D = parts[0].shape[2]
    d_gains = parts[0].new_empty(len(parts), D)
    every = [*parts, *[parts[0]] * (MOST_GAINS - len(parts))]
    launch(
        *(gains_kernel, (len(parts), 1), d_gains, GAINS_TILE),
        *(*every, d_gains, *(each.shape[0] * each.shape[1] for each in every)),
        *(D, padded_width(D), GAINS_TILE.block),
    )
    return d_gains
