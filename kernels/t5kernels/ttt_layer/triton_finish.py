# pyright: reportGeneralTypeIssues=false
# (The body of a kernel is Triton's language, which has no types that pyright could check.)
"""The gradients of all parameters by one launch: the last sums of the backward, over images and programs.

PyTorch could add them, too. It is a kernel so that the whole backward consists of launches that a plan can hold. The
order of additions is fixed.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from t5kernels.launch import Tile, ceil_div, launch, padded_width
from t5kernels.reductions import over_tokens
from t5kernels.tokens import COUNTS, after_previous
from t5kernels.ttt.triton import Inner
from t5kernels.ttt_layer.triton_launch import BackwardSums, GainSums
from t5kernels.ttt_layer.triton_prepare import BIAS_SUM, SUMS

TILE = Tile(block=1024, warps=4, stages=4)  # numbers of a weight that a program adds
ROWS = 4096  # numbers that a program adds at a time for a channel's gradients
CONV_ROWS = tl.constexpr(BIAS_SUM.value + 1)  # of the SUMS, those that are gradients of a convolution


@triton.jit
def _weight_gradients(
    of_queries, sums, d_weights, program, B, H, groups, chunks, numbers, of_queries_h,
    QUERIED: tl.constexpr, FIRST: tl.constexpr, WEIGHED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write a block of d_weights (weights, H, numbers).

    of_queries: for the first QUERIED weights, `numbers` each at the start of every `of_queries_h` of an image and head;
    their sum over images is subtracted. sums: (groups, H, chunks, WEIGHED, numbers) for WEIGHED weights from the FIRST
    on; they are added.
    """
    blocks = (numbers + BLOCK - 1) // BLOCK
    matrix, number = program // blocks, (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    weight, h = matrix // H, matrix % H
    mask = number < numbers
    total = tl.full((BLOCK,), 0.0, tl.float32)
    of_queries += h * of_queries_h + weight * numbers + number
    if weight < QUERIED:
        for b in tl.range(B, num_stages=STAGES):
            total -= tl.load(of_queries + tl.cast(b, tl.int64) * (H * of_queries_h), mask, other=0.0)
    if weight >= FIRST and weight < FIRST + WEIGHED:
        of_weight = sums + (weight - FIRST) * numbers + number
        for row in tl.range(groups * chunks, num_stages=STAGES):
            place = ((row // chunks) * H + h) * chunks + row % chunks
            total += tl.load(of_weight + tl.cast(place, tl.int64) * (WEIGHED * numbers), mask, other=0.0)
    tl.store(d_weights + matrix.to(tl.int64) * numbers + number, total, mask)


@triton.jit
def _sum_of_rows(x, count, run, run_stride, stride, D: tl.constexpr, WIDTH: tl.constexpr, AT_ONCE: tl.constexpr):
    """The sum (WIDTH,) of `count` rows of D numbers: runs of `run` rows, `run_stride` from one run to the next, and
    `stride` from row to row."""
    channel = tl.arange(0, WIDTH)
    total = tl.full((WIDTH,), 0.0, tl.float32)
    for first in range(0, count, AT_ONCE):
        row = first + tl.arange(0, AT_ONCE)
        places = (row // run).to(tl.int64) * run_stride + (row % run) * stride
        mask = (row < count)[:, None] & (channel < D)[None, :]
        total += over_tokens(tl.load(x + places[:, None] + channel[None, :], mask, other=0.0))
    return total


@triton.jit(do_not_specialize=COUNTS)
def parameters_kernel(
    of_queries, weight_sums, q_sums, k_sums, gain_sums, d_parameters,
    B, H, groups, chunks, numbers, of_queries_h, heads, on_grid, q_sums_h, k_sums_h, image_chunks, text_chunks,
    WEIGHTS: tl.constexpr, QUERIED: tl.constexpr, FIRST: tl.constexpr, WEIGHED: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the weights, (WEIGHTS, H, numbers), of the convolutions and of the gains, one after the
    other.

    The launch grid is so many programs for each: WEIGHTS·H times the blocks of `numbers`; 2 · `heads` · CONV_ROWS,
    where `heads` is 0 without convolutions; and one for every gain.

    Convolutions: of queries and then of keys, weight (heads·D, 9) and bias (heads·D,). q_sums, k_sums: (B, heads,
    programs, SUMS, D), of which the first `on_grid` programs are added. Gains: (2 or 4, D), of the image's queries and
    keys and then of the text's. gain_sums: (2, B·H, image_chunks + text_chunks, D), of queries and of keys.
    """
    after_previous(EARLY)
    program = tl.program_id(0)
    conv = program - WEIGHTS * H * ((numbers + BLOCK - 1) // BLOCK)
    gain = conv - 2 * heads * CONV_ROWS
    channel = tl.arange(0, WIDTH)
    if conv < 0:
        _weight_gradients(
            of_queries, weight_sums, d_parameters, program, B, H, groups, chunks, numbers, of_queries_h,
            QUERIED, FIRST, WEIGHED, BLOCK, STAGES,
        )  # fmt: skip
    elif gain < 0:
        row, head = conv % CONV_ROWS, conv // CONV_ROWS
        h, is_key = head % heads, head >= heads
        sums, sums_h = tl.where(is_key, k_sums, q_sums), tl.where(is_key, k_sums_h, q_sums_h)
        sums += h.to(tl.int64) * sums_h + row * D
        total = _sum_of_rows(sums, B * on_grid, on_grid, heads * sums_h, SUMS * D, D, WIDTH, AT_ONCE)
        d_parameters += WEIGHTS * H * numbers + tl.where(is_key, heads * (D * CONV_ROWS), 0)
        place = (h * D + channel) * tl.where(row == BIAS_SUM, 1, 9) + tl.where(row == BIAS_SUM, heads * (D * 9), row)
        tl.store(d_parameters + place, total, channel < D)
    else:
        side, capacity = gain % 2, image_chunks + text_chunks
        own, first = tl.where(gain >= 2, text_chunks, image_chunks), tl.where(gain >= 2, image_chunks, 0)
        gain_sums += (side * (B * H)).to(tl.int64) * (capacity * D) + first * D
        total = _sum_of_rows(gain_sums, B * H * own, own, capacity * D, D, D, WIDTH, AT_ONCE)
        d_parameters += WEIGHTS * H * numbers + 2 * heads * (D * CONV_ROWS) + gain * D
        tl.store(d_parameters + channel, total, channel < D)


def parameter_gradients(
    inner: Inner,
    of_queries: Tensor,
    weight_sums: Tensor,
    q_sums: BackwardSums | None,
    k_sums: BackwardSums | None,
    gain_sums: GainSums | None,
    parameters: Sequence[Tensor],
) -> Tensor:
    """The gradients of the parameters, one after the other in one tensor; of their dtype, or float32 where they differ.

    Args:
        of_queries: (B, H, *gradients_shape), from `launch_apply_backward`.
        weight_sums: from `launch_accumulate_backward`.
        q_sums, k_sums: from `prepare_backward`; those of queries are there if there are convolutions.
        gain_sums: from `norm_backward`, if there are gains.
        parameters: the weights; then, if any, weights and biases of the convolutions; then, if any, the gains.
    """
    groups, H, chunks, weighed, D, _ = weight_sums.shape
    B, weights = of_queries.shape[0], len({*inner.of_queries, *inner.of_keys})
    dtype, width, heads, on_grid = common_dtype(parameters), D, 0, 0
    d_parameters = of_queries.new_empty(sum(p.numel() for p in parameters), dtype=dtype)
    q_rows = k_rows = gain_rows = of_queries
    if q_sums and k_sums:
        q_rows, k_rows, on_grid = q_sums.rows, k_sums.rows, q_sums.on_grid
        width, heads = q_rows.shape[3], q_rows.shape[0] // B
    gain_chunks = [0, 0]
    if gain_sums:
        gain_rows, gain_chunks = gain_sums.rows, [*gain_sums.chunks, 0][:2]
    gains = 2 * sum(each > 0 for each in gain_chunks)
    programs = weights * H * ceil_div(D * D, TILE.block) + 2 * heads * CONV_ROWS.value + gains
    padded = padded_width(width)
    launch(
        *(parameters_kernel, (programs, 1), of_queries, TILE),
        *(of_queries, weight_sums, q_rows, k_rows, gain_rows, d_parameters),
        *(B, H, groups, chunks, D * D, of_queries.stride(1)),
        *(heads, on_grid, q_rows.stride(0), k_rows.stride(0), *gain_chunks),
        *(weights, len(inner.of_queries), inner.of_keys[0], weighed),
        *(width, padded, ROWS // padded, TILE.block, TILE.stages),
    )
    return d_parameters


def common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """That of all, or float32 where they differ."""
    return tensors[0].dtype if all(t.dtype == tensors[0].dtype for t in tensors) else torch.float32
