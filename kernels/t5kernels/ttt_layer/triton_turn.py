# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# (The body of a kernel is Triton's language: constants decide which branches exist, and its loops have no types.)
"""Triton kernels of rotary positions: tokens are normalized (RMS), turned, and summed up for the key norm, in one pass.

Take one token and a pair (a, b) of its channels, whose angle has sine s and cosine c; u = f g x as in triton_norms.py.
The turned pair is

    a' = c u_a - s u_b,    b' = c u_b + s u_a.

Backward, given da' and db':

    du_a = c da' + s db',    du_b = c db' - s da',

and from du to dx and dg as in triton_norms.py. The channels of all pairs' first and second members are two blocks
(BLOCK, WIDTH / 2), so that no channel is looked for in another thread. Tokens without a position have s = 0 and c = 1.
"""

import triton
import triton.language as tl

from t5kernels.reductions import over_channels, over_tokens
from t5kernels.tokens import COUNTS, after_previous, own_share, own_tokens, start_of_head
from t5kernels.ttt_layer.triton_norms import STATISTICS


@triton.jit
def _pairs(D: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr):
    """The channels (PAIRS,) of the first members, of the second ones, and whether there are such channels."""
    pair = tl.arange(0, PAIRS)
    if HALF:
        return pair, pair + D // 2, pair < D // 2
    return 2 * pair, 2 * pair + 1, pair < D // 2


@triton.jit
def _load_row_of_pairs(x, first, second, exists, stride):
    """A row of a matrix, each half (1, PAIRS), float32."""
    return (
        tl.load(x + first * stride, exists, other=0.0).to(tl.float32)[None, :],
        tl.load(x + second * stride, exists, other=0.0).to(tl.float32)[None, :],
    )


@triton.jit
def _store_row_of_pairs(x, a, b, first, second, exists):
    tl.store(x + first, a, exists)
    tl.store(x + second, b, exists)


@triton.jit
def _angles(table, token, prefix, N, stride, first, exists, D: tl.constexpr):
    """Sines and cosines (BLOCK, PAIRS) of tokens (BLOCK,); table: pointer to the row of the first that is turned."""
    mask = ((token >= prefix) & (token < N))[:, None] & exists[None, :]
    at = table + (token - prefix)[:, None] * stride + first[None, :]
    return tl.load(at, mask, other=0.0).to(tl.float32), tl.load(at + D, mask, other=1.0).to(tl.float32)


@triton.jit
def _factor(a, b, eps, D: tl.constexpr):
    """The RMS norm's f (BLOCK, 1) of tokens."""
    return (1 / tl.sqrt((over_channels(a * a) + over_channels(b * b)) / D + eps))[:, None]


@triton.jit
def _turn(a, b, sine, cosine):
    return a * cosine - b * sine, b * cosine + a * sine


@triton.jit
def _first_token(
    x, gain, table, first, second, exists, x_d, prefix, table_n, eps, D: tl.constexpr, RMS: tl.constexpr
):  # fmt: skip
    """A head's first token, turned, each half (1, PAIRS)."""
    a, b = _load_row_of_pairs(x, first, second, exists, x_d)
    if RMS:
        gain_a, gain_b = _load_row_of_pairs(gain, first, second, exists, 1)
        factor = _factor(a, b, eps, D)
        a, b = a * factor * gain_a, b * factor * gain_b
    sine, cosine = _angles(table, tl.arange(0, 1), prefix, 1, table_n, first, exists, D)
    return _turn(a, b, sine, cosine)


