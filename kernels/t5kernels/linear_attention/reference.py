"""The op in readable PyTorch, any device and dtype: sums over tokens first, so the cost is linear in their number.

Shapes: B batch, H heads, N tokens, F features, D width of the values.
"""

import torch
from torch import Tensor

from t5kernels.precision import without_autocast

SMALLEST_NORMALIZER = 1e-6


def linear_attention(q_features: Tensor, k_features: Tensor, v: Tensor) -> Tensor:
    """o_i = q_i (sum_j k_j^T v_j) / (q_i . sum_j k_j), in at least float32, returned in v's dtype.

    Autocast is disabled here because it would round the sums to half precision. Where no feature of a query meets one
    of a key, as can happen with ReLU features, the output is 0 and not 0 / 0.
    """
    with without_autocast(v.device):
        q, k, values = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q_features, k_features, v))
        numerator = q @ (k.mT @ values)
        normalizer = q @ k.sum(-2).unsqueeze(-1)
        return (numerator / normalizer.clamp_min(SMALLEST_NORMALIZER)).to(v.dtype)
