# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# (The body of a kernel is Triton's language: constants decide which branches exist, and its loops have no types.)
"""Triton kernels that prepare tokens for `ttt`: they normalize, convolve 3×3 over the image's grid, and lead back.

Take one image, head and channel, and let n be the normalized tokens (triton_norms.py says how). For a token p with a
place in the grid

    y[p] = n[p] + bias + sum_o w[o] n[p + o],    o over the 9 places around p, n = 0 outside the grid;

and y = n for tokens before and after the grid. Backward, given dy:

    dn[p] = dy[p] + sum_o w[o] dy[p - o],    dw[o] = sum_p n[p] dy[p - o],    dbias = sum_p dy[p],

where p runs over the grid in what belongs to the convolution.

A program of a convolution has BLOCK columns of the grid and goes down its rows. It reads a row once, with its left and
right neighbors, and adds what the row contributes to three rows of the result: the one above, which is then complete,
its own, and the one below. Further programs take the tokens without a place. Programs write their sums side by side and
the caller adds them. There are no atomics, so results are the same from run to run.
"""

import triton
import triton.language as tl

from t5kernels.reductions import over_tokens
from t5kernels.tokens import (
    COUNTS,
    after_previous,
    own_share,
    own_tokens,
    start_of_head,
    token_mask,
    token_pointers,
)
from t5kernels.ttt_layer.triton_norms import load_norm, load_row, store_row

# The rows of a program's partial sums: nine of dw, then dbias, sum dn, sum dn n.
BIAS_SUM = tl.constexpr(9)
PLAIN_SUM = tl.constexpr(10)
PRODUCT_SUM = tl.constexpr(11)
SUMS = tl.constexpr(12)


@triton.jit
def _load_normalized(x, mask, factors, factor_mask, scale, offset, RMS: tl.constexpr, NORM: tl.constexpr):
    """n of tokens, 0 where the mask is false. x: their pointers; factors: pointers (BLOCK,) to their f; scale: r g."""
    n = tl.load(x, mask, other=0.0).to(tl.float32)
    if RMS:
        n = n * tl.load(factors, factor_mask, other=0.0)[:, None] * scale
    elif NORM:
        n = n * scale
    if NORM:
        n = tl.where(mask, n + offset, 0.0)
    return n


