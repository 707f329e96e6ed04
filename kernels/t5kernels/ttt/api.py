"""`ttt`: the bidirectional Test-Time-Training op, checked arguments first."""

from torch import Tensor

from t5kernels.ttt import reference

INNER_MODELS = {
    "linear": reference.linear,
    "linear_proj_qk": reference.linear_proj_qk,
    "one_layer_gate": reference.one_layer_gate,
    "two_layer": reference.two_layer,
    "three_layer": reference.three_layer,
    "swiglu": reference.swiglu,
}
INNER_WEIGHTS = {
    "linear": 0,
    "linear_proj_qk": 2,
    "one_layer_gate": 2,
    "two_layer": 2,
    "three_layer": 3,
    "swiglu": 3,
}
INNER_LOSSES = ("dot", "residual")


def ttt(
    q: Tensor, k: Tensor, v: Tensor, weights: tuple[Tensor, ...], *, inner: str, loss: str = "dot", scale: float
) -> Tensor:
    """Take one gradient step of the inner model on all tokens of (k, v), then apply it to q.

    Args:
        q, k, v: (B, H, N, D) queries, keys (already normalized) and values. q may hold another number of tokens.
        weights: inner weights, each (H, D, D), as many as INNER_WEIGHTS says.
        inner: inner model, a key of INNER_MODELS.
        loss: "dot" (minus the dot product) or "residual" (half the squared error), summed over tokens.
        scale: inner learning rate; the method uses D**-0.5 / N. The linear models normalize, so it cancels there.

    Returns:
        (B, H, N, D) in q's dtype.

    Raises:
        ValueError: unknown `inner` or `loss`, or shapes that do not fit.

    Source: "Linearizing Vision Transformer with Test-Time Training" (arXiv 2605.02772), section 3.
    """
    if inner not in INNER_MODELS or loss not in INNER_LOSSES:
        raise ValueError(f"ttt: inner={inner!r}, loss={loss!r}; expected {list(INNER_MODELS)} and {INNER_LOSSES}")
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"ttt: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} disagree; expected (B, H, N, D)"
        )
    heads, width = q.shape[1], q.shape[3]
    expected = (heads, width, width)
    if len(weights) != INNER_WEIGHTS[inner] or any(tuple(w.shape) != expected for w in weights):
        got = [tuple(w.shape) for w in weights]
        raise ValueError(f"ttt: {inner} takes {INNER_WEIGHTS[inner]} weights of shape {expected}, got {got}")
    return INNER_MODELS[inner](q, k, v, tuple(weights), scale, loss).to(q.dtype)
