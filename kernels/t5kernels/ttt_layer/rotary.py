"""Rotary positions: queries and keys turned, two channels at a time, by angles that grow with a token's place.

Source: "RoFormer: Enhanced Transformer with Rotary Position Embedding" (arXiv 2104.09864); over an image's rows and
columns "Rotary Position Embedding for Vision Transformer" (arXiv 2403.13298).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Rotary(NamedTuple):
    """By what the tokens of an image, and of a text beside it, are turned.

    Attributes:
        image: sines, then cosines, for each channel of each patch: (N − prefix, 2·D), or (H, N − prefix, 2·D). The two
            channels of a pair have the same.
        text: the same for the text's tokens, (T, 2·D) or (H, T, 2·D); None where text is not turned.
        num_prefix_tokens: image tokens before the patches, which have no position and stay.
        half: whether channel i turns with channel i + D/2; otherwise channels 2i and 2i + 1 turn together.
    """

    image: Tensor
    text: Tensor | None = None
    num_prefix_tokens: int = 0
    half: bool = False


def rotated(x: Tensor, rope: Tensor, num_prefix_tokens: int, half: bool) -> Tensor:
    """x, queries or keys (B, H, N, D), with the patches turned. `rope` is Rotary.image; the others are as there."""
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
