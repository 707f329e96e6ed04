"""The ops in readable PyTorch, for any device and dtype.

Shapes: B batch, H heads, N = R x C tokens of a grid of R rows and C columns, row by row, D head width, W window.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def neighborhood_attention(q: Tensor, k: Tensor, v: Tensor, *, rows: int, columns: int, window: int) -> Tensor:
    """Each row of queries attends to all columns of the W rows of keys it can see, masked to the columns it can see.

    It holds W copies of k and v, so its memory grows with N.
    """
    B, H, N, D = q.shape
    visible_rows = window_indices(rows, window, q.device)
    mask = torch.zeros(columns, columns, dtype=torch.bool, device=q.device)
    mask = mask.scatter(1, window_indices(columns, window, q.device), 1).repeat(1, window)

    def rows_in_sight(x: Tensor) -> Tensor:
        """For every row of the grid, the rows of keys or values in its window: (B, H, R·C, D) to (B, H·R, W·C, D)."""
        gathered = x.unflatten(2, (rows, columns)).index_select(2, visible_rows.flatten())
        return gathered.reshape(B, H * rows, window * columns, D)

    q = q.reshape(B, H * rows, columns, D)
    return F.scaled_dot_product_attention(q, rows_in_sight(k), rows_in_sight(v), mask).reshape(B, H, N, D)


def circular_attention(
    q: Tensor, k: Tensor, v: Tensor, *, rows: int, columns: int, num_prefix_tokens: int, squared_radius: int
) -> Tensor:
    """A dense mask over all pairs of tokens, so its memory grows with N squared."""
    token = torch.arange(rows * columns, device=q.device)
    row, column = token // columns, token % columns
    squared_distance = (row[:, None] - row).square() + (column[:, None] - column).square()
    prefix = num_prefix_tokens
    mask = F.pad(squared_distance <= squared_radius, (prefix, 0, prefix, 0), value=True)
    return F.scaled_dot_product_attention(q, k, v, mask)


def window_indices(length: int, window: int, device: torch.device) -> Tensor:
    """(length, window): the positions that each position of an axis sees; at both ends the window is shifted inward."""
    start = (torch.arange(length, device=device) - window // 2).clamp(0, length - window)
    return start[:, None] + torch.arange(window, device=device)
