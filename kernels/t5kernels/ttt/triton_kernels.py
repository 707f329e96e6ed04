# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportOperatorIssue=false
# (The body of a kernel is Triton's language: constants decide which branches exist, and its loops have no types.)
"""The Triton kernels of swiglu with the dot loss. One program takes some tokens of one head; triton.py launches them.

Those of swiglu_last, of which only W3 steps, are its halves on queries (LAST) and those in
triton_last_kernels.py.

Notation, for one image and head, with row vectors: q, k, v are the tokens, W1 W2 W3 the inner weights, s the inner
learning rate, G the step, U = W - G. g = silu(z1), g' and g'' are its derivatives by z1; * is elementwise; sums run
over tokens.

Forward, keys and values (`accumulate_kernel`). z1 = k W1, z2 = k W2, r = v W3^T, and the step is
    G1 = -s sum k^T (r * z2 * g'),   G2 = -s sum k^T (r * g),   G3 = -s sum (g * z2)^T v.
Forward, queries (`apply_kernel`). y1 = q U1, y2 = q U2, o = (silu(y1) * y2) U3.

Backward, queries (`apply_backward_kernel`). With p = silu(y1), h = p * y2 and the gradient do: dh = do U3^T,
dy2 = dh * p, dy1 = dh * y2 * p', so
    dq = dy1 U1^T + dy2 U2^T,   dU1 = sum q^T dy1,   dU2 = sum q^T dy2,   dU3 = sum h^T do.
As U = W - G, dU is a part of dW (summed over images), and dG = -dU. dG is all that the second pass needs of the first,
and the sum over all queries must be complete before it starts.

Backward, keys and values (`accumulate_backward_kernel`). With E = -s dG, the factors of the three sums of the forward,
m1 = r * z2 * g', m2 = r * g and a = g * z2, have the gradients dm1 = k E1, dm2 = k E2 and da = v E3^T, and
    dr  = dm2 * g + dm1 * z2 * g'
    dz1 = (dm2 * r + da * z2) * g' + dm1 * r * z2 * g''        (the second order of the inner model)
    dz2 = da * g + dm1 * r * g'
    dk  = m1 E1^T + m2 E2^T + dz1 W1^T + dz2 W2^T
    dv  = a E3 + dr W3
    dW1 += sum k^T dz1,   dW2 += sum k^T dz2,   dW3 += sum dr^T v    (summed over images).

Everything above splits over the hidden width (columns of W1 and W2, rows of W3): the sums over tokens of a slice need
that slice only, and o, dq, dk, dv are sums over slices. A slice has HIDDEN columns, so few that its three float32 sums
of WIDTH x HIDDEN stay in registers. The backward goes through its tokens once for each slice and adds to what it wrote
before, in the tokens' dtype. Matrix products take the dtype of the tokens and add in float32. Programs write their
partial sums side by side and the caller adds them in a fixed order, so there are no atomics.

Tokens and weights come in one or two groups of channels (triton_groups.py). What lies outside D or N is read as 0,
which adds nothing to any sum above.

Tensor cores want 64 rows of the first factor of a product. Two groups do not have them in `sum k^T m`, which is
therefore TURNED: z and m are transposes from the start, (HIDDEN, BLOCK), and m^T k, (HIDDEN, channels), takes m from
the registers in which it was computed. That also spares memory traffic at width 64, where it was measured to be faster.
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
def sigmoid(z, dtype):
    # It is written out because Triton's own function is interpreted only if TRITON_INTERPRET was set when Triton was
    # imported.
    if dtype == tl.float32:
        return 1 / (1 + tl.exp(-z))
    if dtype == tl.bfloat16:
        # This is one instruction, right to 11 bits, three more than bfloat16 has.
        half = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [0.5 * z], tl.float32, True, 1)
        return 0.5 * half + 0.5
    # These are two instructions of the hardware, without a division's care for the last digits.
    root = tl.rsqrt(1 + tl.exp2(z * -1.4426950408889634))
    return root * root


@triton.jit
def silu(z, dtype):
    """silu(z), and its first and second derivatives."""
    gate = sigmoid(z, dtype)
    value = z * gate
    rest = 1 - gate
    return value, gate + value * rest, gate * rest * (2 + z * (1 - 2 * gate))


@triton.jit
def _load_matrices(
    x1, x2, x3, offset, tile, D: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, HIDDEN: tl.constexpr
):
    """A slice of three D x D matrices, each `offset` numbers on: columns of the first two, rows of the third."""
    return (
        load_columns(x1 + offset, tile, D, WIDTH, REST, HIDDEN),
        load_columns(x2 + offset, tile, D, WIDTH, REST, HIDDEN),
        load_rows(x3 + offset, tile, D, WIDTH, REST, HIDDEN),
    )


@triton.jit
def _load_weights(
    w1, w2, w3, h, tile, dtype, D: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, HIDDEN: tl.constexpr
):
    """A slice of a head's inner weights."""
    w1, w2, w3 = _load_matrices(w1, w2, w3, h * (D * D), tile, D, WIDTH, REST, HIDDEN)
    return cast(w1, dtype), cast(w2, dtype), cast(w3, dtype)


