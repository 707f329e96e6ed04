"""`ttt`: the bidirectional Test-Time-Training op, checked arguments first; and its two halves, for split sequences.

"reference" is plain PyTorch and runs anywhere; "triton" are the kernels of triton.py (swiglu with the dot loss).
"""

from types import ModuleType

import torch
from torch import Tensor

from t5kernels.precision import autocast_dtype
from t5kernels.ttt import reference

INNER_WEIGHTS = {
    "linear": 0,
    "linear_proj_qk": 2,
    "one_layer_gate": 2,
    "two_layer": 2,
    "three_layer": 3,
    "swiglu": 3,
}
INNER_MODELS = tuple(INNER_WEIGHTS)
INNER_LOSSES = ("dot", "residual")
IMPLS = ("reference", "triton")


def ttt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: tuple[Tensor, ...],
    *,
    inner: str,
    loss: str = "dot",
    scale: float,
    impl: str | None = None,
) -> Tensor:
    """Take one gradient step of the inner model on all tokens of (k, v), then apply it to q.

    Args:
        q, k, v: (B, H, N, D) queries, keys (already normalized) and values. q may hold another number of tokens.
        weights: inner weights, each (H, D, D), as many as INNER_WEIGHTS says.
        inner: inner model, a key of INNER_WEIGHTS.
        loss: "dot" (minus the dot product) or "residual" (half the squared error), summed over tokens.
        scale: inner learning rate; the method uses D**-0.5 / N. The linear models normalize, so it cancels there.
        impl: one of IMPLS; None is the reference. "triton" takes views of any strides as they are, sums over tokens in
            float32, and gives a result whose tokens are (B, N, H, D) in memory: merging its heads copies nothing.

    Returns:
        (B, H, N, D) in q's dtype.

    Raises:
        ValueError: unknown `inner` or `loss`, shapes that do not fit, an `impl` that cannot be used.

    Source: "Linearizing Vision Transformer with Test-Time Training" (arXiv 2605.02772), section 3.
    """
    _check_names("ttt", inner, loss)
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"ttt: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} disagree; expected (B, H, N, D)"
        )
    _check_weights("ttt", q, weights, inner)
    if _choose("ttt", impl) == "triton":
        kernels, (narrow_q, narrow_k, narrow_v) = _kernels("ttt", inner, loss, q, k, v, weights=weights)
        step = kernels.accumulate(narrow_k, narrow_v, weights, scale)
        return kernels.apply(narrow_q, weights, step).to(q.dtype)
    if inner in reference.STEPPED:
        return reference.stepped(q, k, v, tuple(weights), inner, scale, loss).to(q.dtype)
    return getattr(reference, inner)(q, k, v, tuple(weights), scale, loss).to(q.dtype)


def ttt_accumulate(
    k: Tensor,
    v: Tensor,
    weights: tuple[Tensor, ...],
    *,
    inner: str,
    loss: str = "dot",
    scale: float,
    impl: str | None = None,
) -> Tensor:
    """The step that some tokens ask for: the first half of `ttt`, which adds up over chunks of a sequence.

    Args:
        k, v: (B, H, N, D), any part of the sequence.
        scale: of the whole sequence, so D**-0.5 over all its tokens.
        Others: as `ttt` takes them; `inner` is none of the linear ones, whose normalized sums are another thing.

    Returns:
        (B, H, weights, D, D) gradients of the inner loss, in at least float32. Sum them over chunks or processes.

    Raises:
        ValueError: as `ttt`.
    """
    _check_half("ttt_accumulate", inner, loss)
    if k.ndim != 4 or k.shape != v.shape:
        raise ValueError(f"ttt_accumulate: k {tuple(k.shape)}, v {tuple(v.shape)} disagree; expected (B, H, N, D)")
    _check_weights("ttt_accumulate", k, weights, inner)
    if _choose("ttt_accumulate", impl) == "triton":
        kernels, (k, v) = _kernels("ttt_accumulate", inner, loss, k, v, weights=weights)
        return kernels.accumulate(k, v, weights, scale)
    gradients = reference.STEPPED[inner][0](k, v, tuple(weights), scale, loss)
    return torch.stack(gradients, dim=2).to(torch.promote_types(k.dtype, torch.float32))


