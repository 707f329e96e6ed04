# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportOperatorIssue=false
# (The body of a kernel is Triton's language: constants decide which branches exist, and its loops have no types.)
"""The Triton kernels of linear_proj_qk. One program takes some tokens of one head; triton_linear.py launches them.

Notation, for one image and head, with row vectors: q, k, v are the tokens, W1 and W2 the inner weights, s the inner
learning rate; phi(x) = elu(x) + 1 and phi' is its derivative; * is elementwise; sums run over tokens.

Forward, keys and values (`accumulate_linear_kernel`). a = phi(k W2), and the step is
    S = s sum a^T v,   z = s sum a.
The rate s cancels in the output. It keeps the sums in the range of 16 bits.
Forward, queries (`apply_linear_kernel`). p = phi(q W1), c = p . z, o = (p S) / c.

Backward, queries (`apply_linear_backward_kernel`). With the gradient do and g = do S^T, do . o = (p . g) / c and
    dp = (g - (do . o) z) / c,   dy = dp * phi'(q W1),
    dq = dy W1^T,   dW1 = sum q^T dy,   dS = sum (p / c)^T do,   dz = -sum (p / c) (do . o).
Backward, keys and values (`accumulate_linear_backward_kernel`).
    da = s (v dS^T + dz),   du = da * phi'(k W2),   dk = du W2^T,   dv = s a dS,   dW2 = sum k^T du.

c is at least `eps`, and where it is less dz and dp have no part in do . o.

dp and da are small differences of large numbers: a shift of all values changes neither, and values have shifts. So that
16 bits do for the factors, S and dS enter there as sums of two such numbers, `high` and `low`. And z and dz add up
features as S and dS do, rounded to 16 bits, so that errors of features cancel in the difference.

Everything above splits over the hidden width (columns of W1 and W2, rows of S, numbers of z), save that c and p . g
are sums over it: `apply_linear_backward_kernel` adds up the other slices' in every slice, of which there is therefore
but one where memory allows. All else is as in triton_kernels.py. What lies outside D or N is read as 0, of which the
features are 1; so z leaves out what is beyond N.
"""

import triton
import triton.language as tl

from t5kernels.reductions import over_channels, over_tokens
from t5kernels.tokens import COUNTS, after_previous, own_share, own_tokens, start_of_head
from t5kernels.ttt.triton_groups import (
    add_dot_columns,
    add_dot_rows,
    added,
    cast,
    dot_channels,
    load_channels,
    load_columns,
    load_rows,
    scaled,
    store_channels,
    store_columns,
    store_rows,
    transposed,
    zero_columns,
    zero_rows,
)


@triton.jit
def _features(x):
    """phi(x)."""
    return tl.exp(tl.minimum(x, 0.0)) + tl.maximum(x, 0.0)


@triton.jit
def _slope(features):
    """phi'(x), from phi(x): fewer registers than if both were kept."""
    return tl.minimum(features, 1.0)


@triton.jit
def _load_sums(step, tile, D: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, HIDDEN: tl.constexpr):
    """A slice of S, (HIDDEN, channels), and of z, (HIDDEN,), which lies after S."""
    feature = tile * HIDDEN + tl.arange(0, HIDDEN)
    return load_rows(step, tile, D, WIDTH, REST, HIDDEN), tl.load(step + D * D + feature, feature < D, other=0.0)


@triton.jit
def _store_sums(sums, s, z, tile, D: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, HIDDEN: tl.constexpr):
    """Write s and z where `_load_sums` reads."""
    feature = tile * HIDDEN + tl.arange(0, HIDDEN)
    store_rows(sums, s, tile, D, WIDTH, REST, HIDDEN)
    tl.store(sums + D * D + feature, z, feature < D)


@triton.jit
def _halves(x, dtype):
    """x in groups as a sum of two of `dtype`, of which the second is small."""
    high = cast(x, dtype)
    return high, cast(added(x, scaled(cast(high, tl.float32), -1)), dtype)


@triton.jit
def _dot_halves(x, high, low):
    """x (high + low)^T, (BLOCK, HIDDEN), for tokens x (BLOCK, channels)."""
    if x[0].dtype == tl.float32:
        return dot_channels(x, transposed(high))
    return dot_channels(x + x, transposed(high + low))


