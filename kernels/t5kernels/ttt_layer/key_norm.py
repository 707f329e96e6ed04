"""Key norms: what is done to the keys before the inner model is fitted on them.

Softmax ignores a shift common to all keys; the inner gradient does not. Instance norm removes it.
Shapes: k is (B, H, N, D); statistics are taken in the dtype of k, at least float32.
Source: "Linearizing Vision Transformer with Test-Time Training" (arXiv 2605.02772), section on key shift.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

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


OVER_TOKENS = ("instance", "instance_no_std", "instance_no_mean")


class KeyStatistics(NamedTuple):
    """Statistics of keys: how many there are, their mean, and the sum of squared deviations from it, (B, H, 1, D) each.

    The statistics of several parts of a sequence are merged without sums of squares, which would lose digits for keys
    far from zero.
    """

    tokens: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, k: Tensor) -> "KeyStatistics":
        """The statistics of the keys (B, H, N, D), in at least float32."""
        variance, mean = torch.var_mean(_wide(k), TOKENS, correction=0, keepdim=True)
        return cls(k.shape[TOKENS], mean, variance * k.shape[TOKENS])

    @classmethod
    def merged(cls, parts: Sequence["KeyStatistics"]) -> "KeyStatistics":
        """The statistics of the keys of all parts together."""
        tokens = sum(part.tokens for part in parts)
        mean = torch.stack([part.mean * (part.tokens / tokens) for part in parts]).sum(0)
        squares = [part.squares + part.tokens * (part.mean - mean).square() for part in parts]
        return cls(tokens, mean, torch.stack(squares).sum(0))


def key_norm(k: Tensor, kind: str, eps: float, statistics: KeyStatistics | None = None) -> Tensor:
    """Normalize keys (B, H, N, D). `kind`: a name of KEY_NORMS; `eps` is added to the variance (released code: 1.0).

    "rms" and "layer" work per token and head; the "instance" kinds per image and channel over the tokens.
    No kind has learned parameters. Half-precision keys are normalized in float32 and returned in their own dtype.

    Args:
        statistics: of the whole sequence where `k` is a part of it, for the kinds that are OVER_TOKENS.
    """
    wide = _wide(k)
    if statistics is None or kind not in OVER_TOKENS:
        return KEY_NORMS[kind](wide, eps).to(k.dtype)
    if kind != "instance_no_mean":
        wide = wide - statistics.mean
    if kind != "instance_no_std":
        wide = wide * torch.rsqrt(statistics.squares / statistics.tokens + eps)
    return wide.to(k.dtype)


def _wide(k: Tensor) -> Tensor:
    return k.float() if k.dtype in (torch.float16, torch.bfloat16) else k
