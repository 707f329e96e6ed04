"""Neighborhood attention by the NATTEN package (arXiv 2204.07143), where it is installed with its CUDA kernels."""

import functools

import torch
from torch import Tensor


@torch.compiler.assume_constant_result
def is_installed() -> bool:
    """Whether natten can be imported and was built with its CUDA kernels."""
    return _has_kernels()


@functools.cache
def _has_kernels() -> bool:
    try:
        import natten
    except ImportError:
        return False
    return bool(getattr(natten, "HAS_LIBNATTEN", False))


def neighborhood_attention(q: Tensor, k: Tensor, v: Tensor, *, rows: int, columns: int, window: int) -> Tensor:
    """Square windows; q, k, v: (B, H, R·C, D). NATTEN itself takes (B, R, C, H, D)."""
    # natten here is the package, not this file, for which pyright takes it where the package is missing.
    from natten import na2d  # pyright: ignore[reportAttributeAccessIssue]

    q, k, v = (t.transpose(1, 2).unflatten(1, (rows, columns)).contiguous() for t in (q, k, v))
    return na2d(q, k, v, kernel_size=window).flatten(1, 2).transpose(1, 2)
