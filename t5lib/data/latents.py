"""Training batches of encoded images (t5lib.data.encoding), read from their shards or held in a device's memory.

A batch is a dict: latents (B, C, h, w) with either prompt_embeds (B, L, D) and pooled (B, P) or labels (B,) int64; all
but the labels float32. It holds one latent size (h, w). Which samples it holds, and which of them lose their caption or
are mirrored, follows from the seed and the batch's number alone: nothing is read to go on at any batch, and shards and
memory give the same batches, whatever the number of workers.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt, Strict
from safetensors.torch import load, load_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from t5lib.data.buckets import Size
from t5lib.data.sampler import Sampler
from t5lib.data.shards import Shard, ShardSet
from t5lib.data.tars import quoted
from t5lib.utils.config import Several, settings
from t5lib.utils.errors import T5Error, reason
from t5lib.utils.files import read_json, sha256, write_json
from t5lib.utils.processes import WHOLE, Part
from t5lib.utils.progress import progress
from t5lib.utils.seeds import numpy_generator

MANIFEST, NULL, INDEX = "manifest.json", "null.safetensors", ".index.json"
Batch = dict[str, Tensor]
Stored = dict[str, Tensor]  # latent, [flipped], prompt_embeds and pooled or label, stacked
EMBEDS = ("prompt_embeds", "pooled")
CHANCE = 2  # keeps its random stream apart from those of the sampler


NAMES = "utf-8", "surrogatepass"  # as a damaged index may have them
PLACE = [("shard", np.int32), ("first byte", np.int64), ("bytes", np.int64)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
Row = Annotated[tuple[str, NonNegativeInt, PositiveInt, PositiveInt, PositiveInt, Digest], Strict(False)]


@settings
class ShardIndex:
    """What `ID.index.json` says about a tar; the entry `digest` there is of all the others.

    Attributes:
        sha256, size: of the tar, in bytes.
        samples: [key, first byte, bytes, latent height, latent width, digest] of each .safetensors in it.
    """

    sha256: str
    size: NonNegativeInt
    samples: Several[Row]

    @classmethod
    def read(cls, file: Path | str) -> "ShardIndex":
        """Raises T5Error when the index of `file` is missing or damaged, or was made of a file of another size."""
        file = Path(file)
        place = file.with_suffix(INDEX)
        noted = read_json(place)
        digest = noted.pop("digest", None) if isinstance(noted, dict) else None
        if digest != digest_of(json.dumps(noted).encode()):
            raise T5Error(f"{place} was changed or damaged, or is of an older version; encode {file.name} again")
        try:
            index = cls(**noted)
        except (T5Error, TypeError) as error:
            raise T5Error(f"{place} is not the index of a shard ({error}); encode {file.name} again") from None
        found = file.stat().st_size if file.exists() else 0
        if found != index.size:
            raise T5Error(f"{file} has {found} bytes, its index says {index.size}: it was cut short; encode it again")
        return index

    @classmethod
    def write(cls, file: Path, samples: Sequence[Sequence]) -> None:
        """Write the index of `file`, which is finished, with these rows."""
        noted = asdict(cls(sha256=sha256(file), size=file.stat().st_size, samples=tuple(map(tuple, samples))))
        write_json(file.with_suffix(INDEX), noted | {"digest": digest_of(json.dumps(noted).encode())})


def member(name: str, size: int) -> tarfile.TarInfo:
    """The header of a file in the tars. Nothing of it depends on time or place."""
    header = tarfile.TarInfo(name)
    header.size = size
    return header


def digest_of(content: bytes) -> str:
    """Digest that identifies a sample's bytes: 32 hexadecimal digits of their sha256."""
    return hashlib.sha256(content).hexdigest()[:32]


