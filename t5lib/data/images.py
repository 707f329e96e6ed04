"""Image batches for training and evaluation, read from shards; repeatable, and resumable at any batch.

Batch b is of slot b mod workers, and every slot owns a fixed share of each epoch, so the stream follows from the seed
and the number of workers alone. Of several processes each has that many workers, and reads the same stream; samples of
another one's are passed over before they are decoded. Every random choice is seeded by what it decides about (order:
epoch and slot; augmentation: epoch and the sample's position in the manifest), never by what came before.

Shapes: B batch, H and W pixels of the network's input.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import accumulate, count, islice
from typing import Annotated, Any, Literal
from unittest.mock import patch

import numpy as np
import torch
import webdataset
from PIL import Image, ImageOps
from pydantic import Field
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from t5lib.data.augment_policy import check_policy
from t5lib.data.decoding import image_of
from t5lib.data.shards import ShardSet, label_of
from t5lib.data.tars import Sample
from t5lib.utils.config import BatchSize, Pair, Pixels, Share, Triple, Workers, settings
from t5lib.utils.errors import T5Error
from t5lib.utils.processes import WHOLE, Part
from t5lib.utils.seeds import derived_seed

Transform = Callable[[Image.Image], torch.Tensor]
Batch = tuple[torch.Tensor, torch.Tensor]
POSTERIZE = ("Posterize", "PosterizeIncreasing", "PosterizeOriginal")
SHUFFLE_BUFFER = 1000  # undecoded samples a worker holds to mix neighbours
ORDER_OF_SHARDS, ORDER_OF_SAMPLES, AUGMENTATION = range(3)  # keep the random streams of one seed apart


@settings
class DataConfig:
    """How images become the network's input.

    Attributes:
        img_size: pixels, one number or (height, width).
        mean, std: of colours from 0 to 1, not to 255.
        crop_pct: share of the resized image's side that the centre crop keeps.
        workers: processes that decode; 0: this process does.
    """

    img_size: Pixels | Pair[Pixels]
    num_classes: Annotated[int, Field(ge=2, le=2**24)]
    mean: Triple[Share]
    std: Triple[Annotated[float, Field(ge=0.001, le=1)]]
    interpolation: Literal["bicubic", "bilinear", "nearest"] = "bicubic"
    crop_pct: Annotated[float, Field(ge=0.1, le=1)] = 1.0
    workers: Workers = 0
    eval_batch_size: BatchSize = 64


@settings
class AugmentConfig:
    """timm's training augmentation; the default changes nothing but what `transform` does without it.

    Attributes:
        auto_augment: such as "rand-m9-mstd0.5-inc1".
        hflip: probability that an image is mirrored.
        scale: share of the area that a random resized crop keeps; None: resize and centre crop.
        re_prob: probability of random erasing with noise.
        color_jitter: strength.
    """

    auto_augment: str | None = None
    hflip: Share = 0.0
    scale: Pair[Share] | None = None
    re_prob: Share = 0.0
    color_jitter: Annotated[float, Field(ge=0, le=10)] | None = None

    def __post_init__(self) -> None:
        low, high = self.scale or (1.0, 1.0)
        _require(0.001 <= low <= high, "scale", self.scale, "two shares of the area such as [0.5, 1.0], 0.001 or more")
        if self.auto_augment is not None:
            check_policy(self.auto_augment)
        clash = self.auto_augment and self.color_jitter and "3a" not in self.auto_augment
        _require(not clash, "color_jitter", self.color_jitter, "null: timm drops it where auto_augment is set")


def size_of(data: DataConfig) -> tuple[int, int]:
    """(height, width) of the network's input."""
    return data.img_size if isinstance(data.img_size, tuple) else (data.img_size, data.img_size)


