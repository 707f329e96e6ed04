"""How the kernels read and write tokens: (B, H, N, D) of any strides, some tokens of one head at a time."""

import triton
import triton.language as tl
from triton.language.extra import cuda

# Arguments of kernels that are counts: one compilation serves them all (Triton would make others for 1 and for 16 n).
COUNTS = (
    *("B", "H", "N", "chunk", "images", "count", "shares", "held", "free"),
    *("rows", "columns", "prefix", "segments", "on_grid"),
)


@triton.jit
def after_previous(EARLY: tl.constexpr):
    """First in every kernel, above all that it reads or writes. EARLY: its programs come up while the kernel before
    still runs, and wait here until that has written everything; then those of the next kernel may come up."""
    if EARLY:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


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
