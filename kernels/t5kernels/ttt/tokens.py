"""How the kernels read tokens: as they are, normalized, or normalized and convolved 3×3 over the image's grid.

For one image, head and channel, x the tokens in memory, m and r what the key norm subtracts and multiplies by (0 and 1
without one), n = (x - m) r, and for a token p with a place in the grid

    y[p] = n[p] + bias + sum_o w[o] n[p + o],    o over the 9 places around p, n = 0 outside the grid;

y = n for tokens before and after the grid. All that does not depend on x is in a table of ROWS numbers a channel:

    y[p] = r x[p] + sum_o (r w[o]) x[p + o] + constant,
    constant = bias - m r (1 + sum of w[o] over the places o that p has), one for each of 16 kinds of place,

so that a token costs ten multiply-adds a channel and no more passes over memory: its neighbors are still in the cache.
"""

import triton
import triton.language as tl

# Arguments of kernels that are counts: one compilation serves them all (Triton would make others for 1 and for 16 n).
COUNTS = ("B", "H", "N", "chunk", "images", "rows", "columns", "prefix", "count", "shares")
# Kinds of tokens: as they are, normalized (table rows SCALE and OUTSIDE), normalized and convolved (all rows).
PLAIN = tl.constexpr(0)
NORMALIZED = tl.constexpr(1)
CONVOLVED = tl.constexpr(2)
# Rows of the table: r; r w of nine places; constants by the neighbors that a place has (1 above, 2 below, 4 left,
# 8 right); and the constant -m r of tokens outside the grid.
SCALE = tl.constexpr(0)
WEIGHTS = tl.constexpr(1)
CONSTANTS = tl.constexpr(10)
OUTSIDE = tl.constexpr(26)
ROWS = tl.constexpr(27)


@triton.jit
def start_of_head(x, b, h, stride_b, stride_h):
    """Pointer to the first token of a head of x (B, H, N, D)."""
    return x + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h


@triton.jit
def token_mask(there, D: tl.constexpr, WIDTH: tl.constexpr):
    """(BLOCK,) to (BLOCK, WIDTH), false beyond D."""
    mask = there[:, None]
    if D < WIDTH:
        mask = mask & (tl.arange(0, WIDTH) < D)[None, :]
    return mask


@triton.jit
def token_pointers(x, start, stride_n, stride_d, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """To the tokens from `start` on, (BLOCK, WIDTH). 64 bits for the first alone: the others are near it."""
    near = tl.arange(0, BLOCK)[:, None] * stride_n + tl.arange(0, WIDTH)[None, :] * stride_d
    return x + tl.cast(start, tl.int64) * stride_n + near


@triton.jit
def load_tokens(x, start, stride_n, stride_d, N, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens from `start` on, (BLOCK, WIDTH), 0 beyond N and D."""
    mask = token_mask(start + tl.arange(0, BLOCK) < N, D, WIDTH)
    return tl.load(token_pointers(x, start, stride_n, stride_d, WIDTH, BLOCK), mask, other=0.0)


@triton.jit
def store_tokens(x, y, start, stride_n, stride_d, N, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    token = start + tl.arange(0, BLOCK)
    mask = token_mask(token < N, D, WIDTH)
    tl.store(token_pointers(x, start, stride_n, stride_d, WIDTH, BLOCK), y.to(x.dtype.element_ty), mask)


@triton.jit
def prefetch_tokens(x, start, stride_n, N, BLOCK: tl.constexpr):
    """Ask for tokens that will be read soon. Only what the hardware runs: the interpreter knows no such instruction."""
    if x.dtype.element_ty == tl.bfloat16:
        token = tl.minimum(start + tl.arange(0, BLOCK), N - 1)
        at = x + token.to(tl.int64) * stride_n
        tl.inline_asm_elementwise("prefetch.global.L1 [$1]; mov.u32 $0, 0;", "=r,l", [at], tl.int32, False, 1)


@triton.jit
def load_row(table, row, D: tl.constexpr, WIDTH: tl.constexpr):
    """A row of a table, (1, WIDTH)."""
    channel = tl.arange(0, WIDTH)
    return tl.load(table + row * D + channel, channel < D, other=0.0)[None, :]


@triton.jit
def on_grid(token, N, rows, columns, prefix):
    """Row and column of each token, and whether it has a place in the grid."""
    patch = token - prefix
    inside = (patch >= 0) & (patch < rows * columns) & (token < N)
    row = patch // columns
    return row, patch - row * columns, inside


@triton.jit
def neighbors(row, column, rows, columns, inside):
    """Which tokens have a neighbor above, below, left and right."""
    return inside & (row > 0), inside & (row + 1 < rows), inside & (column > 0), inside & (column + 1 < columns)


@triton.jit
def load_prepared(
    x, table, index, start, stride_n, stride_d, rows, columns, prefix, N,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """`load_tokens` of y. table: (B·H, ROWS, D) float32, read at `index`."""
    if KIND == PLAIN:
        return load_tokens(x, start, stride_n, stride_d, N, D, WIDTH, BLOCK)
    token = start + tl.arange(0, BLOCK)
    at = token_pointers(x, start, stride_n, stride_d, WIDTH, BLOCK)
    table += index.to(tl.int64) * (ROWS * D)
    here = token_mask(token < N, D, WIDTH)
    own = tl.load(at, here, other=0.0).to(tl.float32)
    scale = load_row(table, SCALE, D, WIDTH)
    if KIND == NORMALIZED:
        return tl.where(here, own * scale + load_row(table, OUTSIDE, D, WIDTH), 0.0).to(x.dtype.element_ty)
    row, column, inside = on_grid(token, N, rows, columns, prefix)
    above, below, left, right = neighbors(row, column, rows, columns, inside)
    kind = above.to(tl.int32) + 2 * below.to(tl.int32) + 4 * left.to(tl.int32) + 8 * right.to(tl.int32)
    kind = tl.where(inside, CONSTANTS + kind, OUTSIDE)
    # 0 beyond N and D, as everything that is added to it: no mask is needed at the end.
    y = tl.load(table + kind[:, None] * D + tl.arange(0, WIDTH)[None, :], here, other=0.0) + own * scale
    for down in tl.range(0, 3, disable_licm=True):
        there = inside & (row + down > 0) & (row + down <= rows)
        line, weights = at + ((down - 1) * columns).to(tl.int64) * stride_n, WEIGHTS + 3 * down
        near = tl.load(line - stride_n, token_mask(there & left, D, WIDTH), other=0.0).to(tl.float32)
        y += near * load_row(table, weights, D, WIDTH)
        near = tl.load(line, token_mask(there, D, WIDTH), other=0.0).to(tl.float32)
        y += near * load_row(table, weights + 1, D, WIDTH)
        near = tl.load(line + stride_n, token_mask(there & right, D, WIDTH), other=0.0).to(tl.float32)
        y += near * load_row(table, weights + 2, D, WIDTH)
    return y.to(x.dtype.element_ty)
