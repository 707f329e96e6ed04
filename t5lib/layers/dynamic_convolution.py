"""A depthwise convolution over the token grid whose kernels come from the tokens (locality "dconv_v").

Shapes: B images, H heads, N tokens, D head width, K = D/8 the bottleneck's width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from t5lib.layers.grid import TokenGrid

REDUCTION = 8  # D over K
TAPS = 9  # of a 3×3 kernel


class DynamicConvolution(nn.Module):
    """3×3 depthwise convolution in which every token makes its own kernel, a bottleneck of its channels.

    Token i gives Σ_t (b_t + silu(x_i A) B_t) ⊙ x_{i+t} over the nine places t around it, 0 beyond the border, with
    A (D, K), B_t (K, D) and b_t (D) a head. All B and b start at 0, and so does the output; b alone is a `dwc_v`.

    Source: the dynamic depthwise convolution on v of JetViT (arXiv 2605.26636). Departures: a kernel comes from the
    channels of its own head, because mixers never mix heads, and the result is added to the layer's output, as that of
    "dwc_v" is, so that the two localities differ in their kernels alone.
    """

    def __init__(self, num_heads: int, head_dim: int):
        super().__init__()
        narrow = max(1, head_dim // REDUCTION)
        self.down = nn.Parameter(torch.empty(num_heads, head_dim, narrow))
        nn.init.trunc_normal_(self.down, std=head_dim**-0.5)
        self.up = nn.Parameter(torch.zeros(num_heads, TAPS, narrow, head_dim))
        self.bias = nn.Parameter(torch.zeros(num_heads, TAPS, 1, head_dim))

    def forward(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """x: (B, H, N, D). Returns (B, H, N, D) in its dtype, 0 at the tokens before and after the grid."""
        own = grid.patches
        patches = x[:, :, own]
        hidden = F.silu(patches @ self.down)
        around = shifted(patches.unflatten(2, (grid.rows, grid.columns)))
        kernels = zip(around, self.up.unbind(1), self.bias.unbind(1), strict=True)
        first, *others = [(hidden @ up + bias) * near.flatten(2, 3) for near, up, bias in kernels]
        return F.pad(sum(others, first), (0, 0, own.start, x.shape[2] - own.stop)).to(x.dtype)


def shifted(x: Tensor) -> list[Tensor]:
    """The nine neighbours of every place of x (B, H, rows, columns, D), row by row, 0 beyond the border."""
    rows, columns = x.shape[2:4]
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    return [padded[:, :, i : i + rows, j : j + columns] for i in range(3) for j in range(3)]
