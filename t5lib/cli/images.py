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
        """As a model of timm wants them: its input size, timm's normalization and crop for its weights."""
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
        with ThreadPoolExecutor(os.cpu_count()) as threads:  # decoding and resizing run outside Python's lock
            images = [image for image in threads.map(self._read, paths) if image is not None]
        if not images:
            raise T5Error(
                f"no image can be read, such as {paths[0]} ({self.unreadable[paths[0]]}); replace or remove such files"
            )
        return torch.stack(images)

    def report(self) -> None:
        """Note the files that were left out, and those of which one frame of several was taken."""
        if self.unreadable:
            path, reason = next(iter(self.unreadable.items()))
            note(f"left out, for it cannot be read: {counted(len(self.unreadable), 'file')}, such as {path} ({reason})")
        if self.animated:
            note(
                f"of {counted(len(self.animated), 'animation')} the first frame is taken, such as {min(self.animated)}"
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

    A batch follows from the seed and its number alone, so work goes on where it stopped.

    Args:
        paths: 2 images or more.
        read: makes (B, 3, H, W) of some of them.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[Sequence[Path]], Tensor], batch_size: int, seed: int):
        order = torch.randperm(len(paths), generator=seeded(seed)).tolist()
        held_out = min(MOST_HELD_OUT, batch_size, max(1, len(paths) // 10))
        self.held_out = [paths[index] for index in order[:held_out]]
        self.rest = [paths[index] for index in order[held_out:]]
        self.read, self.batch_size, self.seed = read, batch_size, seed

    def __call__(self, start: int) -> Iterator[Tensor]:
        """Endless batches (B, 3, H, W) from number `start` on."""
        return (self._batch(number) for number in itertools.count(start))

    def _batch(self, number: int) -> Tensor:
        if number == 0:
            return self.read(self.held_out)
        batches_a_pass = -(-len(self.rest) // self.batch_size)
        epoch, position = divmod(number - 1, batches_a_pass)
        order = torch.randperm(len(self.rest), generator=seeded(self.seed, 1 + epoch)).tolist()
        chosen = order[position * self.batch_size : (position + 1) * self.batch_size]
        images = self.read([self.rest[index] for index in chosen])
        mirrored = torch.rand(len(images), generator=seeded(self.seed, number, 1)) < 0.5
        return torch.where(mirrored[:, None, None, None], images.flip(-1), images)
