"""Real images as generated ones are compared with them, and what is known about each."""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from t5lib.data.buckets import Size, fit
from t5lib.data.captions import about, caption_of
from t5lib.data.decoding import image_of
from t5lib.data.shards import SampleError, ShardSet, where
from t5lib.data.tars import Sample
from t5lib.evaluation.scores import Scene


@dataclass(frozen=True, kw_only=True)
class RealImage:
    """An image and its description.

    Attributes:
        pixels: (C, H, W) uint8, resized and cut to one size as training images are.
        prompt: its caption, or its class number.
        name: what it shows: of the entry "name" in its .json, or its class; None where nothing says so.
        scene: with "name", "count" and "background" in its .json, what can be checked in a picture; else None.
    """

    pixels: Tensor
    prompt: str | int
    name: str | None
    scene: Scene | None


def read(manifest: Path, size: Size, *, channels: int, most: int) -> list[RealImage]:
    """`most` images of a manifest that the stage `shards` wrote, evenly taken, or all; no others are decoded."""
    shards = ShardSet.read(manifest)
    wanted = {i * shards.count // most for i in range(most)} if most < shards.count else set(range(shards.count))
    samples = enumerate(sample for shard in shards.shards for sample in shard.samples())
    return [_described(sample, shards.classes, size, channels) for number, sample in samples if number in wanted]


def references(manifest: Path, size: Size, *, channels: int, most: int, look_at: int = 50_000) -> dict[str, Tensor]:
    """The first `most` pictures (k, C, H, W) of each name among the first `look_at` samples."""
    shards, found = ShardSet.read(manifest), dict[str, list[Tensor]]()
    for sample in islice((sample for shard in shards.shards for sample in shard.samples()), look_at):
        name = _name(sample, shards.classes)
        if name is not None and len(found.setdefault(name, [])) < most:
            found[name].append(_pixels(sample, size, channels))
    return {name: torch.stack(pictures) for name, pictures in found.items()}


def cutouts(manifest: Path) -> dict[str, Tensor]:
    """The pictures (4, h, w) of a manifest, RGBA, by the entry "name" of each .json.

    Raises:
        T5Error: a sample without such an entry, or whose picture cannot be read.
    """
    samples = (sample for shard in ShardSet.read(manifest).shards for sample in shard.samples())
    pictures = {}
    for sample in samples:
        name = about(sample).get("name")
        if not isinstance(name, str):
            raise SampleError(f'{where(sample)} has no .json with the entry "name", which says what it shows; add it')
        pictures[name] = pil_to_tensor(image_of(sample, 4))
    return pictures


def stacked(images: list[RealImage]) -> Tensor:
    """(n, C, H, W) uint8."""
    return torch.stack([image.pixels for image in images])


def _described(sample: Sample, classes: tuple[str, ...], size: Size, channels: int) -> RealImage:
    prompt = int(sample["cls"]) if classes else caption_of(sample)
    name, scene = _name(sample, classes), None if classes else _scene(sample)
    return RealImage(pixels=_pixels(sample, size, channels), prompt=prompt, name=name, scene=scene)


def _scene(sample: Sample) -> Scene | None:
    entries = about(sample)
    name, count, colour = (entries.get(entry) for entry in ("name", "count", "background"))
    if not (isinstance(name, str) and isinstance(count, int) and isinstance(colour, str)):
        return None
    return Scene(name=name, count=count, colour=colour)


def _pixels(sample: Sample, size: Size, channels: int) -> Tensor:
    return pil_to_tensor(fit(image_of(sample, channels), size))


def _name(sample: Sample, classes: tuple[str, ...]) -> str | None:
    name = classes[int(sample["cls"])] if classes else about(sample).get("name")
    return name if isinstance(name, str) else None
