"""The tiles of the kernels of inner models, and which of them a call gets."""

import torch
from torch import Tensor

from t5kernels.launch import (
    H100_SHARED,
    LARGEST_HEAD,
    LEAST_SHARED,
    Tile,
    ceil_div,
    lacks_shared_memory,
    padded_to,
)

# By kernel, then by the padded head width, a power of two or a sum of two (see `groups_of`); 16-bit tokens on a card of
# the H100's size. The tiles of 80 and 96 have not been timed; they spill little.
TILES = {
    "accumulate": {
        32: Tile(hidden=32, block=64, warps=4, stages=3, resident=3),
        64: Tile(hidden=64, block=64, warps=4, stages=3, resident=2),
        80: Tile(hidden=64, block=32, warps=4, stages=3, resident=2),
        96: Tile(hidden=64, block=32, warps=4, stages=3, resident=2),
        128: Tile(hidden=64, block=128, warps=8, stages=2, resident=1),
    },
    "accumulate_last": {
        32: Tile(hidden=32, block=64, warps=4, stages=3, resident=4),
        64: Tile(hidden=64, block=64, warps=4, stages=3, resident=3),
        80: Tile(hidden=64, block=64, warps=4, stages=2, resident=3),
        96: Tile(hidden=64, block=64, warps=4, stages=2, resident=3),
        128: Tile(hidden=64, block=64, warps=8, stages=2, resident=1),
    },
    "apply": {
        32: Tile(hidden=32, block=64, warps=4, stages=2, resident=4),
        64: Tile(hidden=64, block=128, warps=8, stages=3, resident=2),
        80: Tile(hidden=128, block=128, warps=8, stages=2, resident=1),
        96: Tile(hidden=128, block=128, warps=8, stages=2, resident=1),
        128: Tile(hidden=128, block=128, warps=8, stages=2, resident=1),
    },
    "apply_backward": {
        32: Tile(hidden=32, block=64, warps=4, stages=2, resident=2),
        64: Tile(hidden=64, block=64, warps=4, stages=3, resident=2),
        80: Tile(hidden=32, block=64, warps=4, stages=2, resident=2),
        96: Tile(hidden=32, block=64, warps=4, resident=2),
        128: Tile(hidden=32, block=64, warps=4, stages=2, resident=2),
    },
    "accumulate_backward": {
        32: Tile(hidden=32, block=64, warps=4, resident=2),
        64: Tile(hidden=64, block=128, warps=8, stages=2, resident=1),
        80: Tile(hidden=32, block=32, warps=4, resident=2),
        96: Tile(hidden=32, block=64, warps=8, resident=1),
        128: Tile(hidden=64, block=128, warps=8, resident=1),
    },
    "accumulate_last_backward": {
        32: Tile(hidden=32, block=64, warps=4, stages=2, resident=3),
        64: Tile(hidden=64, block=32, warps=4, stages=2, resident=2),
        80: Tile(hidden=32, block=64, warps=4, resident=2),
        96: Tile(hidden=32, block=64, warps=4, resident=2),
        128: Tile(hidden=64, block=32, warps=8, resident=1),
    },
    # Those of linear_proj_qk have not been timed. On queries it needs the whole hidden width at once, or does more.
    "accumulate_linear": {
        32: Tile(hidden=32, block=64, warps=4, stages=3, resident=4),
        64: Tile(hidden=64, block=64, warps=4, stages=3, resident=3),
        80: Tile(hidden=128, block=64, warps=4, stages=3, resident=2),
        96: Tile(hidden=128, block=64, warps=4, stages=3, resident=2),
        128: Tile(hidden=128, block=64, warps=8, stages=3, resident=1),
    },
    "apply_linear": {
        32: Tile(hidden=32, block=64, warps=4, stages=3, resident=6),
        64: Tile(hidden=64, block=64, warps=4, stages=3, resident=4),
        80: Tile(hidden=128, block=64, warps=4, stages=3, resident=2),
        96: Tile(hidden=128, block=64, warps=4, stages=3, resident=2),
        128: Tile(hidden=128, block=64, warps=4, stages=2, resident=2),
    },
    "apply_linear_backward": {
        32: Tile(hidden=32, block=64, warps=4, stages=2, resident=3),
        64: Tile(hidden=64, block=64, warps=4, stages=3, resident=2),
        80: Tile(hidden=128, block=64, warps=8, stages=2, resident=1),
        96: Tile(hidden=128, block=32, warps=8, stages=2, resident=1),
        128: Tile(hidden=128, block=64, warps=8, stages=2, resident=1),
    },
    "accumulate_linear_backward": {
        32: Tile(hidden=32, block=64, warps=4, stages=2, resident=3),
        64: Tile(hidden=64, block=64, warps=4, stages=3, resident=2),
        80: Tile(hidden=128, block=64, warps=8, stages=2, resident=1),
        96: Tile(hidden=128, block=64, warps=8, stages=2, resident=1),
        128: Tile(hidden=128, block=64, warps=8, stages=2, resident=1),
    },
}
# Heads 128 wide, on cards with less shared memory than an H100 has, such as the A100.
SMALLER_TILES = {
    "accumulate": Tile(hidden=64, block=64, warps=8, resident=1),
    "apply": Tile(hidden=128, block=64, warps=4, stages=2, resident=1),
    "accumulate_backward": Tile(hidden=32, block=32, warps=8, resident=1),
    "apply_linear_backward": Tile(hidden=128, block=64, warps=8, resident=1),
    "accumulate_linear_backward": Tile(hidden=128, block=64, warps=8, resident=1),
}
# In float32 tensor cores would lose digits, and small cards have little shared memory: this tile only has to be right.
SAFE_TILE = Tile(hidden=32, block=32, warps=8, resident=1)


def groups_of(width: int) -> tuple[int, int]:
    """The constants WIDTH and REST for a width in TILES: its largest power of two, and what is left."""
    largest = 1 << (width.bit_length() - 1)
    return largest, width - largest


def tile_for(kernel: str, x: Tensor) -> tuple[tuple[int, int], Tile, int]:
    """The widths of the groups of channels, the tile, and how many slices it makes of the hidden width."""
    D = x.shape[3]
    width = padded_to(TILES[kernel], D)
    tile = TILES[kernel][width]
    if x.dtype == torch.float32 or lacks_shared_memory(x, LEAST_SHARED):
        tile = SAFE_TILE
    elif width == LARGEST_HEAD and lacks_shared_memory(x, H100_SHARED):
        tile = SMALLER_TILES.get(kernel, tile)
    return groups_of(width), tile, ceil_div(D, tile.hidden)
