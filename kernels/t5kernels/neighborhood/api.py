"""Local softmax attention on a grid of tokens."""

from torch import Tensor


def neighborhood_attention(q: Tensor, k: Tensor, v: Tensor, *, rows: int, columns: int, window: int) -> Tensor:
    """Not written yet."""
    raise NotImplementedError


def circular_attention(
    q: Tensor, k: Tensor, v: Tensor, *, rows: int, columns: int, num_prefix_tokens: int, radius: float
) -> Tensor:
    """Not written yet."""
    raise NotImplementedError
