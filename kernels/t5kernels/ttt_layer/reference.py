"""The layer in readable PyTorch, any device, dtype, inner model and key norm.

Shapes: B batch, H heads, N tokens, D head width; tokens (B, H, N, D). Source: "Linearizing Vision Transformer with
Test-Time Training" (arXiv 2605.02772): key norm and locality, then the inner model fitted and applied.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

TOKENS, CHANNELS = -2, -1


def _none(k: Tensor, eps: float) -> Tensor:
    return k


def _rms(k: Tensor, eps: float) -> Tensor:
    return k * torch.rsqrt(k.square().mean(CHANNELS, keepdim=True) + eps)


def _layer(k: Tensor, eps: float) -> Tensor:
    return _standardize(k, CHANNELS, eps)


def _instance(k: Tensor, eps: float) -> Tensor:
    return _standardize(k, TOKENS, eps)


def _instance_no_std(k: Tensor, eps: float) -> Tensor:
    return k - k.mean(TOKENS, keepdim=True)


def _instance_no_mean(k: Tensor, eps: float) -> Tensor:
    return k * torch.rsqrt(k.var(TOKENS, keepdim=True, correction=0) + eps)


def _standardize(k: Tensor, dim: int, eps: float) -> Tensor:
    centred = k - k.mean(dim, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dim, keepdim=True) + eps)


KEY_NORMS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "none": _none,
    "rms": _rms,
    "layer": _layer,
    "instance": _instance,
    "instance_no_std": _instance_no_std,
    "instance_no_mean": _instance_no_mean,
}


def key_norm(k: Tensor, kind: str, eps: float) -> Tensor:
    """Normalize keys (B, H, N, D). `kind`: a name of KEY_NORMS; `eps` is added to the variance (released code: 1.0).

    "rms" and "layer" work per token and head; the "instance" kinds per image and channel over the tokens.
    No kind has learned parameters. Half-precision keys are normalized in float32 and returned in their own dtype.
    """
    wide = k.float() if k.dtype in (torch.float16, torch.bfloat16) else k
    return KEY_NORMS[kind](wide, eps).to(k.dtype)


def convolved(x: Tensor, weight: Tensor, bias: Tensor, rows: int, columns: int, num_prefix_tokens: int) -> Tensor:
    """3×3 depthwise convolution over the token grid; 0 at the tokens before and after the grid.

    Args:
        x: (B, H, N, D).
        weight, bias: (H·D, 1, 3, 3) and (H·D,).
    """
    B, H, N, D = x.shape
    patches = x[:, :, num_prefix_tokens : num_prefix_tokens + rows * columns]
    image = patches.transpose(2, 3).reshape(B, H * D, rows, columns)
    mixed = F.conv2d(image, weight, bias, padding=1, groups=H * D).reshape(B, H, D, -1).transpose(2, 3)
    return F.pad(mixed, (0, 0, num_prefix_tokens, N - num_prefix_tokens - rows * columns))
