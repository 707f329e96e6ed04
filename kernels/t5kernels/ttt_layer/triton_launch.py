"""How tokens are prepared for the inner model, and the launches of the kernels that do it and that lead back.

A token's preparation is up to three steps: an RMS norm of each query or key, the key norm over all tokens, and a
convolution over the image's grid. Shapes: B batch, H heads, N tokens, D head width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from t5kernels.launch import (
    Tile,
    blocks_of,
    ceil_div,
    chunks_of,
    launch,
    like_tokens,
    lying_alike,
    padded_width,
)
from t5kernels.ttt_layer import triton_norms, triton_prepare

# By kernel, then by the head width padded to a power of two. `prepare` and its backward take blocks of columns.
TILES = {
    "statistics": {width: Tile(block=4096 // width, warps=4, stages=3, resident=4) for width in (32, 64, 128)},
    "prepare": {
        32: Tile(block=32, warps=4, stages=3, resident=3),
        64: Tile(block=16, warps=4, stages=3, resident=3),
        128: Tile(block=4, warps=2, stages=3, resident=6),
    },
    "prepare_backward": {
        32: Tile(block=8, warps=2, stages=3, resident=6),
        64: Tile(block=4, warps=2, stages=3, resident=6),
        128: Tile(block=2, warps=2, stages=3, resident=6),
    },
    "norm_backward": {width: Tile(block=4096 // width, warps=8, stages=3, resident=2) for width in (32, 64, 128)},
}

GROUP = 64  # channels
# Tokens without a place in the grid that `prepare` and its backward take at a time, by padded width. Blocks of columns
# are smaller because of all that is kept of them. With 16 tokens, at any width, the backward spills registers.
OUTSIDE = {32: 64, 64: 32, 128: 8}


class Convolution(NamedTuple):
    """A convolution's weight (H·D, 1, 3, 3) and bias (H·D,), and its grid: rows, columns, tokens before it."""

    weight: Tensor
    bias: Tensor
    grid: tuple[int, int, int]


class RmsNorm(NamedTuple):
    """An RMS norm of each token: its gain (D,), and the tokens' factors (B·H, N), rows of a larger tensor."""

    gain: Tensor
    factors: Tensor


class KeyNorm(NamedTuple):
    """The norm over `tokens` keys, whose sums `shares` programs wrote to `sums` (B·H, capacity, STATISTICS, D)."""

    sums: Tensor
    shares: int
    tokens: int
    eps: float


class Preparation(NamedTuple):
    """What is done to queries or keys before the inner model gets them.

    Attributes:
        regrouped: the kernels take the channels of all heads GROUP at a time, as if they were heads of that width (see
            `can_regroup`); KeyNorm.sums are laid out accordingly.
    """

    rms: RmsNorm | None
    norm: KeyNorm | None
    conv: Convolution | None
    regrouped: bool = False

    @property
    def switches(self) -> tuple[bool, bool, bool]:
        """The kernels' constants RMS, NORM and CONV."""
        return self.rms is not None, self.norm is not None, self.conv is not None


def can_regroup(*tokens: Tensor) -> bool:
    """Whether channels of these tokens (B, H, N, D) can be taken GROUP at a time, whichever head they belong to.

    That is right where nothing looks across the channels of a head, and spares heads whose width is no power of two
    the channels that would be added to them. The heads of a token have to lie side by side.
    """
    _, H, _, D = tokens[0].shape
    return padded_width(D) != D and H * D % GROUP == 0 and all(t.stride(1) == D * t.stride(3) for t in tokens)