@triton.jit
def load_first_weights(
    w1, w2, h, tile, dtype, D: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, HIDDEN: tl.constexpr
):
    """`_load_weights` without W3."""
    w1 = load_columns(w1 + h * (D * D), tile, D, WIDTH, REST, HIDDEN)
    w2 = load_columns(w2 + h * (D * D), tile, D, WIDTH, REST, HIDDEN)
    return cast(w1, dtype), cast(w2, dtype)


@triton.jit
def _load_triple(x, index, tile, D: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, HIDDEN: tl.constexpr):
    """A slice of the matrices 3 index, 3 index + 1, 3 index + 2 of x, a contiguous stack of D x D."""
    offset = index.to(tl.int64) * (3 * D * D)
    return _load_matrices(x, x + D * D, x + 2 * D * D, offset, tile, D, WIDTH, REST, HIDDEN)


@triton.jit
def _store_triple(
    x, index, tile, x1, x2, x3, D: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, HIDDEN: tl.constexpr
):
    """Write x1, x2, x3 where `_load_triple` reads."""
    x += index.to(tl.int64) * (3 * D * D)
    store_columns(x, x1, tile, D, WIDTH, REST, HIDDEN)
    store_columns(x + D * D, x2, tile, D, WIDTH, REST, HIDDEN)
    store_rows(x + 2 * D * D, x3, tile, D, WIDTH, REST, HIDDEN)