def transform(data: DataConfig, augment: AugmentConfig | None = None) -> Transform:
    """PIL image → float32 (3, H, W), normalised with mean and std.

    Without `augment`: resize the shorter side to img_size / crop_pct, then the centre crop. With it: timm's training
    transform, which draws from the global random states (`train_batches` seeds them for every sample).

    Raises:
        T5Error: timm does not understand `auto_augment`.
    """
    from timm.data import auto_augment, create_transform  # here: it takes seconds to import

    common: dict[str, Any] = {"input_size": size_of(data), "interpolation": data.interpolation}
    common |= {"mean": data.mean, "std": data.std}
    plain = create_transform(**common, crop_pct=data.crop_pct)
    if augment is None:
        return plain
    try:
        with patch.dict(auto_augment.NAME_TO_OP, dict.fromkeys(POSTERIZE, _posterize)):
            training = create_transform(**common, is_training=True, re_mode="pixel", **asdict(augment))
    except (AssertionError, KeyError, ValueError, TypeError) as error:
        example = "expected e.g. 'rand-m9-mstd0.5-inc1' or 'original'"
        raise T5Error(f"timm does not understand auto_augment '{augment.auto_augment}'; {example}") from error
    if augment.scale is None:
        training.transforms[:1] = plain.transforms[:2]  # resize and centre crop in place of timm's random crop
    return training


def _posterize(image: Image.Image, bits: int, **_) -> Image.Image:
    """In place of timm's, which at full strength asks for 0 bits; Pillow 13 refuses that."""
    return ImageOps.posterize(image, min(max(bits, 1), 8))


def train_batches(
    shards: ShardSet,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    workers: int = 0,
    part: Part = WHOLE,
) -> Iterator[Batch]:
    """Shuffled batches without end: images (B, 3, H, W) float32 and classes (B,) int64, every one of them full.

    The same arguments give the same batches; with `start=k` what an uninterrupted stream gives from batch k on,
    found by skipping samples before they are decoded. Slots are as many as workers. With fewer shards than slots every
    slot reads all shards and keeps every n-th sample, otherwise each has its own run of the shards; either way the
    slots share out every epoch evenly and without overlap. The global random states are left as they were.

    Args:
        batch_size: images of a batch, of all processes together.
        workers: processes that decode; 0: this one does.
        part: of every batch, or of all batches, that this process makes.

    Raises:
        T5Error: arguments out of range; while iterating, a damaged shard or sample, by name.
    """
    _require(seed >= 0, "seed", seed, "0 or more")
    _require(start >= 0, "start", start, "0 or more batches")
    _check_split(batch_size, workers)
    _require(shards.count >= workers, "workers", workers, f"at most the {shards.count} samples there are")
    rows = part.of(batch_size, "batch_size")
    return _load(_TrainStream(shards, transform, batch_size, rows, part, seed, start), workers)


