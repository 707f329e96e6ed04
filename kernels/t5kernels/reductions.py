# pyright: reportGeneralTypeIssues=false
# (The body of a kernel is Triton's language, which has no types that pyright could check.)
"""Sums and maxima in kernels over an axis of tokens (tokens, channels).

They are not tl.sum and tl.max because Triton's own functions are interpreted only if TRITON_INTERPRET was set when
Triton was imported.
"""

import triton
import triton.language as tl


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def over_tokens(x):
    """The sum over the first axis."""
    return tl.reduce(x, 0, _add)


@triton.jit
def over_channels(x):
    """The sum over the second axis."""
    return tl.reduce(x, 1, _add)


@triton.jit
def largest_channel(x):
    """The largest number along the second axis."""
    return tl.reduce(x, 1, _larger)
