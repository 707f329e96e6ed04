# pyright: reportGeneralTypeIssues=false
# (The body of a kernel is Triton's language, which has no types that pyright could check.)
"""The Triton kernels of swiglu_last on keys and values: swiglu with the dot loss, of which W3 alone steps.

Notation, slices and groups of channels are those of triton_kernels.py, whose kernels on queries serve here, too (LAST).
U1 = W1 and U2 = W2, and of the formulas there remain G3 (`accumulate_last_kernel`), da with
    dz1 = da * z2 * g',   dz2 = da * g,   dk = dz1 W1^T + dz2 W2^T,   dv = a E3   (`accumulate_last_backward_kernel`).
"""

import triton
import triton.language as tl

from t5kernels.tokens import COUNTS, after_previous, own_share, own_tokens, start_of_head
from t5kernels.ttt.triton_groups import (
    add_dot_columns,
    add_dot_rows,
    added,
    cast,
    dot_channels,
    load_channels,
    load_rows,
    scaled,
    store_channels,
    store_columns,
    store_rows,
    transposed,
    zero_columns,
    zero_rows,
)
from t5kernels.ttt.triton_kernels import add_sum, load_first_weights, sigmoid, silu, to_hidden, zero_sum


@triton.jit(do_not_specialize=COUNTS)
def accumulate_last_kernel(
    k, v, text_k, text_v, w1, w2, sums,
    k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, tk_b, tk_h, tk_n, tv_b, tv_h, tv_n,
    H, N, T, chunk, chunks, capacity, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr,
    TEXT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`accumulate_kernel` where W3 alone steps: sums (B·H, capacity, 1, D, D)."""
    TURNED: tl.constexpr = REST > 0 or (WIDTH == 64 and HIDDEN == 64)
    after_previous(EARLY)
    index, part, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = index // H, index % H
    dtype = k.dtype.element_ty
    w1, w2 = load_first_weights(w1, w2, h, tile, dtype, D, WIDTH, REST, HIDDEN)
    k, k_b, k_h, k_n = own_tokens(k, k_b, k_h, k_n, text_k, tk_b, tk_h, tk_n, part >= chunks, TEXT)
    v, v_b, v_h, v_n = own_tokens(v, v_b, v_h, v_n, text_v, tv_b, tv_h, tv_n, part >= chunks, TEXT)
    part, N = own_share(part, chunks, N, T, TEXT)
    k, v = start_of_head(k, b, h, k_b, k_h), start_of_head(v, b, h, v_b, v_h)
    s3 = zero_sum(HIDDEN, WIDTH, REST, TURNED)
    for start in tl.range(part * chunk, part * chunk + chunk, BLOCK, disable_licm=True):
        values = load_channels(v, start, v_n, v_d, N, D, WIDTH, REST, BLOCK)
        keys = load_channels(k, start, k_n, k_d, N, D, WIDTH, REST, BLOCK)
        z1, z2 = to_hidden(keys, w1, TURNED), to_hidden(keys, w2, TURNED)
        a = (z1 * sigmoid(z1, dtype) * z2).to(dtype)
        s3 = add_sum(s3, values, a, TURNED)
    if not TURNED:
        s3 = transposed(s3)
    sums += (index * capacity + tl.program_id(1)).to(tl.int64) * (D * D)
    store_rows(sums, scaled(s3, -scale), tile, D, WIDTH, REST, HIDDEN)


@triton.jit(do_not_specialize=COUNTS)
def accumulate_last_backward_kernel(
    d_step, k, v, text_k, text_v, w1, w2, dk, dv, text_dk, text_dv, sums,
    k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, tk_b, tk_h, tk_n, tv_b, tv_h, tv_n,
    dk_b, dk_h, dk_n, dk_d, dv_b, dv_h, dv_n, dv_d, tdk_b, tdk_h, tdk_n, tdv_b, tdv_h, tdv_n,
    B, H, N, T, images, chunk, chunks, scale, step_h,
    D: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr,
    SLICES: tl.constexpr, TEXT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`accumulate_backward_kernel` where W3 alone steps. d_step: float32, a D x D every `step_h` numbers.

    sums: (groups·H, all chunks, 2, D, D) of dW1 and dW2.
    """
    after_previous(EARLY)
    part, group, h = tl.program_id(1), tl.program_id(0) // H, tl.program_id(0) % H
    dtype = k.dtype.element_ty
    k, k_b, k_h, k_n = own_tokens(k, k_b, k_h, k_n, text_k, tk_b, tk_h, tk_n, part >= chunks, TEXT)
    v, v_b, v_h, v_n = own_tokens(v, v_b, v_h, v_n, text_v, tv_b, tv_h, tv_n, part >= chunks, TEXT)
    dk, dk_b, dk_h, dk_n = own_tokens(dk, dk_b, dk_h, dk_n, text_dk, tdk_b, tdk_h, tdk_n, part >= chunks, TEXT)
    dv, dv_b, dv_h, dv_n = own_tokens(dv, dv_b, dv_h, dv_n, text_dv, tdv_b, tdv_h, tdv_n, part >= chunks, TEXT)
    part, N = own_share(part, chunks, N, T, TEXT)
    for tile in range(SLICES):
        w1_, w2_ = load_first_weights(w1, w2, h, tile, dtype, D, WIDTH, REST, HIDDEN)
        s1, s2 = zero_columns(HIDDEN, WIDTH, REST), zero_columns(HIDDEN, WIDTH, REST)
        for image in range(tl.minimum(images, B - group * images)):
            b = group * images + image
            d_step_ = d_step + (b * H + h).to(tl.int64) * step_h
            e3 = cast(scaled(load_rows(d_step_, tile, D, WIDTH, REST, HIDDEN), -scale), dtype)
            k_, v_ = start_of_head(k, b, h, k_b, k_h), start_of_head(v, b, h, v_b, v_h)
            dk_, dv_ = start_of_head(dk, b, h, dk_b, dk_h), start_of_head(dv, b, h, dv_b, dv_h)
            for start in tl.range(part * chunk, part * chunk + chunk, BLOCK, disable_licm=True):
                values = load_channels(v_, start, v_n, v_d, N, D, WIDTH, REST, BLOCK)
                keys = load_channels(k_, start, k_n, k_d, N, D, WIDTH, REST, BLOCK)
                z1, z2 = dot_channels(keys, w1_), dot_channels(keys, w2_)
                da = dot_channels(values, transposed(e3))
                gate, slope, _ = silu(z1, dtype)
                dv_tile = add_dot_rows(zero_rows(BLOCK, WIDTH, REST), (gate * z2).to(dtype), e3)
                dz1, dz2 = (da * z2 * slope).to(dtype), (da * gate).to(dtype)
                if tile > 0:
                    before = load_channels(dv_, start, dv_n, dv_d, N, D, WIDTH, REST, BLOCK)
                    dv_tile = added(dv_tile, cast(before, tl.float32))
                store_channels(dv_, dv_tile, start, dv_n, dv_d, N, D, WIDTH, REST, BLOCK)
                dk_tile = add_dot_rows(zero_rows(BLOCK, WIDTH, REST), dz1, transposed(w1_))
                dk_tile = add_dot_rows(dk_tile, dz2, transposed(w2_))
                if tile > 0:
                    before = load_channels(dk_, start, dk_n, dk_d, N, D, WIDTH, REST, BLOCK)
                    dk_tile = added(dk_tile, cast(before, tl.float32))
                store_channels(dk_, dk_tile, start, dk_n, dk_d, N, D, WIDTH, REST, BLOCK)
                keys = transposed(keys)
                s1 = add_dot_columns(s1, keys, dz1)
                s2 = add_dot_columns(s2, keys, dz2)
        place = sums + (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * (2 * D * D)
        store_columns(place, s1, tile, D, WIDTH, REST, HIDDEN)
        store_columns(place + D * D, s2, tile, D, WIDTH, REST, HIDDEN)
        tl.debug_barrier()  # the next slice adds to dk and dv, perhaps by other threads
