"""Image shards encoded once, so that training needs neither VAE nor text encoders.

The folder that `encode` fills:

    ID.tar             the samples of one input shard: KEY.safetensors and KEY.json; ID is the input's sha256, cut
    ID.index.json      where in the tar they lie, and their sha256
    encoding.json      encoders and settings; with others the folder is filled afresh
    null.safetensors   {prompt_embeds (L, D), pooled (P,)}: the empty caption; null.index.json holds its sha256
    manifest.json      t5lib.data.shards.ShardSet, written last

KEY.safetensors holds latent (C, h, w) fp16, with `flip` also that of the mirrored image as `flipped`, and either
prompt_embeds (L, D) fp16 and pooled (P,) fp16 or label () int64. KEY.json holds the caption or label, the image's width
and height, and `size`, the [height, width] it was brought to.
"""

import hashlib
import io
import json
import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import save
from torch import Tensor

from t5lib.data.buckets import BucketConfig, Size, bucket_sizes, fit, nearest
from t5lib.data.captions import caption_of
from t5lib.data.decoding import image_of
from t5lib.data.encoders import ImageEncoder, TextEncoder
from t5lib.data.latents import MANIFEST, NULL, ShardIndex, digest_of, member
from t5lib.data.shards import Shard, ShardSet, label_of
from t5lib.data.tars import Sample
from t5lib.utils import processes
from t5lib.utils.config import BatchSize, Workers, settings
from t5lib.utils.errors import T5Error
from t5lib.utils.files import atomic_file, read_json, sha256, write_bytes, write_json
from t5lib.utils.locks import exclusive
from t5lib.utils.parallel import ahead
from t5lib.utils.progress import StepReporter, progress

FORMAT = 2
ENCODING = "encoding.json"
ID_LENGTH = 16  # of the input's 64 digits
TAR_BLOCK = 512  # bytes a tar's members are padded to


@settings
class EncodingConfig:
    """`flip`: encode the mirrored images too. `workers`: threads that decode images."""

    buckets: BucketConfig
    flip: bool = False
    batch_size: BatchSize = 8
    workers: Annotated[Workers, Field(ge=1)] = 4


def encode(
    shards: ShardSet, folder: Path | str, *, images: ImageEncoder, text: TextEncoder | None, config: EncodingConfig
) -> Path:
    """Encode `shards` into `folder` and return the manifest there. Shards that are finished are not made again; while
    another process encodes into this folder, it is waited for. Processes that work together share the shards.

    Args:
        text: encodes the captions; None: the samples carry a class (.cls) in place of a caption.

    Raises:
        T5Error: a sample that cannot be used (t5lib.data.checking leaves those out); a damaged input shard; a size that
            the VAE cannot take; latents or embeddings that are not finite; a folder with files of something else.
    """
    folder, work = Path(folder), _Work(images, text, config, bucket_sizes(config.buckets), len(shards.classes))
    work.check(shards)
    lock = folder.parent / f".{folder.name}.lock"
    with exclusive(lock, f"encoding into {folder}") if processes.leads() else nullcontext():
        return _encode(shards, folder, work)


def _encode(shards: ShardSet, folder: Path, work: "_Work") -> Path:
    inputs = {shard.sha256[:ID_LENGTH]: shard for shard in shards.shards}
    settings, part = work.settings(), processes.turns()
    processes.by_first(lambda: _prepare(folder, settings, set(inputs), work.text))
    ours, done = list(inputs.items())[part.turn :: part.turns], 0
    with progress(f"encode {shards.name}", sum(shard.count for _, shard in ours)) as bar:
        for name, shard in ours:
            tar = folder / f"{name}.tar"
            if not _finished(tar, shard):
                (folder / MANIFEST).unlink(missing_ok=True)
                work.shard(shard, tar, _onwards(bar, done))
            done += shard.count
            bar.advance(done)
    processes.wait()
    return processes.by_first(lambda: _write_manifest(shards, folder, [folder / f"{n}.tar" for n in inputs], settings))


@dataclass(frozen=True)
class _Decoded:
    """An image on its way: what is stored of it as JSON, and its pixels (channels, H, W) uint8."""

    key: str
    about: dict[str, Any]
    pixels: Tensor


