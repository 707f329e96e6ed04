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
    chunks_of_parts,
    launch,
    like_tokens,
    lying_alike,
    padded_width,
    sum_over_chunks,
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
    return chunks_of_parts(parts, _tile_for(kernel, x)[1], x.shape[0] * x.shape[1])


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
    tile, (heads, programs), numbers = _programs("prepare", x, preparation)
    *_, chunk, _, on_grid = of_grid = numbers[:8]
    text_programs = ceil_div(text.shape[2], tile.block * chunk) if len(changed) > 1 else 0
    tensors, norm_numbers = _norm_arguments(x, preparation)
    text_tensors, text_numbers = _norm_arguments(text, text_preparation)
    weight, bias = preparation.conv[:2] if preparation.conv else (x, x)
    launch(
        *(triton_prepare.prepare_kernel, (heads, programs + text_programs), x, tile),
        *(x, *tensors, weight, bias, y, text, *text_tensors, text_y),
        *(*x.stride(), *y.stride(), *text.stride()[:3], *text_y.stride()[:3]),
        *(*norm_numbers, *text_numbers[2:4], text.shape[2], programs - on_grid, *of_grid, *numbers[8:]),
        *(tile.stages, *preparation.switches, len(changed) > 1),
    )
    return [*outs, *(x for x, _ in parts[len(changed) :])]


def prepare_backward(
    parts: Sequence[tuple[Tensor, Tensor, Preparation]],
) -> tuple[list[Tensor], Tensor | None]:
    """From the gradient dy of prepared tokens, the tokens x and their preparation, of each part of a sequence.

    The gradients of the convolution's inputs (dy itself without one); and sums (B·H, SUMS, D) over the tokens of all
    parts, with regrouped channels (B·H·D / GROUP, SUMS, GROUP); None where no part has a key norm or a convolution.
    """
    grids = [_programs("prepare_backward", _as_prepared(p, x)[0], p) for _, x, p in parts]
    idle = [preparation.norm is None and preparation.conv is None for *_, preparation in parts]
    room = sum(grid[1] for (_, grid, _), rests in zip(grids, idle, strict=True) if not rests)
    width = GROUP if parts[0][2].regrouped else parts[0][1].shape[3]
    sums = parts[0][1].new_empty(grids[0][1][0], room, triton_prepare.SUMS.value, width, dtype=torch.float32)
    gradients, free = [], 0
    for (dy, x, preparation), (tile, grid, numbers), rests in zip(parts, grids, idle, strict=True):
        dx = dy if preparation.conv is None else like_tokens(x)
        gradients.append(dx)
        if rests:
            continue
        dy, x, dx = _as_prepared(preparation, dy, x, dx)
        tensors, norm_numbers = _norm_arguments(x, preparation)
        launch(
            *(triton_prepare.prepare_backward_kernel, grid, x, tile),
            *(dy, x, *tensors, preparation.conv.weight if preparation.conv else x, dx, sums[:, free:]),
            *(*dy.stride(), *x.stride(), *dx.stride(), *norm_numbers, *numbers[:8], room, *numbers[8:]),
            *(tile.stages, *preparation.switches),
        )
        free += grid[1]
    return gradients, sum_over_chunks(sums) if room else None


def norm_backward(dn: Tensor, x: Tensor, preparation: Preparation, sums: Tensor | None) -> Tensor | None:
    """Turn dn into the gradient of x, in place. Of the gradient of the RMS norm's gain, if there is one: (B·H, chunks,
    D), to be added up.

    `sums`: those of `prepare_backward` over all tokens that the key norm is taken over.
    """
    if preparation.rms is None and preparation.norm is None:
        return None
    dn, x = _as_prepared(preparation, dn, x)
    B, H, N, D = x.shape
    width, tile = _tile_for("norm_backward", x)
    chunk, [chunks] = shares_of("norm_backward", x)
    d_gain = x.new_empty(B * H, chunks, D, dtype=torch.float32) if preparation.rms else None
    totals = x if sums is None else sums[:, triton_prepare.PLAIN_SUM.value :]
    tensors, norm_numbers = _norm_arguments(x, preparation)
    launch(
        *(triton_norms.norm_backward_kernel, (B * H, chunks), x, tile),
        *(dn, x, *tensors, totals, dn, x if d_gain is None else d_gain),
        *(*dn.stride(), *x.stride(), *dn.stride(), *norm_numbers),
        *(H, N, chunk, totals.stride(0), D, width, tile.block, tile.stages, *preparation.switches[:2]),
    )
    return d_gain


def _norm_arguments(x: Tensor, preparation: Preparation) -> tuple[tuple[Tensor, Tensor, Tensor], tuple]:
    """Gain, factors and sums (x stands for a tensor that is not read); the numbers from `factors_h` to `eps`."""
    gain, factors = preparation.rms or (x, x)
    sums, shares, tokens, eps = preparation.norm or (x, 0, 0, 0.0)
    return (gain, factors, sums), (factors.stride(0), _capacity(sums), shares, tokens, eps)


def _programs(kernel: str, x: Tensor, preparation: Preparation) -> tuple[Tile, tuple[int, int], tuple[int, ...]]:
    """The tile, the launch grid, and the kernel's numbers from `rows` to BLOCK, for tokens x (B, H, N, D)."""
    B, H, N, D = x.shape
    width, tile = _tile_for(kernel, x)
    rows, columns, prefix = preparation.conv.grid if preparation.conv else (0, 0, 0)
    segments, outside = ceil_div(columns, tile.block), ceil_div(N - rows * columns, tile.block)
    chunk = blocks_of(x, tile, B * H * (segments or 1), rows or outside)
    on_grid = segments * ceil_div(rows, chunk)
    programs = (B * H, on_grid + ceil_div(outside, chunk))
    return tile, programs, (rows, columns, prefix, H, N, chunk, segments or 1, on_grid, D, width, tile.block)


def _tile_for(kernel: str, x: Tensor) -> tuple[int, Tile]:
    """The padded head width, and the tile."""
    width = padded_width(x.shape[3])
    return width, TILES[kernel][width]