@triton.jit
def _load_scales(
    gain, sums, index, capacity, shares, count, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, RMS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """r g and c, each (1, WIDTH)."""
    scale, offset = load_norm(sums, index, capacity, shares, count, eps, D, WIDTH, NORM)
    if RMS:
        scale *= load_row(gain, 0, D, WIDTH)
    return scale, offset


@triton.jit
def _places(weight, h, row: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """A head's weights of the three places in a row of the convolution's window, each (1, WIDTH)."""
    channel = tl.arange(0, WIDTH)
    weight += (h * D + channel) * 9 + row * 3
    return (
        tl.load(weight, channel < D, other=0.0).to(tl.float32)[None, :],
        tl.load(weight + 1, channel < D, other=0.0).to(tl.float32)[None, :],
        tl.load(weight + 2, channel < D, other=0.0).to(tl.float32)[None, :],
    )


@triton.jit
def _columns_of(row, first, last, columns):
    """How many columns a row has: none if it is not one of the rows from `first` to before `last`."""
    return tl.where((row >= first) & (last > row), columns, 0)


@triton.jit
def _load_three(x, stride_n, factors, column, columns, D: tl.constexpr, WIDTH: tl.constexpr, RMS: tl.constexpr):
    """f x of the left neighbors of a row's tokens, of the tokens and of their right neighbors, float32, 0 outside the
    row's `columns`. x, factors: pointers to the tokens and their f."""
    inside = column < columns
    left = tl.load(x - stride_n, token_mask(inside & (column > 0), D, WIDTH), other=0.0)
    own = tl.load(x, token_mask(inside, D, WIDTH), other=0.0)
    right = tl.load(x + stride_n, token_mask(column + 1 < columns, D, WIDTH), other=0.0)
    left, own, right = left.to(tl.float32), own.to(tl.float32), right.to(tl.float32)
    if RMS:
        left *= tl.load(factors - 1, inside & (column > 0), other=0.0)[:, None]
        own *= tl.load(factors, inside, other=0.0)[:, None]
        right *= tl.load(factors + 1, column + 1 < columns, other=0.0)[:, None]
    return left, own, right


@triton.jit
def _add_weighted(total, a, b, c, w_a, w_b, w_c):
    """total + a w_a + b w_b + c w_c, in the order that takes three instructions."""
    return total + a * w_a + b * w_b + c * w_c


@triton.jit
def _outside(start, prefix, on_grid, BLOCK: tl.constexpr):
    """The numbers of BLOCK tokens without a place in the grid, which holds `on_grid` tokens, from the `start`-th on."""
    token = start + tl.arange(0, BLOCK)
    return tl.where(token < prefix, token, token + on_grid)


@triton.jit
def _pointers(x, token, stride_n, stride_d, WIDTH: tl.constexpr):
    """Pointers (BLOCK, WIDTH) to tokens, from their numbers."""
    return x + token.to(tl.int64)[:, None] * stride_n + tl.arange(0, WIDTH)[None, :] * stride_d


@triton.jit
def _convolve(
    x, factors, weight, bias, y, h, scale, offset, segment, first, last,
    x_n, x_d, y_n, y_d, rows, columns, prefix,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    RMS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Write y of a segment's rows from `first` to before `last`. x, factors and y: pointers to a head's first token."""
    w0, w1, w2 = _places(weight, h, 0, D, WIDTH)
    w3, w4, w5 = _places(weight, h, 1, D, WIDTH)
    w6, w7, w8 = _places(weight, h, 2, D, WIDTH)
    w4 += 1
    column = segment * BLOCK + tl.arange(0, BLOCK)
    # c enters as a constant: that of a place with rows above and below it, less the share of rows that do not exist.
    at_left, at_right = (column > 0).to(tl.float32)[:, None], (column + 1 < columns).to(tl.float32)[:, None]
    top = offset * (w1 + at_left * w0 + at_right * w2)
    bottom = offset * (w7 + at_left * w6 + at_right * w8)
    constant = load_row(bias, h, D, WIDTH) + offset * (w4 + at_left * w3 + at_right * w5) + top + bottom
    w0, w1, w2 = w0 * scale, w1 * scale, w2 * scale
    w3, w4, w5 = w3 * scale, w4 * scale, w5 * scale
    w6, w7, w8 = w6 * scale, w7 * scale, w8 * scale
    origin = prefix + segment * BLOCK + (first - 1) * columns
    x = token_pointers(x, origin, x_n, x_d, WIDTH, BLOCK)
    y = token_pointers(y, origin - columns, y_n, y_d, WIDTH, BLOCK)
    factors += origin + tl.arange(0, BLOCK)
    above, own = constant, constant
    for row in tl.range(first - 1, last + 1, 2, num_stages=STAGES):
        # Two rows are loaded before anything is written, because a store holds up the loads after it.
        l0, m0, r0 = _load_three(x, x_n, factors, column, _columns_of(row, 0, rows, columns), D, WIDTH, RMS)
        x += columns * x_n
        if RMS:
            factors += columns
        l1, m1, r1 = _load_three(x, x_n, factors, column, _columns_of(row + 1, 0, rows, columns), D, WIDTH, RMS)
        x += columns * x_n
        if RMS:
            factors += columns
        ready = _add_weighted(above, l0, m0, r0, w6, w7, w8)
        above = _add_weighted(own, l0, m0, r0, w3, w4, w5)
        own = _add_weighted(constant, l0, m0, r0, w0, w1, w2)
        _store_row_of_grid(y, ready, top, bottom, column, row - 1, first, last, rows, columns, D, WIDTH, NORM)
        y += columns * y_n
        ready = _add_weighted(above, l1, m1, r1, w6, w7, w8)
        above = _add_weighted(own, l1, m1, r1, w3, w4, w5)
        own = _add_weighted(constant, l1, m1, r1, w0, w1, w2)
        _store_row_of_grid(y, ready, top, bottom, column, row, first, last, rows, columns, D, WIDTH, NORM)
        y += columns * y_n


@triton.jit
def _store_row_of_grid(
    y, ready, top, bottom, column, row, first, last, rows, columns,
    D: tl.constexpr, WIDTH: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Write a row if it is one from `first` to before `last`, less the share in c of rows that do not exist."""
    if NORM:
        if row == 0:
            ready -= top
        if row + 1 == rows:
            ready -= bottom
    tl.store(y, ready.to(y.dtype.element_ty), token_mask(column < _columns_of(row, first, last, columns), D, WIDTH))


@triton.jit
def _normalize(
    x, gain, factors, sums, y, text_x, text_gain, text_factors, text_sums, text_y,
    x_b, x_h, x_n, x_d, y_b, y_h, y_n, y_d, tx_b, tx_h, tx_n, ty_b, ty_h, ty_n,
    factors_h, capacity, shares, text_shares, count, text_count, eps, prefix, on_grid,
    index, H, N, T, part, outside, chunk,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, RMS: tl.constexpr, NORM: tl.constexpr,
    TEXT: tl.constexpr,
):  # fmt: skip
    """Write y of `chunk` blocks of tokens without a place in the grid, which holds `on_grid` tokens.

    The first `outside` parts are the image's, the others, with TEXT, the text's.
    """
    b, h = index // H, index % H
    is_text = part >= outside
    x, x_b, x_h, x_n = own_tokens(x, x_b, x_h, x_n, text_x, tx_b, tx_h, tx_n, is_text, TEXT)
    y, y_b, y_h, y_n = own_tokens(y, y_b, y_h, y_n, text_y, ty_b, ty_h, ty_n, is_text, TEXT)
    part, N = own_share(part, outside, N, T, TEXT)
    if TEXT:
        gain, factors = tl.where(is_text, text_gain, gain), tl.where(is_text, text_factors, factors)
        sums, prefix = tl.where(is_text, text_sums, sums), tl.where(is_text, T, prefix)
        shares, count = tl.where(is_text, text_shares, shares), tl.where(is_text, text_count, count)
    x, y = start_of_head(x, b, h, x_b, x_h), start_of_head(y, b, h, y_b, y_h)
    factors += index.to(tl.int64) * factors_h
    scale, offset = _load_scales(gain, sums, index, capacity, shares, count, eps, D, WIDTH, RMS, NORM)
    begin = part * chunk * BLOCK
    for start in range(begin, begin + chunk * BLOCK, BLOCK):
        token = _outside(start, prefix, on_grid, BLOCK)
        mask = token_mask(token < N, D, WIDTH)
        x_at = _pointers(x, token, x_n, x_d, WIDTH)
        n = _load_normalized(x_at, mask, factors + token, token < N, scale, offset, RMS, NORM)
        tl.store(_pointers(y, token, y_n, y_d, WIDTH), n.to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=COUNTS)
def prepare_kernel(
    x, gain, factors, sums, weight, bias, y, text_x, text_gain, text_factors, text_sums, text_y,
    x_b, x_h, x_n, x_d, y_b, y_h, y_n, y_d, tx_b, tx_h, tx_n, ty_b, ty_h, ty_n,
    factors_h, capacity, shares, count, eps, text_shares, text_count, T, outside,
    rows, columns, prefix, H, N, chunk, segments, on_grid, chunk_outside,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, BLOCK_OUTSIDE: tl.constexpr,
    RMS: tl.constexpr, NORM: tl.constexpr, CONV: tl.constexpr, TEXT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Write y and, with TEXT, the text's.

    The launch grid is (B·H, programs). First come `on_grid` programs, each with `chunk` rows of one of the `segments`
    of the tokens' grid, then `outside` programs with `chunk_outside` blocks of tokens without a place in it. With TEXT
    others follow for blocks of its T tokens, whose channels lie as the image's do. gain: (D,); weight: (H·D, 9); bias:
    (H·D,); factors and sums as in `statistics_kernel`.
    """
    after_previous(EARLY)
    index, part = tl.program_id(0), tl.program_id(1)
    if part >= on_grid:
        _normalize(
            x, gain, factors, sums, y, text_x, text_gain, text_factors, text_sums, text_y,
            x_b, x_h, x_n, x_d, y_b, y_h, y_n, y_d, tx_b, tx_h, tx_n, ty_b, ty_h, ty_n,
            factors_h, capacity, shares, text_shares, count, text_count, eps, prefix, rows * columns, index, H, N, T,
            part - on_grid, outside, chunk_outside, D, WIDTH, BLOCK_OUTSIDE, RMS, NORM, TEXT,
        )  # fmt: skip
    elif CONV:
        b, h = index // H, index % H
        segment, first = part % segments, (part // segments) * chunk
        last = tl.minimum(first + chunk, rows)
        scale, offset = _load_scales(gain, sums, index, capacity, shares, count, eps, D, WIDTH, RMS, NORM)
        _convolve(
            start_of_head(x, b, h, x_b, x_h), factors + index.to(tl.int64) * factors_h, weight, bias,
            start_of_head(y, b, h, y_b, y_h), h, scale, offset, segment, first, last,
            x_n, x_d, y_n, y_d, rows, columns, prefix, D, WIDTH, BLOCK, STAGES, RMS, NORM,
        )  # fmt: skip


@triton.jit
def _outside_backward(
    dy, x, gain, factors, sums, dx, text_dy, text_x, text_gain, text_factors, text_sums, parts,
    dy_b, dy_h, dy_n, dy_d, x_b, x_h, x_n, x_d, dx_b, dx_h, dx_n, dx_d, tdy_b, tdy_h, tdy_n, tx_b, tx_h, tx_n,
    factors_h, capacity, shares, text_shares, count, text_count, eps, prefix, on_grid,
    index, H, N, T, part, outside, chunk,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    RMS: tl.constexpr, NORM: tl.constexpr, CONV: tl.constexpr, TEXT: tl.constexpr,
):  # fmt: skip
    """Write dn of `chunk` blocks of tokens without a place in the grid, and their sums; see `_normalize`.

    The text is not convolved, so that its dn is its dy.
    """
    b, h = index // H, index % H
    is_text = part >= outside
    x, x_b, x_h, x_n = own_tokens(x, x_b, x_h, x_n, text_x, tx_b, tx_h, tx_n, is_text, TEXT)
    dy, dy_b, dy_h, dy_n = own_tokens(dy, dy_b, dy_h, dy_n, text_dy, tdy_b, tdy_h, tdy_n, is_text, TEXT)
    part, N = own_share(part, outside, N, T, TEXT)
    written = N
    if TEXT:
        gain, factors = tl.where(is_text, text_gain, gain), tl.where(is_text, text_factors, factors)
        sums, prefix = tl.where(is_text, text_sums, sums), tl.where(is_text, T, prefix)
        shares, count = tl.where(is_text, text_shares, shares), tl.where(is_text, text_count, count)
        written = tl.where(is_text, 0, N)
    x, dy = start_of_head(x, b, h, x_b, x_h), start_of_head(dy, b, h, dy_b, dy_h)
    dx = start_of_head(dx, b, h, dx_b, dx_h)
    factors += index.to(tl.int64) * factors_h
    scale, offset = _load_scales(gain, sums, index, capacity, shares, count, eps, D, WIDTH, RMS, NORM)
    s_plain, s_product = tl.full((BLOCK, WIDTH), 0.0, tl.float32), tl.full((BLOCK, WIDTH), 0.0, tl.float32)
    begin = part * chunk * BLOCK
    for start in range(begin, begin + chunk * BLOCK, BLOCK):
        token = _outside(start, prefix, on_grid, BLOCK)
        mask = token_mask(token < N, D, WIDTH)
        grad = tl.load(_pointers(dy, token, dy_n, dy_d, WIDTH), mask, other=0.0)
        if CONV:
            tl.store(_pointers(dx, token, dx_n, dx_d, WIDTH), grad, token_mask(token < written, D, WIDTH))
        if NORM:
            x_at = _pointers(x, token, x_n, x_d, WIDTH)
            n = _load_normalized(x_at, mask, factors + token, token < N, scale, offset, RMS, NORM)
            s_plain += grad.to(tl.float32)
            s_product += grad.to(tl.float32) * n
    if NORM:
        store_row(parts, PLAIN_SUM, over_tokens(s_plain), D, WIDTH)
        store_row(parts, PRODUCT_SUM, over_tokens(s_product), D, WIDTH)


@triton.jit
def _convolve_backward(
    dy, x, dx, factors, weight, parts, h, scale, offset, segment, first, last,
    dy_n, dy_d, x_n, x_d, dx_n, dx_d, rows, columns, prefix,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    RMS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Write dn of a segment's rows from `first` to before `last`, and the SUMS, apart by token until the end."""
    zero = tl.full((BLOCK, WIDTH), 0.0, tl.float32)
    s0, s1, s2, s3, s4, s5, s6, s7, s8 = zero, zero, zero, zero, zero, zero, zero, zero, zero
    s_bias, s_plain, s_product = zero, zero, zero
    w0, w1, w2 = _places(weight, h, 0, D, WIDTH)
    w3, w4, w5 = _places(weight, h, 1, D, WIDTH)
    w6, w7, w8 = _places(weight, h, 2, D, WIDTH)
    w4 += 1
    column = segment * BLOCK + tl.arange(0, BLOCK)
    origin = prefix + segment * BLOCK + (first - 1) * columns
    dy_at = token_pointers(dy, origin, dy_n, dy_d, WIDTH, BLOCK)
    x_at = token_pointers(x, origin + columns, x_n, x_d, WIDTH, BLOCK)
    dx_at = token_pointers(dx, origin - columns, dx_n, dx_d, WIDTH, BLOCK)
    factor_at = factors + (prefix + column)
    # For the rows above, here and below: the part of dn that is complete so far, and n if the row is this program's.
    above, own, n_above, n_own = zero, zero, zero, zero
    for row in tl.range(first - 1, last + 1, num_stages=STAGES):
        left, mid, right = _load_three(dy_at, dy_n, dy, column, _columns_of(row, 0, rows, columns), D, WIDTH, False)
        below = column < _columns_of(row + 1, first, last, columns)
        factor_below, mask_below = factor_at + (row + 1) * columns, token_mask(below, D, WIDTH)
        n_below = _load_normalized(x_at, mask_below, factor_below, below, scale, offset, RMS, NORM)
        ready = _add_weighted(above, right, mid, left, w0, w1, w2)
        above = _add_weighted(own, right, mid, left, w3, w4, w5)
        own = _add_weighted(zero, right, mid, left, w6, w7, w8)
        inside = token_mask(column < _columns_of(row - 1, first, last, columns), D, WIDTH)
        tl.store(dx_at, ready.to(dx.dtype.element_ty), inside)
        if NORM:
            s_plain += tl.where(inside, ready, 0.0)
            s_product += ready * n_above
        s0, s1, s2 = s0 + n_above * right, s1 + n_above * mid, s2 + n_above * left
        s3, s4, s5 = s3 + n_own * right, s4 + n_own * mid, s5 + n_own * left
        s6, s7, s8 = s6 + n_below * right, s7 + n_below * mid, s8 + n_below * left
        s_bias += tl.where((column < _columns_of(row, first, last, columns))[:, None], mid, 0.0)
        # Adding 0.0 makes it a value of this turn. A name that just takes another's value would not be carried to the
        # next turn at all where both begin as the same zero, and its loads would not be made ahead of their turn.
        n_above, n_own = n_own + 0.0, n_below
        dy_at += columns * dy_n
        x_at += columns * x_n
        dx_at += columns * dx_n
    _store_window(parts, s0, s1, s2, s3, s4, s5, s6, s7, s8, D, WIDTH)
    store_row(parts, BIAS_SUM, over_tokens(s_bias), D, WIDTH)
    if NORM:
        store_row(parts, PLAIN_SUM, over_tokens(s_plain), D, WIDTH)
        store_row(parts, PRODUCT_SUM, over_tokens(s_product), D, WIDTH)


@triton.jit(do_not_specialize=COUNTS)
def prepare_backward_kernel(
    dy, x, gain, factors, sums, weight, dx, text_dy, text_x, text_gain, text_factors, text_sums, parts,
    dy_b, dy_h, dy_n, dy_d, x_b, x_h, x_n, x_d, dx_b, dx_h, dx_n, dx_d, tdy_b, tdy_h, tdy_n, tx_b, tx_h, tx_n,
    factors_h, capacity, shares, count, eps, text_shares, text_count, T, outside,
    rows, columns, prefix, H, N, chunk, segments, on_grid, chunk_outside,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, BLOCK_OUTSIDE: tl.constexpr,
    RMS: tl.constexpr, NORM: tl.constexpr, CONV: tl.constexpr, TEXT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Write dn into dx, and the programs' partial sums.

    The launch grid is as in `prepare_kernel`. dx is written with a convolution only; without one, dn is dy.
    parts: (B·H, programs, SUMS, D). Of the convolution's sums there are those of programs on the grid, of
    the others those with a norm. The sums of a program stay apart by token until its end, so a block is small.
    """
    after_previous(EARLY)
    index, part = tl.program_id(0), tl.program_id(1)
    parts += (index.to(tl.int64) * tl.num_programs(1) + part) * (SUMS * D)
    if part >= on_grid:
        _outside_backward(
            dy, x, gain, factors, sums, dx, text_dy, text_x, text_gain, text_factors, text_sums, parts,
            dy_b, dy_h, dy_n, dy_d, x_b, x_h, x_n, x_d, dx_b, dx_h, dx_n, dx_d, tdy_b, tdy_h, tdy_n, tx_b, tx_h, tx_n,
            factors_h, capacity, shares, text_shares, count, text_count, eps, prefix, rows * columns, index, H, N, T,
            part - on_grid, outside, chunk_outside, D, WIDTH, BLOCK_OUTSIDE, RMS, NORM, CONV, TEXT,
        )  # fmt: skip
    elif CONV:
        b, h = index // H, index % H
        segment, first = part % segments, (part // segments) * chunk
        scale, offset = _load_scales(gain, sums, index, capacity, shares, count, eps, D, WIDTH, RMS, NORM)
        _convolve_backward(
            start_of_head(dy, b, h, dy_b, dy_h), start_of_head(x, b, h, x_b, x_h), start_of_head(dx, b, h, dx_b, dx_h),
            factors + index.to(tl.int64) * factors_h, weight, parts, h, scale, offset, segment, first,
            tl.minimum(first + chunk, rows), dy_n, dy_d, x_n, x_d, dx_n, dx_d, rows, columns, prefix,
            D, WIDTH, BLOCK, STAGES, RMS, NORM,
        )  # fmt: skip


@triton.jit
def _store_window(parts, s0, s1, s2, s3, s4, s5, s6, s7, s8, D: tl.constexpr, WIDTH: tl.constexpr):
    """Write the sums of the nine places of the convolution's window."""
    store_row(parts, 0, over_tokens(s0), D, WIDTH)
    store_row(parts, 1, over_tokens(s1), D, WIDTH)
    store_row(parts, 2, over_tokens(s2), D, WIDTH)
    store_row(parts, 3, over_tokens(s3), D, WIDTH)
    store_row(parts, 4, over_tokens(s4), D, WIDTH)
    store_row(parts, 5, over_tokens(s5), D, WIDTH)
    store_row(parts, 6, over_tokens(s6), D, WIDTH)
    store_row(parts, 7, over_tokens(s7), D, WIDTH)
    store_row(parts, 8, over_tokens(s8), D, WIDTH)