def eval_batches(
    shards: ShardSet,
    transform: Transform,
    *,
    batch_size: int,
    workers: int = 0,
    limit: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Every sample once, in the manifest's order: images (B, 3, H, W) float32 and classes (B,) int64.

    The last batch may be short. `limit`: only the first so many samples; rank r has samples r, r + world_size, …

    Raises:
        T5Error: arguments out of range; while iterating, a damaged shard or sample, by name.
    """
    _check_split(batch_size, workers)
    _require(0 <= rank < world_size, "rank", rank, f"0 to {world_size - 1}, below world_size")
    _require(limit is None or limit >= 1, "limit", limit, "at least 1 sample, or null for all")
    keep = range(rank, min(limit or shards.count, shards.count), world_size)
    return _load(_EvalStream(shards, transform, batch_size, keep), workers)


@dataclass
class _Stream(IterableDataset):
    """What both streams share. It travels to the workers whole, also where they are spawned."""

    shards: ShardSet
    transform: Transform
    batch_size: int

    def __iter__(self) -> Iterator[Batch | T5Error]:
        info = get_worker_info()
        try:
            yield from self.batches(info.id if info else 0, info.num_workers if info else 1)
        except T5Error as error:  # as an item: raised in a worker it would arrive wrapped in that worker's traceback
            yield error

    def batches(self, worker: int, workers: int) -> Iterator[Batch]:
        """The batches that this worker makes, one of `workers`."""
        raise NotImplementedError

    def read(self, order: Sequence[int], keep: range) -> Iterator[tuple[int, Sample]]:
        """(position in the manifest, sample) of those samples whose position in `order`, shard after shard, is in
        `keep`. Shards without any are not opened."""
        first = [0, *accumulate(shard.count for shard in self.shards.shards)]
        begin = 0
        for index in order:
            shard = self.shards.shards[index]
            if keep.start < begin + shard.count and begin < keep.stop:
                for offset, sample in enumerate(shard.samples()):
                    if begin + offset >= keep.stop:
                        return
                    if begin + offset in keep:
                        yield first[index] + offset, sample
            begin += shard.count

    def decode(self, sample: Sample) -> tuple[torch.Tensor, int]:
        return self.transform(image_of(sample)), label_of(sample, len(self.shards.classes))


@dataclass
class _TrainStream(_Stream):
    rows: slice
    part: Part
    seed: int
    start: int

    def batches(self, worker: int, workers: int) -> Iterator[Batch]:
        """This process's batches come from its workers in turn: every `workers`-th is this one's, and of one slot."""
        first = self.start + self.part.turn + worker * self.part.turns
        samples = self.samples(first % workers, workers, skip=first // workers * self.batch_size)
        others = (self.part.turns - 1) * self.batch_size  # samples of the slot's batches that other processes make
        while True:
            batch = list(islice(samples, self.batch_size))
            yield tuple(default_collate([self.augmented(*item) for item in batch[self.rows]]))
            next(islice(samples, others, others), None)

    def samples(self, slot: int, slots: int, skip: int) -> Iterator[tuple[int, int, Sample]]:
        """(epoch, position in the manifest, sample) without end, from the slot's `skip`-th sample on."""
        total, shards = self.shards.count, len(self.shards.shards)
        fair = range(slot * total // slots, (slot + 1) * total // slots)
        keep = fair if shards >= slots else range(slot, total, slots)
        for epoch in count(skip // len(keep)):
            order = list(range(shards))
            random.Random(derived_seed(self.seed, ORDER_OF_SHARDS, epoch)).shuffle(order)
            seed = derived_seed(self.seed, ORDER_OF_SAMPLES, epoch, slot)
            # webdataset's plain shuffle cannot be repeated; detshuffle adds its epoch to the seed, so ours is in there
            mixed = webdataset.detshuffle(SHUFFLE_BUFFER, SHUFFLE_BUFFER, seed=seed).run(self.read(order, keep))
            yield from ((epoch, *item) for item in islice(mixed, skip % len(keep), None))
            skip = 0

    def augmented(self, epoch: int, position: int, sample: Sample) -> tuple[torch.Tensor, int]:
        with _seeded(self.seed, AUGMENTATION, epoch, position):
            return self.decode(sample)


@dataclass
class _EvalStream(_Stream):
    keep: range

    def batches(self, worker: int, workers: int) -> Iterator[Batch]:
        samples = self.read(range(len(self.shards.shards)), self.keep)
        number = 0
        while batch := list(islice(samples, self.batch_size)):
            if number % workers == worker:
                yield tuple(default_collate([self.decode(sample) for _, sample in batch]))
            number += 1


def _load(stream: _Stream, workers: int) -> Iterator[Batch]:
    """Batches in order, from worker processes that live as long as the iterator, or from this process."""
    loader = DataLoader(
        stream,
        batch_size=None,  # the stream makes whole batches
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=workers > 0 and torch.cuda.is_available(),
        generator=torch.Generator(),  # without one the loader draws from torch's global state
    )
    for batch in loader:
        if isinstance(batch, T5Error):
            raise batch
        yield tuple(batch)


def _as_it_is(item):
    return item


@contextmanager
def _seeded(*key: int) -> Iterator[None]:
    """Python, NumPy and torch (CPU) draw from streams that `key` fixes, and afterwards go on where they were.

    timm and torchvision draw from all three. Not torch.manual_seed: that would seed the GPUs too.
    """
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    seed = derived_seed(*key)
    random.seed(seed)
    np.random.seed(seed >> 32)  # it takes 32 bits
    torch.default_generator.manual_seed(seed >> 1)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def _check_split(batch_size: int, workers: int) -> None:
    _require(batch_size >= 1, "batch_size", batch_size, "at least 1")
    _require(workers >= 0, "workers", workers, "0 or more processes")


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise T5Error(f"{name} is {value}; expected {expected}")
