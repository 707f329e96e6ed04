"""Triton kernels of what stands before `ttt`: instance norm of the keys, 3×3 depthwise convolution of queries and keys.

Notation, for one image, head and channel: x the tokens as they come, m and r the mean and the inverse deviation of the
keys over tokens (m = 0, r = 1 without a norm), n = (x - m) r, and for a token p of the grid

    y[p] = n[p] + bias + sum_o w[o] n[p + o],    o over the 9 places around p, n = 0 outside the grid.

Tokens before the grid (class, registers) and after it have y = n. Backward, given dy:

    dn[p] = dy[p] + sum_o w[o] dy[p - o],    dw[o] = sum_p n[p] dy[p - o],    dbias = sum_p dy[p],
    dx[p] = r (dn[p] - sum dn / N - n[p] sum (dn n) / N).

Mean and variance come from sums of x - f and (x - f)², f the first token: a shift of all keys, which is what the norm
is there to remove, costs no digits. Programs write their sums side by side and the caller adds them: no atomics, and
results are the same from run to run.
"""

import triton
import triton.language as tl

# Rows of a program's partial sums: nine of dw, then dbias, sum dn, sum dn n.
BIAS_ROW = tl.constexpr(9)
PLAIN_ROW = tl.constexpr(10)
PRODUCT_ROW = tl.constexpr(11)
ROWS = 12


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _over_tokens(x):
    """Sum over the first axis. Not tl.sum: Triton's own functions are interpreted only if Triton was imported so."""
    return tl.reduce(x, 0, _add)


@triton.jit
def _channels(x, b, h, stride_b, stride_h, stride_d, WIDTH: tl.constexpr):
    """Pointers to the channels of a head's first token."""
    return x + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + tl.arange(0, WIDTH) * stride_d


@triton.jit
def _mean_and_scale(sums, first, index, count, eps, D: tl.constexpr, WIDTH: tl.constexpr):
    """m and r of one image and head, (WIDTH,). sums: (B·H, 2, D); first: pointers to the first key."""
    channel = tl.arange(0, WIDTH)
    sums += index.to(tl.int64) * (2 * D) + channel
    mean = tl.load(sums, channel < D, other=0.0) / count
    variance = tl.load(sums + D, channel < D, other=0.0) / count - mean * mean
    scale = 1 / tl.sqrt(tl.maximum(variance, 0.0) + eps)
    return tl.load(first, channel < D, other=0.0).to(tl.float32) + mean, scale


@triton.jit
def _on_grid(token, N, rows, columns, prefix):
    """Row and column of each token, and whether it has a place in the grid."""
    patch = token - prefix
    inside = (patch >= 0) & (patch < rows * columns) & (token < N)
    return patch // columns, patch % columns, inside


