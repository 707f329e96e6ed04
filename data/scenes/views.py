"""What the study shows its models: composed scenes at several sizes to measure on, and fresh views of them to fit on.

Shapes: n images of S × S pixels, bytes from 0 to 255; a model gets them normalized.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from compose import Composed
from torch import Tensor
from torch.nn import functional as F

from t5lib.data.sampler import Sampler
from t5lib.utils.seeds import numpy_generator

PATCH = 14  # pixels
VIEWS = 3  # keeps the random stream of crops and mirroring apart from others
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PROBE_PATCHES = 500_000  # of the fitted folds, that a probe is fitted on


@dataclass(frozen=True)
class Size:
    """At which size scenes are looked at.

    Attributes:
        rows, columns: of patches.
        cell: pixels of a scene, squared, that a patch shows.
    """

    rows: int
    columns: int
    cell: int

    @property
    def name(self) -> str:
        height, width = self.rows * PATCH, self.columns * PATCH
        return str(height) if height == width else f"{height}x{width}"


class Scenes:
    """The scenes of all folds, as bytes, on a device where there is one."""

    def __init__(self, composed: Composed, device: torch.device):
        self.composed, self.device = composed, device
        self.kinds = torch.from_numpy(composed.class_of_entity)
        self.side = composed.images(0).shape[1]
        self.read: dict[int, Tensor] = {}
        self.mean, self.std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD))

    def sizes(self) -> list[Size]:
        """Half size, full size, and a part of it that is not square."""
        whole = self.side // PATCH
        return [
            Size(whole // 2, whole // 2, 2 * PATCH),
            Size(whole, whole, PATCH),
            Size(whole * 25 // 37, whole, PATCH),
        ]

    def images(self, fold: int) -> Tensor:
        """(n, 3, S, S) uint8; read once."""
        if fold not in self.read:
            whole = torch.from_numpy(np.array(self.composed.images(fold))).to(self.device)
            self.read[fold] = whole.permute(0, 3, 1, 2)
        return self.read[fold]

    def normalized(self, images: Tensor, cell: int) -> Tensor:
        """Bytes to what a model gets; scenes are shrunk where a patch shows more than its own pixels."""
        images = images.float()
        images = F.avg_pool2d(images, cell // PATCH) if cell > PATCH else images
        return (images / 255 - self.mean) / self.std

    def measured(self, fold: int, size: Size, batch: int, most: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """The fold's (first `most`) scenes and what their patches show, once."""
        images, shown = self.images(fold)[:most], self.composed.cells(fold, size.cell)[:most]
        height, width = size.rows * size.cell, size.columns * size.cell
        for first in range(0, len(images), batch):
            part = images[first : first + batch, :, :height, :width]
            entities = shown[first : first + batch, : size.rows, : size.columns].astype(np.int64)
            yield self.normalized(part, size.cell), torch.from_numpy(entities)

    def probed(self, folds: list[int], size: Size, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Scenes of each of these folds, with PROBE_PATCHES patches in all, or fewer."""
        most = max(1, PROBE_PATCHES // (size.rows * size.columns * len(folds)))
        for fold in folds:
            yield from self.measured(fold, size, batch, most)

    def fitted(
        self, folds: list[int], batch: int, seed: int, large: float = 0.0, varied: bool = False
    ) -> Callable[[int], Iterator[Tensor]]:
        """Endless batches at the size that models are fitted on: whole scenes, or parts of them.

        The share `large` of them is a quarter of the images in four times the size, which is as many patches. `varied`
        draws parts of any size, colours, and pieces of other images: every batch is new then.
        """
        side, places = self.side // 2, [(fold, i) for fold in folds for i in range(self.composed.counts[fold])]
        sampler = Sampler((len(places),), batch, seed)

        def from_batch(start: int) -> Iterator[Tensor]:
            for number in count(start):
                chosen = [places[index] for index in sampler(number)[1]]
                draw = numpy_generator(seed, VIEWS, number)
                whole = draw.random() < large
                part = torch.stack([self.images(f)[i] for f, i in (chosen[: max(1, batch // 4)] if whole else chosen)])
                if varied:
                    part = part if whole else resized_parts(part, side, draw)
                    yield self.normalized(mixed(recoloured(part, draw), draw), PATCH)
                    continue
                cell = PATCH if whole or draw.random() < 0.5 else 2 * PATCH
                if cell == PATCH and not whole:
                    y, x = draw.integers(0, self.side - side + 1, 2)
                    part = part[:, :, y : y + side, x : x + side]
                yield self.normalized(part.flip(-1) if draw.random() < 0.5 else part, cell)

        return from_batch


def resized_parts(images: Tensor, side: int, draw: np.random.Generator) -> Tensor:
    """A square part of each image (n, 3, S, S), from `side` to S pixels, shrunk to `side`, perhaps mirrored."""
    parts = []
    for image in images.float():
        size = int(draw.integers(side, image.shape[-1] + 1))
        y, x = draw.integers(0, image.shape[-1] - size + 1, 2)
        part = F.interpolate(image[None, :, y : y + size, x : x + size], (side, side), mode="bilinear", antialias=True)
        parts.append(part.flip(-1) if draw.random() < 0.5 else part)
    return torch.cat(parts)


def recoloured(images: Tensor, draw: np.random.Generator) -> Tensor:
    """Contrast, and the brightness of every channel, changed by up to a third, an image (n, 3, S, S) at a time."""
    count = len(images)
    contrast, gain = draw.uniform(2 / 3, 4 / 3, (count, 1, 1, 1)), draw.uniform(2 / 3, 4 / 3, (count, 3, 1, 1))
    contrast, gain = (torch.from_numpy(each).float().to(images.device) for each in (contrast, gain))
    images = images.float()
    mean = images.mean((1, 2, 3), keepdim=True)
    return ((mean + (images - mean) * contrast) * gain).clamp(0, 255)


def mixed(images: Tensor, draw: np.random.Generator) -> Tensor:
    """Every other time, a rectangle of each image (n, 3, S, S) is the next one's."""
    if draw.random() < 0.5:
        return images
    side = images.shape[-1]
    (top, bottom), (left, right) = np.sort(draw.integers(0, side + 1, (2, 2)), axis=1)
    images = images.clone()
    images[..., top:bottom, left:right] = images.roll(1, 0)[..., top:bottom, left:right]
    return images