@triton.jit
def _load_stepped(
    w1, w2, w3, step, h, index, tile, dtype,
    D: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, HIDDEN: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """A slice of U = W - G, subtracted in float32. With LAST, step holds G3 alone."""
    w1, w2, w3 = _load_weights(w1, w2, w3, h, tile, tl.float32, D, WIDTH, REST, HIDDEN)
    if LAST:
        g3 = load_rows(step + index.to(tl.int64) * (D * D), tile, D, WIDTH, REST, HIDDEN)
    else:
        g1, g2, g3 = _load_triple(step, index, tile, D, WIDTH, REST, HIDDEN)
        w1, w2 = added(w1, scaled(g1, -1)), added(w2, scaled(g2, -1))
    w3 = added(w3, scaled(g3, -1))
    return cast(w1, dtype), cast(w2, dtype), cast(w3, dtype)


@triton.jit
def to_hidden(x, w, TURNED: tl.constexpr):
    """x w, (BLOCK, HIDDEN), for x (BLOCK, channels) and w (channels, HIDDEN); with TURNED its transpose."""
    return dot_channels(transposed(w), transposed(x)) if TURNED else dot_channels(x, w)


@triton.jit
def add_sum(total, x, m, TURNED: tl.constexpr):
    """total + x^T m, (channels, HIDDEN), for x (BLOCK, channels) and m (BLOCK, HIDDEN).

    With TURNED total and m are transposes, and so is the result.
    """
    return add_dot_rows(total, m, x) if TURNED else add_dot_columns(total, transposed(x), m)


@triton.jit
def zero_sum(HIDDEN: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, TURNED: tl.constexpr):
    """What `add_sum` starts with."""
    return zero_rows(HIDDEN, WIDTH, REST) if TURNED else zero_columns(HIDDEN, WIDTH, REST)


@triton.jit(do_not_specialize=COUNTS)
def accumulate_kernel(
    k, v, text_k, text_v, w1, w2, w3, sums,
    k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, tk_b, tk_h, tk_n, tv_b, tv_h, tv_n,
    H, N, T, chunk, chunks, capacity, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr,
    TEXT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The launch grid is (B·H, chunks of `chunk` tokens, slices). sums: (B·H, capacity, 3, D, D) float32.

    With TEXT the `chunks` of the image are followed by those of the text's T tokens, whose channels lie as the image's.
    """
    TURNED: tl.constexpr = REST > 0 or (WIDTH == 64 and HIDDEN == 64)
    after_previous(EARLY)
    index, part, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = index // H, index % H
    dtype = k.dtype.element_ty
    w1, w2, w3 = _load_weights(w1, w2, w3, h, tile, dtype, D, WIDTH, REST, HIDDEN)
    k, k_b, k_h, k_n = own_tokens(k, k_b, k_h, k_n, text_k, tk_b, tk_h, tk_n, part >= chunks, TEXT)
    v, v_b, v_h, v_n = own_tokens(v, v_b, v_h, v_n, text_v, tv_b, tv_h, tv_n, part >= chunks, TEXT)
    part, N = own_share(part, chunks, N, T, TEXT)
    k, v = start_of_head(k, b, h, k_b, k_h), start_of_head(v, b, h, v_b, v_h)
    zero = zero_sum(HIDDEN, WIDTH, REST, TURNED)
    s1, s2, s3 = zero, zero, zero
    for start in tl.range(part * chunk, part * chunk + chunk, BLOCK, disable_licm=True):
        values = load_channels(v, start, v_n, v_d, N, D, WIDTH, REST, BLOCK)
        keys = load_channels(k, start, k_n, k_d, N, D, WIDTH, REST, BLOCK)
        z1, z2 = to_hidden(keys, w1, TURNED), to_hidden(keys, w2, TURNED)
        r = to_hidden(values, transposed(w3), TURNED)
        gate, slope, _ = silu(z1, dtype)
        m1, m2 = (r * z2 * slope).to(dtype), (r * gate).to(dtype)
        a = (gate * z2).to(dtype)
        s1 = add_sum(s1, keys, m1, TURNED)
        s2 = add_sum(s2, keys, m2, TURNED)
        s3 = add_sum(s3, values, a, TURNED)
    if TURNED:
        s1, s2 = transposed(s1), transposed(s2)
    else:
        # The third sum is transposed: that keeps the tensor cores' instructions in flight (ptxas: C7515).
        s3 = transposed(s3)
    g1, g2, g3 = scaled(s1, -scale), scaled(s2, -scale), scaled(s3, -scale)
    place = index * capacity + tl.program_id(1)  # fewer registers than with the number of programs
    _store_triple(sums, place, tile, g1, g2, g3, D, WIDTH, REST, HIDDEN)


@triton.jit(do_not_specialize=COUNTS)
def apply_kernel(
    q, text_q, w1, w2, w3, step, out, text_out,
    q_b, q_h, q_n, q_d, tq_b, tq_h, tq_n, o_b, o_h, o_n, o_d, to_b, to_h, to_n,
    H, N, T, chunk, chunks,
    D: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr,
    SLICES: tl.constexpr, LAST: tl.constexpr, TEXT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The launch grid is (B·H, chunks of `chunk` tokens), and a program goes through all SLICES. With TEXT the `chunks`
    of the image are followed by those of the text's T queries, whose channels lie as the image's do.

    step: (B·H, 3, D, D) float32; (B·H, 1, D, D) with LAST.
    """
    after_previous(EARLY)
    index, part = tl.program_id(0), tl.program_id(1)
    b, h = index // H, index % H
    dtype = q.dtype.element_ty
    q, q_b, q_h, q_n = own_tokens(q, q_b, q_h, q_n, text_q, tq_b, tq_h, tq_n, part >= chunks, TEXT)
    out, o_b, o_h, o_n = own_tokens(out, o_b, o_h, o_n, text_out, to_b, to_h, to_n, part >= chunks, TEXT)
    part, N = own_share(part, chunks, N, T, TEXT)
    q, out = start_of_head(q, b, h, q_b, q_h), start_of_head(out, b, h, o_b, o_h)
    if SLICES == 1:
        u1, u2, u3 = _load_stepped(w1, w2, w3, step, h, index, 0, dtype, D, WIDTH, REST, HIDDEN, LAST)
    for start in tl.range(part * chunk, part * chunk + chunk, BLOCK, disable_licm=True):
        queries = load_channels(q, start, q_n, q_d, N, D, WIDTH, REST, BLOCK)
        o = zero_rows(BLOCK, WIDTH, REST)
        for tile in tl.static_range(SLICES):
            if SLICES > 1:
                u1, u2, u3 = _load_stepped(w1, w2, w3, step, h, index, tile, dtype, D, WIDTH, REST, HIDDEN, LAST)
            y1, y2 = dot_channels(queries, u1), dot_channels(queries, u2)
            hidden = y1 * sigmoid(y1, dtype) * y2
            o = add_dot_rows(o, hidden.to(dtype), u3)
        store_channels(out, o, start, o_n, o_d, N, D, WIDTH, REST, BLOCK)


@triton.jit(do_not_specialize=COUNTS)
def apply_backward_kernel(
    do, q, text_do, text_q, w1, w2, w3, step, dq, text_dq, sums,
    do_b, do_h, do_n, do_d, q_b, q_h, q_n, q_d, tdo_b, tdo_h, tdo_n, tq_b, tq_h, tq_n,
    dq_b, dq_h, dq_n, dq_d, tdq_b, tdq_h, tdq_n,
    H, N, T, chunk, chunks, capacity,
    D: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr,
    SLICES: tl.constexpr, LAST: tl.constexpr, TEXT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The launch grid, and image and text, are as in `apply_kernel`. sums: (B·H, capacity, 3, D, D) of -dU, float32."""
    after_previous(EARLY)
    index, part = tl.program_id(0), tl.program_id(1)
    b, h = index // H, index % H
    dtype = q.dtype.element_ty
    do, do_b, do_h, do_n = own_tokens(do, do_b, do_h, do_n, text_do, tdo_b, tdo_h, tdo_n, part >= chunks, TEXT)
    q, q_b, q_h, q_n = own_tokens(q, q_b, q_h, q_n, text_q, tq_b, tq_h, tq_n, part >= chunks, TEXT)
    dq, dq_b, dq_h, dq_n = own_tokens(dq, dq_b, dq_h, dq_n, text_dq, tdq_b, tdq_h, tdq_n, part >= chunks, TEXT)
    part, N = own_share(part, chunks, N, T, TEXT)
    do, q = start_of_head(do, b, h, do_b, do_h), start_of_head(q, b, h, q_b, q_h)
    dq = start_of_head(dq, b, h, dq_b, dq_h)
    for tile in range(SLICES):
        u1, u2, u3 = _load_stepped(w1, w2, w3, step, h, index, tile, dtype, D, WIDTH, REST, HIDDEN, LAST)
        zero = zero_columns(HIDDEN, WIDTH, REST)
        s1, s2, s3 = zero, zero, zero
        for start in tl.range(part * chunk, part * chunk + chunk, BLOCK, disable_licm=True):
            grads = load_channels(do, start, do_n, do_d, N, D, WIDTH, REST, BLOCK)
            queries = load_channels(q, start, q_n, q_d, N, D, WIDTH, REST, BLOCK)
            y1, y2 = dot_channels(queries, u1), dot_channels(queries, u2)
            dh = dot_channels(grads, transposed(u3))
            gate, slope, _ = silu(y1, dtype)
            dy1, dy2 = (dh * y2 * slope).to(dtype), (dh * gate).to(dtype)
            s3 = add_dot_columns(s3, transposed(grads), (gate * y2).to(dtype))
            dq_tile = add_dot_rows(zero_rows(BLOCK, WIDTH, REST), dy1, transposed(u1))
            dq_tile = add_dot_rows(dq_tile, dy2, transposed(u2))
            if tile > 0:
                before = load_channels(dq, start, dq_n, dq_d, N, D, WIDTH, REST, BLOCK)
                dq_tile = added(dq_tile, cast(before, tl.float32))
            store_channels(dq, dq_tile, start, dq_n, dq_d, N, D, WIDTH, REST, BLOCK)
            queries = transposed(queries)
            s1 = add_dot_columns(s1, queries, dy1)
            s2 = add_dot_columns(s2, queries, dy2)
        s1, s2, s3 = scaled(s1, -1), scaled(s2, -1), scaled(transposed(s3), -1)
        _store_triple(sums, index * capacity + tl.program_id(1), tile, s1, s2, s3, D, WIDTH, REST, HIDDEN)
        tl.debug_barrier()  # the next slice adds to dq, perhaps by other threads


@triton.jit(do_not_specialize=COUNTS)
def accumulate_backward_kernel(
    d_step, k, v, text_k, text_v, w1, w2, w3, dk, dv, text_dk, text_dv, sums,
    k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, tk_b, tk_h, tk_n, tv_b, tv_h, tv_n,
    dk_b, dk_h, dk_n, dk_d, dv_b, dv_h, dv_n, dv_d, tdk_b, tdk_h, tdk_n, tdv_b, tdv_h, tdv_n,
    B, H, N, T, images, chunk, chunks, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr,
    SLICES: tl.constexpr, TEXT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The launch grid is (H · groups of `images` images, chunks): a program sums dW over a group of images. Image and
    text are as in `accumulate_kernel`.

    d_step: (B·H, 3, D, D) float32; dk, dv: (B, H, N, D); sums: (groups·H, all chunks, 3, D, D) of dW, float32.
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
        w1_, w2_, w3_ = _load_weights(w1, w2, w3, h, tile, dtype, D, WIDTH, REST, HIDDEN)
        s1, s2 = zero_columns(HIDDEN, WIDTH, REST), zero_columns(HIDDEN, WIDTH, REST)
        s3 = zero_rows(HIDDEN, WIDTH, REST)
        for image in range(tl.minimum(images, B - group * images)):
            b = group * images + image
            index = b * H + h
            e1, e2, e3 = _load_triple(d_step, index, tile, D, WIDTH, REST, HIDDEN)
            e1, e2, e3 = scaled(e1, -scale), scaled(e2, -scale), scaled(e3, -scale)
            e1, e2, e3 = cast(e1, dtype), cast(e2, dtype), cast(e3, dtype)
            k_, v_ = start_of_head(k, b, h, k_b, k_h), start_of_head(v, b, h, v_b, v_h)
            dk_, dv_ = start_of_head(dk, b, h, dk_b, dk_h), start_of_head(dv, b, h, dv_b, dv_h)
            for start in tl.range(part * chunk, part * chunk + chunk, BLOCK, disable_licm=True):
                values = load_channels(v_, start, v_n, v_d, N, D, WIDTH, REST, BLOCK)
                keys = load_channels(k_, start, k_n, k_d, N, D, WIDTH, REST, BLOCK)
                z1, z2 = dot_channels(keys, w1_), dot_channels(keys, w2_)
                r = dot_channels(values, transposed(w3_))
                gate, slope, bend = silu(z1, dtype)
                # The order of what follows keeps the fewest values in registers.
                m1, m2, a = (r * z2 * slope).to(dtype), (r * gate).to(dtype), (gate * z2).to(dtype)
                da = dot_channels(values, transposed(e3))
                dz1, dz2 = da * z2, da * gate
                dm2 = dot_channels(keys, e2)
                dr = dm2 * gate
                dz1 = (dz1 + dm2 * r) * slope
                dm1 = dot_channels(keys, e1)
                dr = (dr + dm1 * z2 * slope).to(dtype)
                dm1 *= r
                dz1 = (dz1 + dm1 * z2 * bend).to(dtype)
                dz2 = (dz2 + dm1 * slope).to(dtype)

                s3 = add_dot_rows(s3, tl.trans(dr), values)
                dv_tile = add_dot_rows(add_dot_rows(zero_rows(BLOCK, WIDTH, REST), a, e3), dr, w3_)
                if tile > 0:
                    before = load_channels(dv_, start, dv_n, dv_d, N, D, WIDTH, REST, BLOCK)
                    dv_tile = added(dv_tile, cast(before, tl.float32))
                store_channels(dv_, dv_tile, start, dv_n, dv_d, N, D, WIDTH, REST, BLOCK)
                dk_tile = add_dot_rows(zero_rows(BLOCK, WIDTH, REST), m1, transposed(e1))
                dk_tile = add_dot_rows(dk_tile, m2, transposed(e2))
                dk_tile = add_dot_rows(dk_tile, dz1, transposed(w1_))
                dk_tile = add_dot_rows(dk_tile, dz2, transposed(w2_))
                if tile > 0:
                    before = load_channels(dk_, start, dk_n, dk_d, N, D, WIDTH, REST, BLOCK)
                    dk_tile = added(dk_tile, cast(before, tl.float32))
                store_channels(dk_, dk_tile, start, dk_n, dk_d, N, D, WIDTH, REST, BLOCK)
                keys = transposed(keys)
                s1 = add_dot_columns(s1, keys, dz1)
                s2 = add_dot_columns(s2, keys, dz2)
        place = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        _store_triple(sums, place, tile, s1, s2, s3, D, WIDTH, REST, HIDDEN)
        tl.debug_barrier()  # the next slice adds to dk and dv, perhaps by other threads