@triton.jit
def key_sums_kernel(
    k, first, sums,
    k_b, k_h, k_n, k_d, f_b, f_h, f_d,
    H, N, chunk,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B·H, chunks of `chunk` tokens). sums: (B·H, chunks, 2, D) float32."""
    index, part = tl.program_id(0), tl.program_id(1)
    b, h = index // H, index % H
    channel = tl.arange(0, WIDTH)
    shift = tl.load(_channels(first, b, h, f_b, f_h, f_d, WIDTH), channel < D, other=0.0).to(tl.float32)
    k = _channels(k, b, h, k_b, k_h, k_d, WIDTH)[None, :]
    total = tl.full((BLOCK, WIDTH), 0.0, tl.float32)
    squares = tl.full((BLOCK, WIDTH), 0.0, tl.float32)
    for start in range(0, chunk, BLOCK):
        token = part * chunk + start + tl.arange(0, BLOCK)
        inside = (token < N)[:, None] & (channel < D)[None, :]
        keys = tl.load(k + token.to(tl.int64)[:, None] * k_n, inside, other=0.0).to(tl.float32)
        keys = tl.where(inside, keys - shift[None, :], 0.0)
        total += keys
        squares += keys * keys
    sums += (index.to(tl.int64) * tl.num_programs(1) + part) * (2 * D) + channel
    tl.store(sums, _over_tokens(total), channel < D)
    tl.store(sums + D, _over_tokens(squares), channel < D)


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
def _near(at, x_n, w, row, column, inside, rows, columns, place: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """What one place of the window adds to the convolution of x, and which tokens have a neighbor there, as 0 and 1."""
    down: tl.constexpr = place // 3 - 1
    right: tl.constexpr = place % 3 - 1
    valid = inside & (row + down >= 0) & (row + down < rows) & (column + right >= 0) & (column + right < columns)
    mask = valid[:, None] & (tl.arange(0, WIDTH) < D)[None, :]
    near = tl.load(at + (down * columns + right).to(tl.int64) * x_n, mask, other=0.0).to(tl.float32)
    return near * w, tl.where(valid, 1.0, 0.0)[:, None]


@triton.jit
def prepare_kernel(
    x, first, sums, weight, bias, y,
    x_b, x_h, x_n, x_d, f_b, f_h, f_d, y_b, y_h, y_n, y_d,
    H, N, chunk, count, eps, rows, columns, prefix,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, CONV: tl.constexpr,
):  # fmt: skip
    """Grid (B·H, chunks of tokens). sums: (B·H, 2, D); weight: (H·D, 9), bias: (H·D,).

    The weights of all nine places stay in registers for the whole chunk.
    """
    index, part = tl.program_id(0), tl.program_id(1)
    b, h = index // H, index % H
    channel = tl.arange(0, WIDTH)
    in_width = (channel < D)[None, :]
    x = _channels(x, b, h, x_b, x_h, x_d, WIDTH)[None, :]
    y = _channels(y, b, h, y_b, y_h, y_d, WIDTH)[None, :]
    if NORM:
        f = _channels(first, b, h, f_b, f_h, f_d, WIDTH)
        mean, scale = _mean_and_scale(sums, f, index, count, eps, D, WIDTH)
        mean, scale = mean[None, :], scale[None, :]
    if CONV:
        w0, w1, w2 = _places(weight, h, 0, D, WIDTH)
        w3, w4, w5 = _places(weight, h, 1, D, WIDTH)
        w6, w7, w8 = _places(weight, h, 2, D, WIDTH)
        offset = tl.load(bias + h * D + channel, channel < D, other=0.0).to(tl.float32)[None, :]
    for start in range(0, chunk, BLOCK):
        token = part * chunk + start + tl.arange(0, BLOCK)
        here = (token < N)[:, None] & in_width
        at = x + token.to(tl.int64)[:, None] * x_n
        result = tl.load(at, here, other=0.0).to(tl.float32)
        if CONV:
            row, column, inside = _on_grid(token, N, rows, columns, prefix)
            w = (w0, w1, w2, w3, w4, w5, w6, w7, w8)
            mixed = tl.full((BLOCK, WIDTH), 0.0, tl.float32)
            used = tl.full((BLOCK, WIDTH), 0.0, tl.float32)  # the weights that met a token: how often m came in
            for place in tl.static_range(9):
                near, met = _near(at, x_n, w[place], row, column, inside, rows, columns, place, D, WIDTH)
                mixed += near
                used += met * w[place]
            if NORM:
                mixed = (mixed - mean * used) * scale
            mixed += offset
        if NORM:
            result = (result - mean) * scale
        if CONV:
            result += tl.where(inside[:, None], mixed, 0.0)
        tl.store(y + token.to(tl.int64)[:, None] * y_n, result.to(y.dtype.element_ty), here)


@triton.jit
def _row_backward(
    dy, dy_n, n, w_left, w_middle, w_right, row, column, inside, rows, columns, down: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What three places of one row of the window add to dn, and n dy of each. `dy`: pointers to the tokens' own dy.

    Place (down, right) of the window: w there, and the dy of the token that saw this one there.
    """
    in_rows = inside & (row - down >= 0) & (row - down < rows)
    in_width = (tl.arange(0, WIDTH) < D)[None, :]
    dy -= (down * columns).to(tl.int64) * dy_n
    left = tl.load(dy + dy_n, (in_rows & (column + 1 < columns))[:, None] & in_width, other=0.0).to(tl.float32)
    middle = tl.load(dy, in_rows[:, None] & in_width, other=0.0).to(tl.float32)
    right = tl.load(dy - dy_n, (in_rows & (column > 0))[:, None] & in_width, other=0.0).to(tl.float32)
    return left * w_left + middle * w_middle + right * w_right, n * left, n * middle, n * right


@triton.jit
def _store_sum(parts, row, x, D: tl.constexpr, WIDTH: tl.constexpr):
    channel = tl.arange(0, WIDTH)
    tl.store(parts + row * D + channel, _over_tokens(x), channel < D)


