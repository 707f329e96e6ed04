"""Triton kernels of what stands before `ttt`: the table by which tokens are read (ttt/tokens.py), and its backward.

Notation as there. Backward, given dy, the gradient of the tokens as they were read:

    dn[p] = dy[p] + sum_o w[o] dy[p - o],    dw[o] = sum_p n[p] dy[p - o],    dbias = sum_p dy[p],
    dx[p] = r (dn[p] - sum dn / N - n[p] sum (dn n) / N),

p over the grid in what belongs to the convolution. Mean and variance come from sums of x - f and (x - f)², f the first
token: a shift of all keys, which is what the norm is there to remove, costs no digits. Programs write their sums side
by side and the caller adds them: no atomics, and results are the same from run to run.
"""

import triton
import triton.language as tl

from t5kernels.ttt.tokens import (
    CONSTANTS,
    COUNTS,
    OUTSIDE,
    ROWS,
    SCALE,
    WEIGHTS,
    load_row,
    load_tokens,
    neighbors,
    on_grid,
    start_of_head,
    store_tokens,
    token_mask,
    token_pointers,
)

# Rows of a program's partial sums: nine of dw, then dbias, sum dn, sum dn n.
BIAS_SUM = tl.constexpr(9)
PLAIN_SUM = tl.constexpr(10)
PRODUCT_SUM = tl.constexpr(11)
SUMS = tl.constexpr(12)


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _over_tokens(x):
    """Sum over the first axis. Not tl.sum: Triton's own functions are interpreted only if Triton was imported so."""
    return tl.reduce(x, 0, _add)


@triton.jit
def _store_row(x, row, values, D: tl.constexpr, WIDTH: tl.constexpr):
    channel = tl.arange(0, WIDTH)
    tl.store(x + row * D + channel, values, channel < D)


@triton.jit
def _first_token(x, b, h, stride_b, stride_h, stride_d, D: tl.constexpr, WIDTH: tl.constexpr):
    """The first token of a head, (WIDTH,), float32."""
    channel = tl.arange(0, WIDTH)
    x = start_of_head(x, b, h, stride_b, stride_h)
    return tl.load(x + channel * stride_d, channel < D, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=COUNTS)
def key_sums_kernel(
    k, first, sums,
    k_b, k_h, k_n, k_d, f_b, f_h, f_d,
    H, N, chunk,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B·H, chunks of `chunk` tokens). sums: (B·H, chunks, 2, D) float32."""
    index, part = tl.program_id(0), tl.program_id(1)
    b, h = index // H, index % H
    shift = _first_token(first, b, h, f_b, f_h, f_d, D, WIDTH)[None, :]
    k = start_of_head(k, b, h, k_b, k_h)
    total = tl.full((BLOCK, WIDTH), 0.0, tl.float32)
    squares = tl.full((BLOCK, WIDTH), 0.0, tl.float32)
    for start in range(part * chunk, part * chunk + chunk, BLOCK):
        inside = token_mask(start + tl.arange(0, BLOCK) < N, D, WIDTH)
        keys = load_tokens(k, start, k_n, k_d, N, D, WIDTH, BLOCK).to(tl.float32)
        keys = tl.where(inside, keys - shift, 0.0)
        total += keys
        squares += keys * keys
    sums += (index.to(tl.int64) * tl.num_programs(1) + part) * (2 * D)
    _store_row(sums, 0, _over_tokens(total), D, WIDTH)
    _store_row(sums, 1, _over_tokens(squares), D, WIDTH)


@triton.jit
def _either(a, a_there, b, b_there):
    """What stands at a or at b, whichever is there, in float32."""
    a = tl.load(a, a_there, other=0.0).to(tl.float32)
    return a + tl.load(b, b_there, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=COUNTS)
def table_kernel(
    sums, first, q_weight, q_bias, k_weight, k_bias, table,
    f_b, f_h, f_d,
    H, shares, count, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, NORM: tl.constexpr, CONV: tl.constexpr,
):  # fmt: skip
    """Grid (B·H, tables: of the keys, of the queries). sums: (B·H, shares, 2, D) of `count` keys; weights (H·D, 9),
    biases (H·D,); table (tables, B·H, ROWS, D)."""
    index, which = tl.program_id(0), tl.program_id(1)
    h = index % H
    channel = tl.arange(0, WIDTH)
    inside = channel < D
    scale, constant = tl.full((WIDTH,), 1.0, tl.float32), tl.full((WIDTH,), 0.0, tl.float32)
    if NORM:
        sums += index.to(tl.int64) * shares * (2 * D) + channel
        mean, square = tl.full((WIDTH,), 0.0, tl.float32), tl.full((WIDTH,), 0.0, tl.float32)
        for part in range(shares):
            mean += tl.load(sums + part * (2 * D), inside, other=0.0)
            square += tl.load(sums + part * (2 * D) + D, inside, other=0.0)
        mean, square = mean / count, square / count
        scale = 1 / tl.sqrt(tl.maximum(square - mean * mean, 0.0) + eps)
        scale = tl.where(which == 0, scale, 1.0)
        shift = mean + _first_token(first, index // H, h, f_b, f_h, f_d, D, WIDTH)
        constant = tl.where(which == 0, -scale * shift, 0.0)
    table += (which * tl.num_programs(0) + index).to(tl.int64) * (ROWS * D)
    _store_row(table, SCALE, scale, D, WIDTH)
    _store_row(table, OUTSIDE, constant, D, WIDTH)
    if CONV:
        at = h * D + channel
        q_there, k_there = channel < D * which, channel < D * (1 - which)
        offset = _either(q_bias + at, q_there, k_bias + at, k_there)
        kind = tl.arange(0, 16)[:, None]
        met = tl.full((16, WIDTH), 1.0, tl.float32)
        for place in tl.static_range(9):
            w = _either(q_weight + at * 9 + place, q_there, k_weight + at * 9 + place, k_there)
            _store_row(table, WEIGHTS + place, w * scale, D, WIDTH)
            needed = (1 if place < 3 else 0) + (2 if place > 5 else 0)
            needed += (4 if place % 3 == 0 else 0) + (8 if place % 3 == 2 else 0)
            met += tl.where((kind & needed) == needed, w[None, :], 0.0)
        constants = table + (CONSTANTS + kind) * D + channel[None, :]
        tl.store(constants, offset[None, :] + constant[None, :] * met, inside[None, :])


@triton.jit
def _places(weight, h, row: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """A head's weights of the three places in a row of the window, each (1, WIDTH)."""
    channel = tl.arange(0, WIDTH)
    weight += (h * D + channel) * 9 + row * 3
    return (
        tl.load(weight, channel < D, other=0.0).to(tl.float32)[None, :],
        tl.load(weight + 1, channel < D, other=0.0).to(tl.float32)[None, :],
        tl.load(weight + 2, channel < D, other=0.0).to(tl.float32)[None, :],
    )


