"""All images of a split decoded once and held on the device: batches without a loader, as fast as memory gives them.

For many runs on the same images at a size that fits the device. What an image goes through is what
t5lib.data.images.transform does without augmentation, up to the normalization, which happens on the device; a
horizontal flip is the only augmentation. Every batch follows from the seed and its number.

Shapes: n images, B batch, H and W pixels of the network's input.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from t5lib.data.images import Batch, DataConfig, Transform, eval_batches, transform
from t5lib.data.sampler import Sampler
from t5lib.data.shards import ShardSet
from t5lib.utils.errors import T5Error
from t5lib.utils.files import atomic_file, sha256, write_text
from t5lib.utils.processes import WHOLE, Part
from t5lib.utils.progress import progress
from t5lib.utils.seeds import numpy_generator

FLIP = 2  # keeps its random stream apart from those of the sampler
DECODED_AT_ONCE = 64  # images a worker hands over in one piece


class InMemoryImages:
    """Images as bytes on a device, with their labels.

    Args:
        images: (n, 3, H, W) uint8.
        labels: (n,) int64.
        data: gives mean and std.

    Raises:
        T5Error: images of another type or shape, not a label for each, or no image.
    """

    def __init__(self, images: Tensor, labels: Tensor, data: DataConfig):
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images) != len(labels) or not len(labels):
            raise T5Error(
                f"images in memory must be uint8 (n, 3, H, W) with n labels and n above 0, got {images.dtype} "
                f"{tuple(images.shape)} with {len(labels)} labels"
            )
        self.images, self.labels = images, labels
        # in float32 and in the order in which torchvision normalizes, so that the results are its very bits
        self.mean, self.std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (data.mean, data.std))

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def load(cls, file: Path | str, data: DataConfig, device: str | torch.device = "cpu") -> "InMemoryImages":
        """Load what `decode` wrote."""
        tensors = load_file(file, device=str(device))
        return cls(tensors["images"], tensors["labels"], data)

    def batches(self, batch_size: int, *, seed: int, hflip: float = 0.0) -> Callable[..., Iterator[Batch]]:
        """A function from a batch number to the endless training batches from there on (t5lib.data.batches).

        Every epoch is a new order of all images; batches are always full, so one may span two epochs.

        Args:
            batch_size: images of a batch, of all processes together.
            hflip: probability that an image is mirrored.

        Raises:
            T5Error: `batch_size` or `hflip` out of range.
        """
        if not 1 <= batch_size <= len(self) or not 0 <= hflip <= 1:
            raise T5Error(
                f"batch_size {batch_size} and hflip {hflip}: expected 1 to {len(self)} images and a probability"
            )

        sampler = Sampler((len(self),), batch_size, seed)

        def from_batch(start: int, part: Part = WHOLE) -> Iterator[Batch]:
            rows = part.of(batch_size, "batch_size")
            for number in part.numbers(start):
                chosen = torch.from_numpy(sampler(number)[1][rows]).to(self.images.device)
                mirrored = torch.from_numpy((numpy_generator(seed, FLIP, number).random(batch_size) < hflip)[rows])
                images = _mirrored(self.images[chosen], mirrored.to(self.images.device))
                yield self._normalized(images), self.labels[chosen]

        return from_batch

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        """Every image once, in the manifest's order; the last batch may be short."""
        for images, labels in zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True):
            yield self._normalized(images), labels

    def _normalized(self, images: Tensor) -> Tensor:
        return images.float().div_(255).sub_(self.mean).div_(self.std)


def decode(
    shards: ShardSet, data: DataConfig, folder: Path | str, *, limit: int | None = None, workers: int | None = None
) -> Path:
    """Decode, resize and crop the (first `limit`) images of `shards` into a file in `folder`, unless it is there whole.

    The file's name follows from the shards' checksums and from what of `data` decides about the pixels; a note beside
    it holds its sha256.

    Args:
        workers: processes that decode; default: data.workers.

    Raises:
        T5Error: a damaged shard or sample, by name.
    """
    file = Path(folder) / f"{_key(shards, data, limit)}.safetensors"
    note = file.with_suffix(".sha256")
    if file.exists() and note.exists() and note.read_text(encoding="utf-8") == sha256(file):
        return file
    total = min(limit or shards.count, shards.count)
    batches = eval_batches(
        shards,
        _AsBytes(transform(replace(data, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))),
        batch_size=DECODED_AT_ONCE,
        workers=data.workers if workers is None else workers,
        limit=limit,
    )
    images, labels, done = torch.empty(0, dtype=torch.uint8), torch.empty(total, dtype=torch.int64), 0
    with progress(f"decode {shards.name}", total) as bar:
        for pixels, classes in batches:
            if not done:
                images = torch.empty(total, *pixels.shape[1:], dtype=torch.uint8)
            images[done : done + len(pixels)], labels[done : done + len(pixels)] = pixels, classes
            done += len(pixels)
            bar.advance(done)
    with atomic_file(file) as temporary:
        save_file({"images": images, "labels": labels}, temporary)
    write_text(note, sha256(file))
    return file


class _AsBytes:
    """A transform whose result, 0 to 1, is turned into bytes again. It travels to the workers."""

    def __init__(self, inner: Transform):
        self.inner = inner

    def __call__(self, image) -> Tensor:
        return self.inner(image).mul_(255).round_().to(torch.uint8)


def _mirrored(images: Tensor, which: Tensor) -> Tensor:
    return torch.where(which.view(-1, 1, 1, 1), images.flip(-1), images)


def _key(shards: ShardSet, data: DataConfig, limit: int | None) -> str:
    pixels = [data.img_size, data.interpolation, data.crop_pct]
    made_from = [[[shard.sha256, shard.left_out] for shard in shards.shards], shards.count, limit, pixels]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:20]
