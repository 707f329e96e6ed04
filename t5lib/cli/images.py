"""A user's own folder of images as the model's input.

Shapes: B images, H and W pixels of the model's input.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from t5lib.cli.screen import counted, note
from t5lib.data.batches import seeded
from t5lib.data.decoding import decode, is_animated
from t5lib.utils.errors import T5Error

MOST_HELD_OUT = 64
MOST_UNREADABLE = 0.5  # share of the files, past which the folder is not what it should be


class ImageReader:
    """Reads image files.

    Files that cannot be read are left out and remembered in `unreadable`, so that one damaged file among thousands
    costs neither the work done before it nor goes unsaid. `animated` remembers files with several frames.

    Args:
        transform: makes (3, H, W) of an image.
        description: how images are prepared, in words.
    """

    def __init__(self, transform: Callable[[Image.Image], Tensor], description: str):
        self.transform, self.description = transform, description
        self.unreadable: dict[Path, str] = {}
        self.animated: set[Path] = set()

    @classmethod
    def of(cls, model: nn.Module) -> "ImageReader":
        """A reader for a timm model: its input size, timm's normalization and crop for its weights."""
        if model.in_chans != 3:
            raise T5Error(f"the model takes images of {model.in_chans} channels; image files are read as RGB, with 3")
        height, width = model.patch_embed.img_size
        config = resolve_model_data_config(model) | {"input_size": (3, height, width)}
        mean, std = (" ".join(f"{value:.3g}" for value in config[name]) for name in ("mean", "std"))
        return cls(create_transform(**config), f"{height} × {width} px, mean {mean}, std {std}")

    def read(self, paths: Sequence[Path]) -> Tensor:
        """(B, 3, H, W) float32, B at most the number of `paths`.

        Raises:
            T5Error: not one of them can be read.
        """
        images = self.readable(paths)
        if not images:
            raise T5Error(
                f"none of the images can be read, such as {paths[0]} ({self.unreadable[paths[0]]}); replace them"
            )
        return torch.stack(images)

    def readable(self, paths: Sequence[Path]) -> list[Tensor]:
        """(3, H, W) float32 each, of those that can be read."""
        with ThreadPoolExecutor(os.cpu_count()) as threads:  # decoding and resizing run outside Python's lock
            return [image for image in threads.map(self._read, paths) if image is not None]

    def report(self) -> None:
        """Note the files that were left out, and those of which one frame of several was taken."""
        if self.unreadable:
            path, reason = next(iter(self.unreadable.items()))
            note(f"left out: {counted(len(self.unreadable), 'file')} that cannot be read, such as {path} ({reason})")
        if self.animated:
            note(
                f"only the first frame is used of {counted(len(self.animated), 'animation')}, such as "
                f"{min(self.animated)}"
            )

    def _read(self, path: Path) -> Tensor | None:
        try:
            image = decode(path)
        except T5Error as error:
            self.unreadable[path] = str(error)
            return None
        if is_animated(path):
            self.animated.add(path)
        return self.transform(image)


class CalibrationImages:
    """Batches for t5lib.calibrate: number 0 is held out to measure on, the later ones pass over all other images again
    and again, each pass in a new order, every image mirrored half of the times.

    A batch follows from the seed and its number alone, so work goes on where it stopped. Where files cannot be read,
    the next ones fill the batch.

    Args:
        paths: 2 images or more.
        reader: reads some of them, and remembers those that it cannot.

    Raises:
        T5Error: here or while iterating, more than MOST_UNREADABLE of the files cannot be read.
    """

    def __init__(self, paths: Sequence[Path], reader: ImageReader, batch_size: int, seed: int):
        order = [paths[index] for index in torch.randperm(len(paths), generator=seeded(seed)).tolist()]
        self.paths, self.reader, self.batch_size, self.seed = paths, reader, batch_size, seed
        _, used = self._take(order, min(MOST_HELD_OUT, batch_size, max(1, len(paths) // 10)))
        self.held_out, self.rest = order[:used], order[used:]

    def __call__(self, start: int) -> Iterator[Tensor]:
        """Endless batches (B, 3, H, W) from number `start` on."""
        return (self._batch(number) for number in itertools.count(start))

    def _batch(self, number: int) -> Tensor:
        if number == 0:
            return torch.stack(self._take(self.held_out, len(self.held_out))[0])
        batches_a_pass = -(-len(self.rest) // self.batch_size)
        epoch, position = divmod(number - 1, batches_a_pass)
        order = torch.randperm(len(self.rest), generator=seeded(self.seed, 1 + epoch)).tolist()
        first = position * self.batch_size
        chosen = [self.rest[index] for index in order[first:] + order[:first]]
        images = torch.stack(self._take(chosen, min(self.batch_size, len(order) - first))[0])
        mirrored = torch.rand(len(images), generator=seeded(self.seed, number, 1)) < 0.5
        return torch.where(mirrored[:, None, None, None], images.flip(-1), images)

    def _take(self, paths: Sequence[Path], count: int) -> tuple[list[Tensor], int]:
        """The first `count` of the images that can be read, or all; and how many files that took."""
        images: list[Tensor] = []
        used = 0
        while len(images) < count and used < len(paths):
            chosen = paths[used : used + count - len(images)]
            images += self.reader.readable(chosen)
            used += len(chosen)
            self._require_enough()
        if not images or used == len(self.paths):  # nothing is left for the other batches
            raise T5Error(f"too few of the {len(self.paths)} images can be read; {self._example()}")
        return images, used

    def _require_enough(self) -> None:
        unreadable = len(self.reader.unreadable)
        if unreadable > MOST_UNREADABLE * len(self.paths):
            raise T5Error(
                f"{unreadable} of {len(self.paths)} images cannot be read, more than {MOST_UNREADABLE:.0%}; "
                f"{self._example()}"
            )

    def _example(self) -> str:
        path, reason = next(iter(self.reader.unreadable.items()))
        return f"replace or remove such files as {path} ({reason})"