@triton.jit
def _row_backward(
    dy, dy_n, n, w_left, w_middle, w_right, row, inside, before, after, rows, columns, down: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What three places of one row of the window add to dn, and n dy of each. `dy`: pointers to the tokens' own dy.

    Place (down, right) of the window: w there, and the dy of the token that saw this one there. `before` and `after`:
    which tokens have a neighbor at their left and right.
    """
    in_rows = inside & (row - down >= 0) & (row - down < rows)
    dy -= down * columns * dy_n
    left = tl.load(dy + dy_n, token_mask(in_rows & after, D, WIDTH), other=0.0).to(tl.float32)
    middle = tl.load(dy, token_mask(in_rows, D, WIDTH), other=0.0).to(tl.float32)
    right = tl.load(dy - dy_n, token_mask(in_rows & before, D, WIDTH), other=0.0).to(tl.float32)
    return left * w_left + middle * w_middle + right * w_right, n * left, n * middle, n * right


@triton.jit(do_not_specialize=COUNTS)
def read_backward_kernel(
    dy, x, table, weight, dx, parts,
    dy_b, dy_h, dy_n, dy_d, x_b, x_h, x_n, x_d, dx_b, dx_h, dx_n, dx_d, rows, columns, prefix,
    H, N, chunk,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, CONV: tl.constexpr,
):  # fmt: skip
    """Grid (B·H, chunks). dx: dn, written with a convolution only (else it is dy); parts: (B·H, chunks, SUMS, D).

    Sums stay apart by thread until the end, so a block is small.
    """
    index, part = tl.program_id(0), tl.program_id(1)
    b, h = index // H, index % H
    x, dy, dx = (
        start_of_head(x, b, h, x_b, x_h),
        start_of_head(dy, b, h, dy_b, dy_h),
        start_of_head(dx, b, h, dx_b, dx_h),
    )
    table += index.to(tl.int64) * (ROWS * D)
    scale, constant = load_row(table, SCALE, D, WIDTH), load_row(table, OUTSIDE, D, WIDTH)
    if CONV:
        w0, w1, w2 = _places(weight, h, 0, D, WIDTH)
        w3, w4, w5 = _places(weight, h, 1, D, WIDTH)
        w6, w7, w8 = _places(weight, h, 2, D, WIDTH)
    zero = tl.full((BLOCK, WIDTH), 0.0, tl.float32)
    s0, s1, s2, s3, s4, s5, s6, s7, s8 = zero, zero, zero, zero, zero, zero, zero, zero, zero
    s_bias, s_plain, s_product = zero, zero, zero
    for start in range(part * chunk, part * chunk + chunk, BLOCK):
        token = start + tl.arange(0, BLOCK)
        here = token_mask(token < N, D, WIDTH)
        n = load_tokens(x, start, x_n, x_d, N, D, WIDTH, BLOCK).to(tl.float32)
        n = tl.where(here, n * scale + constant, 0.0)
        dn = load_tokens(dy, start, dy_n, dy_d, N, D, WIDTH, BLOCK).to(tl.float32)
        if CONV:
            row, column, inside = on_grid(token, N, rows, columns, prefix)
            _, _, before, after = neighbors(row, column, rows, columns, inside)
            s_bias += tl.where(inside[:, None], dn, 0.0)
            at = token_pointers(dy, start, dy_n, dy_d, WIDTH, BLOCK)
            near, p0, p1, p2 = _row_backward(
                at, dy_n, n, w0, w1, w2, row, inside, before, after, rows, columns, -1, D, WIDTH
            )
            dn += near
            s0, s1, s2 = s0 + p0, s1 + p1, s2 + p2
            near, p0, p1, p2 = _row_backward(
                at, dy_n, n, w3, w4, w5, row, inside, before, after, rows, columns, 0, D, WIDTH
            )
            dn += near
            s3, s4, s5 = s3 + p0, s4 + p1, s5 + p2
            near, p0, p1, p2 = _row_backward(
                at, dy_n, n, w6, w7, w8, row, inside, before, after, rows, columns, 1, D, WIDTH
            )
            dn += near
            s6, s7, s8 = s6 + p0, s7 + p1, s8 + p2
            store_tokens(dx, dn, start, dx_n, dx_d, N, D, WIDTH, BLOCK)
        if NORM:
            s_plain += dn
            s_product += dn * n
    parts += (index.to(tl.int64) * tl.num_programs(1) + part) * (SUMS * D)
    if CONV:
        _store_row(parts, 0, _over_tokens(s0), D, WIDTH)
        _store_row(parts, 1, _over_tokens(s1), D, WIDTH)
        _store_row(parts, 2, _over_tokens(s2), D, WIDTH)
        _store_row(parts, 3, _over_tokens(s3), D, WIDTH)
        _store_row(parts, 4, _over_tokens(s4), D, WIDTH)
        _store_row(parts, 5, _over_tokens(s5), D, WIDTH)
        _store_row(parts, 6, _over_tokens(s6), D, WIDTH)
        _store_row(parts, 7, _over_tokens(s7), D, WIDTH)
        _store_row(parts, 8, _over_tokens(s8), D, WIDTH)
        _store_row(parts, BIAS_SUM, _over_tokens(s_bias), D, WIDTH)
    if NORM:
        _store_row(parts, PLAIN_SUM, _over_tokens(s_plain), D, WIDTH)
        _store_row(parts, PRODUCT_SUM, _over_tokens(s_product), D, WIDTH)


@triton.jit(do_not_specialize=COUNTS)
def norm_backward_kernel(
    dn, x, table, totals, dx,
    dn_b, dn_h, dn_n, dn_d, x_b, x_h, x_n, x_d, dx_b, dx_h, dx_n, dx_d,
    H, N, count,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B·H, blocks of tokens). totals: (B·H, 2, D), sum dn and sum dn n. dx may be dn itself."""
    index = tl.program_id(0)
    b, h = index // H, index % H
    x, dn, dx = (
        start_of_head(x, b, h, x_b, x_h),
        start_of_head(dn, b, h, dn_b, dn_h),
        start_of_head(dx, b, h, dx_b, dx_h),
    )
    table += index.to(tl.int64) * (ROWS * D)
    totals += index.to(tl.int64) * (2 * D)
    scale, constant = load_row(table, SCALE, D, WIDTH), load_row(table, OUTSIDE, D, WIDTH)
    plain, product = load_row(totals, 0, D, WIDTH) / count, load_row(totals, 1, D, WIDTH) / count
    start = tl.program_id(1) * BLOCK
    n = load_tokens(x, start, x_n, x_d, N, D, WIDTH, BLOCK).to(tl.float32) * scale + constant
    grad = load_tokens(dn, start, dn_n, dn_d, N, D, WIDTH, BLOCK).to(tl.float32)
    store_tokens(dx, scale * (grad - plain - n * product), start, dx_n, dx_d, N, D, WIDTH, BLOCK)