def ttt_apply(q: Tensor, weights: tuple[Tensor, ...], step: Tensor, *, inner: str, impl: str | None = None) -> Tensor:
    """The inner model after a step, applied to some tokens: the second half of `ttt`.

    Args:
        q: (B, H, N, D), any part of the sequence.
        step: (B, H, weights, D, D), what `ttt_accumulate` gives, summed over the whole sequence.
        Others: as `ttt` takes them.

    Returns:
        (B, H, N, D) in q's dtype.

    Raises:
        ValueError: as `ttt`.
    """
    _check_half("ttt_apply", inner, "dot")
    expected = (*q.shape[:2], INNER_WEIGHTS[inner], *q.shape[3:] * 2)
    if q.ndim != 4 or tuple(step.shape) != expected:
        raise ValueError(
            f"ttt_apply: q {tuple(q.shape)}, step {tuple(step.shape)}; expected (B, H, N, D) and "
            f"(B, H, {INNER_WEIGHTS[inner]}, D, D), which ttt_accumulate gives for inner={inner!r}"
        )
    _check_weights("ttt_apply", q, weights, inner)
    if _choose("ttt_apply", impl) == "triton":
        kernels, (narrow_q,) = _kernels("ttt_apply", inner, "dot", q, weights=weights)
        return kernels.apply(narrow_q, weights, step).to(q.dtype)
    stepped = tuple((w - g).to(w.dtype) for w, g in zip(weights, step.unbind(2), strict=True))
    return reference.STEPPED[inner][1](q, stepped).to(q.dtype)


def _check_names(op: str, inner: str, loss: str) -> None:
    if inner not in INNER_WEIGHTS or loss not in INNER_LOSSES:
        raise ValueError(f"{op}: inner={inner!r}, loss={loss!r}; expected {list(INNER_WEIGHTS)} and {INNER_LOSSES}")


def _check_half(op: str, inner: str, loss: str) -> None:
    _check_names(op, inner, loss)
    if inner not in reference.STEPPED:
        raise ValueError(f"{op}: inner={inner!r} takes no gradient step; expected one of {list(reference.STEPPED)}")


def _check_weights(op: str, q: Tensor, weights: tuple[Tensor, ...], inner: str) -> None:
    expected = (q.shape[1], q.shape[3], q.shape[3])
    if len(weights) != INNER_WEIGHTS[inner] or any(tuple(w.shape) != expected for w in weights):
        got = [tuple(w.shape) for w in weights]
        raise ValueError(f"{op}: {inner} takes {INNER_WEIGHTS[inner]} weights of shape {expected}, got {got}")


def _choose(op: str, impl: str | None) -> str:
    if impl is not None and impl not in IMPLS:
        raise ValueError(f"{op}: impl is {impl!r}; expected one of {IMPLS}, or None for the reference")
    return impl or "reference"


def _kernels(
    op: str, inner: str, loss: str, *tokens: Tensor, weights: tuple[Tensor, ...]
) -> tuple[ModuleType, list[Tensor]]:
    """The Triton module, and the tokens in the dtype that autocast wants. Raises ValueError when it cannot be used."""
    if (inner, loss) != ("swiglu", "dot"):
        raise ValueError(
            f"{op}: impl='triton' with inner={inner!r}, loss={loss!r}; expected 'swiglu' and 'dot'; use 'reference'"
        )
    # Imported where it is used: Triton takes a while, and exists on Linux only.
    try:
        from t5kernels.ttt import triton
    except ImportError as error:
        raise ValueError(f"{op}: impl='triton' without Triton ({error}); install it, or use 'reference'") from error

    tokens = [t.to(autocast_dtype(t)) for t in tokens]
    triton.check(op, tokens, weights)
    return triton, tokens
