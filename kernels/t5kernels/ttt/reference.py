"""The op in readable PyTorch, any device and dtype: fit the inner model on (k, v) by one gradient step, apply it to q.

Shapes: B batch, H heads, N tokens, D head width. q, k, v: (B, H, N, D); inner weights: (H, D, D); row vectors, x @ W.
The gradient is written out (paper section 3, "Linearizing Vision Transformer with Test-Time Training"), so autograd
differentiates through it once and the outer gradient is exact, second order included. The gradient is a sum over
tokens. An inner model that takes a step is therefore two functions: one returns the gradients of some tokens, the other
applies weights to other tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from t5kernels.linear_attention.reference import linear_attention

Weights = tuple[Tensor, ...]


def linear(q: Tensor, k: Tensor, v: Tensor, weights: Weights, scale: float, loss: str) -> Tensor:
    """f(x) = phi(x) W, phi = elu + 1, fitted from W = 0 and normalized: linear attention.

    At W = 0 the output is 0, so both losses have the gradient -s phi(k)^T v; s cancels in the normalized output.
    """
    return linear_attention(_elu_features(q), _elu_features(k), v)


def linear_proj_qk(q: Tensor, k: Tensor, v: Tensor, weights: Weights, scale: float, loss: str) -> Tensor:
    """`linear` on q W1 and k W2."""
    w1, w2 = weights
    return linear(q @ w1, k @ w2, v, (), scale, loss)


def one_layer_gate_gradients(k: Tensor, v: Tensor, weights: Weights, scale: float, loss: str) -> Weights:
    w1, w2 = weights
    z1 = k @ w1
    gate, gate_slope = _silu_with_slope(k @ w2)
    error = _error(lambda: z1 * gate, v, scale, loss)
    return k.mT @ (error * gate), k.mT @ (error * z1 * gate_slope)


def one_layer_gate(x: Tensor, weights: Weights) -> Tensor:
    """f(x) = (x W1) * silu(x W2)."""
    w1, w2 = weights
    return (x @ w1) * F.silu(x @ w2)


def two_layer_gradients(k: Tensor, v: Tensor, weights: Weights, scale: float, loss: str) -> Weights:
    w1, w2 = weights
    hidden, slope = _silu_with_slope(k @ w1)
    error = _error(lambda: hidden @ w2, v, scale, loss)
    return k.mT @ ((error @ w2.mT) * slope), hidden.mT @ error


def two_layer(x: Tensor, weights: Weights) -> Tensor:
    """f(x) = silu(x W1) W2."""
    w1, w2 = weights
    return F.silu(x @ w1) @ w2


def three_layer_gradients(k: Tensor, v: Tensor, weights: Weights, scale: float, loss: str) -> Weights:
    w1, w2, w3 = weights
    hidden1, slope1 = _silu_with_slope(k @ w1)
    hidden2, slope2 = _silu_with_slope(hidden1 @ w2)
    error = _error(lambda: hidden2 @ w3, v, scale, loss)
    grad_z2 = (error @ w3.mT) * slope2
    return k.mT @ ((grad_z2 @ w2.mT) * slope1), hidden1.mT @ grad_z2, hidden2.mT @ error


def three_layer(x: Tensor, weights: Weights) -> Tensor:
    """f(x) = silu(silu(x W1) W2) W3."""
    w1, w2, w3 = weights
    return F.silu(F.silu(x @ w1) @ w2) @ w3


def swiglu_gradients(k: Tensor, v: Tensor, weights: Weights, scale: float, loss: str) -> Weights:
    w1, w2, w3 = weights
    z1, z2 = k @ w1, k @ w2
    gate, gate_slope = _silu_with_slope(z1)
    hidden = gate * z2
    error = _error(lambda: hidden @ w3, v, scale, loss)
    grad_hidden = error @ w3.mT
    return k.mT @ (grad_hidden * z2 * gate_slope), k.mT @ (grad_hidden * gate), hidden.mT @ error


def swiglu(x: Tensor, weights: Weights) -> Tensor:
    """f(x) = (silu(x W1) * (x W2)) W3."""
    w1, w2, w3 = weights
    return (F.silu(x @ w1) * (x @ w2)) @ w3


def swiglu_last_gradients(k: Tensor, v: Tensor, weights: Weights, scale: float, loss: str) -> Weights:
    """`swiglu` with W1 and W2 kept: linear attention with the learned features silu(x W1) * (x W2), no normalizer."""
    w1, w2, w3 = weights
    hidden = F.silu(k @ w1) * (k @ w2)
    return (hidden.mT @ _error(lambda: hidden @ w3, v, scale, loss),)


# Inner models that are normalized linear attention: functions of q, k, v, weights, scale and loss.
NORMALIZED: dict[str, Callable[..., Tensor]] = {"linear": linear, "linear_proj_qk": linear_proj_qk}
# Inner models that take a gradient step: (gradients by the weights that step, which are the last ones, summed over the
# tokens; f itself).
STEPPED: dict[str, tuple[Callable[..., Weights], Callable[[Tensor, Weights], Tensor]]] = {
    "one_layer_gate": (one_layer_gate_gradients, one_layer_gate),
    "two_layer": (two_layer_gradients, two_layer),
    "three_layer": (three_layer_gradients, three_layer),
    "swiglu": (swiglu_gradients, swiglu),
    "swiglu_last": (swiglu_last_gradients, swiglu),
}


def ttt(q: Tensor, k: Tensor, v: Tensor, weights: Weights, inner: str, scale: float, loss: str) -> Tensor:
    """f(q) after one gradient step on (k, v), for the inner model f that `inner` names."""
    if inner in NORMALIZED:
        return NORMALIZED[inner](q, k, v, weights, scale, loss)
    gradients, model = STEPPED[inner]
    return model(q, stepped(weights, gradients(k, v, weights, scale, loss)))


def stepped(weights: Weights, step: Weights) -> Weights:
    """`weights` after the step of the last of them."""
    kept = len(weights) - len(step)
    return weights[:kept] + tuple((w - g).to(w.dtype) for w, g in zip(weights[kept:], step, strict=True))


def _silu_with_slope(z: Tensor) -> tuple[Tensor, Tensor]:
    sigmoid = torch.sigmoid(z)
    value = z * sigmoid
    return value, sigmoid + value * (1 - sigmoid)


def _error(output: Callable[[], Tensor], v: Tensor, scale: float, loss: str) -> Tensor:
    """Derivative of the inner loss by the inner model's output f: -<f, v> gives -v, half squared error gives f - v.

    `output` is computed only where the loss needs it.
    """
    return -scale * v if loss == "dot" else scale * (output() - v)


def _elu_features(x: Tensor) -> Tensor:
    """elu + 1, positive, in at least float32: in half precision small features would round to 0."""
    return F.elu(x.to(torch.promote_types(x.dtype, torch.float32))) + 1
