"""Softmax attention over a window on a grid of tokens: arguments are checked, then an implementation is chosen.

"reference" runs anywhere, "triton" runs the kernels of triton.py, "flex" (FlexAttention) is compiled for each grid,
"natten" is the NATTEN package where it is installed.
"""

import math
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from t5kernels.choice import Candidate, choose, triton_candidate
from t5kernels.neighborhood import reference
from t5kernels.precision import autocast_dtype

# Of the Triton kernels; larger windows and wider heads in float32 do not fit into shared memory.
LARGEST_WINDOW, LARGEST_FLOAT32_HEAD = 7, 64
# Wider heads were not timed against FlexAttention yet (t5kernels.tools.neighborhoods), so it is the default there.
LARGEST_MEASURED_HEAD = 64


def neighborhood_attention(
    q: Tensor, k: Tensor, v: Tensor, *, rows: int, columns: int, window: int, impl: str | None = None
) -> Tensor:
    """Every token attends to exactly window × window tokens around it; at a border the window is shifted inward.

    Args:
        q, k, v: (B, H, rows·columns, D), tokens of the grid only, row by row. k and v are cast to q's dtype.
        rows, columns: the sides of the grid.
        window: the side of the window, odd, at most the smaller side of the grid.
        impl: "natten", "triton" (windows up to 7, 16-bit tokens, or float32 up to 64 wide), "flex", "reference", or
            None for a fast one: on CUDA NATTEN if it is installed, else the kernels for 16-bit tokens up to 64 wide,
            else FlexAttention; elsewhere the reference.

    Returns:
        (B, H, rows·columns, D) in q's dtype.

    Raises:
        ValueError: shapes that disagree, a window that is even or exceeds the grid, an `impl` that cannot be used.

    Source: "Neighborhood Attention Transformer" (arXiv 2204.07143), section 3.1.
    """
    _check_tokens("neighborhood_attention", q, k, v, rows, columns, 0)
    if window < 1 or window % 2 == 0:
        raise ValueError(f"neighborhood_attention: window is {window}; expected an odd number such as 3 or 5")
    if window > min(rows, columns):
        raise ValueError(
            f"neighborhood_attention: window {window} exceeds the grid of {rows}×{columns} tokens; "
            f"expected at most {min(rows, columns)}: take a smaller window or larger images"
        )
    chosen = choose("neighborhood_attention", impl, _natten(q), _triton(q, k, v, window), _flex(q, k, v))
    return _call(_module(chosen).neighborhood_attention, q, k, v, rows=rows, columns=columns, window=window)


def circular_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rows: int,
    columns: int,
    num_prefix_tokens: int,
    radius: float,
    impl: str | None = None,
) -> Tensor:
    """Tokens of the grid attend to prefix tokens and to the grid within a circle; prefix tokens attend to everything.

    Args:
        q, k, v: (B, H, num_prefix_tokens + rows·columns, D), prefix first, then the grid row by row. k and v are cast
            to q's dtype.
        rows, columns: the sides of the grid.
        num_prefix_tokens: how many class, register or text tokens come before the grid.
        radius: the largest Euclidean distance, in patches, at which a token is seen.
        impl: "flex", "reference" (its mask is quadratic in the tokens), or None for flex on CUDA and the reference
            elsewhere.

    Returns:
        (B, H, num_prefix_tokens + rows·columns, D) in q's dtype.

    Raises:
        ValueError: shapes that disagree, a negative radius, an `impl` that cannot be used.

    Source: "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up" (arXiv 2412.16112), section 3.
    """
    _check_tokens("circular_attention", q, k, v, rows, columns, num_prefix_tokens)
    if not radius >= 0:
        raise ValueError(f"circular_attention: radius is {radius}; expected 0 or more patches, as in CLEAR: 8")
    chosen = choose("circular_attention", impl, _flex(q, k, v))
    # Squared distances are whole numbers; the square of, say, the square root of 13 may fall just below its own.
    squared_radius = math.floor(min(radius, rows + columns) ** 2 * (1 + 1e-12))
    sizes = {"rows": rows, "columns": columns, "num_prefix_tokens": num_prefix_tokens}
    return _call(_module(chosen).circular_attention, q, k, v, **sizes, squared_radius=squared_radius)


def _check_tokens(op: str, q: Tensor, k: Tensor, v: Tensor, rows: int, columns: int, num_prefix_tokens: int) -> None:
    expected = num_prefix_tokens + rows * columns
    if q.ndim != 4 or q.shape != k.shape or q.shape != v.shape or q.shape[2] != expected:
        raise ValueError(
            f"{op}: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; expected three of the same shape "
            f"(B, H, {expected}, D) for {num_prefix_tokens} prefix tokens and a grid of {rows}×{columns}; "
            "reshape them, or correct rows, columns or the number of prefix tokens"
        )


def _natten(q: Tensor) -> Candidate:
    def obstacle() -> str | None:
        if _on_card(q) and q.shape[3] % 8 == 0 and _module("natten").is_installed():
            return None
        return (
            f"{_described(q)}; expected natten installed with its CUDA kernels, CUDA tensors in float32 or half "
            "precision, and a width that is a multiple of 8; install natten for this torch and CUDA, or use 'flex' or "
            "'reference'"
        )

    return Candidate("natten", _on_card(q), obstacle)


def _triton(q: Tensor, k: Tensor, v: Tensor, window: int) -> Candidate:
    def obstacle() -> str | None:
        if window > LARGEST_WINDOW:
            return f"with a window of {window}; expected at most {LARGEST_WINDOW}; use 'flex' or 'reference'"
        if autocast_dtype(q) == torch.float32 and q.shape[3] > LARGEST_FLOAT32_HEAD:
            return (
                f"with heads {q.shape[3]} wide in float32; expected at most {LARGEST_FLOAT32_HEAD}; use 16-bit tokens, "
                "'flex' or 'reference'"
            )
        return None

    candidate = triton_candidate((q,), (k, v), obstacle)
    return candidate._replace(by_default=candidate.by_default and q.shape[3] <= LARGEST_MEASURED_HEAD)


def _flex(q: Tensor, k: Tensor, v: Tensor) -> Candidate:
    def obstacle() -> str | None:
        # On a CPU, FlexAttention holds all pairs of tokens and has no gradient: it is good for looking at its masks.
        needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
        if _on_card(q) or not (q.is_cuda or needs_gradient):
            return None
        return f"{_described(q)}; expected CUDA tensors in float32 or half precision; use 'reference'"

    return Candidate("flex", _on_card(q), obstacle)


def _on_card(q: Tensor) -> bool:
    """Whether q is on a card and in a dtype that the fast kernels have."""
    return q.is_cuda and q.dtype != torch.float64


def _described(q: Tensor) -> str:
    return f"with {q.dtype}, head width {q.shape[3]}, on {q.device}"


def _module(impl: str) -> ModuleType:
    """An implementation's module. Those for CUDA are imported where they are used: they import much of torch."""
    if impl == "flex":
        from t5kernels.neighborhood import flex

        return flex
    if impl == "triton":
        from t5kernels.neighborhood import triton

        return triton
    if impl == "natten":
        from t5kernels.neighborhood import natten

        return natten
    return reference


def _call(attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, **sizes: int) -> Tensor:
    """Run it in the dtype that scaled_dot_product_attention would use: that of autocast, or q's."""
    dtype = autocast_dtype(q)
    return attention(q.to(dtype), k.to(dtype), v.to(dtype), **sizes).to(q.dtype)
