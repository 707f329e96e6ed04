"""Scenes of emoji: which there are, drawn by chance, and their pictures, composed from sprites on any device.

Shapes: B scenes; sprites are (E, 4, S, S), RGB multiplied by alpha, then alpha, all 0 to 1.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from captions import COLOURS, COUNTS, PHRASINGS, caption, caption_index
from torch import Tensor

from t5lib.data.decoding import image_of
from t5lib.data.shards import ShardSet

# Where copies stand, by count: centres (x, y) in a picture from -1 to 1, and half the side of a copy.
CENTRES = (
    ((0.0, 0.0),),
    ((-0.48, 0.0), (0.48, 0.0)),
    ((0.0, -0.46), (-0.48, 0.46), (0.48, 0.46)),
    ((-0.48, -0.46), (0.48, -0.46), (-0.48, 0.46), (0.48, 0.46)),
)
HALF_SIDES = (0.78, 0.42, 0.42, 0.42)
MOVED = 0.04  # a copy is off its centre by as much as this, either way
SMALLEST = 0.92  # of its size
SUPERSAMPLED = 2  # pictures are composed this many times larger, then averaged


@dataclass(frozen=True, kw_only=True)
class Emoji:
    """One kind: plain name, code point in hexadecimal (the sprite's key), and Unicode's group."""

    name: str
    key: str
    group: str


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """B scenes: emoji, count (from 1), colour and phrasing as numbers (B,); moves (B, 4, 3) are x, y, scale by copy."""

    emoji: Tensor
    count: Tensor
    colour: Tensor
    phrasing: Tensor
    moves: Tensor

    def __len__(self) -> int:
        return len(self.emoji)

    def captions(self) -> Tensor:
        """(B,) where each scene's caption stands in captions.every_caption."""
        return caption_index(self.emoji, self.count, self.colour, self.phrasing)

    def described(self, index: int, kinds: list[Emoji]) -> dict:
        """What the scene at `index` shows, and its caption."""
        kind, count = kinds[self.emoji[index]], int(self.count[index])
        colour = list(COLOURS)[self.colour[index]]
        text = caption(kind.name, count, colour, int(self.phrasing[index]))
        return {"caption": text, "emoji": kind.key, "name": kind.name, "count": count, "background": colour}


def read_sprites(manifest: Path) -> tuple[list[Emoji], Tensor]:
    """The kinds and their sprites (E, 4, S, S), in the same order."""
    kinds, pictures = [], []
    for shard in ShardSet.read(manifest).shards:
        for sample in shard.samples():
            about = json.loads(sample["json"])
            kinds.append(Emoji(name=about["name"], key=sample["__key__"], group=about["group"]))
            pictures.append(np.asarray(image_of(sample, 4)))
    rgba = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    return kinds, torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)


def draw_scenes(number: int, kinds: int, generator: torch.Generator) -> Scenes:
    """Scenes drawn evenly from all there are, on the CPU."""
    even = [torch.randint(high, (number,), generator=generator) for high in (kinds, len(COUNTS), len(COLOURS))]
    emoji, count, colour = even
    phrasing = torch.randint(len(PHRASINGS), (number,), generator=generator)
    moves = torch.rand(number, len(COUNTS), 3, generator=generator)
    moves[..., :2] = (2 * moves[..., :2] - 1) * MOVED
    moves[..., 2] = SMALLEST + (1 - SMALLEST) * moves[..., 2]
    return Scenes(emoji=emoji, count=count + 1, colour=colour, phrasing=phrasing, moves=moves)


def compose(sprites: Tensor, scenes: Scenes, size: int) -> Tensor:
    """Pictures (B, 3, size, size) in [-1, 1] on the sprites' device."""
    device = sprites.device
    palette = torch.tensor(list(COLOURS.values()), device=device) / 255
    picture = palette[scenes.colour.to(device)][:, :, None, None]
    large = SUPERSAMPLED * size
    for copy in range(len(COUNTS)):
        grid = F.affine_grid(_placement(scenes, copy).to(device), [len(scenes), 4, large, large], align_corners=False)
        drawn = F.grid_sample(sprites[scenes.emoji.to(device)], grid, align_corners=False)
        picture = picture * (1 - drawn[:, 3:]) + drawn[:, :3]
    return F.avg_pool2d(picture, SUPERSAMPLED) * 2 - 1


def to_bytes(pictures: Tensor) -> np.ndarray:
    """(B, H, W, 3) 8-bit pictures of (B, 3, H, W) in [-1, 1]."""
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _placement(scenes: Scenes, copy: int) -> Tensor:
    """(B, 2, 3) from picture to sprite coordinates for one copy; a copy that is not there lies outside."""
    away = (10.0, 10.0)
    table = torch.tensor([centres[copy] if copy < len(centres) else away for centres in CENTRES])
    centre = table[scenes.count - 1] + scenes.moves[:, copy, :2]
    half = torch.tensor(HALF_SIDES)[scenes.count - 1] * scenes.moves[:, copy, 2]
    scale = torch.diag_embed((1 / half)[:, None].expand(-1, 2))
    return torch.cat([scale, (-centre / half[:, None])[..., None]], 2)
