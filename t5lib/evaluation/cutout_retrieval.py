"""Which of the known things a picture shows, where things stand on a plain background and are known as cut-outs.

Whole pictures compare badly: number, place and background weigh more in their features than which small thing is shown
(real pictures of one to four emoji at 64 px find their name among 358 in 56 % by DINOv2's class tokens, beside 20 real
pictures a name). So every thing is cut out, and compared pixel by pixel with every known one on the same background.

Shapes: images are (C, H, W) uint8; E known things; S pixels a side of what is compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from t5lib.evaluation.scores import ground_of, parts_of
from t5lib.utils.errors import T5Error

SIDE = 16  # S: finer, and a pixel's shift weighs too much
MARGIN = 0.06  # of a thing's longer side, around it
OPAQUE = 0.1  # alpha from which on a pixel is of the thing


@dataclass(frozen=True)
class Cutouts:
    """Known things, each filling its square: colours times alpha (E, 3, S, S), and alpha (E, 1, S, S), 0 to 1."""

    names: tuple[str, ...]
    colours: Tensor
    alpha: Tensor

    def on(self, ground: Tensor) -> Tensor:
        """(E, 3, S, S) on a background of one colour (3,)."""
        return self.colours + (1 - self.alpha) * ground[:, None, None]


def cutouts_of(pictures: dict[str, Tensor]) -> Cutouts:
    """From RGBA pictures (4, h, w) uint8 of any sizes, by name.

    Raises:
        T5Error: a picture that has other channels, or that is wholly transparent.
    """
    squares = []
    for name, picture in pictures.items():
        seen = picture[3:].float() / 255 > OPAQUE if len(picture) == 4 else torch.zeros(1, 1, 1, dtype=torch.bool)
        if not seen.any():
            raise T5Error(f"the cut-out of '{name}' is {tuple(picture.shape)}; expected (4, h, w) with something in it")
        alpha = picture[3:].float() / 255
        rows, columns = (seen[0].any(axis).nonzero().flatten() for axis in (1, 0))
        box = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
        squares.append(_square(torch.cat([picture[:3].float() / 255 * alpha, alpha]), box, torch.zeros(4)))
    found = torch.stack(squares)
    return Cutouts(tuple(pictures), found[:, :3], found[:, 3:])


def retrieval(images: Tensor, wanted: Sequence[str], cutouts: Cutouts) -> dict[str, float | int]:
    """How often the things in an image are nearest to the known thing that was asked for.

    The distance is the squared error of pixels, its mean over the things in the image.

    Args:
        images: (n, 3 or 1, H, W) uint8 on the CPU, things on a plain background.
        wanted: n names of `cutouts`.

    Returns:
        As t5lib.evaluation.scores.retrieval: "retrieval_r1", "retrieval_r5", "retrieval_names".

    Raises:
        T5Error: not a name for each image, or a name without a cut-out.
    """
    if len(images) != len(wanted):
        raise T5Error(f"{len(images)} images and {len(wanted)} names; expected a name for each image")
    unknown = [name for name in wanted if name not in cutouts.names]
    if unknown:
        raise T5Error(f"'{unknown[0]}' has no cut-out; expected one of {len(cutouts.names)} names")
    ranks = torch.stack([_rank(image, name, cutouts) for image, name in zip(images, wanted, strict=True)])
    return {
        "retrieval_r1": (ranks < 1).float().mean().item(),
        "retrieval_r5": (ranks < 5).float().mean().item(),
        "retrieval_names": len(cutouts.names),
    }


def _rank(image: Tensor, name: str, cutouts: Cutouts) -> Tensor:
    """How many names are nearer than the right one."""
    ground = torch.from_numpy(ground_of(image)).float()
    whole = (slice(0, image.shape[1]), slice(0, image.shape[2]))
    boxes = [box for box, _ in parts_of(image)] or [whole]
    pixels = image.expand(3, -1, -1).float() / 255
    things = torch.stack([_square(pixels, box, ground) for box in boxes])
    error = (things[:, None] - cutouts.on(ground)).square().mean((0, 2, 3, 4))
    return (error < error[cutouts.names.index(name)]).sum()


def _square(pixels: Tensor, box: tuple[slice, slice], fill: Tensor) -> Tensor:
    """What is in `box` of (C, H, W), with a margin, in a square of S x S pixels; beyond the picture is `fill` (C,)."""
    height, width = (part.stop - part.start for part in box)
    side = int(max(height, width) * (1 + 2 * MARGIN)) + 1
    top, left = (round((part.start + part.stop - side) / 2) for part in box)
    square = fill[:, None, None].expand(-1, side, side).clone()
    above, before = max(0, top), max(0, left)
    inside = pixels[:, above : top + side, before : left + side]
    square[:, above - top :, before - left :][:, : inside.shape[1], : inside.shape[2]] = inside
    small = F.interpolate(square[None], (SIDE, SIDE), mode="bicubic", antialias=True)[0]
    return small.clamp(0, 1)