@triton.jit(do_not_specialize=COUNTS)
def accumulate_linear_kernel(
    k, v, text_k, text_v, w2, sums,
    k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, tk_b, tk_h, tk_n, tv_b, tv_h, tv_n,
    H, N, T, chunk, chunks, capacity, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr,
    TEXT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The launch grid is (B·H, chunks of `chunk` tokens, slices). With TEXT the `chunks` of the image are followed by
    those of the text's T tokens, whose channels lie as the image's do.

    sums: (B·H, capacity, D + 1, D) float32, rows of S and then z.
    """
    after_previous(EARLY)
    index, part, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = index // H, index % H
    dtype = k.dtype.element_ty
    w2 = cast(load_columns(w2 + h * (D * D), tile, D, WIDTH, REST, HIDDEN), dtype)
    k, k_b, k_h, k_n = own_tokens(k, k_b, k_h, k_n, text_k, tk_b, tk_h, tk_n, part >= chunks, TEXT)
    v, v_b, v_h, v_n = own_tokens(v, v_b, v_h, v_n, text_v, tv_b, tv_h, tv_n, part >= chunks, TEXT)
    part, N = own_share(part, chunks, N, T, TEXT)
    k, v = start_of_head(k, b, h, k_b, k_h), start_of_head(v, b, h, v_b, v_h)
    s, z = zero_rows(HIDDEN, WIDTH, REST), tl.full((HIDDEN,), 0.0, tl.float32)
    for start in tl.range(part * chunk, part * chunk + chunk, BLOCK, disable_licm=True):
        values = load_channels(v, start, v_n, v_d, N, D, WIDTH, REST, BLOCK)
        keys = load_channels(k, start, k_n, k_d, N, D, WIDTH, REST, BLOCK)
        a = _features(dot_channels(transposed(w2), transposed(keys))).to(dtype)  # (HIDDEN, BLOCK)
        s = add_dot_rows(s, a, values)
        token = start + tl.arange(0, BLOCK)
        z += over_channels(tl.where((token < N)[None, :], a.to(tl.float32), 0.0))
    sums += (index * capacity + tl.program_id(1)).to(tl.int64) * (D * D + D)
    _store_sums(sums, scaled(s, scale), scale * z, tile, D, WIDTH, REST, HIDDEN)


@triton.jit(do_not_specialize=COUNTS)
def apply_linear_kernel(
    q, text_q, w1, step, out, text_out,
    q_b, q_h, q_n, q_d, tq_b, tq_h, tq_n, o_b, o_h, o_n, o_d, to_b, to_h, to_n,
    H, N, T, chunk, chunks, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr,
    SLICES: tl.constexpr, TEXT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The launch grid is (B·H, chunks of `chunk` tokens), and a program goes through all SLICES. With TEXT the `chunks`
    of the image are followed by those of the text's T queries, whose channels lie as the image's do.

    step: (B·H, D + 1, D) float32.
    """
    after_previous(EARLY)
    index, part = tl.program_id(0), tl.program_id(1)
    b, h = index // H, index % H
    dtype = q.dtype.element_ty
    w1, step = w1 + h * (D * D), step + index.to(tl.int64) * (D * D + D)
    q, q_b, q_h, q_n = own_tokens(q, q_b, q_h, q_n, text_q, tq_b, tq_h, tq_n, part >= chunks, TEXT)
    out, o_b, o_h, o_n = own_tokens(out, o_b, o_h, o_n, text_out, to_b, to_h, to_n, part >= chunks, TEXT)
    part, N = own_share(part, chunks, N, T, TEXT)
    q, out = start_of_head(q, b, h, q_b, q_h), start_of_head(out, b, h, o_b, o_h)
    if SLICES == 1:
        w1_, s, z = _load_for_queries(w1, step, 0, dtype, D, WIDTH, REST, HIDDEN)
        s = cast(s, dtype)
    for start in tl.range(part * chunk, part * chunk + chunk, BLOCK, disable_licm=True):
        queries = load_channels(q, start, q_n, q_d, N, D, WIDTH, REST, BLOCK)
        o, norm = zero_rows(BLOCK, WIDTH, REST), tl.full((BLOCK,), 0.0, tl.float32)
        for tile in tl.static_range(SLICES):
            if SLICES > 1:
                w1_, s, z = _load_for_queries(w1, step, tile, dtype, D, WIDTH, REST, HIDDEN)
                s = cast(s, dtype)
            p = _features(dot_channels(queries, w1_))
            norm += over_channels(p * z[None, :])
            o = add_dot_rows(o, p.to(dtype), s)
        o = scaled(o, (1 / tl.maximum(norm, eps))[:, None])
        store_channels(out, o, start, o_n, o_d, N, D, WIDTH, REST, BLOCK)


@triton.jit
def _load_for_queries(
    w1, step, tile, dtype, D: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, HIDDEN: tl.constexpr
):
    """A slice of a head's W1, S and z."""
    s, z = _load_sums(step, tile, D, WIDTH, REST, HIDDEN)
    return cast(load_columns(w1, tile, D, WIDTH, REST, HIDDEN), dtype), s, z


@triton.jit(do_not_specialize=COUNTS)
def apply_linear_backward_kernel(
    do, q, text_do, text_q, w1, step, dq, text_dq, sums,
    do_b, do_h, do_n, do_d, q_b, q_h, q_n, q_d, tdo_b, tdo_h, tdo_n, tq_b, tq_h, tq_n,
    dq_b, dq_h, dq_n, dq_d, tdq_b, tdq_h, tdq_n,
    H, N, T, chunk, chunks, capacity, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr,
    SLICES: tl.constexpr, TEXT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The launch grid, and image and text, are as in `apply_linear_kernel`.

    sums: (B·H, capacity, 2 D + 1, D) float32, rows of -dW1, of dS, and dz.
    """
    after_previous(EARLY)
    index, part = tl.program_id(0), tl.program_id(1)
    b, h = index // H, index % H
    dtype = q.dtype.element_ty
    w1, step = w1 + h * (D * D), step + index.to(tl.int64) * (D * D + D)
    sums += (index * capacity + part).to(tl.int64) * (2 * D * D + D)
    do, do_b, do_h, do_n = own_tokens(do, do_b, do_h, do_n, text_do, tdo_b, tdo_h, tdo_n, part >= chunks, TEXT)
    q, q_b, q_h, q_n = own_tokens(q, q_b, q_h, q_n, text_q, tq_b, tq_h, tq_n, part >= chunks, TEXT)
    dq, dq_b, dq_h, dq_n = own_tokens(dq, dq_b, dq_h, dq_n, text_dq, tdq_b, tdq_h, tdq_n, part >= chunks, TEXT)
    part, N = own_share(part, chunks, N, T, TEXT)
    do, q = start_of_head(do, b, h, do_b, do_h), start_of_head(q, b, h, q_b, q_h)
    dq = start_of_head(dq, b, h, dq_b, dq_h)
    for tile in range(SLICES):
        w1_, s, z = _load_for_queries(w1, step, tile, dtype, D, WIDTH, REST, HIDDEN)
        high, low = _halves(s, dtype)
        dw1, ds = zero_columns(HIDDEN, WIDTH, REST), zero_columns(HIDDEN, WIDTH, REST)
        dz = tl.full((HIDDEN,), 0.0, tl.float32)
        for start in tl.range(part * chunk, part * chunk + chunk, BLOCK, disable_licm=True):
            grads = load_channels(do, start, do_n, do_d, N, D, WIDTH, REST, BLOCK)
            queries = load_channels(q, start, q_n, q_d, N, D, WIDTH, REST, BLOCK)
            p = _features(dot_channels(queries, w1_))
            g = _dot_halves(grads, high, low)
            norm, product = over_channels(p * z[None, :]), over_channels(p * g)
            for other in range(1, SLICES):
                w1_o, s_o, z_o = _load_for_queries(w1, step, (tile + other) % SLICES, dtype, D, WIDTH, REST, HIDDEN)
                high_o, low_o = _halves(s_o, dtype)
                p_o = _features(dot_channels(queries, w1_o))
                norm += over_channels(p_o * z_o[None, :])
                product += over_channels(p_o * _dot_halves(grads, high_o, low_o))
            share = 1 / tl.maximum(norm, eps)
            product = tl.where(norm < eps, 0.0, share * product)[:, None]  # do . o
            share = share[:, None]
            dy = ((g - product * z[None, :]) * (share * _slope(p))).to(dtype)
            dq_tile = add_dot_rows(zero_rows(BLOCK, WIDTH, REST), dy, transposed(w1_))
            if tile > 0:
                before = load_channels(dq, start, dq_n, dq_d, N, D, WIDTH, REST, BLOCK)
                dq_tile = added(dq_tile, cast(before, tl.float32))
            store_channels(dq, dq_tile, start, dq_n, dq_d, N, D, WIDTH, REST, BLOCK)
            dw1 = add_dot_columns(dw1, transposed(queries), dy)
            p = (p * share).to(dtype)
            ds = add_dot_columns(ds, transposed(grads), p)
            dz -= over_tokens(p.to(tl.float32) * product)
        store_columns(sums, scaled(dw1, -1), tile, D, WIDTH, REST, HIDDEN)
        _store_sums(sums + D * D, transposed(ds), dz, tile, D, WIDTH, REST, HIDDEN)
        tl.debug_barrier()  # the next slice adds to dq, perhaps by other threads


@triton.jit(do_not_specialize=COUNTS)
def accumulate_linear_backward_kernel(
    d_step, k, v, text_k, text_v, w2, dk, dv, text_dk, text_dv, sums,
    k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, tk_b, tk_h, tk_n, tv_b, tv_h, tv_n,
    dk_b, dk_h, dk_n, dk_d, dv_b, dv_h, dv_n, dv_d, tdk_b, tdk_h, tdk_n, tdv_b, tdv_h, tdv_n,
    B, H, N, T, images, chunk, chunks, scale, step_h,
    D: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr,
    SLICES: tl.constexpr, TEXT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The launch grid is (H · groups of `images` images, chunks): a program sums dW2 over a group of images. Image and
    text are as in `accumulate_linear_kernel`.

    d_step: float32, rows of dS and then dz, (D + 1) x D every `step_h` numbers; dk, dv: (B, H, N, D); sums:
    (groups·H, all chunks, D, D) of dW2, float32.
    """
    after_previous(EARLY)
    part, group, h = tl.program_id(1), tl.program_id(0) // H, tl.program_id(0) % H
    dtype = k.dtype.element_ty
    root = tl.sqrt(scale)  # halfway between dS and s dS, where float16 has room for both halves
    k, k_b, k_h, k_n = own_tokens(k, k_b, k_h, k_n, text_k, tk_b, tk_h, tk_n, part >= chunks, TEXT)
    v, v_b, v_h, v_n = own_tokens(v, v_b, v_h, v_n, text_v, tv_b, tv_h, tv_n, part >= chunks, TEXT)
    dk, dk_b, dk_h, dk_n = own_tokens(dk, dk_b, dk_h, dk_n, text_dk, tdk_b, tdk_h, tdk_n, part >= chunks, TEXT)
    dv, dv_b, dv_h, dv_n = own_tokens(dv, dv_b, dv_h, dv_n, text_dv, tdv_b, tdv_h, tdv_n, part >= chunks, TEXT)
    part, N = own_share(part, chunks, N, T, TEXT)
    for tile in range(SLICES):
        w2_ = cast(load_columns(w2 + h * (D * D), tile, D, WIDTH, REST, HIDDEN), dtype)
        dw2 = zero_columns(HIDDEN, WIDTH, REST)
        for image in range(tl.minimum(images, B - group * images)):
            b = group * images + image
            ds, dz = _load_sums(d_step + (b * H + h).to(tl.int64) * step_h, tile, D, WIDTH, REST, HIDDEN)
            high, low = _halves(scaled(ds, root), dtype)
            k_, v_ = start_of_head(k, b, h, k_b, k_h), start_of_head(v, b, h, v_b, v_h)
            dk_, dv_ = start_of_head(dk, b, h, dk_b, dk_h), start_of_head(dv, b, h, dv_b, dv_h)
            for start in tl.range(part * chunk, part * chunk + chunk, BLOCK, disable_licm=True):
                values = load_channels(v_, start, v_n, v_d, N, D, WIDTH, REST, BLOCK)
                keys = load_channels(k_, start, k_n, k_d, N, D, WIDTH, REST, BLOCK)
                a = _features(dot_channels(keys, w2_))
                du = ((root * _dot_halves(values, high, low) + (scale * dz)[None, :]) * _slope(a)).to(dtype)
                dv_tile = scaled(add_dot_rows(zero_rows(BLOCK, WIDTH, REST), a.to(dtype), high), root)
                if tile > 0:
                    before = load_channels(dv_, start, dv_n, dv_d, N, D, WIDTH, REST, BLOCK)
                    dv_tile = added(dv_tile, cast(before, tl.float32))
                store_channels(dv_, dv_tile, start, dv_n, dv_d, N, D, WIDTH, REST, BLOCK)
                dk_tile = add_dot_rows(zero_rows(BLOCK, WIDTH, REST), du, transposed(w2_))
                if tile > 0:
                    before = load_channels(dk_, start, dk_n, dk_d, N, D, WIDTH, REST, BLOCK)
                    dk_tile = added(dk_tile, cast(before, tl.float32))
                store_channels(dk_, dk_tile, start, dk_n, dk_d, N, D, WIDTH, REST, BLOCK)
                dw2 = add_dot_columns(dw2, transposed(keys), du)
        place = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        store_columns(sums + place.to(tl.int64) * (D * D), dw2, tile, D, WIDTH, REST, HIDDEN)
        tl.debug_barrier()  # the next slice adds to dk and dv, perhaps by other threads