class LatentSet:
    """What both forms share. `sizes`: the latents' (h, w); `counts`: how many samples have each of them.

    `null`: the empty caption, prompt_embeds (L, D) and pooled (P,); None for labelled images, which have
    `num_classes` classes and in place of a dropped label that number.
    """

    sizes: tuple[Size, ...]
    counts: tuple[int, ...]
    null: dict[str, Tensor] | None
    num_classes: int

    def __len__(self) -> int:
        return sum(self.counts)

    def batches(
        self, batch_size: int, *, seed: int, drop: float = 0.0, workers: int = 0
    ) -> Callable[..., Iterator[Batch]]:
        """A function from a batch number to the endless shuffled batches from there on (t5lib.data.batches), of which a
        process reads its part alone.

        Every batch is full. The samples of one size come in a new order again and again, none a second time before all
        others; in an epoch each size has its share of the batches, what does not fill one is carried over. Where
        samples were encoded with their mirror image, either is drawn. Several processes get the parts of one
        batch, and so the same size.

        Args:
            batch_size: samples of a batch, of all processes together.
            drop: probability that a caption becomes the empty one, or a label "none".
            workers: processes that read ahead; 0: this process reads.

        Raises:
            T5Error: arguments out of range; while iterating, a damaged shard.
        """
        if not 1 <= batch_size <= len(self):
            raise T5Error(f"batch_size is {batch_size}; expected 1 to {len(self)}, as many as there are samples")
        if seed < 0 or not 0 <= drop <= 1 or workers < 0:
            raise T5Error(f"seed {seed}, drop {drop}, workers {workers}; expected 0 or more, drop a probability")
        sampler = Sampler(self.counts, batch_size, seed)

        def from_batch(start: int, part: Part = WHOLE) -> Iterator[Batch]:
            numbered = _Numbered(self, sampler, drop, part.of(batch_size, "batch_size"))
            return self._stream(numbered, part.numbers(start), workers)

        return from_batch

    def eval_batches(self, batch_size: int, part: Part = WHOLE) -> Iterator[Batch]:
        """Every sample once, size by size in the manifest's order, not mirrored; the last batch of a size may be
        short. Of several processes each gets its batches in turn."""
        places = [(s, first) for s, total in enumerate(self.counts) for first in range(0, total, batch_size)]
        for size, first in places[part.turn :: part.turns]:
            rows = np.arange(first, min(first + batch_size, self.counts[size]))
            yield self._batch(size, rows, np.zeros(len(rows), bool), np.zeros(len(rows), bool))

    def _stream(self, numbered: "_Numbered", numbers: Iterator[int], workers: int) -> Iterator[Batch]:
        raise NotImplementedError

    def _read(self, size: int, rows: np.ndarray) -> Stored:
        """Samples `rows` of those with size number `size`."""
        raise NotImplementedError

    def _batch(self, size: int, rows: np.ndarray, dropped: np.ndarray, mirrored: np.ndarray) -> Batch:
        stored = self._read(size, rows)
        latents, device = stored["latent"], stored["latent"].device
        free, turned = (torch.from_numpy(which).to(device) for which in (dropped, mirrored))
        if "flipped" in stored:
            latents = torch.where(turned.view(-1, 1, 1, 1), stored["flipped"], latents)
        if self.null is None:
            labels = torch.where(free, self.num_classes, stored["label"])
            return {"latents": latents.float(), "labels": labels}
        embeds = torch.where(free.view(-1, 1, 1), self.null["prompt_embeds"].to(device), stored["prompt_embeds"])
        pooled = torch.where(free.view(-1, 1), self.null["pooled"].to(device), stored["pooled"])
        return {"latents": latents.float(), "prompt_embeds": embeds.float(), "pooled": pooled.float()}


class LatentShards(LatentSet):
    """Encoded images on disk; samples are read one by one from where the index says they lie, and held against their
    digests there.

    Args:
        manifest: what `t5lib.data.encoding.encode` returned.

    Raises:
        T5Error: a manifest, shard or index that is missing or damaged, or that do not belong together.
    """

    def __init__(self, manifest: Path | str):
        self.shards = ShardSet.read(manifest)
        columns = zip(*map(_columns, count(), self.shards.shards), strict=True)
        places, keys, digests, sizes = map(np.concatenate, columns)
        found, of_size, counts = np.unique(sizes, axis=0, return_inverse=True, return_counts=True)
        self.sizes = tuple((int(height), int(width)) for height, width in found)
        self.counts = tuple(counts.tolist())
        members = [of_size.ravel() == size for size in range(len(found))]
        self._places = [places[chosen] for chosen in members]
        self._digests = [digests[chosen] for chosen in members]
        self._keys = [keys[chosen] for chosen in members]
        self.num_classes = len(self.shards.classes)
        self.null = self._read_null(Path(manifest).parent / NULL)

    def in_memory(self, device: str | torch.device) -> "InMemoryLatents":
        """All samples read into the memory of `device`."""
        groups, done = [], 0
        with progress(f"load {self.shards.name}", len(self)) as bar:
            for size, total in enumerate(self.counts):
                groups.append({k: v.to(device) for k, v in self._read(size, np.arange(total)).items()})
                done += total
                bar.advance(done)
        null = self.null and {name: value.to(device) for name, value in self.null.items()}
        return InMemoryLatents(groups, sizes=self.sizes, null=null, num_classes=self.num_classes)

    def _stream(self, numbered: "_Numbered", numbers: Iterator[int], workers: int) -> Iterator[Batch]:
        loader = DataLoader(
            numbered,
            batch_size=None,
            sampler=numbers,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=workers > 0 and torch.cuda.is_available(),
            generator=torch.Generator(),  # without one the loader draws from torch's global state
        )
        for batch in loader:
            if isinstance(batch, T5Error):
                raise batch
            yield batch

    def _read(self, size: int, rows: np.ndarray) -> Stored:
        listed = (each[size][rows].tolist() for each in (self._places, self._keys, self._digests))
        samples = [self._sample(place, key, digest) for place, key, digest in zip(*listed, strict=True)]
        if any(tuple(sample["latent"].shape[1:]) != self.sizes[size] for sample in samples):
            raise T5Error(f"{self.shards.name}: latents have other sizes than their index says; encode again")
        stored = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
        if "label" in stored and not 0 <= stored["label"].min() <= stored["label"].max() < self.num_classes:
            raise T5Error(
                f"{self.shards.name}: labels beyond the {self.num_classes} classes that are listed; encode again"
            )
        return stored

    def _sample(self, place: tuple[int, int, int], key: bytes, digest: bytes) -> Stored:
        shard, first, length = place
        path, name = self.shards.shards[shard].path, key.decode(*NAMES)
        try:
            header = member(f"{name}.safetensors", length).tobuf()[-tarfile.BLOCKSIZE :]
            with open(path, "rb") as file:
                file.seek(first - len(header))
                found, content = file.read(len(header)), file.read(length)
        except (OSError, UnicodeError) as error:
            raise T5Error(f"{path} cannot be read at byte {first} ({reason(error)}); encode it again") from error
        if found != header or digest_of(content) != digest.hex():
            raise T5Error(
                f"{path} was changed or damaged between bytes {first} and {first + length}, or is not that of its "
                f"index, which has {quoted(name)} there; encode it again"
            )
        return load(content)

    def _read_null(self, file: Path) -> dict[str, Tensor] | None:
        sample = self._read(0, np.arange(1))
        if "label" in sample:
            return None
        if not file.exists():
            raise T5Error(f"{file} does not exist; it holds the empty caption, and encoding makes it: encode again")
        if sha256(file) != ShardIndex.read(file).sha256:
            raise T5Error(f"{file} was changed or damaged; it holds the empty caption: encode again")
        null = load_file(file)
        if {name: value.shape for name, value in null.items()} != {name: sample[name].shape[1:] for name in EMBEDS}:
            raise T5Error(f"{file} holds the empty caption of other encoders than these shards': encode again")
        return null


