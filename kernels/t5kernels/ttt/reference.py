"""The op in readable PyTorch, any device and dtype: fit the inner model on (k, v) by one gradient step, apply it to q.

Shapes: B batch, H heads, N tokens, D head width. q, k, v: (B, H, N, D); inner weights: (H, D, D); row vectors, x @ W.
The gradient is written out (paper section 3, "Linearizing Vision Transformer with Test-Time Training"), so autograd
differentiates through it once and the outer gradient is exact, second order included.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from t5kernels.linear_attention.reference import linear_attention


def linear(q: Tensor, k: Tensor, v: Tensor, weights: tuple[Tensor, ...], scale: float, loss: str) -> Tensor:
    """f(x) = phi(x) W, phi = elu + 1, fitted from W = 0 and normalized: linear attention.

    At W = 0 the output is 0, so both losses have the gradient -s phi(k)^T v; s cancels in the normalized output.
    """
    return linear_attention(_elu_features(q), _elu_features(k), v)


def linear_proj_qk(q: Tensor, k: Tensor, v: Tensor, weights: tuple[Tensor, ...], scale: float, loss: str) -> Tensor:
    """`linear` on q W1 and k W2."""
    w1, w2 = weights
    return linear(q @ w1, k @ w2, v, (), scale, loss)


def one_layer_gate(q: Tensor, k: Tensor, v: Tensor, weights: tuple[Tensor, ...], scale: float, loss: str) -> Tensor:
    """f(x) = (x W1) * silu(x W2)."""
    w1, w2 = weights
    z1 = k @ w1
    gate, gate_slope = _silu_with_slope(k @ w2)
    error = _error(lambda: z1 * gate, v, scale, loss)
    grad2 = k.mT @ (error * z1 * gate_slope)
    grad1 = k.mT @ (error * gate)
    return (q @ (w1 - grad1)) * F.silu(q @ (w2 - grad2))


def two_layer(q: Tensor, k: Tensor, v: Tensor, weights: tuple[Tensor, ...], scale: float, loss: str) -> Tensor:
    """f(x) = silu(x W1) W2."""
    w1, w2 = weights
    hidden, slope = _silu_with_slope(k @ w1)
    error = _error(lambda: hidden @ w2, v, scale, loss)
    grad2 = hidden.mT @ error
    grad1 = k.mT @ ((error @ w2.mT) * slope)
    return F.silu(q @ (w1 - grad1)) @ (w2 - grad2)


def three_layer(q: Tensor, k: Tensor, v: Tensor, weights: tuple[Tensor, ...], scale: float, loss: str) -> Tensor:
    """f(x) = silu(silu(x W1) W2) W3."""
    w1, w2, w3 = weights
    hidden1, slope1 = _silu_with_slope(k @ w1)
    hidden2, slope2 = _silu_with_slope(hidden1 @ w2)
    error = _error(lambda: hidden2 @ w3, v, scale, loss)
    grad3 = hidden2.mT @ error
    grad_z2 = (error @ w3.mT) * slope2
    grad2 = hidden1.mT @ grad_z2
    grad1 = k.mT @ ((grad_z2 @ w2.mT) * slope1)
    return F.silu(F.silu(q @ (w1 - grad1)) @ (w2 - grad2)) @ (w3 - grad3)


def swiglu(q: Tensor, k: Tensor, v: Tensor, weights: tuple[Tensor, ...], scale: float, loss: str) -> Tensor:
    """f(x) = (silu(x W1) * (x W2)) W3."""
    w1, w2, w3 = weights
    z1, z2 = k @ w1, k @ w2
    gate, gate_slope = _silu_with_slope(z1)
    hidden = gate * z2
    error = _error(lambda: hidden @ w3, v, scale, loss)
    grad3 = hidden.mT @ error
    grad_hidden = error @ w3.mT
    grad2 = k.mT @ (grad_hidden * gate)
    grad1 = k.mT @ (grad_hidden * z2 * gate_slope)
    return (F.silu(q @ (w1 - grad1)) * (q @ (w2 - grad2))) @ (w3 - grad3)


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
