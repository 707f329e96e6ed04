# pyright: reportGeneralTypeIssues=false
# mypy: disable-error-code=assignment
# (The body of a kernel is Triton's language, which has no types to check; its tuples grow.)
"""Tokens and weights of heads whose width is no power of two, as the sides of Triton's tiles have to be.

The channels of a head are one group of WIDTH or two, of WIDTH and REST, both powers of two: 72 channels are 64 and 8,
padded to a REST of 16. A value in groups is a tuple of one tile for each. What lies beyond D is read as 0.
"""

import triton
import triton.language as tl

from t5kernels.tokens import load_tokens, store_tokens


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _add_dot(total, a, b):
    """total + a b, in one instruction where a tile is large enough."""
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def dot_channels(a, b):
    """a b for a (ROWS, channels) and b (channels, COLUMNS) in groups, over which it adds."""
    product = _dot(a[0], b[0])
    for group in tl.static_range(1, len(a)):
        product = _add_dot(product, a[group], b[group])
    return product


@triton.jit
def add_dot_rows(total, a, b):
    """total + a b in groups, as b (.., channels) is."""
    groups = ()
    for group in tl.static_range(len(b)):
        groups += (_add_dot(total[group], a, b[group]),)
    return groups


@triton.jit
def add_dot_columns(total, a, b):
    """total + a b in groups, as a (channels, ..) is."""
    groups = ()
    for group in tl.static_range(len(a)):
        groups += (_add_dot(total[group], a[group], b),)
    return groups


@triton.jit
def transposed(x):
    """The transposes of a value's groups."""
    groups = ()
    for group in tl.static_range(len(x)):
        groups += (tl.trans(x[group]),)
    return groups


@triton.jit
def cast(x, dtype):
    """x in groups, in another dtype."""
    groups = ()
    for group in tl.static_range(len(x)):
        groups += (x[group].to(dtype),)
    return groups


@triton.jit
def scaled(x, factor):
    """factor x in groups."""
    groups = ()
    for group in tl.static_range(len(x)):
        groups += (factor * x[group],)
    return groups


@triton.jit
def added(x, y):
    """x + y in groups."""
    groups = ()
    for group in tl.static_range(len(x)):
        groups += (x[group] + y[group],)
    return groups


@triton.jit
def zero_rows(ROWS: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr):
    """Zeros (ROWS, channels)."""
    # It is written out, as tl.zeros is by tl.full, because Triton's own functions are interpreted only if
    # TRITON_INTERPRET was set when Triton was imported.
    groups = (tl.full((ROWS, WIDTH), 0.0, tl.float32),)
    if REST > 0:
        groups += (tl.full((ROWS, REST), 0.0, tl.float32),)
    return groups


@triton.jit
def zero_columns(COLUMNS: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr):
    """Zeros (channels, COLUMNS)."""
    groups = (tl.full((WIDTH, COLUMNS), 0.0, tl.float32),)
    if REST > 0:
        groups += (tl.full((REST, COLUMNS), 0.0, tl.float32),)
    return groups


@triton.jit
def load_channels(
    x, start, stride_n, stride_d, N, D: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr
):
    """The tokens from `start` on, (BLOCK, channels), 0 beyond N."""
    groups = (load_tokens(x, start, stride_n, stride_d, N, D, WIDTH, BLOCK),)
    if REST > 0:
        groups += (load_tokens(x + WIDTH * stride_d, start, stride_n, stride_d, N, D - WIDTH, REST, BLOCK),)
    return groups


@triton.jit
def store_channels(
    x, y, start, stride_n, stride_d, N, D: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr
):
    """Write y (BLOCK, channels) to the tokens from `start` on, up to N."""
    store_tokens(x, y[0], start, stride_n, stride_d, N, D, WIDTH, BLOCK)
    if REST > 0:
        store_tokens(x + WIDTH * stride_d, y[1], start, stride_n, stride_d, N, D - WIDTH, REST, BLOCK)


@triton.jit
def _channels(GROUP: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr):
    return GROUP * WIDTH + tl.arange(0, WIDTH if GROUP == 0 else REST)


@triton.jit
def _entries(row, column, D: tl.constexpr):
    """Offsets into a contiguous D x D matrix, and which of them lie in it."""
    return row[:, None] * D + column[None, :], (row < D)[:, None] & (column < D)[None, :]


@triton.jit
def load_columns(
    matrix, tile, D: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, HIDDEN: tl.constexpr
):  # fmt: skip
    """A slice of HIDDEN columns of a D x D matrix, (channels, HIDDEN)."""
    groups = ()
    for group in tl.static_range(2 if REST > 0 else 1):
        row, column = _channels(group, WIDTH, REST), tile * HIDDEN + tl.arange(0, HIDDEN)
        offsets, inside = _entries(row, column, D)
        groups += (tl.load(matrix + offsets, inside, other=0.0),)
    return groups


@triton.jit
def load_rows(
    matrix, tile, D: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, HIDDEN: tl.constexpr
):  # fmt: skip
    """A slice of HIDDEN rows of a D x D matrix, (HIDDEN, channels)."""
    groups = ()
    for group in tl.static_range(2 if REST > 0 else 1):
        row, column = tile * HIDDEN + tl.arange(0, HIDDEN), _channels(group, WIDTH, REST)
        offsets, inside = _entries(row, column, D)
        groups += (tl.load(matrix + offsets, inside, other=0.0),)
    return groups


@triton.jit
def store_columns(
    matrix, x, tile, D: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, HIDDEN: tl.constexpr
):  # fmt: skip
    """Write x where `load_columns` reads."""
    for group in tl.static_range(len(x)):
        row, column = _channels(group, WIDTH, REST), tile * HIDDEN + tl.arange(0, HIDDEN)
        offsets, inside = _entries(row, column, D)
        tl.store(matrix + offsets, x[group], inside)


@triton.jit
def store_rows(
    matrix, x, tile, D: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr, HIDDEN: tl.constexpr
):  # fmt: skip
    """Write x where `load_rows` reads."""
    for group in tl.static_range(len(x)):
        row, column = tile * HIDDEN + tl.arange(0, HIDDEN), _channels(group, WIDTH, REST)
        offsets, inside = _entries(row, column, D)
        tl.store(matrix + offsets, x[group], inside)
