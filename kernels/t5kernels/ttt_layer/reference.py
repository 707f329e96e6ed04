"""The layer in readable PyTorch, any device, dtype, inner model and key norm.

Shapes: B batch, H heads, N image tokens, T text tokens, D head width; tokens (B, H, N, D). Source: "Linearizing Vision
Transformer with Test-Time Training" (arXiv 2605.02772): key norm and locality, then the inner model fitted and applied.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from t5kernels.ttt.api import ttt
from t5kernels.ttt_layer.key_norm import KeyStatistics, key_norm

HALF = (torch.float16, torch.bfloat16)
Tokens = tuple[Tensor, Tensor, Tensor]
Conv = tuple[Tensor, Tensor]


def layer(
    image: Tokens, text: Tokens | None, weights, q_conv: Conv | None, k_conv: Conv | None, grid, settings
) -> tuple[Tensor, Tensor | None]:
    """The layer without RMS norms. Arguments and results are those of `ttt_layer`."""
    q, k, v = image
    count, scale = k.shape[2], inner_rate(q, text[0] if text else None)
    k, text_k = _normalized_keys(k, text[1] if text else None, settings)
    if q_conv is not None and k_conv is not None:
        q, k = q + convolved(q, *q_conv, grid), k + convolved(k, *k_conv, grid)
    if text is not None and text_k is not None:
        q, k, v = torch.cat([q, text[0]], dim=2), torch.cat([k, text_k], dim=2), torch.cat([v, text[2]], dim=2)
    o = ttt(q, k, v, weights, inner=settings.inner, loss=settings.loss, scale=scale, impl="reference")
    return (o, None) if text is None else (o[:, :, :count], o[:, :, count:])


def inner_rate(q: Tensor, text_q: Tensor | None) -> float:
    """The inner learning rate of the method, for queries (B, H, N, D) and (B, H, T, D): D**-0.5 / (N + T)."""
    tokens = q.shape[2] if text_q is None else q.shape[2] + text_q.shape[2]
    return q.shape[3] ** -0.5 / tokens


def _normalized_keys(k: Tensor, text_k: Tensor | None, settings) -> tuple[Tensor, Tensor | None]:
    kind, eps = settings.key_norm, settings.eps
    if text_k is None:
        return key_norm(k, kind, eps), None
    if settings.norm_scope == "joint":
        k, text_k = key_norm(torch.cat([k, text_k], dim=2), kind, eps).tensor_split((k.shape[2],), dim=2)
        return k, text_k
    return key_norm(k, kind, eps), key_norm(text_k, kind, eps)


def rms_normalized(tokens, gains, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, H, N, D) after the RMS norms of q and k, with gains (D,) of each."""
    q, k, v = tokens
    return _rms(q, gains[0], eps), _rms(k, gains[1], eps), v


def _rms(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Rounded as diffusers' RMSNorm does."""
    wide = x.float() if x.dtype in HALF else x
    x = x * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (x.to(gain.dtype) if gain.dtype in HALF else x) * gain


def prepared(x: Tensor, kind: str, eps: float, statistics: KeyStatistics | None, conv: Conv | None, grid) -> Tensor:
    """Queries or keys as the inner model gets them. Arguments and results are those of `ttt_prepare`."""
    x = key_norm(x, kind, eps, statistics)
    return x if conv is None else x + convolved(x, *conv, grid)


def convolved(x: Tensor, weight: Tensor, bias: Tensor, grid) -> Tensor:
    """3×3 depthwise convolution over the token grid; 0 at the tokens before and after the grid.

    Args:
        x: (B, H, N, D).
        weight, bias: (H·D, 1, 3, 3) and (H·D,).
        grid: a Grid, or any object with its attributes.

    Returns:
        (B, H, N, D).
    """
    B, H, N, D = x.shape
    first, on_grid = grid.num_prefix_tokens, grid.rows * grid.columns
    image = x[:, :, first : first + on_grid].transpose(2, 3).reshape(B, H * D, grid.rows, grid.columns)
    mixed = F.conv2d(image, weight, bias, padding=1, groups=H * D).reshape(B, H, D, on_grid).transpose(2, 3)
    return F.pad(mixed, (0, 0, first, N - first - on_grid))
