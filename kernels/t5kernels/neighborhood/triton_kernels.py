# pyright: reportGeneralTypeIssues=false
# (The body of a kernel is Triton's language, which has no types that pyright could check.)
"""The Triton kernels of neighborhood attention. One program takes a square of tokens of one head; triton.py launches
them.

A square of TILE × TILE queries sees keys of a square that is W - 1 larger, and all of those fit into one block of
SIDE × SIDE: the softmax is taken at once, and nothing is summed over blocks. At a border windows are shifted inward, so
that a key there is seen from up to W - 1 tokens away: backwards the square is 2 (W - 1) larger.

With p the softmax over a query's window, lse the logarithm of its sum (base 2) and do the gradient of the output o:
    delta = sum do * o,   dv = p^T do,   ds = p * (do v^T - delta),   dq = scale ds k,   dk = scale ds^T q.
"""

import triton
import triton.language as tl

from t5kernels.reductions import largest_channel, over_channels
from t5kernels.tokens import COUNTS, after_previous, start_of_head, token_mask

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _window_start(position, length, WINDOW: tl.constexpr):
    """The first position that `position` sees on an axis."""
    return tl.maximum(tl.minimum(position - WINDOW // 2, length - WINDOW), 0)


@triton.jit
def _sees(query, key, length, WINDOW: tl.constexpr):
    """Whether a query's window on an axis holds a key; no window holds one that lies outside of the grid."""
    start = _window_start(query, length, WINDOW)
    return (key >= start) & (key < start + WINDOW)


@triton.jit
def _corner(tile, columns, TILE: tl.constexpr):
    """Row and column of the first token of a square."""
    across = (columns + TILE - 1) // TILE
    return tile // across * TILE, tile % across * TILE


@triton.jit
def _square(row, column, rows, columns, SIDE: tl.constexpr):
    """Rows and columns of the SIDE · SIDE tokens of a square from a corner on, and which of them are in the grid."""
    place = tl.arange(0, SIDE * SIDE)
    r, c = row + place // SIDE, column + place % SIDE
    return r, c, (r >= 0) & (r < rows) & (c >= 0) & (c < columns)


@triton.jit
def _pointers(x, row, column, columns, stride_n, stride_d, WIDTH: tl.constexpr, SIDE: tl.constexpr):
    """To the tokens of a square (SIDE · SIDE, WIDTH). Only its corner needs 64 bits: the others are near it."""
    place = tl.arange(0, SIDE * SIDE)
    near = (place // SIDE * columns + place % SIDE) * stride_n
    corner = tl.cast(row * columns + column, tl.int64) * stride_n
    return x + corner + (near[:, None] + tl.arange(0, WIDTH)[None, :] * stride_d)


@triton.jit
def _load(
    x, row, column, inside, columns, stride_n, stride_d, D: tl.constexpr, WIDTH: tl.constexpr, SIDE: tl.constexpr
):
    """The tokens of a square, 0 outside of the grid and beyond D."""
    pointers = _pointers(x, row, column, columns, stride_n, stride_d, WIDTH, SIDE)
    return tl.load(pointers, token_mask(inside, D, WIDTH), other=0.0)


@triton.jit
def _store(
    x, y, row, column, inside, columns, stride_n, stride_d, D: tl.constexpr, WIDTH: tl.constexpr, SIDE: tl.constexpr
):
    pointers = _pointers(x, row, column, columns, stride_n, stride_d, WIDTH, SIDE)
    tl.store(pointers, y.to(x.dtype.element_ty), token_mask(inside, D, WIDTH))


@triton.jit(do_not_specialize=COUNTS)
def neighborhood_kernel(
    q, k, v, out, lse,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, o_b, o_h, o_n, o_d,
    H, rows, columns, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr, TILE: tl.constexpr, SIDE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """The launch grid is (B·H, squares of the grid). lse: (B·H, rows·columns) float32."""
    after_previous(EARLY)
    index = tl.program_id(0)
    b, h = index // H, index % H
    row, column = _corner(tl.program_id(1), columns, TILE)
    q_r, q_c, q_in = _square(row, column, rows, columns, TILE)
    key_row, key_column = _window_start(row, rows, WINDOW), _window_start(column, columns, WINDOW)
    k_r, k_c, k_in = _square(key_row, key_column, rows, columns, SIDE)
    queries = _load(start_of_head(q, b, h, q_b, q_h), row, column, q_in, columns, q_n, q_d, D, WIDTH, TILE)
    keys = _load(start_of_head(k, b, h, k_b, k_h), key_row, key_column, k_in, columns, k_n, k_d, D, WIDTH, SIDE)
    sees = _sees(q_r[:, None], k_r[None, :], rows, WINDOW) & _sees(q_c[:, None], k_c[None, :], columns, WINDOW)
    s = tl.where(sees, _dot(queries, tl.trans(keys)) * (scale * LOG2_E), float("-inf"))
    top = largest_channel(s)
    p = tl.exp2(s - top[:, None])
    total = over_channels(p)
    values = _load(start_of_head(v, b, h, v_b, v_h), key_row, key_column, k_in, columns, v_n, v_d, D, WIDTH, SIDE)
    o = _dot(p.to(values.dtype), values) / total[:, None]
    _store(start_of_head(out, b, h, o_b, o_h), o, row, column, q_in, columns, o_n, o_d, D, WIDTH, TILE)
    tl.store(lse + index.to(tl.int64) * rows * columns + q_r * columns + q_c, top + tl.log2(total), q_in)


@triton.jit(do_not_specialize=COUNTS)
def neighborhood_queries_kernel(
    do, q, k, v, out, lse, dq, delta,
    do_b, do_h, do_n, do_d, q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    o_b, o_h, o_n, o_d, dq_b, dq_h, dq_n, dq_d,
    H, rows, columns, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr, TILE: tl.constexpr, SIDE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """dq. The launch grid is that of the forward. lse, delta: (B·H, rows·columns) float32; delta is written."""
    after_previous(EARLY)
    index = tl.program_id(0)
    b, h = index // H, index % H
    row, column = _corner(tl.program_id(1), columns, TILE)
    q_r, q_c, q_in = _square(row, column, rows, columns, TILE)
    key_row, key_column = _window_start(row, rows, WINDOW), _window_start(column, columns, WINDOW)
    k_r, k_c, k_in = _square(key_row, key_column, rows, columns, SIDE)
    queries = _load(start_of_head(q, b, h, q_b, q_h), row, column, q_in, columns, q_n, q_d, D, WIDTH, TILE)
    grads = _load(start_of_head(do, b, h, do_b, do_h), row, column, q_in, columns, do_n, do_d, D, WIDTH, TILE)
    outs = _load(start_of_head(out, b, h, o_b, o_h), row, column, q_in, columns, o_n, o_d, D, WIDTH, TILE)
    place = index.to(tl.int64) * rows * columns + q_r * columns + q_c
    own_delta = over_channels(grads.to(tl.float32) * outs.to(tl.float32))
    tl.store(delta + place, own_delta, q_in)
    keys = _load(start_of_head(k, b, h, k_b, k_h), key_row, key_column, k_in, columns, k_n, k_d, D, WIDTH, SIDE)
    values = _load(start_of_head(v, b, h, v_b, v_h), key_row, key_column, k_in, columns, v_n, v_d, D, WIDTH, SIDE)
    sees = _sees(q_r[:, None], k_r[None, :], rows, WINDOW) & _sees(q_c[:, None], k_c[None, :], columns, WINDOW)
    s = _dot(queries, tl.trans(keys)) * (scale * LOG2_E) - tl.load(lse + place, q_in, other=0.0)[:, None]
    p = tl.exp2(tl.where(sees, s, float("-inf")))
    ds = p * (_dot(grads, tl.trans(values)) - own_delta[:, None])
    grad = scale * _dot(ds.to(keys.dtype), keys)
    _store(start_of_head(dq, b, h, dq_b, dq_h), grad, row, column, q_in, columns, dq_n, dq_d, D, WIDTH, TILE)


@triton.jit(do_not_specialize=COUNTS)
def neighborhood_keys_kernel(
    do, q, k, v, lse, delta, dk, dv,
    do_b, do_h, do_n, do_d, q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    dk_b, dk_h, dk_n, dk_d, dv_b, dv_h, dv_n, dv_d,
    H, rows, columns, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr, TILE: tl.constexpr, SIDE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """dk and dv. The launch grid is (B·H, squares of keys); a program reads the queries that may see its keys."""
    after_previous(EARLY)
    index = tl.program_id(0)
    b, h = index // H, index % H
    row, column = _corner(tl.program_id(1), columns, TILE)
    k_r, k_c, k_in = _square(row, column, rows, columns, TILE)
    q_row, q_column = row - (WINDOW - 1), column - (WINDOW - 1)
    q_r, q_c, q_in = _square(q_row, q_column, rows, columns, SIDE)
    queries = _load(start_of_head(q, b, h, q_b, q_h), q_row, q_column, q_in, columns, q_n, q_d, D, WIDTH, SIDE)
    grads = _load(start_of_head(do, b, h, do_b, do_h), q_row, q_column, q_in, columns, do_n, do_d, D, WIDTH, SIDE)
    keys = _load(start_of_head(k, b, h, k_b, k_h), row, column, k_in, columns, k_n, k_d, D, WIDTH, TILE)
    values = _load(start_of_head(v, b, h, v_b, v_h), row, column, k_in, columns, v_n, v_d, D, WIDTH, TILE)
    place = index.to(tl.int64) * rows * columns + q_r * columns + q_c
    sees = _sees(q_r[None, :], k_r[:, None], rows, WINDOW) & _sees(q_c[None, :], k_c[:, None], columns, WINDOW)
    s = _dot(keys, tl.trans(queries)) * (scale * LOG2_E) - tl.load(lse + place, q_in, other=0.0)[None, :]
    p = tl.exp2(tl.where(sees & q_in[None, :], s, float("-inf")))
    d_values = _dot(p.to(grads.dtype), grads)
    _store(start_of_head(dv, b, h, dv_b, dv_h), d_values, row, column, k_in, columns, dv_n, dv_d, D, WIDTH, TILE)
    ds = p * (_dot(values, tl.trans(grads)) - tl.load(delta + place, q_in, other=0.0)[None, :])
    d_keys = scale * _dot(ds.to(queries.dtype), queries)
    _store(start_of_head(dk, b, h, dk_b, dk_h), d_keys, row, column, k_in, columns, dk_n, dk_d, D, WIDTH, TILE)
