"""Rotary positions: queries and keys turned, two channels at a time, by angles that grow with a token's place.

Source: "RoFormer: Enhanced Transformer with Rotary Position Embedding" (arXiv 2104.09864); over an image's rows and
columns "Rotary Position Embedding for Vision Transformer" (arXiv 2403.13298).
"""

import torch
from torch import Tensor


def rotated(x: Tensor, rope: Tensor, num_prefix_tokens: int, half: bool) -> Tensor:
    """x, queries or keys (B, H, N, D), with the patches turned; tokens before them have no position and stay.

    Args:
        rope: sines, then cosines, for each channel of each patch: (N − prefix, 2·D), or (H, N − prefix, 2·D).
        half: whether channel i turns with channel i + D/2; otherwise channels 2i and 2i + 1 turn together.
    """
    prefix, patches = x[:, :, :num_prefix_tokens], x[:, :, num_prefix_tokens:]
    sines, cosines = rope.chunk(2, dim=-1)
    if half:
        first, second = patches.chunk(2, dim=-1)
        across = torch.cat((-second, first), dim=-1)
    else:
        first, second = patches.unflatten(-1, (-1, 2)).unbind(-1)
        across = torch.stack((-second, first), dim=-1).flatten(-2)
    turned = patches * cosines + across * sines
    return torch.cat((prefix, turned.to(x.dtype)), dim=2)
