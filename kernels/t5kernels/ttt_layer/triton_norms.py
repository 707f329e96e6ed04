# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# (The body of a kernel is Triton's language: constants decide which branches exist, and its loops have no types.)
"""Triton kernels of the norms before `ttt`: the statistics over all tokens that a token's norm needs, and the way back.

Take one image, head and channel. x are the tokens in memory; u = f g x, with the RMS norm's factor f of each token
(over its D channels) and its gain g of the channel, both 1 without such a norm; n = r u + c, with the key norm's factor
r and summand c, which are 1 and 0 without one. Backward, given dn of all N tokens:

    du[p] = r (dn[p] - sum dn / N - n[p] sum (dn n) / N),
    dx[p] = f (g du[p] - f x[p] mean (g du[p] f x[p])),    dg = sum_p du[p] f x[p],

where the mean is over channels. Mean and variance of the key norm come from sums of u - s and (u - s)², where s is the
first token's u. So a shift common to all keys, which the norm is there to remove, costs no digits.

Programs write their sums side by side and other programs add them. There are no atomics, so results are the same from
run to run.
"""

import triton
import triton.language as tl

from t5kernels.reductions import over_channels, over_tokens
from t5kernels.tokens import (
    COUNTS,
    after_previous,
    load_tokens,
    own_share,
    own_tokens,
    start_of_head,
    store_tokens,
    token_mask,
)

# A program of the statistics writes so many rows: the sums of u - s and of (u - s)², and s.
STATISTICS = tl.constexpr(3)
AT_ONCE = tl.constexpr(16)  # the sums of so many programs are added at a time