@dataclass(frozen=True)
class _Work:
    images: ImageEncoder
    text: TextEncoder | None
    config: EncodingConfig
    sizes: tuple[Size, ...]
    classes: int

    def check(self, shards: ShardSet) -> None:
        wrong = [size for size in self.sizes if any(side % self.images.multiple for side in size)]
        if wrong:
            raise T5Error(f"sizes {wrong}: expected multiples of {self.images.multiple} pixels, the width of a token")
        if not self.text and not shards.classes:
            raise T5Error(f"{shards.name} has no classes; give a text encoder for its captions, or labelled shards")

    def settings(self) -> dict[str, Any]:
        """All that decides about the result, but for the batch size, which changes rounding only; JSON-ready."""
        mine = {"format": FORMAT, "sizes": self.sizes, "flip": self.config.flip, "captions": self.text is not None}
        mine |= self.images.settings() | (self.text.settings() if self.text else {})
        return json.loads(json.dumps(mine))

    def shard(self, shard: Shard, tar: Path, advance: Callable[[int], None]) -> None:
        """Write the tar, then its index."""
        samples: list[list] = []
        with atomic_file(tar) as partial, tarfile.open(partial, "w") as out:
            for batch in self.batches(shard, advance):
                for decoded, data, latent in self.encoded(batch):
                    first = _add(out, f"{decoded.key}.safetensors", data)
                    samples.append([decoded.key, first, len(data), *latent, digest_of(data)])
                    _add(out, f"{decoded.key}.json", json.dumps(decoded.about).encode())
        ShardIndex.write(tar, samples)

    def batches(self, shard: Shard, advance: Callable[[int], None]) -> Iterator[list[_Decoded]]:
        """The images of a shard in batches of one size; they never mix shards, so that each can be made alone."""
        waiting: dict[Any, list[_Decoded]] = defaultdict(list)
        workers, size = self.config.workers, self.config.batch_size
        images = ahead(self.decoded, shard.samples(), workers=workers, count=size + workers)
        for count, decoded in enumerate(images, 1):
            advance(count)
            batch = waiting[decoded.pixels.shape]
            batch.append(decoded)
            if len(batch) == size:
                yield waiting.pop(decoded.pixels.shape)
        yield from waiting.values()

    def decoded(self, sample: Sample) -> _Decoded:
        image = image_of(sample, self.images.channels)
        size = nearest(self.sizes, image.height, image.width)
        shown = {"caption": caption_of(sample)} if self.text else {"label": label_of(sample, self.classes)}
        about = {**shown, "width": image.width, "height": image.height, "size": size}
        pixels = torch.from_numpy(np.array(fit(image, size))).view(*size, -1).permute(2, 0, 1)
        return _Decoded(sample["__key__"], about, pixels)

    def encoded(self, batch: list[_Decoded]) -> Iterator[tuple[_Decoded, bytes, Size]]:
        """Each with its .safetensors and the height and width of its latent."""
        pixels = torch.stack([decoded.pixels for decoded in batch]).to(self.images.device).float().div_(127.5).sub_(1)
        tensors = {"latent": self.images(pixels)}
        if self.config.flip:
            tensors["flipped"] = self.images(pixels.flip(-1))
        tensors = {name: value.half().cpu() for name, value in tensors.items()}
        if self.text:
            tensors |= _embeds(self.text, [decoded.about["caption"] for decoded in batch])
        else:
            tensors["label"] = torch.tensor([decoded.about["label"] for decoded in batch])
        for name, value in tensors.items():
            if not value.isfinite().all():
                keys = ", ".join(decoded.key for decoded in batch)
                raise T5Error(
                    f"{name} of one of {keys} is not finite in fp16, as it is stored: leave that out, or "
                    "encode with dtype bf16 or fp32 if it was fp16 and the encoder's own arithmetic overflows"
                )
        for position, decoded in enumerate(batch):
            own = {name: value[position].contiguous() for name, value in tensors.items()}
            height, width = own["latent"].shape[1:]
            yield decoded, save(own), (height, width)


def _embeds(text: TextEncoder, captions: list[str]) -> dict[str, Tensor]:
    return {name: value.half().cpu() for name, value in text(captions).items()}


def _onwards(bar: StepReporter, before: int) -> Callable[[int], None]:
    """Reports so many samples of a shard where so many of the earlier ones are done."""
    return lambda count: bar.advance(before + count)


def _prepare(folder: Path, settings: dict[str, Any], wanted: set[str], text: TextEncoder | None) -> None:
    """Keep what an earlier run with these settings finished; remove half-made, outdated and superfluous files. Encode
    the empty caption."""
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / ENCODING
    if not note.exists() and any(folder.iterdir()):
        raise T5Error(f"{folder} is not empty, and its files are not encoded images; name a new folder")
    before = read_json(note) if note.exists() else settings
    other = sorted(key for key in before.keys() | settings.keys() if before.get(key) != settings.get(key))
    if other:
        print(f"{folder} was encoded with other settings ({', '.join(other)}): starting afresh", flush=True)
    for path in sorted(folder.iterdir()):
        ours = re.match(rf"(\.?)([0-9a-f]{{{ID_LENGTH}}})\.", path.name)  # with a dot in front: half-made
        if ours and (ours[1] or other or ours[2] not in wanted):
            (folder / MANIFEST).unlink(missing_ok=True)
            path.unlink()
    write_json(note, settings)
    if text:
        write_bytes(folder / NULL, save({name: value[0] for name, value in _embeds(text, [""]).items()}))
        ShardIndex.write(folder / NULL, [])


def _finished(tar: Path, shard: Shard) -> bool:
    """Whether the tar is there, bit for bit as it was made, with all samples of the input shard."""
    try:
        index = ShardIndex.read(tar)
    except T5Error:
        return False
    return len(index.samples) == shard.count and sha256(tar) == index.sha256


def _write_manifest(shards: ShardSet, folder: Path, tars: list[Path], settings: dict[str, Any]) -> Path:
    fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    ShardSet(
        name=shards.name,
        licence=shards.licence,
        source=f"{shards.source}; encoded, settings {fingerprint}",
        classes=shards.classes,
        count=shards.count,
        shards=tuple(map(_listed, tars)),  # one after the other: together, the indices fill the memory
    ).write(folder / MANIFEST, root=folder)
    return folder / MANIFEST


def _listed(tar: Path) -> Shard:
    index = ShardIndex.read(tar)
    return Shard(path=os.path.abspath(tar), count=len(index.samples), sha256=index.sha256)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a file to the tar and return where its content begins, in bytes. Equal files make equal tars."""
    tar.addfile(member(name, len(data)), io.BytesIO(data))
    return tar.offset - (len(data) + TAR_BLOCK - 1) // TAR_BLOCK * TAR_BLOCK