@triton.jit(do_not_specialize=COUNTS)
def turn_kernel(
    x, gain, table, y, text_x, text_gain, text_table, text_y, sums,
    x_b, x_h, x_n, x_d, y_b, y_h, y_n, y_d, table_h, table_n,
    tx_b, tx_h, tx_n, ty_b, ty_h, ty_n, text_table_h, text_table_n,
    prefix, text_prefix, H, N, T, chunk, chunks, capacity, free, eps,
    D: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, HALF: tl.constexpr,
    RMS: tl.constexpr, NORM: tl.constexpr, TEXT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Write turned tokens, and with NORM the statistics of them as triton_norms.statistics_kernel does.

    The launch grid, and image and text, are as there. table: (H or 1, N - prefix, 2 D) of any float dtype, heads
    `table_h` apart and tokens `table_n`. With NORM, s is the image's first token.
    """
    after_previous(EARLY)
    index, part = tl.program_id(0), tl.program_id(1)
    b, h = index // H, index % H
    first, second, exists = _pairs(D, PAIRS, HALF)
    if NORM:
        at_first, at_table = start_of_head(x, b, h, x_b, x_h), table + h.to(tl.int64) * table_h
        shift_a, shift_b = _first_token(
            at_first, gain, at_table, first, second, exists, x_d, prefix, table_n, eps, D, RMS
        )  # fmt: skip
        total_a, total_b = tl.full((BLOCK, PAIRS), 0.0, tl.float32), tl.full((BLOCK, PAIRS), 0.0, tl.float32)
        square_a, square_b = tl.full((BLOCK, PAIRS), 0.0, tl.float32), tl.full((BLOCK, PAIRS), 0.0, tl.float32)
    is_text = part >= chunks
    x, x_b, x_h, x_n = own_tokens(x, x_b, x_h, x_n, text_x, tx_b, tx_h, tx_n, is_text, TEXT)
    y, y_b, y_h, y_n = own_tokens(y, y_b, y_h, y_n, text_y, ty_b, ty_h, ty_n, is_text, TEXT)
    if TEXT:
        gain, table = tl.where(is_text, text_gain, gain), tl.where(is_text, text_table, table)
        table_h, table_n = tl.where(is_text, text_table_h, table_h), tl.where(is_text, text_table_n, table_n)
        prefix = tl.where(is_text, text_prefix, prefix)
    part, N = own_share(part, chunks, N, T, TEXT)
    N = tl.minimum(N, part * chunk + chunk)  # chunks are those of `statistics`, and end where they please
    x, y = start_of_head(x, b, h, x_b, x_h), start_of_head(y, b, h, y_b, y_h)
    table += h.to(tl.int64) * table_h
    if RMS:
        gain_a, gain_b = _load_row_of_pairs(gain, first, second, exists, 1)
    for start in tl.range(part * chunk, part * chunk + chunk, BLOCK, num_stages=STAGES):
        token = start + tl.arange(0, BLOCK)
        mask = (token < N)[:, None] & exists[None, :]
        at = x + token.to(tl.int64)[:, None] * x_n
        u_a = tl.load(at + first[None, :] * x_d, mask, other=0.0).to(tl.float32)
        u_b = tl.load(at + second[None, :] * x_d, mask, other=0.0).to(tl.float32)
        if RMS:
            factor = _factor(u_a, u_b, eps, D)
            u_a, u_b = u_a * factor * gain_a, u_b * factor * gain_b
        sine, cosine = _angles(table, token, prefix, N, table_n, first, exists, D)
        u_a, u_b = _turn(u_a, u_b, sine, cosine)
        u_a, u_b = u_a.to(y.dtype.element_ty), u_b.to(y.dtype.element_ty)
        at = y + token.to(tl.int64)[:, None] * y_n
        tl.store(at + first[None, :] * y_d, u_a, mask)
        tl.store(at + second[None, :] * y_d, u_b, mask)
        if NORM:
            u_a = tl.where(mask, u_a.to(tl.float32) - shift_a, 0.0)
            u_b = tl.where(mask, u_b.to(tl.float32) - shift_b, 0.0)
            total_a, total_b = total_a + u_a, total_b + u_b
            square_a, square_b = square_a + u_a * u_a, square_b + u_b * u_b
    if NORM:
        sums += index.to(tl.int64) * capacity * (STATISTICS * D)
        own = sums + tl.program_id(1) * (STATISTICS * D)
        _store_row_of_pairs(own, over_tokens(total_a), over_tokens(total_b), first, second, exists)
        _store_row_of_pairs(own + D, over_tokens(square_a), over_tokens(square_b), first, second, exists)
        _store_row_of_pairs(own + 2 * D, over_tokens(shift_a), over_tokens(shift_b), first, second, exists)
        nothing = tl.full((PAIRS,), 0.0, tl.float32)
        for unused in range(tl.program_id(1) + tl.num_programs(1), free, tl.num_programs(1)):
            own = sums + unused * (STATISTICS * D)
            _store_row_of_pairs(own, nothing, nothing, first, second, exists)
            _store_row_of_pairs(own + D, nothing, nothing, first, second, exists)
            _store_row_of_pairs(own + 2 * D, nothing, nothing, first, second, exists)


@triton.jit(do_not_specialize=COUNTS)
def turn_backward_kernel(
    dy, x, gain, table, dx, text_dy, text_x, text_gain, text_table, text_dx, parts,
    dy_b, dy_h, dy_n, dy_d, x_b, x_h, x_n, x_d, dx_b, dx_h, dx_n, dx_d, table_h, table_n,
    tdy_b, tdy_h, tdy_n, tx_b, tx_h, tx_n, tdx_b, tdx_h, tdx_n, text_table_h, text_table_n,
    prefix, text_prefix, H, N, T, chunk, chunks, capacity, eps,
    D: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, HALF: tl.constexpr,
    RMS: tl.constexpr, TEXT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Write dx, and with RMS the programs' parts of dg. The launch grid is the same.

    parts: (2 `capacity`, B·H, D) float32: one place for each of the image's chunks, then the text's; those that no
    program uses are filled with 0.
    """
    after_previous(EARLY)
    index, part = tl.program_id(0), tl.program_id(1)
    b, h = index // H, index % H
    first, second, exists = _pairs(D, PAIRS, HALF)
    is_text = part >= chunks
    dy, dy_b, dy_h, dy_n = own_tokens(dy, dy_b, dy_h, dy_n, text_dy, tdy_b, tdy_h, tdy_n, is_text, TEXT)
    x, x_b, x_h, x_n = own_tokens(x, x_b, x_h, x_n, text_x, tx_b, tx_h, tx_n, is_text, TEXT)
    dx, dx_b, dx_h, dx_n = own_tokens(dx, dx_b, dx_h, dx_n, text_dx, tdx_b, tdx_h, tdx_n, is_text, TEXT)
    if TEXT:
        gain, table = tl.where(is_text, text_gain, gain), tl.where(is_text, text_table, table)
        table_h, table_n = tl.where(is_text, text_table_h, table_h), tl.where(is_text, text_table_n, table_n)
        prefix = tl.where(is_text, text_prefix, prefix)
    part, N = own_share(part, chunks, N, T, TEXT)
    dy, x = start_of_head(dy, b, h, dy_b, dy_h), start_of_head(x, b, h, x_b, x_h)
    dx, table = start_of_head(dx, b, h, dx_b, dx_h), table + h.to(tl.int64) * table_h
    if RMS:
        gain_a, gain_b = _load_row_of_pairs(gain, first, second, exists, 1)
        sum_a, sum_b = tl.full((BLOCK, PAIRS), 0.0, tl.float32), tl.full((BLOCK, PAIRS), 0.0, tl.float32)
    for start in tl.range(part * chunk, part * chunk + chunk, BLOCK, num_stages=STAGES):
        token = start + tl.arange(0, BLOCK)
        mask = (token < N)[:, None] & exists[None, :]
        at = dy + token.to(tl.int64)[:, None] * dy_n
        d_a = tl.load(at + first[None, :] * dy_d, mask, other=0.0).to(tl.float32)
        d_b = tl.load(at + second[None, :] * dy_d, mask, other=0.0).to(tl.float32)
        sine, cosine = _angles(table, token, prefix, N, table_n, first, exists, D)
        d_a, d_b = _turn(d_a, d_b, -sine, cosine)
        if RMS:
            at = x + token.to(tl.int64)[:, None] * x_n
            fx_a = tl.load(at + first[None, :] * x_d, mask, other=0.0).to(tl.float32)
            fx_b = tl.load(at + second[None, :] * x_d, mask, other=0.0).to(tl.float32)
            factor = _factor(fx_a, fx_b, eps, D)
            fx_a, fx_b = fx_a * factor, fx_b * factor
            sum_a, sum_b = sum_a + d_a * fx_a, sum_b + d_b * fx_b
            d_a, d_b = d_a * gain_a, d_b * gain_b
            mean = ((over_channels(d_a * fx_a) + over_channels(d_b * fx_b)) / D)[:, None]
            d_a, d_b = factor * (d_a - fx_a * mean), factor * (d_b - fx_b * mean)
        at = dx + token.to(tl.int64)[:, None] * dx_n
        tl.store(at + first[None, :] * dx_d, d_a.to(dx.dtype.element_ty), mask)
        tl.store(at + second[None, :] * dx_d, d_b.to(dx.dtype.element_ty), mask)
    if RMS:
        own, place = tl.where(is_text, tl.num_programs(1) - chunks, chunks), tl.where(is_text, capacity, 0) + part
        rows = tl.num_programs(0)
        at = parts + (tl.cast(place, tl.int64) * rows + index) * D
        _store_row_of_pairs(at, over_tokens(sum_a), over_tokens(sum_b), first, second, exists)
        nothing = tl.full((PAIRS,), 0.0, tl.float32)
        for _unused in range(part + own, capacity, own):
            at += tl.cast(own, tl.int64) * rows * D
            _store_row_of_pairs(at, nothing, nothing, first, second, exists)
