# pyright: reportGeneralTypeIssues=false
# (The body of a kernel is Triton's language, which has no types that pyright could check.)
"""How the kernels read and write tokens (B, H, N, D) of any strides, some tokens of one head at a time."""

import triton
import triton.language as tl
from triton.language.extra import cuda

# Arguments of kernels that are counts. One compilation serves all their values; Triton would specialize on 1 and on
# multiples of 16.
COUNTS = (
    *("B", "H", "N", "T", "chunk", "chunks", "images", "groups", "count", "shares", "capacity", "free", "outside"),
    *("rows", "columns", "prefix", "segments", "on_grid", "chunk_outside", "heads", "end"),
    *("text_shares", "text_count", "text_begin", "text_end", "image_chunks", "text_chunks"),
)


@triton.jit
def after_previous(EARLY: tl.constexpr):
    """Every kernel calls it first, before it reads or writes anything.

    With EARLY the programs of a kernel come up while the kernel before still runs. They wait here until that one has
    written everything; then the programs of the next kernel may come up.
    """
    if EARLY:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


@triton.jit
def own_tokens(x, x_b, x_h, x_n, text, t_b, t_h, t_n, is_text, TEXT: tl.constexpr):
    """The tokens of this program and the strides of their images, heads and tokens: x's, or with TEXT perhaps text's.

    They are selected, not branched on: behind a branch, Triton 3.6 forgets that channels are adjacent and would read
    them one by one, without a pipeline.
    """
    if TEXT:
        x = tl.where(is_text, text, x)
        x_b = tl.where(is_text, tl.cast(t_b, tl.int64), tl.cast(x_b, tl.int64))
        x_h = tl.where(is_text, tl.cast(t_h, tl.int64), tl.cast(x_h, tl.int64))
        x_n = tl.where(is_text, tl.cast(t_n, tl.int32), tl.cast(x_n, tl.int32))
    return x, x_b, x_h, x_n


@triton.jit
def own_share(part, chunks, N, T, TEXT: tl.constexpr):
    """The number of this program's chunk among those of its tokens, and how many tokens they are.

    With TEXT the `chunks` of the image's N tokens are followed by those of the text's T.
    """
    if TEXT:
        is_text = part >= chunks
        return tl.where(is_text, part - chunks, part), tl.where(is_text, T, N)
    return part, N


@triton.jit
def start_of_head(x, b, h, stride_b, stride_h):
    """Pointer to the first token of a head of x (B, H, N, D)."""
    return x + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h


@triton.jit
def token_mask(is_token, D: tl.constexpr, WIDTH: tl.constexpr):
    """A mask (BLOCK,) of tokens as a mask (BLOCK, WIDTH) that is false beyond D."""
    mask = is_token[:, None]
    if D < WIDTH:
        mask = mask & (tl.arange(0, WIDTH) < D)[None, :]
    return mask


@triton.jit
def token_pointers(x, start, stride_n, stride_d, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers (BLOCK, WIDTH) to the tokens from `start` on. Only the first needs 64 bits: the others are near it."""
    near = tl.arange(0, BLOCK)[:, None] * stride_n + tl.arange(0, WIDTH)[None, :] * stride_d
    return x + tl.cast(start, tl.int64) * stride_n + near


@triton.jit
def load_tokens(x, start, stride_n, stride_d, N, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The tokens from `start` on, (BLOCK, WIDTH), 0 beyond N and D."""
    mask = token_mask(start + tl.arange(0, BLOCK) < N, D, WIDTH)
    return tl.load(token_pointers(x, start, stride_n, stride_d, WIDTH, BLOCK), mask, other=0.0)


@triton.jit
def store_tokens(x, y, start, stride_n, stride_d, N, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Write y (BLOCK, WIDTH) to the tokens from `start` on, up to N and D."""
    token = start + tl.arange(0, BLOCK)
    mask = token_mask(token < N, D, WIDTH)
    tl.store(token_pointers(x, start, stride_n, stride_d, WIDTH, BLOCK), y.to(x.dtype.element_ty), mask)