@triton.jit
def load_row(x, row, D: tl.constexpr, WIDTH: tl.constexpr, stride=1):
    """A row of a matrix of D columns, (1, WIDTH), float32."""
    channel = tl.arange(0, WIDTH)
    return tl.load(x + row * D + channel * stride, channel < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def store_row(x, row, values, D: tl.constexpr, WIDTH: tl.constexpr):
    """Write values (WIDTH,) to a row of a matrix of D columns."""
    channel = tl.arange(0, WIDTH)
    tl.store(x + row * D + channel, values, channel < D)


@triton.jit
def _rms_factor(x, eps, D: tl.constexpr):
    """f (BLOCK,) of tokens x (BLOCK, WIDTH)."""
    return 1 / tl.sqrt(over_channels(x * x) / D + eps)


@triton.jit
def _first_token(
    x, gain, b, h, stride_b, stride_h, stride_d, eps, D: tl.constexpr, WIDTH: tl.constexpr, RMS: tl.constexpr
):  # fmt: skip
    """u (1, WIDTH) of a head's first token, float32."""
    x = load_row(start_of_head(x, b, h, stride_b, stride_h), 0, D, WIDTH, stride_d)
    if RMS:
        x = x * _rms_factor(x, eps, D)[:, None] * load_row(gain, 0, D, WIDTH)
    return x


@triton.jit
def _store_statistics(sums, place, total, squares, shift, D: tl.constexpr, WIDTH: tl.constexpr):
    sums += place * (STATISTICS * D)
    store_row(sums, 0, total, D, WIDTH)
    store_row(sums, 1, squares, D, WIDTH)
    store_row(sums, 2, shift, D, WIDTH)


@triton.jit(do_not_specialize=COUNTS)
def statistics_kernel(
    x, text_x, gain, text_gain, first, first_gain, sums, factors, text_factors,
    x_b, x_h, x_n, x_d, t_b, t_h, t_n, f_b, f_h, f_d, factors_h,
    H, N, T, chunk, chunks, capacity, free, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    RMS: tl.constexpr, NORM: tl.constexpr, TEXT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Write the statistics of all tokens that are needed before one is prepared.

    The launch grid is (B·H, chunks of `chunk` tokens). factors: those of the RMS norm, float32, heads `factors_h`
    apart. sums: (B·H, `capacity`, STATISTICS, D) float32, with s from the first token of `first`; of the `free` places
    from here on, those that no program uses are filled with 0. With TEXT the image's `chunks` are followed by those of
    the text's T tokens, whose channels lie as the image's.
    """
    after_previous(EARLY)
    index, part = tl.program_id(0), tl.program_id(1)
    b, h = index // H, index % H
    x, x_b, x_h, x_n = own_tokens(x, x_b, x_h, x_n, text_x, t_b, t_h, t_n, part >= chunks, TEXT)
    if TEXT and RMS:
        gain, factors = tl.where(part >= chunks, text_gain, gain), tl.where(part >= chunks, text_factors, factors)
    part, N = own_share(part, chunks, N, T, TEXT)
    x = start_of_head(x, b, h, x_b, x_h)
    if RMS:
        gains = load_row(gain, 0, D, WIDTH)
        factors += index.to(tl.int64) * factors_h
    if NORM:
        shift = _first_token(first, first_gain, b, h, f_b, f_h, f_d, eps, D, WIDTH, RMS)
        total = tl.full((BLOCK, WIDTH), 0.0, tl.float32)
        squares = tl.full((BLOCK, WIDTH), 0.0, tl.float32)
    for start in tl.range(part * chunk, part * chunk + chunk, BLOCK, num_stages=STAGES):
        token = start + tl.arange(0, BLOCK)
        u = load_tokens(x, start, x_n, x_d, N, D, WIDTH, BLOCK).to(tl.float32)
        if RMS:
            factor = _rms_factor(u, eps, D)
            tl.store(factors + token, factor, token < N)
            u = u * factor[:, None] * gains
        if NORM:
            u = tl.where(token_mask(token < N, D, WIDTH), u - shift, 0.0)
            total += u
            squares += u * u
    if NORM:
        sums += index.to(tl.int64) * capacity * (STATISTICS * D)
        place = tl.program_id(1)
        _store_statistics(sums, place, over_tokens(total), over_tokens(squares), over_tokens(shift), D, WIDTH)
        nothing = tl.full((WIDTH,), 0.0, tl.float32)
        for unused in range(place + tl.num_programs(1), free, tl.num_programs(1)):
            _store_statistics(sums, unused, nothing, nothing, nothing, D, WIDTH)


@triton.jit
def _load_two_sums(sums, begin, end, stride, D: tl.constexpr, WIDTH: tl.constexpr):
    """Two rows, each (WIDTH,), added over programs from `begin` to before `end`, whose rows lie `stride` apart."""
    channel, row = tl.arange(0, WIDTH)[None, :], tl.arange(0, AT_ONCE)[:, None]
    one, other = tl.full((WIDTH,), 0.0, tl.float32), tl.full((WIDTH,), 0.0, tl.float32)
    for start in range(begin, end, AT_ONCE):
        mask = (start + row < end) & (channel < D)
        pointers = sums + (start + row) * stride + channel
        one += over_tokens(tl.load(pointers, mask, other=0.0))
        other += over_tokens(tl.load(pointers + D, mask, other=0.0))
    return one, other


@triton.jit
def load_norm(
    sums, index, capacity, shares, count, eps, D: tl.constexpr, WIDTH: tl.constexpr, NORM: tl.constexpr
):  # fmt: skip
    """r and c, each (1, WIDTH), of `count` tokens whose sums lie in the first `shares` of `capacity` places."""
    if NORM:
        sums += index.to(tl.int64) * capacity * (STATISTICS * D)
        mean, square = _load_two_sums(sums, 0, shares, STATISTICS * D, D, WIDTH)
        mean, square = mean / count, square / count
        scale = (1 / tl.sqrt(tl.maximum(square - mean * mean, 0.0) + eps))[None, :]
        return scale, -scale * (mean[None, :] + load_row(sums, 2, D, WIDTH))
    return tl.full((1, WIDTH), 1.0, tl.float32), tl.full((1, WIDTH), 0.0, tl.float32)


@triton.jit(do_not_specialize=COUNTS)
def norm_backward_kernel(
    dn, x, gain, factors, sums, text_dn, text_x, text_gain, text_factors, text_sums, totals, parts,
    dn_b, dn_h, dn_n, dn_d, x_b, x_h, x_n, x_d, tdn_b, tdn_h, tdn_n, tx_b, tx_h, tx_n,
    factors_h, capacity, shares, count, eps, text_shares, text_count,
    totals_h, totals_p, end, text_begin, text_end, H, N, T, chunk, chunks,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    RMS: tl.constexpr, NORM: tl.constexpr, TEXT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Turn dn into dx, in place, and write the programs' parts of dg.

    The launch grid, and image and text, are as in `statistics_kernel`. totals: sum dn and sum dn n, two rows of D
    numbers of each program of the kernel before; programs lie `totals_p` apart and heads `totals_h`. The image's norm
    takes the programs to before `end`, the text's those from `text_begin` to before `text_end`.
    parts: (B·H, all chunks, D), float32.
    """
    after_previous(EARLY)
    index, part = tl.program_id(0), tl.program_id(1)
    b, h = index // H, index % H
    is_text = part >= chunks
    x, x_b, x_h, x_n = own_tokens(x, x_b, x_h, x_n, text_x, tx_b, tx_h, tx_n, is_text, TEXT)
    dn, dn_b, dn_h, dn_n = own_tokens(dn, dn_b, dn_h, dn_n, text_dn, tdn_b, tdn_h, tdn_n, is_text, TEXT)
    part, N = own_share(part, chunks, N, T, TEXT)
    begin = 0
    if TEXT:
        gain, factors = tl.where(is_text, text_gain, gain), tl.where(is_text, text_factors, factors)
        sums, shares = tl.where(is_text, text_sums, sums), tl.where(is_text, text_shares, shares)
        count = tl.where(is_text, text_count, count)
        begin, end = tl.where(is_text, text_begin, 0), tl.where(is_text, text_end, end)
    x, dn = start_of_head(x, b, h, x_b, x_h), start_of_head(dn, b, h, dn_b, dn_h)
    if NORM:
        scale, offset = load_norm(sums, index, capacity, shares, count, eps, D, WIDTH, NORM)
        totals += index.to(tl.int64) * totals_h
        plain, product = _load_two_sums(totals, begin, end, totals_p, D, WIDTH)
        plain, product = (plain / count)[None, :], (product / count)[None, :]
    if RMS:
        gains = load_row(gain, 0, D, WIDTH)
        factors += index.to(tl.int64) * factors_h
        d_gain = tl.full((BLOCK, WIDTH), 0.0, tl.float32)
    for start in tl.range(part * chunk, part * chunk + chunk, BLOCK, num_stages=STAGES):
        u = load_tokens(x, start, x_n, x_d, N, D, WIDTH, BLOCK).to(tl.float32)
        grad = load_tokens(dn, start, dn_n, dn_d, N, D, WIDTH, BLOCK).to(tl.float32)
        if RMS:
            token = start + tl.arange(0, BLOCK)
            factor = tl.load(factors + token, token < N, other=0.0)[:, None]
            fx = u * factor
            u = fx * gains
        if NORM:
            grad = scale * (grad - plain - (u * scale + offset) * product)
        if RMS:
            d_gain += grad * fx
            grad *= gains
            grad = factor * (grad - fx * (over_channels(grad * fx) / D)[:, None])
        store_tokens(dn, grad, start, dn_n, dn_d, N, D, WIDTH, BLOCK)
    if RMS:
        parts += (index.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * D
        store_row(parts, 0, over_tokens(d_gain), D, WIDTH)