class InMemoryLatents(LatentSet):
    """Encoded images in the memory of one device; `workers` does nothing here.

    Args:
        groups: for each latent size its samples, stacked: latent (n, C, h, w), flipped alike where there is one, and
            prompt_embeds (n, L, D) and pooled (n, P), or label (n,) int64.
        sizes: (h, w) of each group.
        null: the empty caption, or None for labels, which are below `num_classes`.
    """

    def __init__(
        self, groups: Sequence[Stored], *, sizes: Sequence[Size], null: dict[str, Tensor] | None, num_classes: int = 0
    ):
        self.groups, self.sizes, self.null, self.num_classes = list(groups), tuple(sizes), null, num_classes
        self.counts = tuple(len(group["latent"]) for group in groups)

    def _stream(self, numbered: "_Numbered", numbers: Iterator[int], workers: int) -> Iterator[Batch]:
        return (numbered.batch(number) for number in numbers)

    def _read(self, size: int, rows: np.ndarray) -> Stored:
        chosen = torch.from_numpy(rows)
        return {name: value[chosen.to(value.device)] for name, value in self.groups[size].items()}


@dataclass
class _Numbered(Dataset):
    """Batches by their number, for a loader's workers; this process reads the samples `rows` of each."""

    source: LatentSet
    sampler: Sampler
    drop: float
    rows: slice

    def batch(self, number: int) -> Batch:
        size, rows = self.sampler(number)
        chance = numpy_generator(self.sampler.seed, CHANCE, number).random((2, len(rows)))
        dropped, mirrored = chance[0, self.rows] < self.drop, chance[1, self.rows] < 0.5
        return self.source._batch(size, rows[self.rows], dropped, mirrored)

    def __getitem__(self, number: int) -> Batch | T5Error:
        try:
            return self.batch(number)
        except T5Error as error:  # as an item: raised in a worker it would arrive wrapped in that worker's traceback
            return error


def _columns(number: int, shard: Shard) -> tuple[np.ndarray, ...]:
    """Places, keys, digests and sizes of a shard's samples, in so few bytes that millions of samples fit in memory."""
    rows = _checked(shard.path, shard.count, shard.sha256).samples
    places = np.array([(number, *row[1:3]) for row in rows], dtype=PLACE)
    digests = np.frombuffer(bytes.fromhex("".join(row[5] for row in rows)), dtype="V16")
    keys = np.array([row[0].encode(*NAMES) for row in rows])
    return places, keys, digests, np.array([row[3:5] for row in rows], dtype=np.int32)


def _checked(tar: str, samples: int, digest: str) -> ShardIndex:
    index, name = ShardIndex.read(tar), os.path.basename(tar)
    if len(index.samples) != samples or index.sha256 != digest:
        raise T5Error(f"{name}: its index is not of the shard that the manifest lists; encode again")
    ends = sorted((row[1], row[1] + row[2]) for row in index.samples)
    if ends[0][0] < tarfile.BLOCKSIZE or ends[-1][1] > index.size or any(a[1] > b[0] for a, b in pairwise(ends)):
        raise T5Error(f"{name}: its index has samples outside of it, or one over another; encode again")
    return index


def _as_it_is(item):
    return item
