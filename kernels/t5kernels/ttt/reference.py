"""The op in readable PyTorch, any device and dtype: fit the inner model on (k, v) by one gradient step, apply it to q.

Shapes: B batch, H heads, N tokens, D head width. q, k, v: (B, H, N, D); inner weights: (H, D, D); row vectors, x @ W.
The gradient is written out (paper section 3, "Linearizing Vision Transformer with Test-Time Training"), so autograd
differentiates through it once and the outer gradient is exact, second order included.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def swiglu(q: Tensor, k: Tensor, v: Tensor, weights: tuple[Tensor, ...], scale: float, loss: str) -> Tensor:
    """f(x) = (silu(x W1) * (x W2)) W3."""
    w1, w2, w3 = weights
    z1, z2 = k @ w1, k @ w2
    gate, gate_slope = _silu_with_slope(z1)
    hidden = gate * z2
    error = _error(hidden, w3, v, scale, loss)
    grad3 = hidden.mT @ error
    grad_hidden = error @ w3.mT
    grad2 = k.mT @ (grad_hidden * gate)
    grad1 = k.mT @ (grad_hidden * z2 * gate_slope)
    return (F.silu(q @ (w1 - grad1)) * (q @ (w2 - grad2))) @ (w3 - grad3)


def two_layer(q: Tensor, k: Tensor, v: Tensor, weights: tuple[Tensor, ...], scale: float, loss: str) -> Tensor:
    """f(x) = silu(x W1) W2."""
    w1, w2 = weights
    hidden, slope = _silu_with_slope(k @ w1)
    error = _error(hidden, w2, v, scale, loss)
    grad2 = hidden.mT @ error
    grad1 = k.mT @ ((error @ w2.mT) * slope)
    return F.silu(q @ (w1 - grad1)) @ (w2 - grad2)


def _silu_with_slope(z: Tensor) -> tuple[Tensor, Tensor]:
    sigmoid = torch.sigmoid(z)
    value = z * sigmoid
    return value, sigmoid + value * (1 - sigmoid)


def _error(hidden: Tensor, w_out: Tensor, v: Tensor, scale: float, loss: str) -> Tensor:
    """Derivative of the inner loss by the inner model's output: -<f, v> gives -v, half squared error gives f - v."""
    return -scale * v if loss == "dot" else scale * (hidden @ w_out - v)