def regrouped(x: Tensor) -> Tensor:
    """(B, H, N, D) as (B, H·D / GROUP, N, GROUP)."""
    B, H, N, D = x.shape
    b, _, n, d = x.stride()
    return x.as_strided((B, H * D // GROUP, N, GROUP), (b, GROUP * d, n, d))


def _as_prepared(preparation: Preparation, *tokens: Tensor) -> list[Tensor]:
    """The tokens as the kernels of this preparation take them."""
    return [regrouped(t) if preparation.regrouped else t for t in tokens]


def shares_of(kernel: str, *parts: Tensor) -> tuple[int, list[int]]:
    """Tokens that a program takes, and programs a head for each part of a sequence."""
    x = parts[0]
    return chunks_of(parts, _tile_for(kernel, x)[1], x.shape[0] * x.shape[1])[:2]


def take_statistics(
    parts: Sequence[tuple[Tensor, Preparation]], first: Tensor, first_rms: RmsNorm | None, sums: Tensor, rms_eps: float
) -> None:
    """Write the factors and the sums of the tokens of a sequence's parts, as far as their preparation uses them.

    Args:
        parts: tokens and preparation of each.
        first: tokens (B, H, N, D) whose first is subtracted before squares are summed; first_rms: their RMS norm.
        sums: as KeyNorm has them, from the place on where theirs are.
    """
    preparation = parts[0][1]
    *tokens, first = _as_prepared(preparation, *lying_alike([x for x, _ in parts]), first)
    x, text = tokens[0], tokens[-1]
    B, H, N, D = x.shape
    width, tile = _tile_for("statistics", x)
    chunk, chunks = shares_of("statistics", *tokens)
    (gain, factors), (text_gain, text_factors) = (parts[i][1].rms or (x, x) for i in (0, -1))
    b, h, _, d = first.stride()
    launch(
        *(triton_norms.statistics_kernel, (B * H, sum(chunks)), x, tile),
        *(x, text, gain, text_gain, first, first_rms.gain if first_rms else x, sums, factors, text_factors),
        *(*x.stride(), *text.stride()[:3], b, h, d, factors.stride(0)),
        *(H, N, text.shape[2], chunk, chunks[0], _capacity(sums), sums.shape[1], rms_eps),
        *(D, width, tile.block, tile.stages, *preparation.switches[:2], len(parts) > 1),
    )


def _capacity(sums: Tensor) -> int:
    """For how many programs a head there is room in the tensor of which `sums` is a part."""
    return sums.stride(0) // (triton_norms.STATISTICS.value * sums.shape[3])


def prepared(parts: Sequence[tuple[Tensor, Preparation]]) -> list[Tensor]:
    """The tokens of a sequence's parts as the inner model gets them, by one launch. A part to which nothing is done is
    given back itself; the text's never have more done to them than the image's."""
    changed = [(x, preparation) for x, preparation in parts if any(preparation.switches)]
    if not changed:
        return [x for x, _ in parts]
    preparation, text_preparation = changed[0][1], changed[-1][1]
    tokens = lying_alike([x for x, _ in changed])
    outs = [like_tokens(x) for x in tokens]
    xs, ys = _as_prepared(preparation, *tokens), _as_prepared(preparation, *outs)
    x, text, y, text_y = xs[0], xs[-1], ys[0], ys[-1]
    programs = _programs("prepare", xs, preparation)
    tensors, norm_numbers = _norm_arguments(x, preparation)
    text_tensors, text_numbers = _norm_arguments(text, text_preparation)
    weight, bias = preparation.conv[:2] if preparation.conv else (x, x)
    launch(
        *(triton_prepare.prepare_kernel, programs.grid, x, programs.tile),
        *(x, *tensors, weight, bias, y, text, *text_tensors, text_y),
        *(*x.stride(), *y.stride(), *text.stride()[:3], *text_y.stride()[:3]),
        *(*norm_numbers, *text_numbers[2:4], *programs.numbers, *programs.constants),
        *(*preparation.switches, len(changed) > 1),
    )
    return [*outs, *(x for x, _ in parts[len(changed) :])]


class BackwardSums(NamedTuple):
    """What the programs of `prepare_backward` sum.

    Attributes:
        rows: (B·H, programs, SUMS, D), with regrouped channels (B·H·D / GROUP, programs, SUMS, GROUP).
        on_grid, image: the first of the programs, which have rows of the grid, and which have tokens of the image.
    """

    rows: Tensor
    on_grid: int
    image: int


def prepare_backward(
    parts: Sequence[tuple[Tensor, Tensor, Preparation]],
) -> tuple[list[Tensor], BackwardSums | None]:
    """From the gradient dy of prepared tokens, the tokens x and their preparation, of each part of a sequence.

    The gradients of the convolution's inputs (dy itself without one); and sums over tokens, None where no part has a
    key norm or a convolution. The text's never has one that the image's has not.
    """
    summed = [part for part in parts if part[2].norm or part[2].conv]
    gradients = [dy for dy, *_ in parts]
    if not summed:
        return gradients, None
    preparation, text_preparation = summed[0][2], summed[-1][2]
    if preparation.conv:
        gradients[0] = like_tokens(parts[0][1])
    [dx] = _as_prepared(preparation, gradients[0])
    dys = _as_prepared(preparation, *(dy for dy, *_ in summed))
    xs = _as_prepared(preparation, *lying_alike([x for _, x, _ in summed]))
    (dy, text_dy), (x, text) = ((each[0], each[-1]) for each in (dys, xs))
    programs = _programs("prepare_backward", xs, preparation)
    sums = x.new_empty(*programs.grid, triton_prepare.SUMS.value, x.shape[3], dtype=torch.float32)
    tensors, norm_numbers = _norm_arguments(x, preparation)
    text_tensors, text_numbers = _norm_arguments(text, text_preparation)
    launch(
        *(triton_prepare.prepare_backward_kernel, programs.grid, x, programs.tile),
        *(dy, x, *tensors, preparation.conv.weight if preparation.conv else x, dx, text_dy, text, *text_tensors, sums),
        *(*dy.stride(), *x.stride(), *dx.stride(), *text_dy.stride()[:3], *text.stride()[:3]),
        *(*norm_numbers, *text_numbers[2:4], *programs.numbers, *programs.constants),
        *(*preparation.switches, len(summed) > 1),
    )
    return gradients, BackwardSums(sums, programs.on_grid, programs.image)


class GainSums(NamedTuple):
    """Partial sums of the gains' gradients of queries and of keys.

    Attributes:
        rows: (2, B·H, chunks of all parts, D) float32.
        chunks: those of each part.
    """

    rows: Tensor
    chunks: list[int]


def empty_gain_sums(parts: Sequence[Tensor]) -> GainSums:
    """Room for what `norm_backward` of queries and keys sums, for the tokens (B, H, N, D) of each part."""
    B, H, _, D = parts[0].shape
    _, chunks = shares_of("norm_backward", *parts)
    return GainSums(parts[0].new_empty(2, B * H, sum(chunks), D, dtype=torch.float32), chunks)


def norm_backward(
    parts: Sequence[tuple[Tensor, Tensor, Preparation]],
    sums: BackwardSums | None,
    apart: bool,
    gain_rows: Tensor | None,
) -> None:
    """Turn the gradient dn of normalized tokens into that of x, in place, for dn, x and preparation of each part.

    Args:
        sums: from `prepare_backward`.
        apart: whether each part has a key norm of its own.
        gain_rows: gets those of GainSums, where there is an RMS norm.
    """
    preparation, text_preparation = parts[0][2], parts[-1][2]
    if preparation.rms is None and preparation.norm is None:
        return
    dns = _as_prepared(preparation, *(dn for dn, *_ in parts))
    xs = _as_prepared(preparation, *lying_alike([x for _, x, _ in parts]))
    (dn, text_dn), (x, text) = ((each[0], each[-1]) for each in (dns, xs))
    B, H, N, D = x.shape
    width, tile = _tile_for("norm_backward", x)
    chunk, chunks = shares_of("norm_backward", *xs)
    totals, every, own = x, 0, 0
    if preparation.norm and sums:
        totals, every, own = sums.rows[:, :, triton_prepare.PLAIN_SUM.value :], sums.rows.shape[1], sums.image
    tensors, norm_numbers = _norm_arguments(x, preparation)
    text_tensors, text_numbers = _norm_arguments(text, text_preparation)
    launch(
        *(triton_norms.norm_backward_kernel, (B * H, sum(chunks)), x, tile),
        *(dn, x, *tensors, text_dn, text, *text_tensors, totals, x if gain_rows is None else gain_rows),
        *(*dn.stride(), *x.stride(), *text_dn.stride()[:3], *text.stride()[:3], *norm_numbers, *text_numbers[2:4]),
        *(*totals.stride()[:2], own if apart else every, own if apart else 0, every),
        *(H, N, text.shape[2], chunk, chunks[0]),
        *(D, width, tile.block, tile.stages, *preparation.switches[:2], len(parts) > 1),
    )


def _norm_arguments(x: Tensor, preparation: Preparation) -> tuple[tuple[Tensor, Tensor, Tensor], tuple]:
    """Gain, factors and sums (x stands for a tensor that is not read); the numbers from `factors_h` to `eps`."""
    gain, factors = preparation.rms or (x, x)
    sums, shares, tokens, eps = preparation.norm or (x, 0, 0, 0.0)
    return (gain, factors, sums), (factors.stride(0), _capacity(sums), shares, tokens, eps)


class _Programs(NamedTuple):
    """How the kernels that convolve share out the tokens of a sequence's parts.

    Attributes:
        grid: of the launch; of each head's programs the first `on_grid` have rows of the tokens' grid, and the first
            `image` have tokens of the image.
        numbers: the kernels' arguments from T to `chunk_outside`; constants: those from D to BLOCK_OUTSIDE.
    """

    tile: Tile
    grid: tuple[int, int]
    on_grid: int
    image: int
    numbers: tuple[int, ...]
    constants: tuple[int, ...]


def _programs(kernel: str, parts: Sequence[Tensor], preparation: Preparation) -> _Programs:
    """The programs for the tokens (B, H, N, D) of an image and, if any, of a text."""
    x, *texts = parts
    B, H, N, D = x.shape
    width, tile = _tile_for(kernel, x)
    rows, columns, prefix = preparation.conv.grid if preparation.conv else (0, 0, 0)
    segments, block_outside = ceil_div(columns, tile.block), OUTSIDE[width]
    blocks = [ceil_div(N - rows * columns, block_outside), *(ceil_div(t.shape[2], block_outside) for t in texts)]
    chunk = blocks_of(x, tile, B * H * segments, rows) if segments else 1
    chunk_outside = blocks_of(x, tile, B * H, *blocks) if any(blocks) else 1
    on_grid, (outside, *of_text) = segments * ceil_div(rows, chunk), (ceil_div(n, chunk_outside) for n in blocks)
    grid = B * H, on_grid + outside + sum(of_text)
    numbers = parts[-1].shape[2], outside, rows, columns, prefix, H, N, chunk, segments or 1, on_grid, chunk_outside
    constants = D, width, tile.block, tile.stages, block_outside
    return _Programs(tile, grid, on_grid, on_grid + outside, numbers, constants)


def _tile_for(kernel: str, x: Tensor) -> tuple[int, Tile]:
    """The padded head width, and the tile."""
    width = padded_width(x.shape[3])
    return width, TILES[kernel][width]
