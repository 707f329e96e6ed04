"""Local operators in the place of an attention, as Diffusion Grafting puts them there.

Source of both: "Exploring Diffusion Transformer Designs via Grafting" (arXiv 2506.05340). Its recipe is the one of this
library: every operator is first fitted by regression to what the attention of its place gives (t5lib.calibrate), then
the whole model is trained for a short while (t5lib.train).

Shapes: B images, H heads (of all layers that the mixer stands for), N tokens, D head width.
"""

import torch
from t5kernels.neighborhood.reference import window_indices
from torch import Tensor, nn
from torch.nn import functional as F

from t5lib.layers.config import TTTConfig
from t5lib.layers.grid import TokenGrid
from t5lib.layers.mixers import Mixer, Tokens, convolved, softmax_attention


class LocalMixer(Mixer):
    """An operator over the grid; class, register and text tokens, which have no place there, ask all tokens by softmax.

    A subclass defines `local`. Both parts have a cost that is linear in N.

    Attributes:
        reach: how far a patch looks in each direction, in patches.
    """

    def __init__(self, num_heads: int, head_dim: int, config: TTTConfig, layers: int = 1):
        super().__init__(num_heads, head_dim, config, layers)
        self.reach = int(config.radius)

    def local(self, patches: Tokens, apart: tuple[Tensor, Tensor], grid: TokenGrid) -> Tensor:
        """What the patches give, (B, H, rows·columns, D).

        Args:
            patches: their q, k and v.
            apart: k and v (B, H, P, D) of the tokens before and after the grid; P may be 0.
        """
        raise NotImplementedError

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid) -> Tensor:
        own = grid.patches
        apart_q, apart_k, apart_v = (torch.cat([t[:, :, : own.start], t[:, :, own.stop :]], dim=2) for t in (q, k, v))
        o = self.local((grid.on_grid(q), grid.on_grid(k), grid.on_grid(v)), (apart_k, apart_v), grid).to(q.dtype)
        if not apart_q.shape[2]:
            return o
        before, after = softmax_attention(apart_q, k, v).tensor_split((own.start,), dim=2)
        return torch.cat([before, o, after], dim=2)


class SlidingWindowMixer(LocalMixer):
    """Softmax attention within a square window of 2·`config.radius` + 1 patches a side, without new weights.

    Source: arXiv 2506.05340 (see above), where it is one of the operators grafted into a DiT. Departures: the window is
    a square of the grid, not a stretch of the sequence. At a border it moves inward, as in neighborhood attention, and
    it is never larger than the grid. Class, register and text tokens see every token, and every token sees them.
    """

    def local(self, patches: Tokens, apart: tuple[Tensor, Tensor], grid: TokenGrid) -> Tensor:
        """One row of patches at a time asks whole rows, of which a mask leaves the window's columns."""
        q, k, v = patches
        rows, columns = (_window(size, self.reach, q.device) for size in (grid.rows, grid.columns))
        mask = torch.zeros(grid.columns, grid.columns, dtype=torch.bool, device=q.device).scatter(1, columns, 1)
        mask = F.pad(mask.repeat(1, rows.shape[1]), (apart[0].shape[2], 0), value=True)

        def in_sight(x: Tensor, others: Tensor) -> Tensor:
            near = x.unflatten(2, (grid.rows, grid.columns))[:, :, rows].flatten(3, 4)
            others = others.unsqueeze(2).expand(-1, -1, grid.rows, -1, -1)
            return torch.cat([others, near], dim=3).flatten(1, 2)

        by_row = q.unflatten(2, (grid.rows, grid.columns)).flatten(1, 2)
        o = softmax_attention(by_row, in_sight(k, apart[0]), in_sight(v, apart[1]), mask)
        return o.unflatten(1, (-1, grid.rows)).flatten(2, 3)


class GatedConvolutionMixer(LocalMixer):
    """Gated depthwise convolution, q ⊙ conv(k ⊙ v), as in Hyena with short explicit filters.

    Before it q, k and v take short convolutions x + conv₃(x) each; the filters of `conv` are 2·`config.radius` + 1
    patches a side. All convolutions are depthwise, over the grid.

    Source: arXiv 2506.05340 (see above), which grafts operators of the Hyena family (arXiv 2302.10866). Departures: the
    filters are two-dimensional, so that the grid takes the place of the sequence, and they look in every direction.
    Class, register and text tokens attend by softmax, for a convolution cannot gather into them; patches see them by
    the mean of their k ⊙ v, which is added to that of every patch.
    """

    def __init__(self, num_heads: int, head_dim: int, config: TTTConfig, layers: int = 1):
        super().__init__(num_heads, head_dim, config, layers)
        channels = self.num_heads * head_dim
        for name in ("q", "k", "v"):
            setattr(self, f"{name}_short", nn.Conv2d(channels, channels, 3, padding=1, groups=channels))
        side = 2 * self.reach + 1
        self.filters = nn.Conv2d(channels, channels, side, padding=self.reach, groups=channels)

    def local(self, patches: Tokens, apart: tuple[Tensor, Tensor], grid: TokenGrid) -> Tensor:
        plane = TokenGrid(grid.rows, grid.columns)
        short = (self.q_short, self.k_short, self.v_short)
        q, k, v = (x + convolved(x, conv, plane) for x, conv in zip(patches, short, strict=True))
        product = k * v
        if apart[0].shape[2]:
            product = product + (apart[0] * apart[1]).mean(2, keepdim=True)
        B, H, N, D = product.shape
        image = product.transpose(2, 3).reshape(B, H * D, grid.rows, grid.columns)
        return q * self.filters(image).reshape(B, H, D, N).transpose(2, 3)


def _window(size: int, reach: int, device: torch.device) -> Tensor:
    """(size, W): the places that each of an axis sees."""
    return window_indices(size, min(2 * reach + 1, size), device)
