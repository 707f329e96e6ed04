"""`ttt`, the bidirectional Test-Time-Training op, and its two halves for split sequences.

Arguments are checked, then an implementation is chosen: "reference" is plain PyTorch and runs anywhere; "triton" runs
the kernels of triton.py, which exist for FUSED_INNERS with the dot loss.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from t5kernels.choice import Candidate, choose, triton_candidate
from t5kernels.precision import as_in_autocast
from t5kernels.ttt import reference

INNER_WEIGHTS = {
    "linear": 0,
    "linear_proj_qk": 2,
    "one_layer_gate": 2,
    "two_layer": 2,
    "three_layer": 3,
    "swiglu": 3,
    "swiglu_last": 3,
}
# How many of them, the last ones, take the step; all of them where nothing is said.
STEPPED_WEIGHTS = INNER_WEIGHTS | {"swiglu_last": 1}
FUSED_INNERS = ("swiglu", "swiglu_last", "linear_proj_qk")
INNER_MODELS = tuple(INNER_WEIGHTS)
INNER_LOSSES = ("dot", "residual")


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
        impl: "triton", "reference", or None for the kernels where they are made for the call (16-bit CUDA tokens,
            one of FUSED_INNERS with the dot loss) and the reference elsewhere. "triton" takes views of any strides as
            they are, sums over tokens in float32, and returns tokens that lie in memory as (B, N, H, D), so that
            merging the heads copies nothing. It has a first derivative only.

    Returns:
        (B, H, N, D) in q's dtype.

    Raises:
        ValueError: unknown `inner` or `loss`, shapes that do not fit, an `impl` that cannot be used.

    Source: "Linearizing Vision Transformer with Test-Time Training" (arXiv 2605.02772), section 3.
    """
    check_names("ttt", inner, loss)
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"ttt: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} disagree; expected (B, H, N, D)"
        )
    check_weights("ttt", q, weights, inner)
    if choose("ttt", impl, kernels(inner, loss, (q, k, v), weights)) == "triton":
        from t5kernels.ttt import triton

        narrow_q, narrow_k, narrow_v = as_in_autocast(q, k, v)
        step = triton.accumulate(narrow_k, narrow_v, weights, scale, inner)
        return triton.apply(narrow_q, weights, step, inner, scale).to(q.dtype)
    return reference.ttt(q, k, v, tuple(weights), inner, scale, loss).to(q.dtype)


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
    """Take the inner gradient of some tokens: the first half of `ttt`. Gradients add up over chunks of a sequence.

    Args:
        k, v: (B, H, N, D), any part of the sequence.
        scale: that of the whole sequence, so D**-0.5 divided by the number of all its tokens.
        weights, inner, loss, impl: as `ttt` takes them, except that `inner` is none of the linear models: what they sum
            is no gradient, because they normalize.

    Returns:
        (B, H, S, D, D) gradients of the inner loss by the S weights that step (STEPPED_WEIGHTS), in at least float32.
        Sum them over chunks or processes.

    Raises:
        ValueError: as `ttt`.
    """
    _check_half("ttt_accumulate", inner, loss)
    if k.ndim != 4 or k.shape != v.shape:
        raise ValueError(f"ttt_accumulate: k {tuple(k.shape)}, v {tuple(v.shape)} disagree; expected (B, H, N, D)")
    check_weights("ttt_accumulate", k, weights, inner)
    if choose("ttt_accumulate", impl, kernels(inner, loss, (k, v), weights)) == "triton":
        from t5kernels.ttt import triton

        k, v = as_in_autocast(k, v)
        return triton.accumulate(k, v, weights, scale, inner)
    gradients = reference.STEPPED[inner][0](k, v, tuple(weights), scale, loss)
    return torch.stack(gradients, dim=2).to(torch.promote_types(k.dtype, torch.float32))


def ttt_apply(q: Tensor, weights: tuple[Tensor, ...], step: Tensor, *, inner: str, impl: str | None = None) -> Tensor:
    """Apply the inner model after its step to some tokens: the second half of `ttt`.

    Args:
        q: (B, H, N, D), any part of the sequence.
        step: (B, H, S, D, D), the results of `ttt_accumulate` summed over the whole sequence.
        weights, inner, impl: as `ttt_accumulate` takes them.

    Returns:
        (B, H, N, D) in q's dtype.

    Raises:
        ValueError: as `ttt`.
    """
    _check_half("ttt_apply", inner, "dot")
    expected = (*q.shape[:2], STEPPED_WEIGHTS[inner], *q.shape[3:] * 2)
    if q.ndim != 4 or tuple(step.shape) != expected:
        raise ValueError(
            f"ttt_apply: q {tuple(q.shape)}, step {tuple(step.shape)}; expected (B, H, N, D) and "
            f"(B, H, {STEPPED_WEIGHTS[inner]}, D, D), which ttt_accumulate gives for inner={inner!r}"
        )
    check_weights("ttt_apply", q, weights, inner)
    if choose("ttt_apply", impl, kernels(inner, "dot", (q,), weights)) == "triton":
        from t5kernels.ttt import triton

        (narrow_q,) = as_in_autocast(q)
        return triton.apply(narrow_q, weights, step, inner).to(q.dtype)
    return reference.STEPPED[inner][1](q, reference.stepped(tuple(weights), step.unbind(2))).to(q.dtype)


def check_names(op: str, inner: str, loss: str) -> None:
    """Raises ValueError for an unknown inner model or loss."""
    if inner not in INNER_WEIGHTS or loss not in INNER_LOSSES:
        raise ValueError(f"{op}: inner={inner!r}, loss={loss!r}; expected {list(INNER_WEIGHTS)} and {INNER_LOSSES}")


def _check_half(op: str, inner: str, loss: str) -> None:
    check_names(op, inner, loss)
    if inner not in reference.STEPPED:
        raise ValueError(f"{op}: inner={inner!r} takes no gradient step; expected one of {list(reference.STEPPED)}")


def check_weights(op: str, q: Tensor, weights: tuple[Tensor, ...], inner: str) -> None:
    """Raises ValueError for inner weights of another number or shape than tokens q (B, H, N, D) need."""
    expected = (q.shape[1], q.shape[3], q.shape[3])
    if len(weights) != INNER_WEIGHTS[inner] or any(tuple(w.shape) != expected for w in weights):
        got = [tuple(w.shape) for w in weights]
        raise ValueError(f"{op}: {inner} takes {INNER_WEIGHTS[inner]} weights of shape {expected}, got {got}")


def kernels(inner: str, loss: str, tokens: Sequence[Tensor], weights: Sequence[Tensor]) -> Candidate:
    """The Triton kernels as a candidate for a call with these tokens (B, H, N, D)."""

    def obstacle() -> str | None:
        if inner not in FUSED_INNERS or loss != "dot":
            return f"with inner={inner!r}, loss={loss!r}; expected one of {FUSED_INNERS} and 'dot'; use 'reference'"
        return None

    return triton_candidate(tokens, weights, obstacle)