@triton.jit
def prepare_backward_kernel(
    dy, x, first, sums, weight, dx, parts,
    dy_b, dy_h, dy_n, dy_d, x_b, x_h, x_n, x_d, f_b, f_h, f_d, dx_b, dx_h, dx_n, dx_d,
    H, N, chunk, count, eps, rows, columns, prefix,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, CONV: tl.constexpr,
):  # fmt: skip
    """Grid (B·H, chunks). dx is given dn (not written without CONV: it is dy). parts: (B·H, chunks, 12, D) float32,
    rows as named above. sums are (B·H, 2, D) here and below.

    Sums over tokens stay apart by thread until the end, so a block is small.
    """
    index, part = tl.program_id(0), tl.program_id(1)
    b, h = index // H, index % H
    channel = tl.arange(0, WIDTH)
    in_width = (channel < D)[None, :]
    if NORM:
        f = _channels(first, b, h, f_b, f_h, f_d, WIDTH)
        mean, scale = _mean_and_scale(sums, f, index, count, eps, D, WIDTH)
    if CONV:
        w0, w1, w2 = _places(weight, h, 0, D, WIDTH)
        w3, w4, w5 = _places(weight, h, 1, D, WIDTH)
        w6, w7, w8 = _places(weight, h, 2, D, WIDTH)
    zero = tl.full((BLOCK, WIDTH), 0.0, tl.float32)
    s0, s1, s2, s3, s4, s5, s6, s7, s8 = zero, zero, zero, zero, zero, zero, zero, zero, zero
    s_bias, s_plain, s_product = zero, zero, zero
    x = _channels(x, b, h, x_b, x_h, x_d, WIDTH)[None, :]
    dy = _channels(dy, b, h, dy_b, dy_h, dy_d, WIDTH)[None, :]
    dx = _channels(dx, b, h, dx_b, dx_h, dx_d, WIDTH)[None, :]
    for start in range(0, chunk, BLOCK):
        token = part * chunk + start + tl.arange(0, BLOCK)
        here = (token < N)[:, None] & in_width
        at = token.to(tl.int64)[:, None]
        n = tl.load(x + at * x_n, here, other=0.0).to(tl.float32)
        if NORM:
            n = tl.where(here, (n - mean[None, :]) * scale[None, :], 0.0)
        dn = tl.load(dy + at * dy_n, here, other=0.0).to(tl.float32)
        if CONV:
            row, column, inside = _on_grid(token, N, rows, columns, prefix)
            s_bias += tl.where(inside[:, None], dn, 0.0)
            dy_at = dy + at * dy_n
            near, p0, p1, p2 = _row_backward(
                dy_at, dy_n, n, w0, w1, w2, row, column, inside, rows, columns, -1, D, WIDTH
            )
            dn += near
            s0, s1, s2 = s0 + p0, s1 + p1, s2 + p2
            near, p0, p1, p2 = _row_backward(
                dy_at, dy_n, n, w3, w4, w5, row, column, inside, rows, columns, 0, D, WIDTH
            )
            dn += near
            s3, s4, s5 = s3 + p0, s4 + p1, s5 + p2
            near, p0, p1, p2 = _row_backward(
                dy_at, dy_n, n, w6, w7, w8, row, column, inside, rows, columns, 1, D, WIDTH
            )
            dn += near
            s6, s7, s8 = s6 + p0, s7 + p1, s8 + p2
            tl.store(dx + at * dx_n, dn.to(dx.dtype.element_ty), here)
        if NORM:
            s_plain += dn
            s_product += dn * n
    parts += (index.to(tl.int64) * tl.num_programs(1) + part) * 12 * D
    if CONV:
        _store_sum(parts, 0, s0, D, WIDTH)
        _store_sum(parts, 1, s1, D, WIDTH)
        _store_sum(parts, 2, s2, D, WIDTH)
        _store_sum(parts, 3, s3, D, WIDTH)
        _store_sum(parts, 4, s4, D, WIDTH)
        _store_sum(parts, 5, s5, D, WIDTH)
        _store_sum(parts, 6, s6, D, WIDTH)
        _store_sum(parts, 7, s7, D, WIDTH)
        _store_sum(parts, 8, s8, D, WIDTH)
        _store_sum(parts, BIAS_ROW, s_bias, D, WIDTH)
    if NORM:
        _store_sum(parts, PLAIN_ROW, s_plain, D, WIDTH)
        _store_sum(parts, PRODUCT_ROW, s_product, D, WIDTH)


@triton.jit
def norm_backward_kernel(
    dn, x, first, sums, totals, dx,
    dn_b, dn_h, dn_n, dn_d, x_b, x_h, x_n, x_d, f_b, f_h, f_d, dx_b, dx_h, dx_n, dx_d,
    H, N, count, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B·H, blocks of tokens). totals: (B·H, 2, D), sum dn and sum dn n. dx may be dn itself."""
    index = tl.program_id(0)
    b, h = index // H, index % H
    channel = tl.arange(0, WIDTH)
    f = _channels(first, b, h, f_b, f_h, f_d, WIDTH)
    mean, scale = _mean_and_scale(sums, f, index, count, eps, D, WIDTH)
    totals += index.to(tl.int64) * (2 * D) + channel
    plain = tl.load(totals, channel < D, other=0.0)
    product = tl.load(totals + D, channel < D, other=0.0)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = (token < N)[:, None] & (channel < D)[None, :]
    at = token.to(tl.int64)[:, None]
    keys = tl.load(_channels(x, b, h, x_b, x_h, x_d, WIDTH)[None, :] + at * x_n, here, other=0.0).to(tl.float32)
    n = (keys - mean[None, :]) * scale[None, :]
    grad = tl.load(_channels(dn, b, h, dn_b, dn_h, dn_d, WIDTH)[None, :] + at * dn_n, here, other=0.0).to(tl.float32)
    grad = scale[None, :] * (grad - plain[None, :] / count - n * (product[None, :] / count))
    dx = _channels(dx, b, h, dx_b, dx_h, dx_d, WIDTH)[None, :] + at * dx_n
    tl.store(dx, grad.to(dx.dtype.element_ty), here)
